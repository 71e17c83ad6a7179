"""What wan1.3b needs against frames, resolution, window and processes, by cost.py; and the table of what to rent.

    python benchmarks/growth.py --count       # growth.json: memory and work of wan1.3b, four minutes
    python benchmarks/growth.py --picture     # growth.png, from it
    python benchmarks/growth.py --table       # the figures of RESULTS.md's table, a minute or two
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

import cost  # noqa: E402
import train  # noqa: E402

SWEEPS = {
    "frames": {T: dict(frames=T) for T in (49, 65, 81, 97, 113, 129, 145, 161)},
    "height in pixels (16:9)": {h: dict(height=h, width=w) for h, w in (
        (256, 448), (320, 560), (384, 672), (480, 832), (576, 1024), (640, 1136), (720, 1280))},
    "window, chunks of 4 frames": {n: dict(window=n) for n in range(2, 21, 3)},
    "processes, one a card": {n: dict(ranks=n) for n in (1, 2, 4, 8, 16, 32)},
}
COLORS = {"dmd": "#4477aa", "fake": "#66ccee", "gan_g": "#ee6677", "gan_d": "#ccbb44"}
RENTED = [("wan1.3b", n, 0) for n in (1, 2, 4, 8, 16)] + [("wan14b", 8, 0), ("wan14b", 16, 0), ("wan14b", 16, 16)]


def plan(preset, ranks, **change):
    cfg = train.Config(**{"dtype": "bf16", **train.PRESETS[preset], "preset": preset, **change})
    return cost.plan(cfg, ranks, cfg.shard or min(ranks, cost.NODE))


def once(counted, known):
    """cost.counted, which counts one micro-batch whatever the number of ranks, remembering what it has counted."""
    def remembered(cfg):
        if repr(cfg) not in known:
            known[repr(cfg)] = counted(cfg)
        return known[repr(cfg)]
    return remembered


def flop(work):
    return {key: sum(amount for kind, amount in done.items() if kind != "memory") for key, done in work.items()}


def count():
    """{sweep: {tick: (bytes held, {update: peak bytes of activations}, {update: FLOP of a cycle on all ranks})}}"""
    found = {}
    for sweep, points in SWEEPS.items():
        for tick, change in points.items():
            ranks = change.get("ranks", 8)
            held, peaks, work = plan("wan1.3b", **{"ranks": ranks, **change})
            total = {key: value * ranks for key, value in flop(work).items()}
            found.setdefault(sweep, {})[tick] = sum(held.values()), peaks, total
            print(sweep, tick, f"{sum(held.values()) + max(peaks.values()):.4g} B", flush=True)
    return found


def draw(path, counted):
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.4), layout="constrained", sharey="row")
    for (above, below), (sweep, points) in zip(axes.T, counted.items()):
        ticks = list(map(int, points))
        held, peaks, work = zip(*points.values())
        above.stackplot(ticks, [[w[key] / 1e15 for w in work] for key in COLORS], colors=COLORS.values(),
                        labels=[cost.UPDATES[key] for key in COLORS], linewidth=0)
        below.fill_between(ticks, [h / cost.GIB for h in held], color="#dddddd", linewidth=0)
        for key, color in COLORS.items():
            width = 3.4 if key == "dmd" else 1.6  # the fake score's line lies on it
            below.plot(ticks, [(h + p[key]) / cost.GIB for h, p in zip(held, peaks)], color=color, linewidth=width)
        for card in cost.CARDS:
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
    for card in cost.CARDS[1:3]:
        axes[1, 0].text(161, card + 1, f"{card} GB", ha="right", **grey)
    for axis in axes[:, 0]:
        axis.set_ylim(0)
    axes[1, 0].set_ylim(0, 92)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)


def table():
    yield ("| | held + activations = peak, GiB a card | cards of | TFLOP a cycle and card | s a cycle | 800 cycles, h "
           "| 600 of DMD before, h |")
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for preset, ranks, shard in RENTED:
        held, peaks, work = plan(preset, ranks, shard=shard)
        held, active = sum(held.values()) / cost.GIB, max(peaks.values()) / cost.GIB
        fits = [f"{card} GB" for card in cost.CARDS if held + active <= card * (1 - cost.SPARE)]
        every = sum(work.values(), cost.Counter())
        cycle, run, warm = (" to ".join(map(cost.short, cost.hours(done, cycles))) for done, cycles in (
            (every, 3600), (every, 800), (work["dmd"] + work["fake"], 600)))
        name = f"{preset} on {ranks}" + (f", --shard {shard}" if shard else "")
        yield (f"| {name} | {held:.1f} + {active:.1f} = {held + active:.0f} | {(fits or ['none'])[0]} | "
               f"{sum(flop(work).values()) / 1e12:,.0f} | {cycle} | {run} | {warm} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag in "count", "table", "picture":
        parser.add_argument(f"--{flag}", action="store_true")
    args, path = parser.parse_args(), HERE / "growth.json"
    cost.counted = once(cost.counted, {})
    if args.count:
        path.write_text(json.dumps(count(), indent=1))
    if args.picture:
        draw(path.with_suffix(".png"), json.loads(path.read_text()))
    if args.table:
        print(*table(), sep="\n")
