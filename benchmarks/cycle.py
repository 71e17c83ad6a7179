"""A MoGAN cycle of the toy preset on two processes: this checkout against another one, same seed, same losses.

    git worktree add ../before f333d91 && python benchmarks/cycle.py --base ../before

Also prints where the time of this checkout's cycle goes.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from compare import flags, hardware

args = flags(__doc__, base="", cycles=8)
HERE = Path(__file__).parent.parent
FLAGS = "--preset toy --samples 0 --fake_warmup 1 --discriminator_warmup 1 --save_every 1000".split()


def trial(tree):
    """The logged MoGAN cycles of a short run, without the first."""
    out = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py", *FLAGS]
    command += ["--steps", str(args.cycles), "--out", out, "--contexts", HERE / "runs" / "contexts"]
    subprocess.run(list(map(str, command)), cwd=tree, check=True, capture_output=True)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == "mogan"][1:]


print(f"toy preset, 2 processes of 1 thread; {hardware(args)}")
pairs = []
for _ in range(args.pairs):
    this, base = trial(HERE), trial(args.base)
    worst = max(abs(a[key] / b[key] - 1) for a, b in zip(this, base) for key in ("dmd", "fake", "gan_d", "gan_g"))
    pairs.append([statistics.median(row["seconds"] for row in rows) for rows in (this, base)])
    print(f"{pairs[-1][0]:.2f} s against {pairs[-1][1]:.2f} s; losses differ by {worst:.1e} at most", flush=True)
spread = sorted(a / b for a, b in pairs)
print(f"RESULT toy cycle, against {args.base}: {statistics.median(spread):.2f} ({spread[0]:.2f}..{spread[-1]:.2f}) "
      "of its time; aim 0.75")
