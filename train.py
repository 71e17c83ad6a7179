"""MoGAN post-training (arXiv 2511.21592), Algorithm 1: one code path from a laptop process to a cluster.

    torchrun --nproc_per_node 2 train.py                                # the toy world: CPU, no downloads
    torchrun --nproc_per_node 16 train.py --videos DIR --prompts FILE   # Wan2.1-T2V-1.3B, the paper's setting
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...   # 2 nodes
    python train.py --preset wan1.3b --dry_run                          # resolved settings and sizes only

Every field of Config is a flag. Running the same command again resumes from the newest checkpoint in --out.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import cost
from discriminator import PROMPT, MotionDiscriminator, motion_tensor
from model import (NEGATIVE_PROMPT, REPO, WEIGHTS, add_noise, encode_prompts, few_step, few_step_times, find_weights,
                   load_dit, sample_noise, save_dit, shift_time, velocity_to_x0)
from raft import check_size, clip_beside_flow, find_raft, load_raft, video_flow
from sample import header, read_prompts, read_video, video_files, write_video
from vae import load_vae


# ---------------------------------------------------------------------------------------------------------------------
# Settings. Defaults are the paper's values for wan1.3b; a preset is the list of what differs.


@dataclass
class Config:
    preset: str = "auto"            # toy, wan1.3b, wan14b; auto: wan1.3b where CUDA is available, else toy
    out: str = ""                   # run folder, default runs/<preset>: checkpoints, log, samples, exports
    seed: int = 0
    # weights: files, folders or hub names
    weights: str = ""               # folder of the preset's weights, default as in README
    generator: str = ""             # 3-step student to start from; default the preset's own, else the teacher
    fake_score: str = ""            # to start from, as a run exports it; default the teacher
    raft: str = ""                  # default in the weights folder or weights/raft-things.pth
    contexts: str = str(REPO / "runs" / "contexts")  # encoded prompts, shared by runs
    # data
    videos: str = ""                # folder of real videos, searched recursively
    prompts: str = ""               # file, one prompt a line
    height: int = 480
    width: int = 832
    frames: int = 81                # 1 + 4k
    fps: int = 16                   # real videos are resampled to it, so that the frame rate is no cue
    workers: int = 2                # processes per rank that decode real videos ahead of the step
    # length of each phase, in cycles
    steps: int = 800                # full MoGAN cycles (App. B)
    warmup_steps: int = -1          # DMD alone first, to a 3-step start; -1: 600 from the teacher, else 0
    fake_warmup: int = -1           # fake score alone, at first; -1: 50 for a student without --fake_score, else 0
    discriminator_warmup: int = 20  # fake score and discriminator heads, before the first full cycle
    # optimisation
    batch: int = 16                 # samples of a generator or fake-score update, over all ranks
    discriminator_batch: int = 64   # generated clips, and as many real, of its update; at most batch * fake_steps
    micro_batch: int = 1            # samples that a rank computes at once; gradients accumulate over its share
    lr_generator: float = 1e-5
    lr_fake_score: float = 1e-5
    lr_discriminator: float = 1e-5
    beta1: float = 0.0              # CHOICE: 0, so that the generator's two objectives share no momentum
    gan_optimizer: bool = False     # CHOICE: one AdamW; a second for GAN updates changed nothing (toy/README.md)
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 10.0              # largest gradient norm of an update
    ema: float = 0.0                # decay of an averaged generator, exported beside the plain one; 0: none
    dtype: str = "auto"             # compute: bf16, fp32; auto: bf16 on CUDA. Master weights are fp32
    # few-step sampler and distribution matching
    timesteps: tuple = (1000, 757, 522)
    shift: float = 8.0
    guidance: float = 3.5           # w of x_pos + w (x_pos - x_neg), the usual scale minus 1
    negative_prompt: str = NEGATIVE_PROMPT
    t_min: float = 0.02
    t_max: float = 0.98
    fake_steps: int = 4
    # flow GAN
    lambda_g: float = 0.5           # lambda_1
    lambda_d: float = 0.5           # lambda_2
    lambda_r1: float = 0.3
    lambda_r2: float = 0.3          # ten times more: less motion, less jitter on the toy world
    sigma: float = 0.01             # standard deviation of the noise of R1 and R2
    r_form: str = "divided"         # divided: ((D(o) - D(o + noise)) / sigma)^2; printed: Eq. 6-7, no sigma
    r_space: str = "latent"         # where R1 and R2 add noise: encoded flow (latent), motion tensor (pixel)
    window: int = 12                # four-frame chunks after a boundary frame: 12 are the paper's 49 frames
    window_start: str = "random"    # CHOICE: random, not first, to judge all frames; no difference seen
    raft_iters: int = 12
    flow_scale: float = 16.0        # px/frame, near the real clips' speed: five times that taught nothing (toy)
    depth: int = 16                 # DiT blocks in the discriminator
    taps: tuple = (7, 13, 15)       # blocks with a head
    t_star: str = "zero"            # the discriminator's timestep; random is APT's, and slower on the toy world
    real_roundtrip: bool = False    # CHOICE: pass real clips through the VAE? No gain seen: flow hides its blur
    order: str = "appendix"         # generator before discriminator; algorithm: after, as Algorithm 1 prints
    # memory against time; the result is the same
    remat: bool = True              # recompute each pass of the VAE in backward
    latents_per_pass: int = 3       # through the VAE at once; 3 take the least memory at the default window and remat
    raft_group: int = 4             # frame pairs that RAFT's backward holds at once
    checkpointing: bool = True      # recompute each DiT block in backward
    shard: int = 0                  # ranks that share one copy of the parameters; 0: those of a node, 1: a copy each
    shard_blocks: bool = True       # gather and reduce block by block; in one piece is faster for a small network
    # ablations of Table 2
    no_dmd: bool = False
    no_r: bool = False
    latent_gan: bool = False        # the discriminator sees the video's latents instead of its flow
    # bookkeeping
    save_every: int = 20            # cycles between checkpoints
    sample_every: int = 50          # cycles between sample clips
    samples: int = 4                # how many
    dry_run: bool = False           # print what a run would need, and end
    ranks: int = 0                  # --dry_run only: as if there were this many processes


PRESETS = {
    "wan1.3b": {},
    "wan14b": {},
    "toy": dict(
        height=64, width=64, frames=17, steps=60, discriminator_warmup=10, samples=48, sample_every=20,
        batch=12, discriminator_batch=12, micro_batch=12, fake_steps=2,
        lr_generator=1e-4, lr_fake_score=4e-4, lr_discriminator=3e-4,
        timesteps=(1000, 857, 600), shift=3.0, guidance=1.0, negative_prompt="",
        sigma=0.05, window=2, raft_iters=4, flow_scale=3.0, depth=4, taps=(1, 2, 3),
        remat=False, latents_per_pass=4, raft_group=1024, checkpointing=False, shard=1, shard_blocks=False),
}


def parse_flags(argv):
    """Config from flags over the preset's row over the defaults; anything unknown ends with one line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.error = lambda message: stop(f"{message} (train.py --help lists the flags)")
    for field in fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        if field.type is tuple:
            kind = dict(type=int, nargs="+")
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **kind)
    flags = vars(parser.parse_args(argv))
    flags = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}
    preset = flags.get("preset", "auto")
    if preset == "auto":
        preset = "wan1.3b" if torch.cuda.is_available() else "toy"
        say(f"preset {preset} ({'no ' if preset == 'toy' else ''}CUDA here; "
            f"--preset {' or '.join(PRESETS)} to choose)")
    if preset not in PRESETS:
        raise ValueError(f"expected --preset auto, {', '.join(PRESETS)}; got {preset}")
    cfg = Config(**{**PRESETS[preset], **flags, "preset": preset})
    check(cfg)
    return resolve(cfg)


def resolve(cfg):
    """Fill in the settings whose default depends on others or on what lies on the disk."""
    cfg.out, cfg.weights = cfg.out or str(REPO / "runs" / cfg.preset), cfg.weights or str(WEIGHTS[cfg.preset])
    student = Path(cfg.weights) / "student.safetensors"
    if not cfg.generator and student.exists():
        cfg.generator = str(student)
    saved = checkpoints(cfg.out)
    begun = json.loads((saved[-1] / "config.json").read_text()) if saved else {}
    if cfg.warmup_steps < 0:
        cfg.warmup_steps = begun.get("warmup_steps", 0 if cfg.generator else 600)
    if cfg.fake_warmup < 0:  # the fake score starts from the teacher, which a distilled generator has left
        cfg.fake_warmup = begun.get("fake_warmup", 50 if cfg.generator and not cfg.fake_score else 0)
    if cfg.no_dmd and not cfg.generator:
        raise ValueError("expected --generator with --no_dmd, a 3-step student: without DMD the teacher becomes none")
    if cfg.no_dmd:
        cfg.warmup_steps = cfg.fake_warmup = 0
    if cfg.preset != "toy":
        cfg.videos = cfg.videos or str(REPO / "data" / "videos")
        cfg.prompts = cfg.prompts or str(REPO / "data" / "prompts.txt")
    if begun and not cfg.dry_run:
        tell_changes(cfg, begun)
    return cfg


def tell_changes(cfg, begun):
    """Say what a resumed run changes of the settings in `begun`; ValueError for what a run must end as it began."""
    fixed = ("preset", "no_dmd", "no_r", "latent_gan", "ema", "gan_optimizer", "depth", "taps", "fake_warmup",
             "warmup_steps", "discriminator_warmup")
    changes = []
    for name, now in json.loads(json.dumps(asdict(cfg))).items():  # JSON has made lists of the run's tuples
        then = begun.get(name, now)
        if now != then and name in fixed:
            raise ValueError(f"expected --{name} {then}, with which the run in {cfg.out} began, got {now}: "
                             "use another --out for other settings")
        if now != then and name != "out":
            changes.append(f"{name} {then} -> {now}")
    if changes:
        say(f"changed since the last checkpoint: {', '.join(changes)}")


def check(cfg):
    """Raise ValueError, one line, for settings that cannot run."""
    choices = dict(
        r_form=("divided", "printed"), r_space=("latent", "pixel"), window_start=("random", "first"),
        t_star=("zero", "random"), order=("appendix", "algorithm"),
        dtype=("auto", "bf16", "fp32"))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(f"expected --{name} {' or '.join(allowed)}, got {getattr(cfg, name)}")
    for name in ("fps", "batch", "discriminator_batch", "micro_batch", "fake_steps", "sigma", "clip", "raft_iters",
                 "flow_scale", "latents_per_pass", "raft_group", "save_every", "sample_every", "shift"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"expected --{name} above 0, got {getattr(cfg, name)}")
    for name in "steps", "discriminator_warmup", "workers", "samples", "shard", "ranks", "seed":
        if not getattr(cfg, name) >= 0:
            raise ValueError(f"expected --{name} 0 or more, got {getattr(cfg, name)}")
    for name, value in asdict(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"expected a finite --{name}, got {value}")
    for name in "warmup_steps", "fake_warmup":
        if getattr(cfg, name) < -1:
            raise ValueError(f"expected --{name} 0 or more, or -1 for its default, got {getattr(cfg, name)}")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"expected --ema of 0 or more and below 1, got {cfg.ema}")
    if len(set(cfg.taps)) < len(cfg.taps):
        raise ValueError(f"expected --taps that differ, got {list(cfg.taps)}")
    steps = list(cfg.timesteps)
    if steps != sorted(set(steps), reverse=True) or steps[0] > 1000 or steps[-1] <= 0:
        raise ValueError(f"expected falling --timesteps within 1000 to 1, got {steps}")
    if not 0 <= cfg.t_min < cfg.t_max <= 1:
        raise ValueError(f"expected 0 <= --t_min < --t_max <= 1, got {cfg.t_min} and {cfg.t_max}")
    chunks, size = (cfg.frames - 1) // 4, f"{cfg.height} x {cfg.width}"
    if cfg.frames % 4 != 1 or cfg.frames < 5:
        raise ValueError(f"expected --frames 1 + 4k (5, 9, ..., 81), got {cfg.frames}: "
                         f"try {max(5, cfg.frames // 4 * 4 + 1)}")
    if cfg.height % 16 or cfg.width % 16 or min(cfg.height, cfg.width) < 16:
        raise ValueError(f"expected --height and --width divisible by 16, got {size}")
    if not 1 <= cfg.window <= chunks:
        raise ValueError(f"expected --window 1 to {chunks} chunks for {cfg.frames} frames, got {cfg.window}")
    if cfg.preset == "toy" and not cfg.videos and ((cfg.height, cfg.width) != (64, 64) or cfg.frames > 17):
        raise ValueError("expected 64 x 64 and at most 17 frames, the size of the toy world's real clips, "
                         f"got {size} x {cfg.frames}: give --videos for other sizes")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        raise ValueError(f"expected at most {torch.cuda.device_count()} processes on this node, one a GPU, "
                         f"got {local}: see torchrun --nnodes at the top of train.py")
    if cfg.ranks and not cfg.dry_run:
        raise ValueError("expected --ranks with --dry_run only: torchrun says how many processes there are")
    if cfg.shard and (cfg.ranks or world()) % cfg.shard:
        raise ValueError(f"expected --shard to divide the {cfg.ranks or world()} processes, got {cfg.shard}")
    if cfg.discriminator_batch > cfg.batch * cfg.fake_steps:
        raise ValueError("expected --discriminator_batch at most batch * fake_steps = "
                         f"{cfg.batch * cfg.fake_steps}, since it reuses the fake score's samples; "
                         f"got {cfg.discriminator_batch}")


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: one path for one process or many


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def say(line):
    if rank() == 0:
        tqdm.write(line)
        sys.stdout.flush()


def stop(line):
    """End with one line on stderr, said once per node, or, once the process group is up, by every rank that fails."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or dist.is_initialized():
        tqdm.write(f"train.py: {line}", file=sys.stderr)
        sys.stderr.flush()
    if dist.is_initialized() and world() > 1:
        os._exit(2)  # leaving the group in order would wait for the other ranks' collectives
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(2)


def setup(ranks=0):
    """Start the process group (one process included); returns the device and the mesh to shard over.

    ranks: how many share one copy of the parameters; 0: those of a node.
    """
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost")
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "0" if world() == 1 else "29500")  # 0: any free one
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks = ranks or int(os.environ["LOCAL_WORLD_SIZE"])
    # Parameters are sharded inside a node and replicated across (HSDP): slow links carry gradients only.
    shape = (world() // ranks, ranks) if world() > ranks else (world(),)
    device = "cuda" if cuda else "cpu"
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    return torch.device(device), mesh


def shard(net, mesh, dtype, blocks, checkpointing):
    """FSDP2: each block, then the rest; without `blocks` all at once. Only `net(...)` may be called afterwards."""
    policy = dict(reduce_dtype=torch.float32, cast_forward_inputs=False)
    trunk = getattr(net, "trunk", net)
    for block in trunk.blocks:
        block.checkpointing = checkpointing
        if blocks:
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, **policy))
    if dtype and trunk is not net:  # a discriminator's heads in fp32: bf16 cannot tell the logits of R1 and R2 apart
        for part in *net.heads, net.logit:
            fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    return fully_shard(net, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, **policy))


def seed_of(*key):
    """A seed that depends only on what it is for: a resumed run, or another number of ranks, draws the same."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


class Draw(NamedTuple):
    """The random numbers of one use (role) in one cycle, for the samples of one micro-batch."""
    seed: int
    step: int
    role: str
    index: list

    def seeds(self, what):
        return [seed_of(self.seed, self.step, self.role, what, i) for i in self.index]

    def uniform(self, what):
        """One number in [0, 1) per sample, [B]."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds(what)]
        return torch.tensor([torch.rand((), generator=g) for g in generators])

    def noise(self, shape, steps):
        """[steps, B, *shape]"""
        return sample_noise(self.seeds("noise"), shape, steps)

    def renoise(self, shape):
        """[B, *shape], independent of `noise`."""
        return sample_noise(self.seeds("renoise"), shape, 1)[0]

    def choice(self, what, count):
        """One of range(count), the same for all samples and ranks."""
        return seed_of(self.seed, self.step, self.role, what) % count


def shares(batch, micro_batch):
    """This rank's micro-batches of a global batch: (sample indices, weights), equally many on every rank.

    Where the batch does not divide, the last samples are padding of weight 0. Weights sum to the world size over
    all ranks, as FSDP averages gradients over ranks: the result is the global batch's mean on any number of them.
    """
    each = math.ceil(batch / world())
    mine = [i * world() + rank() for i in range(each)]
    for first in range(0, each, micro_batch):
        index = mine[first : first + micro_batch]
        yield index, torch.tensor([world() / batch if i < batch else 0.0 for i in index])


def discriminator_shares(cfg):
    """The same for a discriminator update, whose generated clips are the fake score's rollouts in their order."""
    for k in range(math.ceil(cfg.discriminator_batch / cfg.batch)):
        for index, weight in shares(cfg.batch, cfg.micro_batch):
            used = torch.tensor([k * cfg.batch + i < cfg.discriminator_batch for i in index])
            yield [k * cfg.batch + i for i in index], weight * used * cfg.batch / cfg.discriminator_batch


def total(values):
    """Means over the global batch, by name, of this rank's weighted sums; weights as in `shares`."""
    stack = torch.stack([value.double().cpu() for value in values.values()]) / world()
    stack = stack.to("cuda") if dist.get_backend() == "nccl" else stack
    dist.all_reduce(stack)
    return dict(zip(values, stack.tolist()))


class Log:
    """One line per cycle on the screen and one JSON object per cycle in log.jsonl; only rank 0 writes."""

    def __init__(self, path, start):
        self.path = path
        if rank() == 0 and path.exists():  # a killed run's cycles after its last checkpoint are logged again
            lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
            kept = "".join(line for line in lines if json.loads(line)["step"] < start)
            path.with_suffix(".part").write_text(kept)
            path.with_suffix(".part").rename(path)

    def write(self, values):
        if rank() == 0:
            odd = [key for key, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
            with self.path.open("a") as file:
                file.write(json.dumps({**values, **dict.fromkeys(odd)}) + "\n")  # JSON has no NaN
            text = [f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items() if k != "step"]
            say(f"{values['step']:5d} " + " | ".join(text))


# ---------------------------------------------------------------------------------------------------------------------
# Real clips, decoded by workers ahead of the step


class RealClips(Dataset):
    """(step, index) -> uint8 [3, T, H, W] of a random real clip, or None, and why files were skipped."""

    def __init__(self, cfg, files, frames):
        self.cfg, self.files, self.frames = cfg, files, frames

    def __getitem__(self, key):
        cfg, skipped = self.cfg, []
        place = Draw(cfg.seed, key[0], "real", [key[1]]).uniform("place").item()
        seed = seed_of(cfg.seed, *key, "file")
        if not self.files:
            from toy.world import clip
            x = clip(seed, motion_rich=True).pixels[0]
            first = int(place * (x.shape[1] - self.frames + 1))
            return to_bytes(x[:, first : first + self.frames]), skipped
        for i in torch.randperm(len(self.files), generator=torch.Generator().manual_seed(seed)).tolist():
            try:
                x, fps = read_video(self.files[i], self.frames, (cfg.height, cfg.width), cfg.fps, place)
                if fps > 0.9 * cfg.fps:  # slower ones would repeat frames: flow that is zero every other time
                    return to_bytes(x), skipped
                skipped.append(f"{self.files[i]}: has {fps:.3g} frames per second, {cfg.fps} needed")
            except (ValueError, OSError) as error:
                skipped.append(str(error))
        return None, skipped


def to_bytes(x):
    """[-1, 1] -> uint8, as a file would hold it: a quarter of the shared memory between workers and step."""
    return x.add(1).mul(127.5).round().byte()


def real_clips(cfg, frames, first, last):
    """Yield this rank's micro-batches of real clips [B, 3, T, H, W], by cycle, decoded ahead of the step.

    A file that cannot be used is named, once per rank, and passed over; ValueError if none can be used.
    """
    files, told = (video_files(cfg.videos) if cfg.videos else []), set()
    turns = [index for index, _ in discriminator_shares(cfg)]
    keys = [[(step, i) for i in index] for step in range(first, last) for index in turns]
    clips = RealClips(cfg, files, frames)
    for batch in DataLoader(clips, batch_sampler=keys, collate_fn=list, num_workers=cfg.workers):
        for line in dict.fromkeys(line for _, skipped in batch for line in skipped if line not in told):
            told.add(line)
            tqdm.write(f"skipped: {line} ({len(told)} of {len(files)} files)")
        if any(x is None for x, _ in batch):
            raise ValueError(f"expected videos of at least {frames / cfg.fps:.2f} s in {cfg.videos}, "
                             f"none of {len(files)} can be used")
        yield torch.stack([x for x, _ in batch]).float().div(127.5).sub(1)


# ---------------------------------------------------------------------------------------------------------------------
# The losses. All return one value per sample, [B].


def mean(x):
    return x.flatten(1).mean(dim=1)


def dmd_loss(z0, x0_real, x0_fake):
    """Eq. 1-2: its gradient in z0 is (x0_fake - x0_real) / mean|z0 - x0_real|, the difference of the scores.

    CHOICE: Eq. 1 prints the opposite sign, which would raise the KL; DMD (arXiv 2405.14867) descends it.
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


def r_loss(logit, logit_noised, sigma, form):
    """Eq. 6-7: a finite difference, as FSDP with checkpointing cannot differentiate a gradient penalty.

    CHOICE: "divided" estimates |grad D|^2 whatever sigma is; as printed it is sigma^2 of that, 1e-4: no effect.
    """
    return ((logit - logit_noised) / (sigma if form == "divided" else 1.0)).square()


# ---------------------------------------------------------------------------------------------------------------------
# Networks, checkpoints, samples


def load_networks(cfg):
    """Generator, teacher, fake score and discriminator in fp32 on the CPU, and the frozen VAE and RAFT."""
    vae, raft, teacher = load_vae(cfg.weights), load_raft(find_raft(cfg.weights, cfg.raft)), load_dit(cfg.weights)
    check_size(raft.cfg, cfg.height, cfg.width)
    generator = load_dit(cfg.generator or cfg.weights)
    fake_score = load_dit(cfg.fake_score or cfg.weights, entry="critic")  # what CausVid's checkpoints call it
    for name, net in dict(generator=generator, fake_score=fake_score).items():
        if net.cfg != teacher.cfg:
            raise ValueError(f"expected a {name} of the teacher's architecture {teacher.cfg}, got {net.cfg}")
    torch.manual_seed(cfg.seed)  # the heads must be the same on every rank before they are sharded
    discriminator = MotionDiscriminator(teacher.cfg, cfg.depth, cfg.taps).load_trunk(teacher)
    return generator, teacher, fake_score, discriminator, vae, raft


def adamw(net, lr, cfg):
    """AdamW with its state allocated at once, so that a checkpoint has the same tensors at any step.

    Fused: no temporaries, and FSDP dispatches one operation, not fifteen that each take 0.1 s the first time.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr, (cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                  fused=True)
    for p in net.parameters():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.tensor(0.0, device=p.device), **moments}
    return optimizer


def live_state(nets, optimizers, ema):
    """Every tensor a resume needs, by name, as views of the live (sharded) ones; loading fills them."""
    state = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    for name, optimizer in optimizers.items():
        for key, p in nets["generator" if name == "gan" else name].named_parameters():
            slots = optimizer.state[p].items()
            state.update({f"optimizer.{name}.{key}.{slot}": value for slot, value in slots})
    return {**state, **{f"ema.{key}": value for key, value in ema.items()}}


def checkpoints(out):
    """A run's checkpoints, oldest first; not those that are being written, or that somebody has renamed or copied."""
    return sorted(path for path in Path(out).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


def save_checkpoint(cfg, step, state):
    """Write aside, then rename: a kill at any moment leaves the previous checkpoint. Keeps the newest two."""
    path = Path(cfg.out) / f"checkpoint-{step:06d}"
    part = path.with_suffix(".part")
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=part)
    dist.barrier()
    if rank() == 0:
        (part / "config.json").write_text(json.dumps(asdict(cfg), indent=1))
        part.rename(path)
        for old in checkpoints(cfg.out)[:-2]:
            shutil.rmtree(old)


def export(cfg, step, net, state, name):
    """Gather a DiT and write it under the official keys as <out>/<name>.safetensors."""
    full = {}
    for key, value in state.items():
        value = value.full_tensor()
        if rank() == 0:
            full[key] = value.cpu()
    if rank() == 0:
        path = Path(cfg.out) / f"{name}.safetensors"
        head = REPO / ".git" / "HEAD"
        ref = head.read_text().split()[-1] if head.exists() else ""
        commit = (REPO / ".git" / ref).read_text().strip() if ref and (REPO / ".git" / ref).is_file() else ref
        save_dit(full, path.with_suffix(".part"), net.cfg, preset=cfg.preset, step=step, commit=commit,
                 sampler=json.dumps({"timesteps": cfg.timesteps, "shift": cfg.shift}))
        path.with_suffix(".part").rename(path)


@torch.no_grad()
def sample_clips(cfg, step, generator, vae, raft, contexts, prompts, times, shape):
    """Sample fixed prompts with fixed seeds; the first four become clips beside their flow under samples/.

    Returns the log entry, in the toy world with exact scores.
    """
    device, clips = next(generator.parameters()).device, []
    for index, _ in shares(cfg.samples, cfg.micro_batch):
        chosen = [prompts[seed_of("prompt", i) % len(prompts)] for i in index]
        noise = sample_noise([seed_of("sample", i) for i in index], shape, len(times)).to(device)
        x = vae.decode(few_step(generator, noise, contexts(chosen).to(device), times)).clamp(-1, 1).float()
        for i, prompt, clip in zip(index, chosen, x):
            if i < min(4, cfg.samples):
                flow = video_flow(raft, clip[None], cfg.raft_iters)[0]
                path = Path(cfg.out) / "samples" / f"step-{step:06d}-{i}.mp4"
                write_video(path, clip_beside_flow(clip, flow), cfg.fps)
            clips.append((i, prompt, clip.cpu()))
    if cfg.preset != "toy" or cfg.videos or cfg.prompts:
        return {"step": step, "phase": "samples"}
    from toy.world import score
    everyone = [None] * world()
    dist.all_gather_object(everyone, clips)
    _, texts, pixels = zip(*sorted(clip for part in everyone for clip in part if clip[0] < cfg.samples))
    return {"step": step, "phase": "samples", **score(torch.stack(pixels), texts)}


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def motion(cfg, raft, x):
    """Pixels [B, 3, T, H, W] -> motion tensor of the same shape."""
    return motion_tensor(video_flow(raft, x, cfg.raft_iters, cfg.raft_group), cfg.flow_scale)


def generated_motion(cfg, vae, raft, z0, start):
    """o_gen of a window of z0: only it is decoded, with the state before it detached (App. A)."""
    if cfg.latent_gan:
        return z0
    return motion(cfg, raft, vae.decode_window(z0, start, cfg.window, cfg.latents_per_pass, cfg.remat))


def real_motion(cfg, vae, raft, x):
    """o_real of real pixels."""
    if cfg.latent_gan:
        return vae.encode(x, cfg.latents_per_pass)
    if cfg.real_roundtrip:
        x = vae.decode(vae.encode(x, cfg.latents_per_pass), cfg.latents_per_pass)
    return motion(cfg, raft, x)


def see(cfg, vae, o):
    """o as the discriminator takes it: its VAE latents."""
    return o if cfg.latent_gan else vae.encode(o, cfg.latents_per_pass, cfg.remat)


def see_noised(cfg, vae, o, draw):
    """Input of a discriminator update: o [2 B, ...], real before generated, encoded; for R1 and R2 again with noise."""
    seen = see(cfg, vae, o)
    if cfg.no_r:
        return seen
    target = o if cfg.r_space == "pixel" else seen
    noised = target + cfg.sigma * draw.noise(target.shape[1:], 2).flatten(0, 1).to(o.device)
    return torch.cat([seen, see(cfg, vae, noised) if cfg.r_space == "pixel" else noised])


def trainable(net, flag, part=None):
    """Freeze or free a sharded network, or a part of it."""
    net.reshard()  # a forward without backward leaves the root gathered: the flag would miss its shards
    (part or net).requires_grad_(flag)


def tally(sums, name, values, weight):
    """Add a micro-batch's weighted values to the sum under this name; returns what was added, with its gradient."""
    part = (values * weight.to(values.device)).sum()
    sums[name] = sums.get(name, 0) + part.detach()
    return part


def update(cfg, name, net, optimizer, sums, bad):
    """Clip the gradient and step, on all ranks alike; returns the figures of the update of this name.

    An update that is not finite is left out and counted in bad; five in a row raise ValueError.
    """
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip, foreach=True).full_tensor().item()
    figures = {**total(sums), f"norm_{name}": norm}
    if all(math.isfinite(figure) for figure in figures.values()):
        optimizer.step()
        bad[name] = 0
    else:
        bad[name] = bad.get(name, 0) + 1
        say(f"left out: a {name} update with {figures} ({bad[name]} in a row)")
        if bad[name] == 5:
            raise ValueError(f"five {name} updates in a row were not finite: lower the learning rate or "
                             f"try --dtype fp32; the last checkpoint in {cfg.out} is untouched")
    optimizer.zero_grad(set_to_none=True)
    return figures


def train(cfg):
    # Bad input should show before anything is loaded.
    for path in cfg.weights, cfg.generator or cfg.weights, cfg.fake_score or cfg.weights:
        find_weights(path, "a Wan DiT")
    find_weights(find_raft(cfg.weights, cfg.raft), "RAFT")
    if cfg.prompts:
        prompts = read_prompts(cfg.prompts)
    else:
        from toy.world import PROMPTS as prompts
    say(f"generator: {cfg.generator or 'the teacher itself, not distilled'}; weights: {cfg.weights}")
    phases = ["fake_warmup"] * cfg.fake_warmup + ["dmd_warmup"] * cfg.warmup_steps
    phases += ["discriminator_warmup"] * cfg.discriminator_warmup + ["mogan"] * cfg.steps
    saved, last = checkpoints(cfg.out), len(phases)
    start = int(saved[-1].name.split("-")[1]) if saved else 0
    if start > last:
        raise ValueError(f"expected --steps {cfg.steps + start - last} or more, which the run in {cfg.out} has done")
    final = "fake_score" if not cfg.no_dmd else "generator_ema" if cfg.ema else "generator"  # what a run writes last
    if saved and start == last and header(Path(cfg.out) / f"{final}.safetensors").get("step") == str(last):
        return say(f"nothing left to train: the run in {cfg.out} has done its {last} cycles (--out for another run)")
    if start < cfg.fake_warmup + cfg.warmup_steps:
        say_warmup(cfg)
    f = 1 + (cfg.frames - 1) // 4
    first_real = max(start, cfg.fake_warmup + cfg.warmup_steps)
    reals = real_clips(cfg, cfg.frames if cfg.latent_gan else 1 + 4 * cfg.window, first_real, last)
    if first_real < last:
        reals = itertools.chain([next(reals)], reals)  # the first ones now: there may be no usable video
    device, mesh = setup(cfg.shard)
    out = Path(cfg.out)
    # The text encoder comes first and goes before the rest is loaded; one process a node runs it, the others wait.
    contexts = encode_prompts([*prompts, cfg.negative_prompt, PROMPT], cfg.weights, cfg.contexts, device,
                              wait=os.environ["LOCAL_RANK"] != "0")
    generator, teacher, fake_score, discriminator, vae, raft = load_networks(cfg)
    if rank() == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1))

    dtype = torch.bfloat16 if cfg.dtype == "bf16" or (cfg.dtype == "auto" and device.type == "cuda") else None
    vae, raft = vae.to(device, dtype), raft.to(device)
    teacher.requires_grad_(False)
    for net in generator, fake_score, teacher, discriminator:
        shard(net, mesh, dtype, cfg.shard_blocks, cfg.checkpointing)
    nets = dict(generator=generator, fake_score=fake_score, discriminator=discriminator)
    optimizers = {name: adamw(net, getattr(cfg, f"lr_{name}"), cfg) for name, net in nets.items()}
    if cfg.gan_optimizer:
        optimizers["gan"] = adamw(generator, cfg.lr_generator, cfg)
    ema = {key: value.clone() for key, value in generator.state_dict().items()} if cfg.ema else {}
    state = live_state(nets, optimizers, ema)
    if saved:
        try:
            dcp.load(state, checkpoint_id=saved[-1])
        except CheckpointException as error:
            before = f": if it is damaged, move it away to go on from {saved[-2].name}" if len(saved) > 1 else ""
            raise ValueError(f"expected a whole checkpoint of these networks in {saved[-1]}, got "
                             f"{str(error).splitlines()[-1]}{before}") from None
        say(f"resumed {saved[-1]}")

    times = few_step_times(cfg.timesteps, cfg.shift)
    shape = (teacher.cfg.in_dim, f, cfg.height // 8, cfg.width // 8)  # of a latent clip, [C, f, h, w]
    negative = contexts([cfg.negative_prompt]).to(device)
    motion_context = contexts([PROMPT]).to(device)
    for net in nets.values():  # FSDP fixes a net's gradient dtype at its first forward, which must not find it frozen
        with torch.no_grad():
            z, t = torch.zeros(1, shape[0], 1, 2, 2, device=device), torch.zeros(1, device=device)
            net(z, t, motion_context)
        trainable(net, True)

    def rollout(draw):
        """z0 by backward simulation from fresh prompts and noise, and their context. Alg. 1 l.4-5"""
        context = contexts([prompts[seed % len(prompts)] for seed in draw.seeds("prompt")]).to(device)
        # CHOICE: one exit step for all samples of an update: ranks must call a sharded network equally often.
        exit_step, noise = draw.choice("exit", len(times)), draw.noise(shape, len(times)).to(device)
        return few_step(generator, noise, context, times, exit_step), context

    def score_times(draw):
        """t [B] of a score update. CHOICE: uniform, shifted, clamped, as CausVid; the paper: t ~ [0, 1]."""
        return shift_time(draw.uniform("t"), cfg.shift).clamp(cfg.t_min, cfg.t_max).to(device)

    def judge(seen, draw):
        """Logits [B n] of n tensors of B motion latents each."""
        t = torch.zeros(len(draw.index))
        if cfg.t_star == "random":
            t = shift_time(draw.uniform("t*"), cfg.shift)
        t = t.to(device).repeat(len(seen) // len(t))
        return discriminator(seen, t, motion_context.expand(len(seen), -1, -1))

    bad, log = {}, Log(out / "log.jsonl", start)
    for step in tqdm(range(start, last + 1), initial=start, total=last, disable=rank() != 0):
        # What is due after `step` cycles comes first, so that the turn after the last cycle does nothing else.
        moved = step == start or phases[step - 1] in ("dmd_warmup", "mogan")  # else the clips would be the same
        if cfg.samples and (step == last or moved and step % cfg.sample_every == 0):
            log.write(sample_clips(cfg, step, generator, vae, raft, contexts, prompts, times, shape))
        due = step > start and (step % cfg.save_every == 0 or step == last)
        if due:
            save_checkpoint(cfg, step, state)
        if due or step == last:  # also with nothing left to do: the run may have been killed before its export
            export(cfg, step, generator, generator.state_dict(), "generator")
            if ema:
                export(cfg, step, generator, ema, "generator_ema")
        if step == last:
            break
        began, phase, figures, rollouts = time.time(), phases[step], {}, []
        window_start = 0
        if cfg.window_start == "random":
            window_start = Draw(cfg.seed, step, "window", []).choice("start", f - cfg.window)

        # 1. Generator: distribution matching.                                  Alg. 1 l.3-7, Eq. 1-2
        if phase in ("dmd_warmup", "mogan") and not cfg.no_dmd:
            sums = {}
            for index, weight in shares(cfg.batch, cfg.micro_batch):
                draw = Draw(cfg.seed, step, "dmd", index)
                z0, context = rollout(draw)
                with torch.no_grad():
                    t = score_times(draw)
                    z_t = add_noise(z0, draw.renoise(shape).to(device), t)
                    x0_fake = velocity_to_x0(fake_score(z_t, t, context), z_t, t)
                    x0_pos = velocity_to_x0(teacher(z_t, t, context), z_t, t)
                    x0_neg = velocity_to_x0(teacher(z_t, t, negative.expand_as(context)), z_t, t)
                    x0_real = x0_pos + cfg.guidance * (x0_pos - x0_neg)
                tally(sums, "dmd", dmd_loss(z0, x0_real, x0_fake), weight).backward()
            figures |= update(cfg, "dmd", generator, optimizers["generator"], sums, bad)

        # 2. Fake score: follow the generator by flow matching.                 Alg. 1 l.8-13, Eq. 3
        for k in range(cfg.fake_steps):
            sums = {}
            for index, weight in shares(cfg.batch, cfg.micro_batch):
                draw = Draw(cfg.seed, step, f"fake{k}", index)
                with torch.no_grad():
                    z0, context = rollout(draw)
                rollouts.append(z0)  # CHOICE: also the discriminator's generated half, batch * fake_steps
                if not cfg.no_dmd:
                    t, noise = score_times(draw), draw.renoise(shape).to(device)
                    v_fake = fake_score(add_noise(z0, noise, t), t, context)
                    tally(sums, "fake", fake_loss(v_fake, noise, z0), weight).backward()
            if sums:
                figures |= update(cfg, "fake_score", fake_score, optimizers["fake_score"], sums, bad)

        for turn in ("generator", "discriminator")[:: 1 if cfg.order == "appendix" else -1]:
            # 3. Generator: its flow should look real.                          Alg. 1 l.14-16, 19, Eq. 5
            if turn == "generator" and phase == "mogan":
                sums = {}
                trainable(discriminator, False)
                for index, weight in shares(cfg.batch, cfg.micro_batch):
                    draw = Draw(cfg.seed, step, "gan", index)
                    z0, _ = rollout(draw)
                    logit_gen = judge(see(cfg, vae, generated_motion(cfg, vae, raft, z0, window_start)), draw)
                    (cfg.lambda_g * tally(sums, "gan_g", gan_g_loss(logit_gen), weight)).backward()
                trainable(discriminator, True)
                optimizer = optimizers["gan" if cfg.gan_optimizer else "generator"]
                figures |= update(cfg, "gan", generator, optimizer, sums, bad)

            # 4. Discriminator: real against generated motion, with R1 and R2.  Alg. 1 l.15-18, Eq. 4, 6-8
            if turn == "discriminator" and phase in ("discriminator_warmup", "mogan"):
                sums = {}
                trainable(discriminator, phase == "mogan", discriminator.trunk)
                for z0, (index, weight) in zip(rollouts, discriminator_shares(cfg)):
                    draw = Draw(cfg.seed, step, "judge", index)
                    with torch.no_grad():
                        # One expression: names would keep the motion tensors, 0.9 GiB, until the next cycle.
                        seen = see_noised(cfg, vae, torch.cat([
                            real_motion(cfg, vae, raft, next(reals).to(device)),
                            generated_motion(cfg, vae, raft, z0, window_start)]), draw)
                    logit_real, logit_gen, *logits_noised = judge(seen, draw).chunk(len(seen) // len(index))
                    r1 = r2 = 0
                    if not cfg.no_r:
                        r1 = r_loss(logit_real, logits_noised[0], cfg.sigma, cfg.r_form)
                        r2 = r_loss(logit_gen, logits_noised[1], cfg.sigma, cfg.r_form)
                        r1, r2 = tally(sums, "r1", r1, weight), tally(sums, "r2", r2, weight)
                    gan_d = tally(sums, "gan_d", gan_d_loss(logit_real, logit_gen), weight)
                    (cfg.lambda_d * gan_d + cfg.lambda_r1 * r1 + cfg.lambda_r2 * r2).backward()
                    tally(sums, "logit_real", logit_real, weight), tally(sums, "logit_gen", logit_gen, weight)
                figures |= update(cfg, "discriminator", discriminator, optimizers["discriminator"], sums, bad)

        for key, value in ema.items():
            value.lerp_(state[f"generator.{key}"], 1 - cfg.ema)
        peak = {}
        if device.type == "cuda":
            peak["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        log.write({"step": step, "phase": phase, **figures, "seconds": time.time() - began, **peak})
    if not cfg.no_dmd:
        export(cfg, last, fake_score, fake_score.state_dict(), "fake_score")  # spares a later run its fake_warmup
    say(f"wrote {out / 'generator.safetensors'}")


def say_warmup(cfg):
    """Tell what making the 3-step start costs, if the run has to."""
    if cfg.warmup_steps:
        _, _, tflop, _ = cost.plan(cfg, 1, 1)
        eflop = cfg.warmup_steps * (tflop["generator, DMD"] + tflop["fake score"]) / 1e6
        say(f"{cfg.warmup_steps} cycles of distribution matching come first: {eflop:.2g} EFLOP, "
            f"{eflop * 1e6 / 400 / 3600:.2g} GPU-hours at 400 TFLOP/s; --generator STUDENT starts from a 3-step one")


def dry_run(cfg):
    """Print what a run would need: bytes of a rank and FLOP of a cycle, by cost.py's formulas."""
    say_warmup(cfg)
    ranks = cfg.ranks or world()
    # CHOICE: pretended processes stand on nodes of eight, as cards are rented, or of fewer where eight do not divide.
    node = max(n for n in range(1, 9) if ranks % n == 0) if cfg.ranks else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for line in cost.report(cfg, ranks, cfg.shard or node):
        say(line)


def main(argv=None):
    try:
        cfg = parse_flags(argv)
        say(json.dumps(asdict(cfg), ensure_ascii=False))
        dry_run(cfg) if cfg.dry_run else train(cfg)
    except CheckpointException as error:
        stop(str(error).splitlines()[-1])
    except (ValueError, OSError) as error:
        stop(str(error).splitlines()[0])
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
