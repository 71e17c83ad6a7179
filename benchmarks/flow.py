"""Optical flow of a clip: `video_flow` against RAFT run pair by pair, as flow metrics usually do; weights are equal.

Claim: at most 0.80 of the time of torchvision's raft_large, forward and with the gradient of the clip. Also against
our own RAFT pair by pair, which shows what sharing a frame's features and batching pairs do alone. The peers keep all
activations; ours does so too with --group 9, while a smaller --group computes them again to bound the memory. Without
a gradient the group is raft.GROUP_PIXELS, as in training.

    pip install --no-deps --target ../peer torchvision==0.28.0    # apart: without its operators transformers breaks
    PYTHONPATH=../peer python benchmarks/flow.py
    export MALLOC_MMAP_THRESHOLD_=$((1<<34)) MALLOC_TRIM_THRESHOLD_=$((1<<34))    # and again: glibc keeps what is freed
"""

import tempfile

import torch
from safetensors.torch import save_file

from compare import flags, hardware, report
from raft import load_raft, video_flow

if torch.version.cuda is None:  # there the wheel's operators do not load; RAFT needs none, the import asks for two
    stubs = torch.library.Library("torchvision", "DEF")
    for name in "nms", "qnms":
        stubs.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchvision.models.optical_flow import raft_large  # noqa: E402

args = flags(__doc__, frames=9, height=192, width=320, iters=12, group=9)
theirs = raft_large().eval().requires_grad_(False).to(args.device)
with tempfile.TemporaryDirectory() as folder:
    save_file(theirs.state_dict(), f"{folder}/raft.safetensors")
    raft = load_raft(f"{folder}/raft.safetensors", args.device)
x = torch.rand(1, 3, args.frames, args.height, args.width, device=args.device) * 2 - 1


def ours(x):
    return video_flow(raft, x, args.iters, args.group if torch.is_grad_enabled() else None)


def pair_by_pair(flow):
    def clip(x):
        frames = x.unbind(2)
        return torch.stack([flow(a, b) for a, b in zip(frames, frames[1:])], dim=2)
    return clip


def grad(flow):
    leaf = x.clone().requires_grad_()
    flow(leaf).square().mean().backward()
    return leaf.grad


PEERS = {"torchvision's": pair_by_pair(lambda a, b: theirs(a, b, num_flow_updates=args.iters)[-1]),
         "our RAFT": pair_by_pair(lambda a, b: raft(a, b, args.iters))}
print(f"RAFT large, {args.frames} frames {args.height}x{args.width}, {args.iters} iterations; {hardware(args)}")
for name, peer in PEERS.items():
    with torch.no_grad():
        a, b = ours(x), peer(x)
        print(f"largest difference {(a - b).abs().max():.1e} px of {b.abs().max():.1f}")
        report(f"video_flow forward, against {name} pair by pair", lambda: ours(x), lambda: peer(x), args, "0.80")
    a, b = grad(ours), grad(peer)
    print(f"gradients: relative difference {(a - b).norm() / b.norm():.1e}")
    what = f"video_flow with gradient, against {name} pair by pair"
    report(what, lambda: grad(ours), lambda: grad(peer), args, "0.80")
