"""cost.py's formulas against live tensors and operations of train.py's own updates; tables and a picture.

    python benchmarks/cost.py                 # small settings: activation peaks and FLOP, modelled, counted
    python benchmarks/cost.py --full          # the same at 480x832x81 in bf16, on tensors without memory
    python benchmarks/cost.py --table         # README's table: what to rent
    python benchmarks/cost.py --measure       # growth.json: bytes at full size, seconds of the toy preset, by setting
    python benchmarks/cost.py --picture       # growth.png: formulas, and these measurements beside them

A cycle of train.train runs as it stands, on one process without FSDP, whose gathered blocks cost.py counts
apart. A dispatch mode sees each tensor that an operation makes and when its storage goes. The device "meta"
has shapes and no numbers: the same operations are seen at no cost, so a laptop can count the full size.
"""

import argparse
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

if __name__ == "__main__":  # this folder has a cost.py, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import cost
import model
import raft
import train
import vae
from discriminator import MotionDiscriminator

aten = torch.ops.aten
FLASH = (aten._scaled_dot_product_flash_attention_for_cpu,
         aten._scaled_dot_product_flash_attention_for_cpu_backward)
FLOP = {**flop_registry,
        FLASH[0]: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
        FLASH[1]: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)}


class Count(TorchDispatchMode):
    """Bytes of live storages made while it is on, `now` and at the `peak`; FLOP as torch counts them."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.flop, self.alive = 0, 0, 0, {}

    def __enter__(self):
        for tensor in gc.get_objects():  # what is there already, weights among it, is not counted
            if issubclass(type(tensor), torch.Tensor):
                self.see(tensor.untyped_storage(), 0)
        return super().__enter__()

    def see(self, storage, size):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = size, weakref.ref(storage, lambda _: self.gone(key))
            self.now += size
            self.peak = max(self.peak, self.now)

    def gone(self, key):
        self.now -= self.alive.pop(key)[0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in FLOP:
            self.flop += FLOP[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.see(x.untyped_storage(), x.untyped_storage().nbytes())
        return out


def counted(cfg, nets, device="cpu"):
    """{update: [(FLOP, bytes)]} of a cycle of train.train; nets: configurations of DiT, VAE and RAFT."""
    count, out, done = Count(), {}, [0]
    order = [] if cfg.no_dmd else ["generator, DMD", *["fake score"] * cfg.fake_steps]
    order = iter([*order, "generator, flow GAN", "discriminator"])

    def networks(cfg):
        with torch.device(device):
            generator, teacher, fake_score = (model.WanDiT(nets[0]) for _ in range(3))
            judge = MotionDiscriminator(nets[0], cfg.depth, cfg.taps).load_trunk(teacher)
            frozen = vae.WanVAE(nets[1]), raft.RAFT(nets[2])
        for p in frozen[0].parameters():
            p.data = vae.channels_last(p.data) if p.ndim == 5 else p.data
        return generator, teacher, fake_score, judge, *(net.requires_grad_(False) for net in frozen)

    def shard(net, mesh, dtype, blocks, checkpointing):
        trunk = getattr(net, "trunk", net).to(dtype)
        for block in trunk.blocks:
            block.checkpointing = checkpointing
        for p in net.parameters():  # a gradient is gone once it is complete: only activations remain
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def update(cfg, name, net, optimizer, sums, bad):
        out.setdefault(next(order), []).append((count.flop - done[0], count.peak))
        done[0], count.peak = count.flop, count.now
        return {f"norm_{name}": 0.0}

    def begin(*_):
        count.__enter__()
        return [(1.0, 1.0)] * len(cfg.timesteps)

    text = nets[0].text_len, nets[0].text_dim
    frames = cfg.frames if cfg.latent_gan else 1 + 4 * cfg.window
    clip = torch.zeros(cfg.micro_batch, 3, frames, cfg.height, cfg.width, device=device)
    replaced = dict(
        load_networks=networks, shard=shard, update=update, few_step_times=begin,
        setup=lambda *_: (torch.device(device), None), real_clips=lambda *_: itertools.repeat(clip),
        encode_prompts=lambda *_, **__: lambda prompts: torch.zeros(len(prompts), *text),
        trainable=lambda net, flag, part=None: (part or net).requires_grad_(flag))
    unused = "find_weights", "adamw", "live_state", "export", "save_checkpoint", "sample_clips", "Log"
    replaced |= {name: mock.MagicMock() for name in unused}
    flash, layout = F.scaled_dot_product_attention, vae.channels_last
    if device == "meta":  # there it would fall back to the plain product, and a 3-D convolution forget the layout
        flash, layout = lambda q, k, v: FLASH[0](q, k, v)[0], lambda x: x
    try:
        with (TemporaryDirectory() as cfg.out, mock.patch.multiple(train, **replaced),
              mock.patch.object(F, "scaled_dot_product_attention", flash),
              mock.patch.object(vae, "channels_last", layout),
              mock.patch.dict("os.environ", LOCAL_RANK="0")):
            train.train(cfg)
    finally:
        if count.alive:
            count.__exit__(None, None, None)
    return out


def compared(cfg, nets, device="cpu"):
    """Yield (update, modelled / counted bytes, modelled / counted FLOP, counted bytes, counted FLOP)."""
    modelled = cost.updates(cfg, *nets, 2 if cfg.dtype == "bf16" else 4, cfg.batch)
    for name, rows in counted(cfg, nets, device).items():
        flop, peak = sum(row[0] for row in rows), max(row[1] for row in rows)
        yield name, modelled[name][1] / peak, modelled[name][0] * cfg.batch / flop, peak, flop


def small(**flags):
    """A cycle of the toy preset's settings, without warm-ups, files or randomness in what it computes."""
    fixed = dict(preset="toy", steps=1, warmup_steps=0, fake_warmup=0, discriminator_warmup=0, samples=0,
                 timesteps=(1000,), window_start="first", batch=2, discriminator_batch=2, micro_batch=2,
                 fake_steps=1, weights="random")
    return train.Config(**{**train.PRESETS["toy"], **fixed, **flags})


TOY = model.CONFIGS["toy"], vae.CONFIGS["toy"], raft.CONFIGS["toy"]
WIDE = (model.DiTConfig(dim=768, heads=6, ffn_dim=4480, layers=3, text_dim=128, text_len=32),
        vae.VAEConfig(32, 16, (0.0,) * 16, (1.0,) * 16), raft.CONFIGS["large"])
WAN = model.CONFIGS["wan1.3b"], vae.WAN, raft.CONFIGS["large"]
SPARE = dict(checkpointing=True, remat=True, raft_group=4, latents_per_pass=1)
ONE = dict(batch=1, micro_batch=1, discriminator_batch=1)
AT_128 = dict(ONE, depth=3, taps=(0, 2), height=128, width=128, frames=9, window=2, raft_iters=4)
SETTINGS = {
    "toy": (TOY, {}),
    "toy, sparing memory": (TOY, SPARE),
    "toy, two latents a pass": (TOY, {**SPARE, "latents_per_pass": 2, "no_r": True}),
    "toy, on latents": (TOY, dict(latent_gan=True, checkpointing=True)),
    "wide, sparing memory": (WIDE, {**AT_128, **SPARE}),
    "wide, bf16": (WIDE, {**AT_128, **SPARE, "dtype": "bf16", "no_dmd": True}),
}


def print_comparison(settings, device):
    print(f"modelled / counted, on {device}\n\n"
          "| setting | update | peak | MB counted | FLOP | GFLOP counted |\n"
          "|---|---|---:|---:|---:|---:|")
    for name, (nets, flags) in settings.items():
        for update, peak, flop, size, count in compared(small(**flags), nets, device):
            print(f"| {name} | {update} | {peak:.3f} | {size / 1e6:.4g} | {flop:.3f} | {count / 1e9:.4g} |",
                  flush=True)


def print_table():
    """README's: memory of a rank, operations and hours of the wan1.3b preset."""
    rows, columns = {}, {"1 H200": (1, 1), "8 H200": (8, 8), "16 H200": (16, 8), "8 x 80 GB": (8, 8)}
    for card, (ranks, share) in columns.items():
        held, peaks, tflop, _ = cost.plan(train.Config(preset="wan1.3b"), ranks, share)
        worst, gib = max(peaks, key=peaks.get), 80e9 if "80" in card else 141e9
        need, cycle = sum(held.values()) + max(peaks.values()), sum(tflop.values())
        cells = {f"{name}, GiB": f"{size / 2**30:.1f}" for name, size in held.items() if size}
        cells |= {f"activations, {name}, GiB": f"{size / 2**30:.1f}" for name, size in peaks.items()}
        cells |= {"**peak, GiB**": f"**{need / 2**30:.0f}** ({worst})", "of the card": f"{need / gib:.0%}",
                  "TFLOP a cycle and rank": f"{cycle:,.0f}",
                  "hours for 800 cycles at 400 TFLOP/s a card": f"{cycle * 800 / 400 / 3600:,.0f}"}
        for key, value in cells.items():
            rows.setdefault(key, []).append(value)
    print("| a rank of | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for key, values in rows.items():
        print(f"| {key} | " + " | ".join(values) + " |")


PAPER = dict(ONE, height=480, width=832, frames=81, window=12, depth=16, taps=(7, 13, 15), raft_iters=12, dtype="bf16",
             **{**SPARE, "latents_per_pass": 3})
FULL = {  # where --measure counts the bytes of full-size updates, without their numbers
    "frames": {T: dict(frames=T) for T in (49, 161)},
    "height in pixels (16:9)": {h: dict(height=h, width=w) for h, w in ((256, 448), (720, 1280))},
    "window, chunks of 4 frames": {n: dict(window=n) for n in (4, 12, 20)},
}
NODE = 2  # cores of the machine whose seconds --measure takes: more processes share them
CPU = {  # there, and on toy networks
    "frames": {T: dict(frames=T) for T in (9, 17, 33, 49)},
    "side in pixels": {n: dict(height=n, width=n) for n in (64, 96, 128, 160)},
    "window, chunks of 4 frames": {n: dict(window=n) for n in (1, 2, 3, 4)},
    "processes, one thread each": {n: dict(ranks=n) for n in (1, 2, 4)},
}
SMALL = dict(batch=4, discriminator_batch=4)
COLORS = {"generator, DMD": "#4477aa", "fake score": "#66ccee", "generator, flow GAN": "#ee6677",
          "discriminator": "#ccbb44"}


def count_bytes():
    """{sweep: {tick: {update: GiB of activations}}} at FULL's points."""
    for sweep, points in FULL.items():
        for tick, change in points.items():
            rows = counted(small(**{**PAPER, **change}), WAN, "meta")
            yield sweep, tick, {name: max(peak for _, peak in row) / 2**30 for name, row in rows.items()}


def time_cycles():
    """{sweep: {tick: {update: seconds a cycle}}} of step.py at CPU's points."""
    for sweep, points in CPU.items():
        for tick, change in points.items():
            flags = {**SMALL, **change, "preset": "toy", "videos": "."}  # so that any size will do; no file is read
            ranks = flags.pop("ranks", NODE)
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks,
                       Path(__file__).with_name("step.py")]
            command += itertools.chain(*((f"--{k}", v) for k, v in flags.items()))
            done = subprocess.run(list(map(str, command)), check=True, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
            found = re.findall(r"RESULT (.*): ([\d.]+) s an update", done.stdout)
            times = {name: float(s) for name, s in found}
            times["fake score"] *= train.PRESETS["toy"]["fake_steps"]
            yield sweep, tick, times


def measure(path):
    found = {"GiB": {}, "seconds": {}}
    for unit, points in ("GiB", count_bytes()), ("seconds", time_cycles()):
        for sweep, tick, values in points:
            found[unit].setdefault(sweep, {})[tick] = values
            print(f"{sweep} {tick}, {unit}: {values}", flush=True)
    path.write_text(json.dumps(found, indent=1))


def toy_tflop(ranks=NODE, **change):
    """TFLOP of a cycle that a core of the measuring machine gets to do."""
    cfg = train.Config(**{**train.PRESETS["toy"], "preset": "toy", **SMALL, **change})
    return sum(cost.plan(cfg, ranks, 1)[2].values()) * max(1, ranks / NODE)


def draw_full_size(axes, counted):
    """FLOP of a cycle and GiB of a rank at the peak, by formula, and where they were counted (crosses)."""
    base = dict(preset="wan1.3b", dtype="bf16")
    sizes = [(256, 448), (320, 560), (384, 672), (480, 832), (576, 1024), (640, 1136), (720, 1280)]
    frames = [49, 65, 81, 97, 113, 129, 145, 161]
    sweeps = {
        "frames": (frames, [dict(frames=T) for T in frames]),
        "height in pixels (16:9)": ([h for h, _ in sizes], [dict(height=h, width=w) for h, w in sizes]),
        "window, chunks of 4 frames": ([*range(2, 21, 2)], [dict(window=n) for n in range(2, 21, 2)]),
        "processes, one a card": ([1, 2, 4, 8, 16, 32], [dict(ranks=n) for n in (1, 2, 4, 8, 16, 32)]),
    }
    for column, (label, (ticks, changes)) in zip(axes.T, sweeps.items()):
        plans = []
        for change in changes:
            ranks = change.get("ranks", 8)
            plans.append((*cost.plan(train.Config(**{**base, **change}), ranks, min(8, ranks)), ranks))
        flop = [[tflop[name] * ranks / 1000 for _, _, tflop, _, ranks in plans] for name in COLORS]
        column[0].stackplot(ticks, flop, colors=COLORS.values(), labels=COLORS, linewidth=0)
        held = [sum(held.values()) / 2**30 for held, *_ in plans]
        for name, color in COLORS.items():
            peak = [size + peaks[name] / 2**30 for size, (_, peaks, *_) in zip(held, plans)]
            width = 3.4 if "DMD" in name else 1.6  # the fake score's line lies on it
            column[1].plot(ticks, peak, color=color, linewidth=width)
            for tick, gib in counted.get(label, {}).items():
                column[1].plot(int(tick), held[0] + gib[name], "x", color=color, clip_on=False)
        column[1].fill_between(ticks, held, color="#dddddd", linewidth=0)
        for card in 80, 141:
            column[1].axhline(card * 1e9 / 2**30, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        usual = {"frames": 81, "height in pixels (16:9)": 480, "window, chunks of 4 frames": 12}.get(label, 8)
        for axis in column:
            axis.axvline(usual, color="black", linewidth=0.8, alpha=0.35)
            axis.set_xlim(ticks[0], ticks[-1])
            if "processes" in label:
                axis.set_xscale("log", base=2)
                axis.set_xticks(ticks, ticks)
        column[1].set_xlabel(label)
    axes[0, 0].set_ylabel("wan1.3b: PFLOP a cycle,\nall ranks")
    axes[1, 0].set_ylabel("wan1.3b: GiB at the peak,\na rank")
    text = dict(color="#666666", fontsize=8)
    axes[1, 0].text(frames[0] + 2, 3, "held between updates", **text)
    for card in 80, 141:
        axes[1, 0].text(161, card * 1e9 / 2**30 + 2, f"{card} GB", ha="right", **text)
    axes[0, 3].text(15, 420, "a batch of 16 gives\nmore ranks padding", ha="right", **text)


def draw_toy(axes, seconds):
    """Measured seconds of a cycle by update, and what its FLOP at one pace for all would take."""
    pace = sum(seconds["frames"]["17"].values()) / toy_tflop()
    for axis, (label, points) in zip(axes, CPU.items()):
        bottom = [0.0] * len(points)
        for name, color in COLORS.items():
            bars = [seconds[label][str(tick)][name] for tick in points]
            axis.bar(range(len(points)), bars, 0.6, bottom, color=color)
            bottom = [a + b for a, b in zip(bottom, bars)]
        axis.plot([pace * toy_tflop(**change) for change in points.values()], "k.-", linewidth=0.8)
        axis.set_xticks(range(len(points)), points)
        axis.set_xlabel(label)
    axes[0].set_ylabel("toy, measured on two cores:\nseconds a cycle of 4 clips")
    axes[0].text(0.02, 0.9, "black: FLOP at one pace", transform=axes[0].transAxes, color="#666666", fontsize=8)


def draw(path):
    import matplotlib.pyplot as plt
    measured = json.loads(path.with_name("growth.json").read_text())
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(3, 4, figsize=(11, 7.8), layout="constrained", sharey="row")
    draw_full_size(axes[:2], measured["GiB"])
    draw_toy(axes[2], measured["seconds"])
    for axis in axes[:, 0]:
        axis.set_ylim(0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, or meta: shapes only")
    for flag in "full", "table", "measure", "picture":
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    if args.table:
        print_table()
    elif args.measure:
        measure(Path(__file__).with_name("growth.json"))
    elif args.picture:
        draw(Path(__file__).with_name("growth.png"))
    elif args.full:
        print_comparison({"wan1.3b, bf16, 480x832x81": (WAN, PAPER)}, "meta")
    else:
        print_comparison(SETTINGS, args.device)
