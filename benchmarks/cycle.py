"""A MoGAN cycle of the toy preset on two processes: this checkout against another one, same seed, same losses.

    git worktree add ../before COMMIT && python benchmarks/cycle.py --base ../before      # one with the same flags

The last lines say where the time of a cycle goes, before and now. An optimizer's step counts with the next update.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
FLAGS = "--preset toy --samples 0 --fake_warmup 1 --discriminator_warmup 1 --save_every 1000".split()


def clocked_training():
    """train.py of the checkout in the working folder; each update's seconds go to clock.jsonl beside its log."""
    sys.path[0] = os.getcwd()
    import train
    global_means, mark = train.global_means, [time.perf_counter()]
    path = Path(sys.argv[sys.argv.index("--out") + 1]) / "clock.jsonl"

    def clocked(sums):
        means = global_means(sums)
        if os.environ["RANK"] == "0":
            with open(path, "a") as file:
                file.write(json.dumps([next(iter(sums)), time.perf_counter() - mark[0]]) + "\n")
        mark[0] = time.perf_counter()
        return means
    train.global_means = clocked
    train.main()


if "RANK" in os.environ:
    clocked_training()
    sys.exit()

from compare import flags, hardware  # noqa: E402

from cost import UPDATES  # noqa: E402

args = flags(__doc__, base="", cycles=8)


def trial(tree):
    """A short run: the logged MoGAN cycles without the first, and {update: median seconds}."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", Path(__file__).resolve(), *FLAGS]
    command += ["--cycles", args.cycles, "--weights", HERE / "toy" / "weights"]  # other weights, other losses
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([*map(str, command), "--out", out], cwd=tree, check=True, capture_output=True)
        rows, clock = (list(map(json.loads, Path(out, f"{name}.jsonl").read_text().splitlines()))
                       for name in ("log", "clock"))
    parts = {name: statistics.median([s for label, s in clock if label == name][2:]) for name in UPDATES}
    return [row for row in rows if row["phase"] == "mogan"][1:], parts


print(f"toy preset, 2 processes of 1 thread; {hardware(args)}")
pairs, clocks = [], []
for i in range(args.pairs):
    trees = (HERE, args.base)[:: -1 if i % 2 else 1]  # whoever goes second finds warm caches
    (this, now), (base, before) = [trial(tree) for tree in trees][:: -1 if i % 2 else 1]
    worst = max(abs(a[key] / b[key] - 1) for a, b in zip(this, base) for key in ("dmd", "fake", "gan_d", "gan_g"))
    pairs.append([statistics.median(row["seconds"] for row in rows) for rows in (this, base)])
    clocks.append((now, before))
    print(f"{pairs[-1][0]:.2f} s against {pairs[-1][1]:.2f} s; losses differ by {worst:.1e} at most", flush=True)
for key, name in UPDATES.items():
    a, b = (statistics.median(parts[key] for parts in side) for side in zip(*clocks))
    print(f"{name}: {a:.2f} s an update against {b:.2f}, {a / b:.2f} of its time")
spread = sorted(a / b for a, b in pairs)
print(f"RESULT toy cycle, against {args.base}: {statistics.median(spread):.2f} ({spread[0]:.2f}..{spread[-1]:.2f}) "
      "of its time; aim 0.75")
