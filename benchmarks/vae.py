"""Claim: WanVAE decodes and encodes in at most 0.70 of the time and of the memory of diffusers' AutoencoderKLWan.

Equal random weights at full width, one clip, no gradient. Outputs are compared first. Times: alternating pairs in one
process, after one call of each. Memory: peak during one call less what was resident before it, each side in a process
of its own after a tiny call: VmHWM, reset through /proc/self/clear_refs, less VmRSS (Linux); on a GPU what the
allocator held. diffusers runs as it comes: without slicing or tiling.

    pip install -r benchmarks/requirements.txt && python benchmarks/vae.py
"""

import argparse
import ctypes
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vae import load_vae                                                                                  # noqa: E402


def load(side, folder, args):
    dtype = getattr(torch, args.dtype)
    if side == "ours":
        return load_vae(folder, dtype).to(args.device)
    return diffusers.AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype).to(args.device).eval()


def calls(side, net, args, f, h, w):
    """{task: function} of one side; z [1, 16, f, h, w] is raw in diffusers' API and normalised in ours."""
    generator = torch.Generator().manual_seed(1)
    dtype, pixels = getattr(torch, args.dtype), (4 * f - 3, 8 * h, 8 * w)
    z = torch.randn(1, 16, f, h, w, generator=generator).to(args.device, dtype)
    x = (2 * torch.rand(1, 3, *pixels, generator=generator) - 1).to(args.device, dtype)
    if side == "diffusers":
        return {"decode": lambda: net.decode(z).sample, "encode": lambda: net.encode(x).latent_dist.mode()}
    mean, std = net.mean_std(z)
    n, z = args.latents_per_pass, ((z - mean) / std).to(dtype)
    return {"decode": lambda: net.decode(z, n).clamp(-1, 1), "encode": lambda: net.encode(x, n) * std + mean}


def peak(side, task, folder, args):
    """MiB that one call takes beyond what is there before it."""
    net = load(side, folder, args)
    calls(side, net, args, 2, 4, 4)[task]()  # libraries and code that come with the first call
    call = calls(side, net, args, *args.size)[task]
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def kib(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    ctypes.CDLL(None).malloc_trim(0)  # what loading freed must not serve the call
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 2**10


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=3, default=(5, 15, 26), help="latents f h w")
    parser.add_argument("--latents_per_pass", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # side, task, folder: the process of one call
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.peak:
        return print(peak(*args.peak, args))

    f, h, w = args.size
    print(f"{f} latents {h}x{w} <-> {4 * f - 3} frames {8 * h}x{8 * w}, batch 1, width 96, {args.dtype}, {args.device}, "
          f"{args.threads} threads, {args.latents_per_pass} latents a pass, torch {torch.__version__}, "
          f"diffusers {diffusers.__version__}", flush=True)

    def seconds(call):
        start = time.perf_counter()
        call()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    results = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        diffusers.AutoencoderKLWan().save_pretrained(folder)
        ours, theirs = (calls(side, load(side, folder, args), args, f, h, w) for side in ("ours", "diffusers"))
        for task in "decode", "encode":
            a, b = ours[task]().float(), theirs[task]().float()
            error = ((a - b).norm() / b.norm()).item()
            print(f"{task}: relative difference of the outputs {error:.1e}", flush=True)
            assert error < (1e-4 if args.dtype == "float32" else 5e-2), error
            ratios = []
            for _ in range(args.pairs):
                a, b = seconds(ours[task]), seconds(theirs[task])
                ratios.append(a / b)
                print(f"  {a:.2f} s, diffusers {b:.2f} s: {a / b:.3f}", flush=True)
            results.append(f"{task} {median(ratios):.2f} of diffusers ({min(ratios):.2f}..{max(ratios):.2f})")
        for task in "decode", "encode":
            a, b = (float(subprocess.run([sys.executable, *sys.argv, "--peak", side, task, folder], check=True,
                                         capture_output=True, text=True).stdout.split()[-1])
                    for side in ("ours", "diffusers"))
            print(f"{task}: peak {a:.0f} MiB, diffusers {b:.0f} MiB: {a / b:.3f}", flush=True)
            results.append(f"{task} peak memory {a / b:.2f}")
    print("RESULT vae " + ", ".join(results))


if __name__ == "__main__":
    main()
