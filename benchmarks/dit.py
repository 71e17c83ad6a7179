"""WanDiT against diffusers' WanTransformer3DModel at the width of Wan2.1-1.3B, a few layers deep.

Claim: at most 0.95 of its time, forward, and forward + backward with every block checkpointed. Weights are equal and
random; outputs and the gradients of the latents and of all parameters are compared first.
"""

import tempfile

import diffusers
import torch

from compare import flags, hardware, report
from model import load_dit
from weights import official_dit

args = flags(__doc__, layers=4, dim=1536, ffn=8960, frames=5, height=30, width=52)
dtype = getattr(torch, args.dtype)
theirs = diffusers.WanTransformer3DModel(
    num_attention_heads=args.dim // 128, ffn_dim=args.ffn, num_layers=args.layers)
with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    ours = load_dit(folder, dtype=dtype).to(args.device)
theirs.to(args.device, dtype).enable_gradient_checkpointing()
z = torch.randn(1, 16, args.frames, args.height, args.width).to(args.device, dtype)
context = torch.randn(1, ours.cfg.text_len, ours.cfg.text_dim).to(args.device, dtype)
t = torch.tensor([0.757], device=args.device)


def call(z):
    return ours(z, t, context)


def peer(z):
    return theirs(z, 1000 * t, context, return_dict=False)[0]


def grad(net, call):
    """Gradients of the latents and of every parameter."""
    net.zero_grad()
    leaf = z.clone().requires_grad_()
    call(leaf).float().square().mean().backward()
    return {"z": leaf.grad, **{name: p.grad for name, p in net.named_parameters()}}


def compare(what, a, b):
    error = (a.float() - b.float()).norm() / b.float().norm()
    assert error < (1e-4 if args.dtype == "float32" else 5e-2), (what, error)
    return error


print(f"DiT {args.dim}, ffn {args.ffn}, {args.layers} layers, text {ours.cfg.text_len}x{ours.cfg.text_dim}, latents "
      f"{args.frames}x{args.height}x{args.width}, batch 1, diffusers {diffusers.__version__}; {hardware(args)}",
      flush=True)
with torch.no_grad():
    print(f"relative difference of the outputs {compare('output', call(z), peer(z)):.1e}", flush=True)
    report("dit forward, against diffusers", lambda: call(z), lambda: peer(z), args, "0.95")
for block in ours.blocks:
    block.checkpointing = True
a, b = grad(ours, call), official_dit(grad(theirs, peer))
errors = [compare(name, value, b[name]) for name, value in a.items()]
print(f"largest relative difference of {len(a)} gradients {max(errors):.1e}", flush=True)
del a, b
report("dit forward + backward, checkpointed, against diffusers", lambda: grad(ours, call), lambda: grad(theirs, peer),
       args, "0.95")
