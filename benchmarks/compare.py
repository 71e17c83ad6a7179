"""What the benchmarks share: alternate timing in one process, and the peak memory of a call in a process of its own."""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


def without_files(train, cfg):
    """Let train.train(cfg) do without any file, as cost.py does; nothing is saved or exported."""
    import cost
    vars(train).update(cost.without_files(cfg))
    train.checkpoint.claim = train.checkpoint.save = train.checkpoint.export = lambda *_: None


def flags(doc, **defaults):
    """The benchmark's flags; each default is a flag of its own type."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    for name, value in dict(pairs=5, threads=2, device="cpu", dtype="float32", **defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def hardware(args):
    models = (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line)
    cpu = next(models, platform.machine())
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{cpu}, {args.threads} threads"
    return f"{name}, {args.dtype}, torch {torch.__version__}"


def seconds(call, device):
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(ours, peer, args):
    """Time both calls alternately, after an untimed call of each: (median seconds of both, sorted ratios of pairs)."""
    ours(), peer()
    pairs = []
    for i in range(args.pairs):
        first, second = (ours, peer) if i % 2 == 0 else (peer, ours)  # whoever goes second finds warm caches
        times = seconds(first, args.device), seconds(second, args.device)
        pairs.append(times if i % 2 == 0 else times[::-1])
    return *(statistics.median(t) for t in zip(*pairs)), sorted(a / b for a, b in pairs)


def report(what, ours, peer, args, target):
    mine, theirs, spread = ratios(ours, peer, args)
    print(f"RESULT {what}: {statistics.median(spread):.2f} ({spread[0]:.2f}..{spread[-1]:.2f}) of its time, "
          f"{mine:.2f} s against {theirs:.2f} s; aim {target}", flush=True)


def settle_memory(args, calls):
    """In a child of `peaks`: make one call and print how far memory rose above what stood before it, MiB."""
    if args.peak_of:
        resident = lambda key: next(int(row.split()[1]) / 1024 for row in open("/proc/self/status") if key in row)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark VmHWM starts anew
        before = resident("VmRSS")
        calls[args.peak_of]()
        print(torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else resident("VmHWM") - before)
        sys.exit()


def peaks(names, *more, rounds=3):
    """Median peak MiB of each named call, each time in a fresh process of this script with the same flags and `more`.

    There glibc returns freed memory to the system at once: the peak is what a call holds, not also what malloc kept
    for later, which differs by a quarter between one process and the next.
    """
    command = [sys.executable, *sys.argv, *map(str, more), "--peak_of"]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}

    def peak(name):
        done = subprocess.run([*command, name], check=True, stdout=subprocess.PIPE, text=True, env=env)
        return float(done.stdout.split()[-1])
    return {name: statistics.median(peak(name) for _ in range(rounds)) for name in names}
