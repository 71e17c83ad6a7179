"""The four updates of train.py itself on random weights and clips: seconds and peak memory of each.

    python benchmarks/step.py                                      # toy sizes on this machine
    torchrun --nproc_per_node 8 benchmarks/step.py --preset wan1.3b --batch 8 --discriminator_batch 32
    python benchmarks/step.py --preset wan1.3b --batch 1 --discriminator_batch 4 --no-remat       # what a measure buys
    python benchmarks/step.py --preset wan1.3b --batch 1 --discriminator_batch 4 --trace 12       # and top 12 kernels
    python benchmarks/step.py --preset wan1.3b --batch 1 --discriminator_batch 4 --compile        # blocks compiled

Every flag of train.py is one here. Nothing is downloaded: speed and memory do not depend on what the weights say.
Peaks are those of the CUDA allocator, so on a CPU only seconds are shown.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path[0] = str(Path(__file__).parent.parent)  # this folder has a cost.py, too

import cost  # noqa: E402
import raft  # noqa: E402
import train  # noqa: E402
import vae  # noqa: E402
from model import CONFIGS, WanDiT  # noqa: E402

CYCLES, CUDA = 3, torch.cuda.is_available()
ORDER = "generator, DMD", "fake score", "generator, flow GAN", "discriminator"


def random_networks(cfg):
    torch.manual_seed(0)
    dit = CONFIGS[cfg.preset]
    nets = [WanDiT(dit).init_weights() for _ in range(3)]
    for net in nets:
        torch.nn.init.normal_(net.head.head.weight, std=0.02)  # it starts at zero: no gradient would pass
    flow = raft.RAFT(raft.CONFIGS[cost.RAFT_OF[cfg.preset]]).requires_grad_(False)
    coder = vae.WanVAE(vae.CONFIGS[cfg.preset]).requires_grad_(False)
    judge = train.MotionDiscriminator(dit, cfg.depth, cfg.taps).load_trunk(nets[1])
    for net in (*nets, judge.trunk) * compiled:
        for block in net.blocks:
            block.compile()
    return *nets, judge, coder, flow


def random_contexts(prompts, weights, cache, device):
    shape = CONFIGS[cfg.preset].text_len, CONFIGS[cfg.preset].text_dim
    return lambda prompts: torch.randn(len(prompts), *shape)


def random_clips(cfg, frames, first, last):
    while True:
        for index, _ in train.discriminator_shares(cfg):
            yield torch.rand(len(index), 3, frames, cfg.height, cfg.width) * 2 - 1


def clocked(cfg, name, net, optimizer, sums, bad):
    """train.update, and what passed since the last one ended."""
    figures = update(cfg, name, net, optimizer, sums, bad)
    if CUDA:
        torch.cuda.synchronize()
    label = {"fake_score": ORDER[1], "discriminator": ORDER[3]}.get(name, ORDER[2 if "gan_g" in sums else 0])
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")
    rows.setdefault(label, []).append((time.perf_counter() - mark[0], peak))
    mark[0] = time.perf_counter()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return figures


argv, trace = sys.argv[1:], 0
compiled = "--compile" in argv
argv = [flag for flag in argv if flag != "--compile"]
if "--trace" in argv:
    at = argv.index("--trace")
    trace = int(argv[at + 1])
    del argv[at: at + 2]
cfg = train.parse_flags([*argv, "--out", tempfile.mkdtemp(), "--generator", "random", "--fake_score", "random",
                         "--samples", "0", "--steps", str(CYCLES), "--discriminator_warmup", "0"])
cfg.prompts = ""
rows, mark, update = {}, [time.perf_counter()], train.update
train.load_networks, train.encode_prompts, train.real_clips = random_networks, random_contexts, random_clips
train.find_weights = lambda *_: None  # nothing is read
train.update, train.save_checkpoint, train.export = clocked, lambda *_: None, lambda *_: None
try:
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * CUDA]
    with profile(activities=activities) if trace else torch.enable_grad() as p:
        train.train(cfg)
except torch.OutOfMemoryError:
    train.say(f"out of memory after {', '.join(rows) or 'no update at all'}")
if train.rank() == 0:
    if trace:
        print(p.key_averages().table(sort_by=f"self_{'cuda' if CUDA else 'cpu'}_time_total", row_limit=trace))
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{cfg.preset}, {cfg.frames} frames {cfg.height}x{cfg.width}, window {cfg.window}, batch {cfg.batch} and "
          f"{cfg.discriminator_batch}, {train.world()} x {name}, torch {torch.__version__}")
    for label in ORDER:
        seconds, peak = zip(*rows.get(label, [(float("nan"),) * 2])[-(CYCLES - 1):])  # the first cycle warms up
        shown = f", peak {max(peak):.2f} GiB" if CUDA else ""
        print(f"RESULT {label}: {statistics.median(seconds):.2f} s an update{shown}")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
