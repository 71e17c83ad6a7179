"""Prompts to videos, by the 3-step student or the 50-step teacher (UniPC with guidance).

    python sample.py --prompt "a red circle moving right quickly"                 one clip, sample.mp4
    python sample.py --prompts prompts.txt --num_videos 5 --out_dir samples       VBench's names, {prompt}-{i}.mp4
    torchrun --nproc_per_node 8 sample.py --prompts prompts.txt --out_dir ...     shared among eight cards
    python sample.py --prompt "..." --generator runs/wan1.3b/generator.safetensors --flow
    python sample.py --prompt "..." --preset wan1.3b --sampler unipc              the teacher

The weights decide the sampler: few_step, training's own, for a student, unipc for the base model. With --out_dir, the
same command again goes on where it was stopped. Video i of prompt p (both from 0, repeated prompts dropped) has the
seed --seed + 100000 p + i, VBench's rule, whatever the batch size and the number of processes.
"""

import argparse
import itertools
import json
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import chosen_preset, expect, from_json, one_line, print0, rank, say, world
from flow_viz import clip_beside_flow
from model import few_step, few_step_times, load_dit, sample_noise, shift_time
from raft import check_size, find_raft, load_raft, video_flow
from text import NEGATIVE_PROMPT, comment_of, encode_prompts, file_stem, read_prompts
from vae import load_vae
from video import is_made, write_video
from weights import REPO, WEIGHTS, header

TOY = dict(height=64, width=64, frames=17, fps=16.0, timesteps=(1000, 857, 600), batch_size=16)
WAN = dict(height=480, width=832, frames=81, fps=16.0, timesteps=(1000, 757, 522), batch_size=1)
SAMPLING = {  # defaults of each preset: timesteps are the student's; Wan's shift and guidance are those of its README
    "toy": dict(**TOY, shift=3.0, guidance=2.0, negative_prompt=NEGATIVE_PROMPT["toy"]),
    "wan1.3b": dict(**WAN, shift=8.0, guidance=6.0, negative_prompt=NEGATIVE_PROMPT["wan1.3b"]),
    "wan14b": dict(**WAN, shift=5.0, guidance=5.0, negative_prompt=NEGATIVE_PROMPT["wan14b"]),
}
TEACHER_STEPS = 50
RANGES = {  # of the flags; video 100000 would have the next prompt's seed
    "num_videos": (1, 100000), "seed": (0, 10**15), "height": (16, 4096), "width": (16, 4096), "frames": (1, 4097),
    "fps": (0.1, 1000), "steps": (1, 1000), "shift": (0.01, 1000), "guidance": (-100, 100), "batch_size": (1, 1024),
}


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
    for i in tqdm(range(steps), desc="UniPC", leave=False, disable=rank() > 0 or None):
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
def generate(args, net, vae, contexts, texts, seeds):
    """Pixels [B, 3, T, H, W] in about [-1, 1], fp32 on the CPU, of one text and one seed a sample."""
    shape = net.cfg.in_dim, 1 + (args.frames - 1) // 4, args.height // 8, args.width // 8
    few = args.sampler == "few_step"
    noise = sample_noise(seeds, shape, args.steps if few else 1).to(args.device)                 # [S, B, C, f, h, w]
    context = contexts(texts).to(args.device)
    if few:
        return decode(vae, few_step(net, noise, context, few_step_times(args.timesteps, args.shift)[: args.steps]))
    negative = contexts([args.negative_prompt] * len(texts)).to(args.device)
    return decode(vae, teacher_sample(net, noise[0], context, negative, args.steps, args.shift, args.guidance))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_flags(argv):
    def refuse(message):
        raise ValueError(f"{message} (sample.py --help lists the flags)")

    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").split("\n")[0])
    parser.error = refuse  # argparse would print its usage around the one line
    flag = parser.add_argument
    flag("--prompt", action="append", default=[], help="may be repeated")
    flag("--prompts", help="a file, one prompt a line; blank lines and # comments are skipped")
    flag("--extended_prompts", help="another, line for line what the videos of --prompts, which name them, are made of")
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
    flag("--sampler", choices=["few_step", "unipc"], help="default: few_step for a student, unipc for the base model")
    flag("--timesteps", type=int, nargs="+", help="of few_step, falling from 1000; default the student's own")
    flag("--steps", type=int, help="default 50 of unipc; of few_step the first so many --timesteps, default all")
    flag("--shift", type=float, help="of the noise levels; more stays noisy for longer")
    flag("--guidance", type=float, help="of unipc; 1: none")
    flag("--negative_prompt", help="of unipc; default Wan's own, empty in the toy world as in its training")
    flag("--batch_size", type=int, help="videos at once; only rounding differs: in bf16 .1 of 255 levels, in places 20")
    flag("--weights", help="folder of the preset's weights, default as in README")
    flag("--generator", help="file, folder, hub name, number of a kept export; default: newest in runs/, shipped, base")
    flag("--vae", help="default in the weights folder")
    flag("--text_encoder", help="folder, default the weights folder")
    flag("--raft", help="for --flow; default in the weights folder or weights/raft-things.pth")
    flag("--cache", default=str(REPO / "runs" / "contexts"), help="folder of encoded prompts")
    flag("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the DiT; auto: bf16 on CUDA, else fp32")
    flag("--device", help="default cuda, a card for each process, where there is one, but cpu for toy")
    flag("--text_device", help="of the text encoder; cpu: 11 GB of memory there instead of on the card")
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
        print0(f"preset {stated}, the generator's")
    args.preset = chosen_preset(args.preset, SAMPLING)
    args.weights = Path(args.weights or WEIGHTS[args.preset])
    for key in ("height", "width", "frames", "fps", "batch_size"):
        if getattr(args, key) is None:
            setattr(args, key, SAMPLING[args.preset][key])
    for key, (low, high) in RANGES.items():
        value = getattr(args, key)
        expect(value is None or low <= value <= high, f"--{key} from {low} to {high}", value)
    expect(args.frames % 4 == 1, "--frames 1 + 4k (17, 49, 81)", f"{args.frames}: try {args.frames // 4 * 4 + 1}")
    expect(args.height % 16 == args.width % 16 == 0, "--height and --width divisible by 16",
           f"{args.height} x {args.width}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() and args.preset != "toy" else "cpu")
    if world() > 1 and args.device == "cuda":
        each, cards = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        expect(each <= cards, f"at most {cards} processes on this node, one a GPU", f"{each}: or --device cpu")
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    args.text_device = args.text_device or args.device
    device, _ = find_device(args.device), find_device(args.text_device)
    if args.dtype == "auto":
        args.dtype = "bf16" if device.type == "cuda" else "fp32"


def is_base(args, path):
    """Whether a path is the preset's own folder or hub repository, which holds the base model and no student."""
    name = WEIGHTS[args.preset].name
    hub = f"Wan-AI/{name}", f"Wan-AI/{name}-Diffusers"
    return Path(path).resolve() == args.weights.resolve() or str(path) in hub


def distilled_for(path):
    """{timesteps, shift} of a student whose header states them, as train.py's exports do; else {}."""
    text = header(path).get("sampler", "{}")
    try:
        stated = from_json(text)
        if stated:
            few_step_times(stated["timesteps"], stated["shift"])
        return dict(stated)
    except (ValueError, TypeError, LookupError):
        raise ValueError(f"expected falling timesteps and a shift in the header of {path}, got {text[:60]}") from None


def choose_generator(args):
    """Decide args.generator, .sampler and its settings; say so, return the generator's header."""
    student, number = args.generator, f"-{int(args.generator):06d}" if (args.generator or "").isdigit() else ""
    if number or not student:  # a number is that of a kept export, train.py --keep_every
        exports = (REPO / "runs").glob(f"*/generator{number}.safetensors")
        found = sorted((p for p in exports if header(p).get("preset") == args.preset), key=lambda p: p.stat().st_mtime)
        shipped = [p for p in [args.weights / "student.safetensors"] if p.exists()]
        expect(found or not number, f"a runs/*/generator{number}.safetensors", "none: see train.py --keep_every")
        student = args.weights if args.sampler == "unipc" and not number else [args.weights, *shipped, *found][-1]
    base, meta, stated = is_base(args, student), header(student), distilled_for(student)
    known = "few_step" if stated else "unipc" if base else "few_step" if args.timesteps else None
    args.sampler = args.sampler or known
    expect(args.sampler, "--sampler few_step, for a student, or unipc, for a teacher",
           f"none, and {student} does not state which it is")
    few, guided = args.sampler == "few_step", ("guidance", "negative_prompt")
    expect(args.generator or not (few and base), "a student for few_step, --generator or an export in runs/", "none")
    for key in guided if few else ("timesteps",):
        expect(getattr(args, key) is None, f"no --{key} with --sampler {args.sampler}", getattr(args, key))
    for key in ("shift", "timesteps") if few else ("shift", *guided):
        if getattr(args, key) is None:
            setattr(args, key, {**SAMPLING[args.preset], **stated}[key])
    args.steps = args.steps or (len(args.timesteps) if few else TEACHER_STEPS)
    if few:
        count = len(few_step_times(args.timesteps, args.shift))
        expect(args.steps <= count, f"--steps up to the student's {count}", f"{args.steps}: see --timesteps and, for "
               "the base model, --sampler unipc")
    args.generator = str(student)
    how = "few-step" if few else f"UniPC, guidance {args.guidance:g}"
    cycle = f", cycle {meta['cycle']}" if "cycle" in meta else ""
    print0(f"generator {args.generator}{cycle}: {args.steps} steps ({how})")
    return meta


def chosen_prompts(args):
    """{prompt, after which a file is named: text, of which it is made}; of a repeated prompt the first counts."""
    named = read_prompts(args.prompts) if args.prompts else []
    texts = read_prompts(args.extended_prompts) if args.extended_prompts else named
    expect(len(texts) == len(named), f"--extended_prompts with a line for each of the {len(named)} of --prompts",
           len(texts))
    given = [prompt.encode(errors="surrogateescape").decode(errors="replace").strip() for prompt in args.prompt]
    if not given + named and args.preset == "toy":
        given = ["a red circle moving right quickly"]
    expect(given + named and all(given), "a prompt", "none: --prompt TEXT, or --prompts FILE with one a line")
    chosen = {}
    for prompt, text in [*zip(given, given), *zip(named, texts)]:
        chosen.setdefault(prompt, text)
    return chosen


def plan(args, prompts, meta):
    """(text, seed, path, comment) of each video, None for one that is there; comment holds its settings as JSON."""
    keys = ["preset", "generator", "sampler", "steps", "shift", "timesteps", "guidance", "negative_prompt", "height",
            "width", "frames", "fps", "dtype"]
    settings = {key: getattr(args, key) for key in keys} | dict(cycle=meta.get("cycle"))
    count, jobs = len(prompts) * args.num_videos, []
    expect(count <= 10**6, "1 to 1000000 videos in all", count)
    one = count == 1 and not args.out_dir
    expect(not args.out or one and args.out.endswith(".mp4"), "--out to be one .mp4",
           f"{args.out} for {count} videos: see --out_dir")
    for (p, (prompt, text)), i in itertools.product(enumerate(prompts.items()), range(args.num_videos)):
        seed = args.seed + 100000 * p + i
        extended = {} if text == prompt else {"extended_prompt": text}
        comment = json.dumps(dict(prompt=prompt, **extended, seed=seed, **settings), ensure_ascii=False)
        name = f"{file_stem(prompt)}-{i}.mp4"
        path = Path(args.out or "sample.mp4") if one else Path(args.out_dir or "samples") / name
        there = not one and is_done(path, comment, args.flow)
        jobs.append(None if there else (text, seed, path, comment))
    return jobs


def is_done(path, comment, flow):
    """Whether a video is there, and its flow if wanted; one that is there but was made otherwise raises ValueError."""
    if path.exists() and comment_of(path) != comment:
        raise ValueError(f"{path} is there, made with other settings: use another --out_dir, or remove it")
    return path.exists() and (not flow or is_made(flow_path(path)))


def flow_path(path):
    """Where the flow picture of a video goes: not into its folder, of which VBench takes every entry for a video."""
    return Path(f"{path.parent}-flow" if path.parent.name else "flow") / f"{path.stem}.flow.mp4"


def load_contexts(args, texts):
    """A reader of the texts' contexts, which one process a node encodes, before the other networks are loaded."""
    if not args.weights.exists() and (args.generator == str(args.weights) or not (args.vae and args.text_encoder)):
        name = WEIGHTS[args.preset].name
        fix = f"hf download Wan-AI/{name} --local-dir {args.weights}" if args.preset != "toy" else "leave --weights out"
        raise ValueError(f"expected the weights of {args.preset} in {args.weights}, no such folder: {fix}")
    texts = texts + [args.negative_prompt] * (args.sampler == "unipc")
    return encode_prompts(texts, args.text_encoder or args.weights, args.cache, args.text_device)


def load_flow(args):
    """RAFT for --flow; raises ValueError for frames that are too small or too few for it."""
    expect(args.frames > 1, "--frames 5 or more with --flow", 1)
    raft = load_raft(find_raft(args.weights, args.raft), args.device)
    check_size(raft.cfg, args.height, args.width)
    return raft


def run(argv):
    args = parse_flags(argv)
    resolve(args)
    prompts = chosen_prompts(args)
    meta = choose_generator(args)
    planned = plan(args, prompts, meta)
    left, jobs = [job for job in planned if job], [job for job in planned[rank() :: world()] if job]
    if not left:
        return print0("every video is there already")
    raft = load_flow(args) if args.flow else None
    contexts = load_contexts(args, [job[0] for job in left])
    if jobs:  # CHOICE: the vae stays in fp32, as in Wan's own sampling; it is a small part of the time
        net, vae = load_dit(args.generator).eval(), load_vae(args.vae or args.weights).eval().to(args.device)
        net = net.to(args.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    if world() > 1:  # no rank writes while another plans; and what fails now is told by the rank that it befalls
        dist.init_process_group("gloo")
    for i in tqdm(range(0, len(jobs), args.batch_size), desc="batches", disable=rank() > 0 or None):
        batch = jobs[i : i + args.batch_size]
        clips = generate(args, net, vae, contexts, [job[0] for job in batch], [job[1] for job in batch])
        for x, (_, _, path, comment) in zip(clips, batch):
            expect(x.isfinite().all(), f"finite pixels for {path}", f"others: is {args.generator} damaged?")
            if raft is not None:
                flow = video_flow(raft, x[None].clamp(-1, 1).to(args.device))[0].cpu()
                write_video(flow_path(path), clip_beside_flow(x, flow), args.fps, comment)
            write_video(path, x, args.fps, comment)
            say(f"wrote {path}")


def main(argv=None):
    with one_line("sample.py"):
        run(argv)


if __name__ == "__main__":
    main()
