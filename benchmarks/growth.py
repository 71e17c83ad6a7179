"""How cost grows with frames, resolution, window and processes: cost.py's counts at full size, seconds of the toy.

    python benchmarks/growth.py --count       # growth.json: memory and work of wan1.3b, four minutes
    python benchmarks/growth.py --time        # growth.json: seconds of toy cycles on this machine, a quarter of an hour
    python benchmarks/growth.py --picture     # growth.png
    python benchmarks/growth.py --table       # RESULTS.md's table: what to rent
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

import cost  # noqa: E402
import train  # noqa: E402

FULL = {
    "frames": {T: dict(frames=T) for T in (49, 65, 81, 97, 113, 129, 145, 161)},
    "height in pixels (16:9)": {h: dict(height=h, width=w) for h, w in (
        (256, 448), (320, 560), (384, 672), (480, 832), (576, 1024), (640, 1136), (720, 1280))},
    "window, chunks of 4 frames": {n: dict(window=n) for n in range(2, 21, 3)},
    "processes, one a card": {n: dict(ranks=n) for n in (1, 2, 4, 8, 16, 32)},
}
NODE = 2  # cores of the machine whose seconds --time takes: more processes share them
TOY = {
    "frames": {T: dict(frames=T) for T in (9, 17, 33, 49)},
    "side in pixels": {n: dict(height=n, width=n) for n in (64, 96, 128, 160)},
    "window, chunks of 4 frames": {n: dict(window=n) for n in (1, 2, 3, 4)},
    "processes, one thread each": {n: dict(ranks=n) for n in (1, 2, 4)},
}
FOUR = dict(batch=4, discriminator_batch=4)
COLORS = {"dmd": "#4477aa", "fake": "#66ccee", "gan_g": "#ee6677", "gan_d": "#ccbb44"}
TABLE = {"1 card": ("wan1.3b", 1, 1), "8": ("wan1.3b", 8, 8), "16": ("wan1.3b", 16, 8),
         "14B on 8": ("wan14b", 8, 8), "14B on 16": ("wan14b", 16, 16)}


def config(preset, **change):
    return train.Config(**{"dtype": "bf16", **train.PRESETS[preset], "preset": preset, **change})


def flop(work):
    return {key: sum(amount for kind, amount in done.items() if kind != "memory") for key, done in work.items()}


def count():
    """{sweep: {tick: (bytes held, {update: peak bytes of activations}, {update: FLOP of a cycle on all ranks})}}"""
    found = {}
    for sweep, points in FULL.items():
        for tick, change in points.items():
            change = dict(change)
            ranks = change.pop("ranks", 8)
            held, peaks, work = cost.plan(config("wan1.3b", **change), ranks, min(8, ranks))
            total = {key: value * ranks for key, value in flop(work).items()}
            found.setdefault(sweep, {})[tick] = sum(held.values()), peaks, total
            print(sweep, tick, f"{sum(held.values()) + max(peaks.values()):.4g} B", flush=True)
    return found


def clock():
    """{sweep: {tick: ({update: seconds a cycle}, FLOP on a core of this machine)}} of step.py at TOY's points."""
    found = {}
    for sweep, points in TOY.items():
        for tick, change in points.items():
            change = dict(change)
            ranks = change.pop("ranks", NODE)
            cfg = config("toy", dtype="fp32", **FOUR, **change)
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, HERE / "step.py"]
            for key, value in {**FOUR, **change, "preset": "toy"}.items():
                command += [f"--{key}", value]
            done = subprocess.run(list(map(str, command)), check=True, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
            seconds = {key: float(s) for key, s in re.findall(r"RESULT (\w+).*: ([\d.]+) s an update", done.stdout)}
            seconds["fake"] *= cfg.fake_updates
            work = sum(flop(cost.plan(cfg, ranks, 1)[2]).values()) * max(1, ranks / NODE)
            found.setdefault(sweep, {})[tick] = seconds, work
            print(sweep, tick, seconds, flush=True)
    return found


def draw(path, counted, timed):
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(3, 4, figsize=(11, 7.8), layout="constrained", sharey="row")
    for (above, below), (sweep, points) in zip(axes[:2].T, counted.items()):
        ticks = list(map(int, points))
        held, peaks, work = zip(*points.values())
        above.stackplot(ticks, [[w[key] / 1e15 for w in work] for key in COLORS], colors=COLORS.values(),
                        labels=[cost.UPDATES[key] for key in COLORS], linewidth=0)
        below.fill_between(ticks, [h / cost.GIB for h in held], color="#dddddd", linewidth=0)
        for key, color in COLORS.items():
            width = 3.4 if key == "dmd" else 1.6  # the fake score's line lies on it
            below.plot(ticks, [(h + p[key]) / cost.GIB for h, p in zip(held, peaks)], color=color, linewidth=width)
        for card in cost.CARDS[2:]:
            below.axhline(card, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        usual = {"frames": 81, "height in pixels (16:9)": 480, "window, chunks of 4 frames": 12}.get(sweep, 8)
        for axis in above, below:
            axis.axvline(usual, color="black", linewidth=0.8, alpha=0.35)
            axis.set_xlim(ticks[0], ticks[-1])
            if "processes" in sweep:
                axis.set_xscale("log", base=2)
                axis.set_xticks(ticks, ticks)
        below.set_xlabel(sweep)
    grey = dict(color="#666666", fontsize=8)
    axes[0, 0].set_ylabel("wan1.3b: PFLOP a cycle,\nall ranks")
    axes[0, 3].text(0.95, 0.9, "a batch of 16 gives\nmore ranks padding", ha="right", va="top",
                    transform=axes[0, 3].transAxes, **grey)
    axes[1, 0].set_ylabel("wan1.3b: GiB at the peak,\na rank")
    axes[1, 0].text(51, 1, "held between updates", **grey)
    for card in cost.CARDS[2:]:
        axes[1, 0].text(161, card + 2, f"{card} GB", ha="right", **grey)

    seconds, work = timed["frames"]["17"]
    pace = sum(seconds.values()) / work
    for axis, (sweep, points) in zip(axes[2], timed.items()):
        bottom = [0.0] * len(points)
        for key, color in COLORS.items():
            bars = [seconds[key] for seconds, _ in points.values()]
            axis.bar(range(len(points)), bars, 0.6, bottom, color=color)
            bottom = [a + b for a, b in zip(bottom, bars)]
        axis.plot([pace * work for _, work in points.values()], "k.-", linewidth=0.8)
        axis.set_xticks(range(len(points)), points)
        axis.set_xlabel(sweep)
    axes[2, 0].set_ylabel("toy, measured on two cores:\nseconds a cycle of 4 clips")
    axes[2, 0].text(0.02, 0.9, "black: FLOP at one pace", transform=axes[2, 0].transAxes, **grey)
    for axis in axes[:, 0]:
        axis.set_ylim(0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)


def print_table():
    rows = {}
    for preset, ranks, share in TABLE.values():
        cfg = config(preset)
        held, peaks, work = cost.plan(cfg, ranks, share)
        peak, all_work = sum(held.values()) + max(peaks.values()), sum(work.values(), cost.Counter())
        cells = {f"{name.split(':')[0]}, GiB": f"{size / cost.GIB:.1f}" for name, size in held.items() if size}
        cells |= {f"activations, {cost.UPDATES[key]}, GiB": f"{size / cost.GIB:.1f}" for key, size in peaks.items()}
        cells["**peak, GiB**"] = f"**{peak / cost.GIB:.0f}** ({cost.UPDATES[max(peaks, key=peaks.get)]})"
        fits = [f"{card} GB" for card in cost.CARDS if peak / cost.GIB <= card * (1 - cost.SPARE)]
        cells["with a tenth to spare"] = fits[0] if fits else f"over {cost.CARDS[-1]} GB"
        cells["TFLOP a cycle and rank"] = f"{sum(flop(work).values()) / 1e12:,.0f}"
        cells["seconds a cycle"] = " to ".join(cost.short(3600 * x) for x in cost.hours(all_work, 1))
        cells["hours for 800 cycles"] = " to ".join(map(cost.short, cost.hours(all_work, 800)))
        warm = work["dmd"] + work["fake"]
        cells["hours of DMD before, from Wan itself"] = " to ".join(map(cost.short, cost.hours(warm, 600)))
        for key, value in cells.items():
            rows.setdefault(key, []).append(value)
    print("| a rank of | " + " | ".join(TABLE) + " |\n|---|" + "---:|" * len(TABLE))
    for key, values in rows.items():
        print(f"| {key} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag in "count", "time", "table", "picture":
        parser.add_argument(f"--{flag}", action="store_true")
    args, path = parser.parse_args(), HERE / "growth.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if args.count:
        path.write_text(json.dumps({**known, "counted": count()}, indent=1))
    elif args.time:
        path.write_text(json.dumps({**known, "timed": clock()}, indent=1))
    elif args.picture:
        draw(path.with_suffix(".png"), known["counted"], known["timed"])
    elif args.table:
        print_table()
