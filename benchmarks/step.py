"""The four updates of train.py itself on random weights and clips: seconds and peak memory of each.

    python benchmarks/step.py                                      # toy sizes on this machine
    torchrun --nproc_per_node 8 benchmarks/step.py --preset wan1.3b --batch 8 --discriminator_batch 32
    python benchmarks/step.py --preset wan1.3b --batch 1 --discriminator_batch 4 --no-checkpointing   # what it buys
    python benchmarks/step.py --preset wan1.3b --batch 1 --discriminator_batch 4 --trace 12           # top 12 kernels

Every flag of train.py is one here. Nothing is downloaded: speed and memory do not depend on what the weights say. Peaks
are those of the CUDA allocator, so on a CPU only seconds are shown. An optimizer's step counts with the next update.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile

from compare import without_files  # first: vae is not this folder's
import cost
import raft
import train
from cli import print0, rank, world

CYCLES = 3

parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--trace", type=int, default=0)
parser.add_argument("--latents", type=int, default=train.LATENTS_PER_PASS)  # through the VAE at once
parser.add_argument("--pairs", type=int, default=0)                         # of frames that share a checkpoint in RAFT
args, flags = parser.parse_known_args()
cfg = train.parse_flags([*flags, "--out", tempfile.mkdtemp(), "--generator", "random", "--fake_score", "random",
                         "--samples", "0", "--cycles", str(CYCLES), "--save_every", "1000",
                         *"--fake_warmup 0 --dmd_warmup 0 --discriminator_warmup 0".split()])
cuda = torch.cuda.is_available() and cfg.preset != "toy"
train.LATENTS_PER_PASS = args.latents
raft.GROUP_PIXELS = args.pairs * cfg.height * cfg.width or raft.GROUP_PIXELS
load_networks, global_means, rows, mark = train.load_networks, train.global_means, {}, [0.0]


def networks(cfg):
    torch.manual_seed(0)
    return load_networks(cfg)


def clocked(sums):
    """train.global_means, which ends an update, and what passed since the last one ended."""
    means = global_means(sums)  # waits for the device
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    rows.setdefault(next(iter(sums)), []).append((time.perf_counter() - mark[0], peak))
    mark[0] = time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    return means


def started(cycles, **_):
    """In tqdm's place: a cycle's first update begins with it, after what was written."""
    for cycle in cycles:
        mark[0] = time.perf_counter()
        yield cycle


without_files(train, cfg)
train.load_networks, train.global_means, train.tqdm = networks, clocked, started
activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
try:
    with profile(activities=activities) if args.trace else nullcontext() as traced:
        train.train(cfg)
except torch.OutOfMemoryError:
    print0(f"out of memory after {', '.join(rows) or 'no update at all'}")
if rank() == 0:
    if args.trace:
        order = f"self_{'cuda' if cuda else 'cpu'}_time_total"
        print(traced.key_averages().table(sort_by=order, row_limit=args.trace))
    print(f"{cfg.preset}, {cfg.frames} frames {cfg.height}x{cfg.width}, window {cfg.window}, batch {cfg.batch} and "
          f"{cfg.discriminator_batch}, {world()} x {torch.cuda.get_device_name() if cuda else 'CPU'}, "
          f"torch {torch.__version__}")
    for key, name in cost.UPDATES.items():
        seconds, peaks = zip(*rows.get(key, [(float("nan"),) * 2]))
        seconds = seconds[len(seconds) // CYCLES:] or seconds  # the first cycle warms up
        shown = f", peak {max(peaks):.2f} GiB" if cuda else ""
        print(f"RESULT {key}, {name}: {statistics.median(seconds):.2f} s an update{shown}")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
