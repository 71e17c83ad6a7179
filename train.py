"""MoGAN post-training (arXiv 2511.21592), Algorithm 1: one code path from a laptop process to a cluster.

    torchrun --nproc_per_node 2 train.py                                # the toy world: CPU, no downloads
    torchrun --nproc_per_node 16 train.py --videos DIR --prompts FILE   # Wan2.1-T2V-1.3B, the paper's setting
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...   # 2 nodes
    python cost.py --preset wan1.3b --ranks 16                          # what that needs, before it is rented

Every field of Config is a flag. Running the same command again resumes from the newest checkpoint in --out.
"""

import itertools
import json
import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import checkpoint
from cli import chosen_preset, expect, gathered, given_flags, one_line, print0, rank, setup, world
from discriminator import PROMPT, MotionDiscriminator, motion_tensor
from flow_viz import clip_beside_flow
from model import (Draw, add_noise, attention_backend, few_step, few_step_times, load_dit, sample_noise, seed_of,
                   shift_time, velocity_to_x0)
from raft import check_size, find_raft, load_raft, video_flow
from text import NEGATIVE_PROMPT, encode_prompts, read_prompts
from vae import load_vae
from video import FPS, real_clips, to_float, write_video
from weights import REPO, WEIGHTS, find_weights

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Defaults are the paper's values for wan1.3b; a preset is the list of what differs.


@dataclass
class Config:
    preset: str = "auto"            # toy, wan1.3b, wan14b; auto: wan1.3b where CUDA is available, else toy
    out: str = ""                   # run folder, default runs/<preset>: checkpoints, log, samples, exports
    seed: int = 0                   # of every random number
    # weights: of generator and fake score a file, folder or hub name
    weights: str = ""               # folder of the preset's weights, default as in README
    generator: str = ""             # 3-step student to start from; default the preset's own, else the teacher
    fake_score: str = ""            # file to start from, as a run exports it; default the teacher
    raft: str = ""                  # default in the weights folder or weights/raft-things.pth
    # data
    videos: str = str(REPO / "data" / "videos")          # folder of real videos, or a list of clips (video.py)
    prompts: str = str(REPO / "data" / "prompts.txt")    # file, one prompt a line
    height: int = 480               # pixels, divisible by 16
    width: int = 832                # pixels, divisible by 16
    frames: int = 81                # 1 + 4k
    workers: int = 2                # processes per rank that decode real videos ahead of the step
    # length of each phase
    cycles: int = 800               # full MoGAN cycles; CHOICE: what App. B calls 800 steps
    dmd_warmup: int = -1            # cycles of DMD alone first; -1: 600 from the teacher, 0 from a 3-step student
    fake_warmup: int = -1           # cycles of the fake score alone at first; -1: 50 for a student without --fake_score
    discriminator_warmup: int = 50  # CHOICE: cycles of fake score and discriminator, at most, until it SEPARATES
    # optimisation
    batch: int = 16                 # samples of a generator or fake-score update, over all ranks
    discriminator_batch: int = 64   # generated clips, and as many real, of its update; at most batch * fake_updates
    micro_batch: int = 1            # samples that a rank computes at once; gradients accumulate over its share
    lr_generator: float = 1e-5      # learning rates of AdamW
    lr_fake_score: float = 1e-5     # as above
    lr_discriminator: float = 1e-5  # as above
    ema: float = 0.0                # decay of an averaged generator, exported beside the plain one; 0: none
    dtype: str = "auto"             # compute: bf16, fp32; auto: bf16 on CUDA. Master weights are fp32
    # few-step sampler and distribution matching
    timesteps: tuple = (1000, 757, 522)  # CHOICE: of the few-step sampler, CausVid's
    shift: float = 8.0              # of the noise levels, towards noise
    guidance: float = 3.5           # CHOICE: w of x_pos + w (x_pos - x_neg), the usual scale minus 1; CausVid's
    fake_updates: int = 4           # of the fake score, a cycle
    dmd: bool = True                # distribution matching; without it the ablation "no DMD" of Table 2
    # flow GAN
    lambda_g: float = 0.5           # lambda_1, weight of the generator's loss, Eq. 5
    lambda_d: float = 0.5           # lambda_2, weight of the discriminator's loss, Eq. 4
    lambda_r1: float = 0.3          # weight of R1; both 0: the ablation "no R1, R2"
    lambda_r2: float = 0.3          # weight of R2; ten times more: less motion, less jitter on the toy world
    sigma: float = 0.01             # standard deviation of the noise of R1 and R2
    window: int = 12                # four-frame chunks after a boundary frame: 12 are the paper's 49 frames
    raft_iters: int = 12            # CHOICE: refinements of a flow, RAFT's training length
    flow_scale: float = 16.0        # px per 1/16 s, near the real clips' speed: five times that taught nothing (toy)
    taps: tuple = (7, 13, 15)       # DiT blocks with a head; the last is the discriminator's last
    latent_gan: bool = False        # the discriminator sees the video's latents, not its flow: ablation of Table 2
    # memory against time; the result is the same
    checkpointing: bool = True      # recompute each DiT block in backward
    shard: int = 0                  # ranks that share one copy of the parameters; 0: those of a node, 1: a copy each
    # bookkeeping
    save_every: int = 20            # cycles between checkpoints, exports and sample clips
    keep_every: int = 0             # cycles between exports that stay, numbered, in bf16; 0: none stays
    samples: int = 4                # sample clips, of fixed prompts and seeds


# The recipe's constants, the one place to edit them.
BETAS, WEIGHT_DECAY = (0.0, 0.999), 0.01  # CHOICE: beta_1 0, so that the generator's objectives share no momentum
MAX_GRAD_NORM = 10.0                      # gradients are clipped to it
SEPARATES = 1.25                          # gan_d, a moving average, under which a discriminator may teach; chance 1.39
T_MIN, T_MAX = 0.02, 0.98                 # of the timesteps of score updates
LATENTS_PER_PASS = 3                      # through the VAE at once: the least memory for the paper's window

PRESETS = {
    "wan1.3b": {}, "wan14b": {}, "toy": dict(
        videos="", prompts="", height=64, width=64, frames=17, cycles=60, discriminator_warmup=40, samples=48,
        batch=12, discriminator_batch=12, micro_batch=12, fake_updates=2, lr_generator=1e-4, lr_fake_score=4e-4,
        lr_discriminator=3e-4, timesteps=(1000, 857, 600), shift=3.0, guidance=1.0, sigma=0.05, window=2,
        raft_iters=4, flow_scale=3.0, taps=(1, 2, 3), checkpointing=False, shard=1),
}
RANGES = {  # least and most of flags; of the others 0 and 100,000
    **dict.fromkeys(("batch", "discriminator_batch", "micro_batch", "fake_updates", "raft_iters", "window"), (1, 4096)),
    **dict.fromkeys(("height", "width", "frames"), (1, 4097)), "save_every": (1, 10**5), "seed": (0, 10**15),
    **dict.fromkeys(("sigma", "flow_scale", "shift"), (1e-6, 1000)), "workers": (0, 100), "ema": (0, 1)}


def parse_flags(argv=None):
    """Config from flags over the preset's row over the defaults; ValueError, one line, for what cannot run."""
    flags = given_flags(Config, argv, __doc__, RANGES)
    preset = chosen_preset(flags.get("preset", "auto"), PRESETS)
    cfg = Config(**{**PRESETS[preset], **flags, "preset": preset})
    cfg.out, cfg.weights = cfg.out or str(REPO / "runs" / preset), cfg.weights or str(WEIGHTS[preset])
    student = Path(cfg.weights) / "student.safetensors"
    cfg.generator = cfg.generator or (str(student) if student.exists() else "")
    begun = checkpoint.begun_with(cfg.out)
    if cfg.dmd_warmup < 0:
        # CHOICE: 600 cycles of 16, 9,600 samples at 1e-5, to a 3-step start; the paper takes one and tells no length.
        cfg.dmd_warmup = begun.get("dmd_warmup", 0 if cfg.generator else 600)
    if cfg.fake_warmup < 0:  # CHOICE: the fake score starts as the teacher, which a distilled generator has left
        cfg.fake_warmup = begun.get("fake_warmup", 50 if cfg.generator and not cfg.fake_score else 0)
    if not cfg.dmd:
        cfg.dmd_warmup = cfg.fake_warmup = 0
    check(cfg)
    return cfg


def check(cfg):
    """Raise ValueError, one line, for settings that would fail late or be misread."""
    expect(cfg.dtype in ("auto", "bf16", "fp32"), "--dtype auto, bf16 or fp32", cfg.dtype)
    size, chunks, rollouts = f"{cfg.height} x {cfg.width}", cfg.frames // 4, cfg.batch * cfg.fake_updates
    expect(cfg.frames % 4 == 1 < cfg.frames, "--frames 1 + 4k (5, 9, ..., 81)", f"{cfg.frames}: try {4 * chunks + 1}")
    expect(cfg.height % 16 == cfg.width % 16 == 0, "sides divisible by 16", size)
    expect(cfg.window <= chunks, f"--window 1 to {chunks} chunks for {cfg.frames} frames", cfg.window)
    expect(cfg.discriminator_batch <= rollouts, f"--discriminator_batch at most batch * fake_updates = {rollouts}, "
           "since it reuses the fake score's samples", cfg.discriminator_batch)
    expect(cfg.dmd or cfg.generator, "a 3-step --generator with --no-dmd", "none: the teacher is not one")


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: one path for one process or many


def shard(net, mesh, dtype, cfg):
    """FSDP2: each block, then the rest. Only `net(...)` may be called afterwards."""
    trunk = getattr(net, "trunk", net)
    for block in trunk.blocks:
        block.checkpointing = cfg.checkpointing
    parts = [(block, dtype) for block in trunk.blocks if cfg.shard != 1]  # 1: in one piece, faster for a small network
    if dtype and trunk is not net:  # CHOICE: a discriminator's heads in fp32: R1 and R2 compare logits bf16 cannot tell
        parts += [(part, None) for part in (*net.heads, net.logit)]
    for part, compute in *parts, (net, dtype):
        # Until now parameters are a file's pages, maybe bf16. What trains becomes an fp32 master; the rest needs none.
        for p in part.parameters():
            p.data = p.data.to(mesh.device_type, torch.float32 if p.requires_grad else compute or torch.float32)
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False))
    return net


@contextmanager
def frozen(net):
    """Freeze a sharded network for a while; what was frozen before stays so."""
    net.reshard()  # a forward without backward leaves the root gathered: the flag would miss its shards
    parameters = [p for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    yield
    net.reshard()
    for p in parameters:
        p.requires_grad_(True)


def micro_batches(batch, size):
    """This rank's micro-batches of a global batch: (sample indices, weights), equally many on every rank.

    Where the batch does not divide, the last samples are padding of weight 0. Weights sum to the world size over
    all ranks, as FSDP averages gradients over ranks: the result is the global batch's mean on any number of them.
    """
    mine = [i * world() + rank() for i in range(math.ceil(batch / world()))]
    for first in range(0, len(mine), size):
        index = mine[first : first + size]
        yield index, torch.tensor([world() / batch if i < batch else 0.0 for i in index])


def discriminator_micro_batches(cfg):
    """The same for a discriminator update, whose generated clips are the fake score's rollouts in their order."""
    for k in range(math.ceil(cfg.discriminator_batch / cfg.batch)):
        for index, weight in micro_batches(cfg.batch, cfg.micro_batch):
            used = torch.tensor([k * cfg.batch + i < cfg.discriminator_batch for i in index])
            yield [k * cfg.batch + i for i in index], weight * used * cfg.batch / cfg.discriminator_batch


def global_means(sums):
    """Means over the global batch, by name, of this rank's weighted sums; weights as in `micro_batches`."""
    stack = torch.stack([value.double() for value in sums.values()]) / world()
    dist.all_reduce(stack)
    return dict(zip(sums, stack.tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# The losses. All return one value per sample, [B].


def mean(x):
    return x.flatten(1).mean(dim=1)


def dmd_loss(z0, x0_real, x0_fake):
    """Eq. 1-2: its gradient in z0 goes as (x0_fake - x0_real) / mean|z0 - x0_real|, the difference of the scores.

    CHOICE: Eq. 1 prints the opposite sign, which would raise the KL; DMD2 (arXiv 2405.14867) descends it.
    """
    grad = (x0_fake - x0_real) / mean((z0 - x0_real).abs()).view(-1, 1, 1, 1, 1)
    return 0.5 * mean((z0 - (z0 - grad).detach()).square())


def fake_loss(v_fake, noise, z0):
    """Eq. 3: flow matching of the fake score on the generator's samples."""
    return mean((v_fake - (noise - z0)).square())


def gan_g_loss(logit_gen):
    """Eq. 5, g(x) = log(1 + e^x)."""
    return F.softplus(-logit_gen)


def gan_d_loss(logit_real, logit_gen):
    """Eq. 4."""
    return F.softplus(-logit_real) + F.softplus(logit_gen)


def r_loss(logit, logit_noised, sigma):
    """Eq. 6-7: a finite difference, as FSDP with checkpointing cannot differentiate a gradient penalty.

    CHOICE: divided by sigma, it estimates |grad D|^2 whatever sigma is; as printed it is 1e-4 of that: no effect.
    """
    return ((logit - logit_noised) / sigma).square()


def add(sums, weight, **losses):
    """Add a micro-batch's weighted losses, each [B], to the sums of their names; returns what was added, in order."""
    parts = []
    for name, loss in losses.items():
        expect(loss.shape == weight.shape, f"{name} of one value per sample, {list(weight.shape)}", list(loss.shape))
        parts.append((loss * weight.to(loss.device, non_blocking=True)).sum())
        sums[name] = sums.get(name, 0) + parts[-1].detach()
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Networks and optimizers


def load_networks(cfg):
    """Generator, teacher, fake score and discriminator as their files' pages, and the frozen VAE and RAFT, fp32."""
    vae, raft = load_vae(cfg.weights), load_raft(find_raft(cfg.weights, cfg.raft))
    check_size(raft.cfg, cfg.height, cfg.width)
    teacher, generator = (load_dit(path, dtype=None) for path in (cfg.weights, cfg.generator or cfg.weights))
    fake_score = load_dit(cfg.fake_score or cfg.weights, dtype=None, entry="critic")  # as CausVid's checkpoints call it
    for name, net in dict(generator=generator, fake_score=fake_score).items():
        expect(net.cfg == teacher.cfg, f"a {name} of the teacher's architecture {teacher.cfg}", net.cfg)
    torch.manual_seed(cfg.seed)  # the heads must be the same on every rank before they are sharded
    discriminator = MotionDiscriminator(teacher.cfg, cfg.taps, "meta").load_trunk(teacher)
    return generator, teacher.requires_grad_(False), fake_score, discriminator, vae, raft


def adamw(net, lr):
    """AdamW of what is not frozen; its state is there at once: a checkpoint has the same tensors at any step."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    # Fused: no temporaries, and FSDP dispatches one operation, not fifteen that each take 0.1 s the first time.
    optimizer = torch.optim.AdamW(parameters, lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    for p in parameters:
        optimizer.state[p] = dict(
            step=torch.tensor(0.0, device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def train(cfg):
    for path in filter(None, (cfg.weights, cfg.generator, cfg.fake_score)):  # bad input shows first
        find_weights(path, "a Wan DiT")
    find_weights(find_raft(cfg.weights, cfg.raft), "RAFT")
    prompts, times = read_prompts(cfg.prompts), few_step_times(cfg.timesteps, cfg.shift)
    print0(f"generator: {cfg.generator or 'the teacher itself'}; {cfg.fake_warmup} cycles of the fake score, "
           f"{cfg.dmd_warmup} of DMD, at most {cfg.discriminator_warmup} of the discriminator, {cfg.cycles} of MoGAN")
    phases = ["fake_warmup"] * cfg.fake_warmup + ["dmd_warmup"] * cfg.dmd_warmup
    phases += ["discriminator_warmup"] * cfg.discriminator_warmup + ["mogan"] * cfg.cycles
    out, last, start = Path(cfg.out), len(phases), checkpoint.start_of(cfg, len(phases))
    keys = [[(cycle, i) for i in index] for cycle in range(max(start, cfg.fake_warmup + cfg.dmd_warmup), last)
            for index, _ in discriminator_micro_batches(cfg)]
    real_frames = cfg.frames if cfg.latent_gan else 1 + 4 * cfg.window
    reals = real_clips(cfg.videos, keys, real_frames, (cfg.height, cfg.width), cfg.seed, cfg.workers, cfg.latent_gan)

    device, mesh = setup(cfg.shard, cpu=cfg.preset == "toy")
    if keys:  # the first ones now: there may be no usable video; not before, as their pinned memory is this device's
        reals = itertools.chain([next(reals)], reals)
    checkpoint.claim(out, start)
    if start == last and checkpoint.is_finished(cfg, last):
        return print0(f"nothing left to train: the run in {out} has done its {last} cycles (--out for another run)")
    # The text encoder goes before the rest is loaded. Of the prompts it sees those that this run draws, with padding.
    fixed, roles = (NEGATIVE_PROMPT[cfg.preset], PROMPT), ("dmd", "gan", *map("fake{}".format, range(cfg.fake_updates)))
    sampled = [prompts[seed_of("prompt", i) % len(prompts)] for i in range(cfg.samples + -cfg.samples % world())]
    drawn = Draw.all_prompts(prompts, cfg.seed, range(start, last), roles, cfg.batch + -cfg.batch % world())
    contexts = encode_prompts([*fixed, *sampled, *drawn], cfg.weights, out.parent / "contexts", device)
    negative, motion_context = contexts(fixed).to(device).split(1)
    generator, teacher, fake_score, discriminator, vae, raft = load_networks(cfg)
    dtype = torch.bfloat16 if cfg.dtype == "bf16" or (cfg.dtype == "auto" and device.type == "cuda") else None
    vae, raft = vae.to(device, dtype), raft.to(device)
    for net in generator, fake_score, teacher, discriminator:
        shard(net, mesh, dtype, cfg)
    nets = dict(generator=generator, fake_score=fake_score, discriminator=discriminator)
    optimizers = {name: adamw(net, getattr(cfg, f"lr_{name}")) for name, net in nets.items()}
    ema = {key: value.clone() for key, value in generator.state_dict().items()} if cfg.ema else {}
    state = {**checkpoint.live_state(nets, optimizers, ema), "separation": torch.tensor(math.log(4))}
    checkpoint.load(cfg.out, state)
    shape = teacher.cfg.in_dim, 1 + cfg.frames // 4, cfg.height // 8, cfg.width // 8  # of a latent clip, [C, f, h, w]
    if device.type == "cuda":
        print0(f"attention of {dtype or torch.float32}: {attention_backend(teacher.cfg, shape, dtype, device)}")
    for net in nets.values():  # FSDP fixes a net's gradient dtype at its first forward, before the loop freezes any
        with torch.no_grad():
            net(torch.zeros(1, shape[0], 1, 2, 2, device=device), torch.zeros(1, device=device), motion_context)

    def rollout(draw):
        """z0 by backward simulation from fresh prompts and noise, and their context. Alg. 1 l.4-6"""
        context = contexts(draw.prompts(prompts)).to(device)
        # CHOICE: one exit step for all samples of an update: ranks must call a sharded network equally often.
        exit_step, noise = draw.choice("exit", len(times)), draw.noise(shape, len(times)).to(device)
        return few_step(generator, noise, context, times, exit_step), context  # CHOICE: l.6 feeds it the final z0

    def score_times(draw):
        """t [B] of a score update. CHOICE: uniform, shifted, clamped, as CausVid; the paper: t ~ [0, 1]."""
        return shift_time(draw.uniform("t"), cfg.shift).clamp(T_MIN, T_MAX).to(device)

    def encode_motion(x, speed=1.0):
        """Pixels, whose flow times speed is px per 1/16 s -> latents of their motion. CHOICE: by the frozen VAE."""
        o = motion_tensor(video_flow(raft, x, cfg.raft_iters) * speed, cfg.flow_scale)
        return vae.encode(o, LATENTS_PER_PASS)

    def encode_generated(z0, start):
        """What the discriminator sees of z0: the motion of a window, decoded with the state before it detached."""
        return z0 if cfg.latent_gan else encode_motion(vae.decode_window(z0, start, cfg.window, LATENTS_PER_PASS))

    def encode_real(x, speed):
        """What it sees of real clips, x [B, 3, T, H, W] as uint8 and speed [B] (video.py)."""
        x, speed = to_float(x.to(device, non_blocking=True)), speed.view(-1, 1, 1, 1, 1).to(device)
        return vae.encode(x, LATENTS_PER_PASS) if cfg.latent_gan else encode_motion(x, speed)

    def logits(seen):
        """The discriminator's judgement [B] of what it sees [B, C, f, h, w], at t* = 0 with one prompt (App. A)."""
        t = torch.zeros(len(seen), device=device)
        return discriminator(seen, t, motion_context.expand(len(seen), -1, -1))

    def update(name, sums, network="generator"):
        """Clip the gradient and step, on all ranks alike; returns the figures of the update of this name.

        An update that is not finite is left out and counted; five in a row raise ValueError.
        """
        parameters, optimizer = nets[network].parameters(), optimizers[network]
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM, foreach=True).full_tensor().item()
        figures = {**global_means(sums), f"norm_{name}": norm}
        failures[name] = 0 if all(map(math.isfinite, figures.values())) else failures.get(name, 0) + 1
        if failures[name]:
            print0(f"left out: a {name} update with {figures} ({failures[name]} in a row)")
            expect(failures[name] < 5, f"finite {name} updates", "five in a row that are not: lower the learning rate "
                   f"or try --dtype fp32; the last checkpoint in {out} is untouched")
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return figures

    @torch.no_grad()
    def sample_clips():
        """Sample fixed prompts with fixed seeds; four become clips beside their flow, the toy world scores all."""
        clips, scored = [], cfg.preset == "toy" and not (cfg.videos or cfg.prompts)
        for index, _ in micro_batches(cfg.samples, cfg.micro_batch):
            chosen = [sampled[i] for i in index]
            noise = sample_noise([seed_of("sample", i) for i in index], shape, len(times)).to(device)
            x = vae.decode(few_step(generator, noise, contexts(chosen).to(device), times)).clamp(-1, 1)
            for i, prompt, clip in zip(index, chosen, x):
                if i < min(4, cfg.samples):
                    both = clip_beside_flow(clip, video_flow(raft, clip[None], cfg.raft_iters)[0])
                    write_video(out / "samples" / f"cycle-{cycle:06d}-{i}.mp4", both, FPS)
                if scored:
                    clips.append((i, prompt, clip.cpu()))
        if not scored:
            return {}
        from toy.world import score
        _, texts, pixels = zip(*sorted(clip for clip in gathered(clips) if clip[0] < cfg.samples))  # without padding
        return score(torch.stack(pixels), texts)

    log, failures = checkpoint.Log(cfg, start), {}
    for cycle in tqdm(range(start, last + 1), initial=start, total=last, disable=rank() != 0):
        # What is due after `cycle` cycles comes first, so that the turn after the last one does nothing else.
        if cycle % cfg.save_every == 0 or cycle == last:
            if cfg.samples and (cycle in (start, last) or phases[cycle - 1] in ("dmd_warmup", "mogan")):  # or the same
                log.write({"cycle": cycle, "phase": "samples", **sample_clips()})
            if cycle > start:
                checkpoint.save(cfg, cycle, state)
            if cycle == last and cfg.dmd:
                checkpoint.export(cfg, cycle, fake_score, "fake_score")  # spares a later run its fake_warmup
            if cycle and ema:
                checkpoint.export(cfg, cycle, generator, "generator_ema", ema)
            if cycle:  # also if just resumed: it may have been killed before its export, of which this is the last
                checkpoint.export(cfg, cycle, generator, "generator")
        if cycle == last:
            break
        began, phase, figures, rollouts = time.time(), phases[cycle], {}, []
        if phase == "discriminator_warmup" and state["separation"] < SEPARATES:  # the clips of its cycle go unseen
            list(itertools.islice(reals, len(list(discriminator_micro_batches(cfg)))))
            continue
        window_start = Draw(cfg.seed, cycle, "gan", []).window(shape[1], 1 + cfg.window)  # CHOICE: random, with ends

        # CHOICE: the order of App. B; Algorithm 1 prints the discriminator before the generator's flow GAN.
        # 1. Generator: distribution matching.                                  Alg. 1 l.3-7, Eq. 1-2
        if phase in ("dmd_warmup", "mogan") and cfg.dmd:
            sums = {}
            for index, weight in micro_batches(cfg.batch, cfg.micro_batch):
                draw = Draw(cfg.seed, cycle, "dmd", index)
                z0, context = rollout(draw)
                with torch.no_grad():
                    t = score_times(draw)
                    z_t = add_noise(z0, draw.renoise(shape).to(device), t)
                    x0_fake = velocity_to_x0(fake_score(z_t, t, context), z_t, t)
                    x0_pos = velocity_to_x0(teacher(z_t, t, context), z_t, t)
                    x0_neg = velocity_to_x0(teacher(z_t, t, negative.expand_as(context)), z_t, t)
                    x0_real = x0_pos + cfg.guidance * (x0_pos - x0_neg)
                [dmd] = add(sums, weight, dmd=dmd_loss(z0, x0_real, x0_fake))
                dmd.backward()
            figures |= update("dmd", sums)

        # 2. Fake score: follow the generator by flow matching.                 Alg. 1 l.8-13, Eq. 3
        for k in range(cfg.fake_updates):
            sums = {}
            for index, weight in micro_batches(cfg.batch, cfg.micro_batch):
                draw = Draw(cfg.seed, cycle, f"fake{k}", index)
                with torch.no_grad():
                    z0, context = rollout(draw)
                rollouts.append(z0)  # CHOICE: also the discriminator's generated half, batch * fake_updates
                if cfg.dmd:
                    t, noise = score_times(draw), draw.renoise(shape).to(device)
                    v_fake = fake_score(add_noise(z0, noise, t), t, context)
                    [fake] = add(sums, weight, fake=fake_loss(v_fake, noise, z0))
                    fake.backward()
            if cfg.dmd:
                figures |= update("fake_score", sums, "fake_score")

        # 3. Generator: its flow should look real.                              Alg. 1 l.14-16, 19, Eq. 5
        if phase == "mogan":
            sums = {}
            with frozen(discriminator):
                for index, weight in micro_batches(cfg.batch, cfg.micro_batch):
                    z0, _ = rollout(Draw(cfg.seed, cycle, "gan", index))  # CHOICE: its own; Alg. 1 reuses a stale one
                    [gan_g] = add(sums, weight, gan_g=gan_g_loss(logits(encode_generated(z0, window_start))))
                    (cfg.lambda_g * gan_g).backward()
            figures |= update("gan", sums)

        # 4. Discriminator: real against generated motion, with R1 and R2.      Alg. 1 l.15-18, Eq. 4, 6-8
        if phase in ("discriminator_warmup", "mogan"):
            sums = {}
            for z0, (index, weight) in zip(rollouts, discriminator_micro_batches(cfg)):
                with torch.no_grad():
                    seen = torch.cat([encode_real(*next(reals)), encode_generated(z0, window_start)])
                noise = Draw(cfg.seed, cycle, "judge", index).noise(seen.shape[1:], 2).flatten(0, 1).to(device)
                # CHOICE: the noise of R1 and R2 on latents.
                real, gen, noised_real, noised_gen = logits(torch.cat([seen, seen + cfg.sigma * noise])).chunk(4)
                gan_d, _, r1, r2 = add(sums, weight, gan_d=gan_d_loss(real, gen), accuracy=(real > gen).float(),
                    r1=r_loss(real, noised_real, cfg.sigma), r2=r_loss(gen, noised_gen, cfg.sigma))
                (cfg.lambda_d * gan_d + cfg.lambda_r1 * r1 + cfg.lambda_r2 * r2).backward()
            figures |= update("discriminator", sums, "discriminator")
            if not failures["discriminator"]:  # NaN would stay
                state["separation"].lerp_(torch.tensor(figures["gan_d"]), 0.2)

        for key, value in ema.items():
            value.lerp_(state[f"generator.{key}"], 1 - cfg.ema)
        log.write({"cycle": cycle, "phase": phase, **figures, "seconds": time.time() - began})
    print0(f"wrote {out / 'generator.safetensors'}")


def main(argv=None):
    with one_line("train.py"):
        cfg = parse_flags(argv)
        print0(json.dumps(asdict(cfg), ensure_ascii=False))
        train(cfg)


if __name__ == "__main__":
    main()
