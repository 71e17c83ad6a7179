"""Prompts to videos, by the 3-step student or the 50-step teacher (UniPC with guidance).

    python sample.py --prompt "a red circle moving right quickly"                 one clip, sample.mp4
    python sample.py --prompts prompts.txt --num_videos 5 --out_dir samples       VBench's names, {prompt}-{i}.mp4
    python sample.py --prompt "..." --generator runs/wan1.3b/generator.safetensors --flow
    python sample.py --prompt "..." --preset wan1.3b --steps 50                   the teacher

With no more --steps than the student was distilled for, this is the few-step sampler of training; with more, the
teacher's. With --out_dir, the same command again goes on where it was stopped. Video i of prompt p (both from 0,
repeated prompts dropped) has the seed --seed + 100000 p + i, VBench's rule, whatever the batch size.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from cli import chosen_preset, one_line
from flow_viz import clip_beside_flow
from model import few_step, few_step_times, load_dit, sample_noise, shift_time
from raft import check_size, find_raft, load_raft, video_flow
from text import NEGATIVE_PROMPT, encode_prompts, read_prompts
from vae import load_vae
from video import open_video, write_video
from weights import REPO, WEIGHTS, header

TOY = dict(height=64, width=64, frames=17, fps=16.0, timesteps=(1000, 857, 600), batch_size=16)
WAN = dict(height=480, width=832, frames=81, fps=16.0, timesteps=(1000, 757, 522), batch_size=1)
SAMPLING = {  # defaults of each preset: timesteps are the student's; Wan's shift and guidance are those of its README
    "toy": dict(**TOY, shift=3.0, guidance=2.0, negative_prompt=NEGATIVE_PROMPT["toy"]),
    "wan1.3b": dict(**WAN, shift=8.0, guidance=6.0, negative_prompt=NEGATIVE_PROMPT["wan1.3b"]),
    "wan14b": dict(**WAN, shift=5.0, guidance=5.0, negative_prompt=NEGATIVE_PROMPT["wan14b"]),
}
TEACHER_STEPS = 50


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


def unipc_sigmas(steps, shift):
    """Noise levels of Wan's UniPC, steps + 1 floats from 0.999 (shifted) to 0, in fp32 as Wan keeps them."""
    top = torch.tensor(0.999).item()
    grid = shift_time(torch.linspace(top, 0, steps + 1, dtype=torch.float64)[:-1], shift)
    return [*grid.float().tolist(), 0.0]


def unipc(v_fn, z, steps, shift):
    """Integrate noise z to z0 with UniPC of order 2 (arXiv 2302.04867, B_2(h) = e^h - 1), as Wan's FlowUniPC scheduler.

    v_fn(z, sigma) -> v, called `steps` times. Works on the prediction x = z - sigma v, in the time
    log((1 - sigma) / sigma): a step corrects z with the x just found, then predicts the next z; the last returns its x.
    """
    sigmas = unipc_sigmas(steps, shift)
    lam = [math.log((1 - s) / s) for s in sigmas[:-1]]
    x1 = x2 = z_last = None  # x one and two steps ago; z after the last correction
    for i in tqdm(range(steps), desc="UniPC", leave=False, disable=None):
        x = z - sigmas[i] * v_fn(z, sigmas[i])
        if i == steps - 1:
            return x

        if i > 0:  # correct z, which came from sigmas[i - 1]
            h = lam[i] - lam[i - 1]
            e = math.expm1(-h)
            if i == 1:
                mean = x1 + 0.5 * (x - x1)
            else:  # the weights solve [[1, 1], [r, 1]] (rho, rho_new) = (b1, b2)
                r, phi = (lam[i - 2] - lam[i - 1]) / h, e / -h - 1
                b1, b2 = phi / e, 2 * (phi / -h - 0.5) / e
                rho = (b2 - b1) / (r - 1)
                mean = x1 + rho * (x2 - x1) / r + (b1 - rho) * (x - x1)
            z = sigmas[i] / sigmas[i - 1] * z_last - (1 - sigmas[i]) * e * mean

        h = lam[i + 1] - lam[i]  # predict z at sigmas[i + 1]
        mean = x if i == 0 else x + 0.5 * (x1 - x) * h / (lam[i - 1] - lam[i])
        z_last, x1, x2 = z, x, x1
        z = sigmas[i + 1] / sigmas[i] * z - (1 - sigmas[i + 1]) * math.expm1(-h) * mean


def teacher_sample(teacher, noise, context, negative, steps, shift, guidance):
    """Wan's own sampler: UniPC with v = v_neg + guidance (v_pos - v_neg), from noise [B, C, f, h, w] to z0."""
    def guided(z, sigma):
        # The solver has the exact noise level, the network is told it cut to whole thousandths, as in Wan.
        t = torch.full((len(z),), int(1000 * sigma) / 1000, device=z.device)
        v = teacher(z, t, context)
        return v if guidance == 1 else torch.lerp(teacher(z, t, negative), v, guidance)
    return unipc(guided, noise, steps, shift)


def decode(vae, z):
    """Latents z [B, C, f, h, w] -> pixels [B, 3, T, H, W], fp32 on the CPU, not clamped; one sample at a time."""
    return torch.cat([vae.decode(sample[None]).float().cpu() for sample in z])


@torch.no_grad()
def generate(args, net, vae, contexts, prompts, seeds):
    """Pixels [B, 3, T, H, W] in about [-1, 1], fp32 on the CPU, of one prompt and one seed a sample."""
    shape = net.cfg.in_dim, 1 + (args.frames - 1) // 4, args.height // 8, args.width // 8
    noise = sample_noise(seeds, shape, 1 if args.teacher else args.steps).to(args.device)        # [S, B, C, f, h, w]
    context = contexts(prompts).to(args.device)
    if args.teacher:
        negative = contexts([args.negative_prompt] * len(prompts)).to(args.device)
        return decode(vae, teacher_sample(net, noise[0], context, negative, args.steps, args.shift, args.guidance))
    return decode(vae, few_step(net, noise, context, few_step_times(args.timesteps, args.shift)[: args.steps]))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_flags(argv):
    def refuse(message):
        raise ValueError(f"{message} (sample.py --help lists the flags)")

    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.error = refuse  # argparse would print its usage around the one line
    flag = parser.add_argument
    flag("--prompt", action="append", default=[], help="may be repeated")
    flag("--prompts", help="a file, one prompt a line; blank lines and # comments are skipped")
    flag("--num_videos", type=int, default=1, help="videos a prompt")
    flag("--seed", type=int, default=0)
    flag("--out", help="file of a single video, overwritten; default sample.mp4")
    flag("--out_dir", help="folder of several videos, of which those already there are kept; default samples")
    flag("--flow", action="store_true", help="also write OUT_DIR-flow/NAME.flow.mp4, clip beside flow")
    flag("--preset", default="auto", help=f"{', '.join(SAMPLING)}; auto: wan1.3b where there is CUDA, else toy")
    flag("--height", type=int, help="pixels, divisible by 16")
    flag("--width", type=int, help="pixels, divisible by 16")
    flag("--frames", type=int, help="1 + 4k")
    flag("--fps", type=float, help="of the file; the network does not know it")
    flag("--steps", type=int, help="default: as many as the student has, 50 without a student")
    flag("--shift", type=float, help="of the noise levels; more stays noisy for longer")
    flag("--guidance", type=float, help="of the teacher; 1: none")
    flag("--negative_prompt", help="of the teacher; default Wan's own, empty in the toy world as in its training")
    flag("--batch_size", type=int, help="videos at once; changes speed and memory only")
    flag("--weights", help="folder of the preset's weights, default as in README")
    flag("--generator", help="file, folder or hub name; default: newest export in runs/, shipped student, base model")
    flag("--vae", help="default in the weights folder")
    flag("--text_encoder", help="folder, default the weights folder")
    flag("--raft", help="for --flow; default in the weights folder or weights/raft-things.pth")
    flag("--cache", default=str(REPO / "runs" / "contexts"), help="folder of encoded prompts")
    flag("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the DiT; auto: bf16 on CUDA, else fp32")
    flag("--device", help="default cuda where there is one, but cpu for toy")
    return parser.parse_args(argv)


def find_device(name):
    """The torch device of that name; ValueError if this machine has none, or none that the networks run on."""
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"expected a --device of this machine, got {name} ({str(error)[:60]} ...)") from None
    if device.type not in ("cpu", "cuda"):  # others lack float64 or complex numbers
        raise ValueError(f"expected --device cpu or cuda, got {name}")
    return device


def resolve(args):
    """Fill in from the preset's row what the flags leave open; raise ValueError for what cannot be sampled."""
    stated = header(args.generator).get("preset")
    if args.preset == "auto" and stated in SAMPLING:
        args.preset = stated
        print(f"preset {stated}, the generator's")
    args.preset = chosen_preset(args.preset, SAMPLING)
    args.weights = Path(args.weights or WEIGHTS[args.preset])
    for key, value in SAMPLING[args.preset].items():
        if key != "shift" and getattr(args, key, None) is None:  # a student's file may state its shift
            setattr(args, key, value)
    if args.frames % 4 != 1 or args.frames < 1:
        near = max(1, args.frames // 4 * 4 + 1)
        raise ValueError(f"expected --frames 1 + 4k (17, 49, 81), got {args.frames}: try {near}")
    if args.height % 16 or args.width % 16 or min(args.height, args.width) < 16:
        raise ValueError(f"expected --height and --width divisible by 16, got {args.height} x {args.width}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() and args.preset != "toy" else "cpu")
    device = find_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bf16" if device.type == "cuda" else "fp32"
    for key in ("num_videos", "batch_size", "fps", "steps", "shift"):
        if getattr(args, key) is not None and not 0 < getattr(args, key) < math.inf:
            raise ValueError(f"expected --{key} above 0, got {getattr(args, key)}")
    if not math.isfinite(args.guidance):
        raise ValueError(f"expected a finite --guidance, got {args.guidance}")


def is_base(args, path):
    """Whether a path is the preset's own folder, which holds the base model and no student."""
    return Path(path).resolve() == args.weights.resolve()


def choose_generator(args):
    """Decide args.generator, .steps, .timesteps, .shift and .teacher (which sampler), say so, return its header."""
    exports = (REPO / "runs").glob("*/generator.safetensors")
    found = sorted((p for p in exports if header(p).get("preset") == args.preset), key=lambda p: p.stat().st_mtime)
    shipped = [p for p in [args.weights / "student.safetensors"] if p.exists()]
    student = Path(args.generator) if args.generator else [args.weights, *shipped, *found][-1]
    meta = header(student)
    sampler = json.loads(meta.get("sampler", "{}"))  # what train.py distilled it for
    args.timesteps = sampler.get("timesteps", args.timesteps)
    args.steps = args.steps or (TEACHER_STEPS if is_base(args, student) else len(args.timesteps))
    args.teacher = args.steps > len(args.timesteps)
    if args.teacher and not args.generator:  # so many steps are meant for the base model
        student, meta, sampler = args.weights, {}, {}
    args.generator = str(student)
    args.shift = args.shift or sampler.get("shift", SAMPLING[args.preset]["shift"])
    how = f"UniPC, guidance {args.guidance:g}" if args.teacher else "few-step"
    cycle = f", cycle {meta['cycle']}" if "cycle" in meta else ""
    print(f"generator {args.generator}{cycle}: {args.steps} steps ({how})")
    return meta


def chosen_prompts(args):
    prompts = list(args.prompt) + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts and args.preset == "toy":
        prompts = ["a red circle moving right quickly"]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("expected a prompt, got none: --prompt TEXT, or --prompts FILE with one a line")
    return list(dict.fromkeys(prompts))


def plan(args, prompts, meta):
    """(prompt, seed, path, comment) of each video that is still to be made; comment holds its settings as JSON."""
    keys = ["preset", "generator", "steps", "shift", "timesteps", "height", "width", "frames", "fps", "dtype"]
    keys += ["guidance", "negative_prompt"] * args.teacher
    settings = {key: getattr(args, key) for key in keys} | dict(cycle=meta.get("cycle"))
    one, jobs = len(prompts) * args.num_videos == 1 and not args.out_dir, []
    if args.out and not (one and args.out.endswith(".mp4")):
        raise ValueError(f"--out takes one .mp4, got {args.out} for {len(prompts) * args.num_videos}: see --out_dir")
    for p, i in itertools.product(range(len(prompts)), range(args.num_videos)):
        name, seed = f"{prompts[p]}-{i}.mp4", args.seed + 100000 * p + i
        comment = json.dumps(dict(prompt=prompts[p], seed=seed, **settings), ensure_ascii=False)
        if not one and ("/" in name or len(name.encode()) > 250):
            raise ValueError(f'prompt {p + 1} cannot name a file, which has 250 bytes at most and no "/": {name[:60]}')
        path = Path(args.out or "sample.mp4") if one else Path(args.out_dir or "samples") / name
        if one or not is_done(path, comment, args.flow):
            jobs.append((prompts[p], seed, path, comment))
    return jobs


def is_done(path, comment, flow):
    """Whether a video is there, and its flow if wanted; one that is there but was made otherwise raises ValueError."""
    if not path.exists():
        return False
    with open_video(path) as (container, _):
        if container.metadata.get("comment") != comment:
            raise ValueError(f"{path} is there, made with other settings: use another --out_dir, or remove it")
    return not flow or flow_path(path).exists()


def flow_path(path):
    """Where the flow picture of a video goes: not into its folder, of which VBench takes every entry for a video."""
    return Path(f"{path.parent}-flow" if path.parent.name else "flow") / f"{path.stem}.flow.mp4"


def load_networks(args, prompts):
    """Generator, vae and a reader of contexts. The prompts come first: UMT5-XXL is gone before the others arrive."""
    if not args.weights.exists() and (is_base(args, args.generator) or not (args.vae and args.text_encoder)):
        name = WEIGHTS[args.preset].name
        fix = f"hf download Wan-AI/{name} --local-dir {args.weights}" if args.preset != "toy" else "leave --weights out"
        raise ValueError(f"expected the weights of {args.preset} in {args.weights}, no such folder: {fix}")
    texts = prompts + [args.negative_prompt] * args.teacher
    contexts = encode_prompts(texts, args.text_encoder or args.weights, args.cache, args.device)
    net, vae = load_dit(args.generator), load_vae(args.vae or args.weights)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    # CHOICE: the vae stays in fp32, as in Wan's own sampling; it is a small part of the time.
    return net.eval().to(args.device, dtype), vae.eval().to(args.device), contexts


def load_flow(args):
    """RAFT for --flow; raises ValueError for frames that are too small or too few for it."""
    if args.frames < 2:
        raise ValueError("expected --frames 5 or more with --flow, got 1")
    raft = load_raft(find_raft(args.weights, args.raft), args.device)
    check_size(raft.cfg, args.height, args.width)
    return raft


def run(argv):
    args = parse_flags(argv)
    resolve(args)
    prompts = chosen_prompts(args)
    meta = choose_generator(args)
    jobs = plan(args, prompts, meta)
    if not jobs:
        return print("every video is there already")
    raft = load_flow(args) if args.flow else None
    net, vae, contexts = load_networks(args, prompts)
    for i in tqdm(range(0, len(jobs), args.batch_size), desc="batches", disable=None):
        batch = jobs[i : i + args.batch_size]
        clips = generate(args, net, vae, contexts, [job[0] for job in batch], [job[1] for job in batch])
        for x, (_, _, path, comment) in zip(clips, batch):
            if not x.isfinite().all():
                raise ValueError(f"expected finite pixels for {path}, got others: is {args.generator} damaged?")
            if raft is not None:
                flow = video_flow(raft, x[None].clamp(-1, 1).to(args.device))[0].cpu()
                write_video(flow_path(path), clip_beside_flow(x, flow), args.fps, comment)
            write_video(path, x, args.fps, comment)
            tqdm.write(f"wrote {path}")


def main(argv=None):
    with one_line("sample.py"):
        run(argv)


if __name__ == "__main__":
    main()
