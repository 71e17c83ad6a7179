"""The gradient through decode_window -> flow -> encode -> discriminator: recomputed piece by piece, or all kept.

Claim: at most a quarter of the peak memory of keeping every activation, with the same gradient, for at most 1.6 times
the time. --sweep prints peak memory against window length and pair group, and draws growth of both into tower.png.
"""

import sys
from pathlib import Path
from unittest import mock

import torch

from compare import flags, hardware, peaks, report, settle_memory  # first: vae is not this folder's
import vae as vae_file
from discriminator import MotionDiscriminator, motion_tensor
from model import DiTConfig
from raft import CONFIGS, RAFT, video_flow
from vae import WAN, VAEConfig, WanVAE

args = flags(__doc__, window=6, height=128, width=128, dim=32, width_d=384, depth=4, group=4, latents_per_pass=1,
             sweep=0)
torch.set_grad_enabled(True)
vae = WanVAE(VAEConfig(args.dim, 16, WAN.latents_mean, WAN.latents_std)).requires_grad_(False).to(args.device)
raft = RAFT(CONFIGS["large"]).requires_grad_(False).to(args.device)
cfg = DiTConfig(args.width_d, args.width_d // 128, 4 * args.width_d, args.depth)
net = MotionDiscriminator(cfg, (args.depth - 1,)).requires_grad_(False).to(args.device)
z0 = torch.randn(1, 16, args.window + 1, args.height // 8, args.width // 8, device=args.device)
context, t = torch.randn(1, 512, 4096, device=args.device), torch.zeros(1, device=args.device)


def gradient(recompute, latents_per_pass, group):
    for block in net.trunk.blocks:
        block.checkpointing = recompute
    z = z0.clone().requires_grad_()
    x = vae.decode_window(z, 0, args.window, latents_per_pass)
    o = motion_tensor(video_flow(raft, x, 12, group))
    net(vae.encode(o, latents_per_pass), t, context).sum().backward()
    return z.grad


def draw(windows, by_window, groups, by_group):
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, colour in ("plain", "#b0563c"), ("ours", "#2f6f8f"):
        left.plot(windows, [mib[name] / 1024 for mib in by_window], "o-", color=colour)
        text = {"plain": "everything kept", "ours": "recomputed"}[name]
        left.annotate(text, (windows[-1], by_window[-1][name] / 1024),
                      xytext=(-6, 6), textcoords="offset points", ha="right", color=colour)
    right.plot(groups, [mib / 1024 for mib in by_group], "o-", color="#2f6f8f")
    right.set_xscale("log", base=2)
    left.set(xlabel="window, latents of 4 frames", ylabel="peak of the flow tower, GiB", ylim=0)
    right.set(xlabel=f"frame pairs a group, window {args.window}", ylim=0, xticks=groups, xticklabels=groups)
    for axis in left, right:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / "tower.png", dpi=110)


def kept():
    return gradient(False, args.window, 10**6)  # one pass, one group


def autograd_conv(conv, weight, *x):
    return vae_file.unstack(torch.nn.Conv3d.forward(conv, vae_file.stack(x)))


@mock.patch.object(vae_file.FrozenConv, "apply", autograd_conv)
def plain():
    return kept()


calls = {"ours": lambda: gradient(True, args.latents_per_pass, args.group), "plain": plain}
settle_memory(args, calls)
frames = 1 + 4 * args.window
print(f"window of {args.window} latents = {frames} frames {args.height}x{args.width}, VAE width {args.dim}, "
      f"RAFT large, {args.depth} DiT blocks of width {args.width_d}; {hardware(args)}")
if args.sweep:
    windows, groups = (1, 2, 4, 6, 8), (1, 2, 4, 8, 16, 32)
    by_window = [peaks(calls, "--sweep", 0, "--window", window, rounds=1) for window in windows]
    by_group = [peaks(["ours"], "--sweep", 0, "--group", group, rounds=1)["ours"] for group in groups]
    print("| window, latents | " + " | ".join(map(str, windows)) + " |\n|---" + "|---:" * len(windows) + "|")
    for name in calls:
        print(f"| {name}, MiB | " + " | ".join(f"{mib[name]:.0f}" for mib in by_window) + " |")
    print("\n| frame pairs a group | " + " | ".join(map(str, groups)) + " |\n|---" + "|---:" * len(groups) + "|")
    print("| ours, MiB | " + " | ".join(f"{mib:.0f}" for mib in by_group) + " |")
    draw(windows, by_window, groups, by_group)
    sys.exit()
# With the same convolutions: a random RAFT enlarges rounding a thousand times. test_smoke.py holds the convolutions
# against autograd's own.
a, b = calls["ours"](), kept()
print(f"gradients: largest difference {(a - b).abs().max() / b.abs().max():.1e} of the largest")
report("flow tower gradient, against keeping everything", calls["ours"], calls["plain"], args, "1.6")
mib = peaks(calls)
print(f"RESULT flow tower peak memory, against keeping everything: {mib['ours'] / mib['plain']:.2f}, "
      f"{mib['ours']:.0f} against {mib['plain']:.0f} MiB above the weights; aim 0.25")
