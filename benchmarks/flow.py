"""Optical flow of a clip: `video_flow` against the same RAFT run pair by pair, as flow metrics usually do.

Claim: a frame's features are computed once, not twice, which saves a fifth of the time or more, forward and with the
gradient of the clip. The peer keeps all activations; ours does so too with --group 9, while --group 4, the default of
training and of the forward here, computes them again to bound the memory.
"""

import torch

from compare import flags, hardware, report
from raft import CONFIGS, GROUP, RAFT, video_flow

args = flags(__doc__, frames=9, height=192, width=320, iters=12, group=9)
raft = RAFT(CONFIGS["large"]).requires_grad_(False).to(args.device)
x = torch.rand(1, 3, args.frames, args.height, args.width, device=args.device) * 2 - 1


def ours(x):
    return video_flow(raft, x, args.iters, args.group if torch.is_grad_enabled() else GROUP)


def peer(x):
    frames = x.unbind(2)
    return torch.stack([raft(a, b, args.iters) for a, b in zip(frames, frames[1:])], dim=2)


def grad(flow):
    leaf = x.clone().requires_grad_()
    flow(leaf).square().mean().backward()
    return leaf.grad


print(f"RAFT large, {args.frames} frames {args.height}x{args.width}, {args.iters} iterations; {hardware(args)}")
with torch.no_grad():
    a, b = ours(x), peer(x)
    print(f"largest difference {(a - b).abs().max():.1e} px of {b.abs().max():.1f}")
    report("video_flow forward, against pair by pair", lambda: ours(x), lambda: peer(x), args, "0.80")
a, b = grad(ours), grad(peer)
print(f"gradients: largest difference {(a - b).abs().max() / b.abs().max():.1e} of the largest")
report("video_flow with gradient, against pair by pair", lambda: grad(ours), lambda: grad(peer), args, "0.80")
