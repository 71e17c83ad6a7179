"""Prompt embedding to pixels: our samplers against diffusers' WanPipeline with the same random weights.

Claim: at most 0.95 of its time, three steps without guidance (what a distilled student does) and --steps with it (what
the teacher does). Both integrate with UniPC, so the pixels are compared first; few_step makes the same calls. The text
encoder is left out.

    python benchmarks/sampling.py                                                              # small networks
    python benchmarks/sampling.py --dim 1536 --ffn 8960 --layers 30 --vae 96 --frames 81 --height 480 --width 832 \\
        --steps 50 --device cuda --dtype bfloat16                                              # Wan2.1-T2V-1.3B's sizes
"""

import tempfile

import diffusers
import torch

from compare import flags, hardware, report, seconds
import cost
from model import load_dit
from sample import decode, teacher_sample
from vae import load_vae

args = flags(__doc__, dim=384, ffn=1536, layers=4, vae=32, frames=17, height=128, width=192, steps=6, shift=8.0,
             guidance=5.0)
dtype, f = getattr(torch, args.dtype), 1 + (args.frames - 1) // 4
shape = 1, 16, f, args.height // 8, args.width // 8
transformer = diffusers.WanTransformer3DModel(
    num_attention_heads=args.dim // 128, ffn_dim=args.ffn, num_layers=args.layers)
autoencoder = diffusers.AutoencoderKLWan(base_dim=args.vae)
with tempfile.TemporaryDirectory() as folder:
    transformer.save_pretrained(f"{folder}/dit"), autoencoder.save_pretrained(f"{folder}/vae")
    ours = load_dit(f"{folder}/dit", dtype=dtype).to(args.device)
    vae = load_vae(f"{folder}/vae", dtype).to(args.device)
scheduler = diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=args.shift)
pipe = diffusers.WanPipeline(None, None, autoencoder, scheduler, transformer).to(args.device, dtype)
pipe.set_progress_bar_config(disable=True)
noise = torch.randn(shape, device=args.device)
context, negative = (torch.randn(1, 512, 4096, device=args.device).to(dtype) for _ in range(2))


def sample(steps, guidance):
    z0 = teacher_sample(ours, noise, context, negative, steps, args.shift, guidance)
    return decode(vae, z0).clamp(-1, 1).add(1).div(2)


def peer(steps, guidance):
    x = pipe(height=args.height, width=args.width, num_frames=args.frames, num_inference_steps=steps, output_type="pt",
             guidance_scale=guidance, latents=noise, prompt_embeds=context, negative_prompt_embeds=negative).frames
    return x.transpose(1, 2).float().cpu()


print(f"DiT {args.dim}, ffn {args.ffn}, {args.layers} layers, VAE width {args.vae}, {args.frames} frames "
      f"{args.height}x{args.width}, diffusers {diffusers.__version__}; {hardware(args)}", flush=True)
with torch.no_grad():
    for steps, guidance in (3, 1.0), (args.steps, args.guidance):
        a, b = sample(steps, guidance), peer(steps, guidance)
        error = (a - b).norm() / b.norm()
        print(f"{steps} steps, guidance {guidance:g}: relative difference of the pixels {error:.1e}", flush=True)
        assert error < 3e-2, error  # not rounding alone: diffusers' noise levels lie up to 0.002 from Wan's own
        report(f"{steps} steps, guidance {guidance:g}, against WanPipeline", lambda: sample(steps, guidance),
               lambda: peer(steps, guidance), args, "0.95")
    t = torch.tensor([0.757], device=args.device)
    took = min(seconds(lambda: ours(noise, t, context), args.device) for _ in range(args.pairs))
    with cost.Count() as count:
        ours(noise, t, context)
    flop = sum(amount for kind, amount in count.work.items() if kind != "memory")
print(f"RESULT a DiT forward: {took:.3f} s, {flop / 1e12:.3g} TFLOP, {flop / took / 1e12:.3g} TFLOP/s")
