"""WanVAE against diffusers' AutoencoderKLWan at full width: decode and encode of one clip without gradient.

Claim: at most 0.70 of its time and of its peak memory. Weights are equal and random, outputs are compared first, and
diffusers runs as it comes, without slicing or tiling. Peak memory is each call's own (compare.py) after a tiny call,
with which libraries and code arrive; what loading freed is given back before, so that it does not serve the call.
"""

import ctypes
import tempfile

import diffusers
import torch

from compare import flags, hardware, peaks, report, settle_memory
from vae import load_vae, mean_std

args = flags(__doc__, latents=5, height=15, width=26, latents_per_pass=1, weights="")
dtype, n = getattr(torch, args.dtype), args.latents_per_pass
torch.set_grad_enabled(False)


def calls(side, net, f, h, w):
    """{name: call} of one side. Latents are raw in diffusers' API and normalised in ours; its decode clamps."""
    z = torch.randn(1, 16, f, h, w).to(args.device, dtype)
    x = (torch.rand(1, 3, 4 * f - 3, 8 * h, 8 * w) * 2 - 1).to(args.device, dtype)
    if side == "diffusers":
        return {"diffusers decode": lambda: net.decode(z).sample,
                "diffusers encode": lambda: net.encode(x).latent_dist.mode()}
    mean, std = mean_std(net.cfg, z.device)
    z = ((z - mean) / std).to(dtype)
    return {"ours decode": lambda: net.decode(z, n).clamp(-1, 1),
            "ours encode": lambda: net.encode(x, n) * std + mean}


def load(side, folder):
    if side == "ours":
        net = load_vae(folder, dtype)
    else:
        net = diffusers.AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype).eval()
    net.to(args.device)
    calls(side, net, 2, 4, 4)[f"{side} {args.peak_of.split()[-1] if args.peak_of else 'decode'}"]()
    torch.manual_seed(1)
    return calls(side, net, args.latents, args.height, args.width)


if args.peak_of:
    call = load(args.peak_of.split()[0], args.weights)
    ctypes.CDLL(None).malloc_trim(0)
    settle_memory(args, call)

print(f"{args.latents} latents {args.height}x{args.width}, batch 1, {n} a pass, diffusers {diffusers.__version__}; "
      f"{hardware(args)}", flush=True)
with tempfile.TemporaryDirectory() as folder:
    diffusers.AutoencoderKLWan().save_pretrained(folder)
    ours, theirs = load("ours", folder), load("diffusers", folder)
    for task in "decode", "encode":
        call, peer = ours[f"ours {task}"], theirs[f"diffusers {task}"]
        a, b = call().float(), peer().float()
        error = (a - b).norm() / b.norm()
        print(f"{task}: relative difference of the outputs {error:.1e}", flush=True)
        assert error < (1e-4 if args.dtype == "float32" else 5e-2)
        report(f"vae {task}, against diffusers", call, peer, args, "0.70")
    peak = peaks([f"{side} {task}" for task in ("decode", "encode") for side in ("ours", "diffusers")],
                 "--weights", folder)
for task in "decode", "encode":
    a, b = peak[f"ours {task}"], peak[f"diffusers {task}"]
    print(f"RESULT vae {task} peak memory, against diffusers: {a / b:.2f}, {a:.0f} against {b:.0f} MiB; aim 0.70")
