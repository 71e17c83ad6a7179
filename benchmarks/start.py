"""How long train.py takes to be imported, to log its first cycle and to resume, and the memory each process reaches.

--base DIR measures another checkout of this repository alternately with this one.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import flags, hardware

args = flags(__doc__, base="")
TREES = {"this": Path(__file__).parent.parent, **({"base": Path(args.base).resolve()} if args.base else {})}
FLAGS = "--preset toy --samples 0 --fake_warmup 1 --discriminator_warmup 0 --save_every 1".split()


def launch(tree, command, done):
    """Run until `done()` or the end; returns seconds and the process's peak resident memory, MiB."""
    start = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    process = subprocess.Popen([sys.executable, *command], cwd=tree, env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None and not done():
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
        time.sleep(0.01)
    took = time.perf_counter() - start
    process.kill()
    process.wait()
    return took, peak / 1024


def trial(tree):
    folder = Path(tempfile.mkdtemp())
    out = folder / "run"
    log, logged = out / "log.jsonl", lambda cycle: log.exists() and f'"cycle": {cycle},' in log.read_text()
    train = ["train.py", *FLAGS, "--out", out]
    times = {"import train": launch(tree, ["-c", "import train"], lambda: False),
             "first logged cycle": launch(tree, [*train, "--cycles", "0"], lambda: logged(0))}
    launch(tree, [*train, "--cycles", "1"], lambda: False)
    times["resume to the next logged cycle"] = launch(tree, [*train, "--cycles", "2"], lambda: logged(2))
    shutil.rmtree(folder)
    return times


print(f"toy preset, one process; {hardware(args)}")
results = {name: [] for name in TREES}
for _ in range(args.pairs):
    for name, tree in TREES.items():
        results[name].append(trial(tree))
for what in results["this"][0]:
    for name, rows in results.items():
        times, peak = sorted(row[what][0] for row in rows), max(row[what][1] for row in rows)
        print(f"RESULT {what} ({name}): {statistics.median(times):.1f} s ({times[0]:.1f}..{times[-1]:.1f}), "
              f"{peak:.0f} MiB")
