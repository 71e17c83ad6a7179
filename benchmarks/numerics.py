"""bf16 against fp32: relative error of each network's output, and of the gradient that reaches z0 through the flow.

One figure a sample, their median and the worst: a few samples have ten times the gradient of the others and would
speak for all.

    python benchmarks/numerics.py                                           # the shipped toy weights
    python benchmarks/numerics.py --preset wan1.3b --height 480 --width 832 --batch 1 --device cuda

RAFT stays in fp32, as in train.py; what it is given has been through bf16. Random weights would mislead: through a
random VAE and RAFT the gradient's cosine was 0.80 where the trained toy networks have 0.999.
"""

import torch

from compare import flags, hardware
from discriminator import PROMPT, MotionDiscriminator, motion_tensor
from model import few_step, few_step_times, load_dit, sample_noise
from raft import find_raft, load_raft, video_flow
from text import load_text_encoder
from vae import load_vae
from weights import WEIGHTS

args = flags(__doc__, preset="toy", height=64, width=64, batch=16, window=2, depth=4)
folder = WEIGHTS[args.preset]
encode = load_text_encoder(folder, args.device)
texts = "a red circle moving right", PROMPT
context, motion_context = (encode([text] * args.batch).to(args.device) for text in texts)
del encode
dit, vae = load_dit(folder).requires_grad_(False).to(args.device), load_vae(folder).to(args.device)
raft = load_raft(find_raft(folder), args.device)
net = MotionDiscriminator(dit.cfg, range(args.depth)).to(args.device).load_trunk(dit).requires_grad_(False)
shape = dit.cfg.in_dim, args.window + 2, args.height // 8, args.width // 8
noise = sample_noise(range(args.batch), shape, 3).to(args.device)
t = torch.zeros(args.batch, device=args.device)
with torch.no_grad():
    z0 = few_step(dit, noise, context, few_step_times())


def outputs(dtype):
    for part in dit, net.trunk, vae:
        part.to(dtype)
    z = z0.clone().requires_grad_()
    x = vae.decode_window(z, 1, args.window)
    flow = video_flow(raft, x)
    seen = vae.encode(motion_tensor(flow))
    logits = net(seen, t, motion_context)
    logits.sum().backward()
    with torch.no_grad():
        v = dit(z0, t + 0.5, context)
    return {"DiT": v, "VAE decode": x, "flow": flow, "VAE encode": seen, "logits": logits, "gradient at z0": z.grad}


print(f"{args.preset}, {args.batch} x {4 * args.window + 1} frames {args.height}x{args.width}; {hardware(args)}")
exact, rounded = outputs(torch.float32), outputs(torch.bfloat16)
for name, want in exact.items():
    got, want = (x.detach().double().reshape(args.batch, -1) for x in (rounded[name], want))
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(got, want)
    print(f"RESULT bf16 {name}: relative error {error.median():.1e} (worst {error.max():.1e}), "
          f"cosine {cosine.median():.5f} ({cosine.min():.5f})")
