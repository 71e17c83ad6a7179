"""Train the toy world's networks from nothing and write toy/weights: the recipe of the shipped files.

    python toy/make_weights.py all                       # every part, one after the other
    python toy/make_weights.py teacher --steps 20000     # one part; the same command again resumes it

Order matters: the teacher needs vae, text and latents, the student needs the teacher and raft. Each part is seeded by
(part, step), logs to runs/make_weights/{part}.jsonl, checkpoints beside it, and exports fp16 weights whose header holds
the recipe and the figures.
"""
import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import text                                                                                        # noqa: E402
from model import DiTConfig, WanDiT, add_noise, few_step, few_step_times                           # noqa: E402
from model import load_dit, sample_noise, save_dit, shift_time                                     # noqa: E402
from text import WAN_NEGATIVE, load_text_encoder                                                # noqa: E402
from weights import write_tensors                                                                  # noqa: E402
from raft import CONFIGS as RAFTS, RAFT, save_raft                                                 # noqa: E402
from toy.world import ADVERBS, COLOURS, DIRECTIONS, FRAMES, PROMPTS, SHAPES, SIZE                  # noqa: E402
from toy.world import attributes, clips, held_out, score                                           # noqa: E402
from vae import VAEConfig, WanVAE, load_vae, save_vae                                              # noqa: E402

RUNS, OUT = REPO / "runs" / "make_weights", REPO / "toy" / "weights"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = {"vae": 760, "raft": 700, "text": 600, "latents": 28, "decoder": 1500, "teacher": 6300,
         "student": 200, "measure": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser, schedule, checkpoints

def orthogonalise(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of each of g [N, r, c], by five Newton-Schulz steps (Jordan et al., Muon)."""
    flip = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if flip else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(1, 2) if flip else x


class Optimizer:
    """Muon on the named matrices, AdamW on the rest. Its state is one flat dict of tensors, so it saves like weights.

    CHOICE: Muon, because the VAE's kernels and the DiT's matrices reached the same loss in about half of AdamW's steps.
    """

    def __init__(self, net: nn.Module, is_matrix, muon_lr: float, adam_lr: float, betas=(.9, .98), decay: float = .01):
        self.named = {n: p for n, p in net.named_parameters() if p.requires_grad}
        self.groups = {}                                         # matrices of one shape are orthogonalised together
        for name, p in self.named.items():
            if is_matrix(name, p):
                self.groups.setdefault((p.shape[0], p[0].numel()), []).append(name)
        matrices = {n for names in self.groups.values() for n in names}
        self.plain = [n for n in self.named if n not in matrices]
        self.lrs, self.betas, self.decay, self.count = (muon_lr, adam_lr), betas, decay, 0
        self.state = {f"m.{n}": torch.zeros(p.shape, device=p.device) for n, p in self.named.items()}
        self.state |= {f"v.{n}": torch.zeros_like(self.named[n]) for n in self.plain}

    @torch.no_grad()
    def step(self, scale: float, clip: float = 1.) -> float:
        """One update with both rates times `scale`; returns the gradient norm; clears the gradients."""
        for p in self.named.values():                            # images leave the temporal convolutions untouched
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), clip).item()
        self.count += 1
        for (rows, columns), names in self.groups.items():
            g = torch.stack([self.named[n].grad.reshape(rows, columns) for n in names])
            m = torch.stack([self.state[f"m.{n}"].view(rows, columns) for n in names]).lerp_(g, .05)
            update = orthogonalise(g.lerp(m, .95)) * (max(1, rows / columns) ** .5 * self.lrs[0] * scale)
            for i, n in enumerate(names):
                self.state[f"m.{n}"].copy_(m[i].view_as(self.named[n]))
                self.named[n].mul_(1 - self.lrs[0] * scale * self.decay).sub_(update[i].view_as(self.named[n]))
        b1, b2 = self.betas
        params, grads = [self.named[n] for n in self.plain], [self.named[n].grad for n in self.plain]
        m, v = [self.state[f"m.{n}"] for n in self.plain], [self.state[f"v.{n}"] for n in self.plain]
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, (1 - b2 ** self.count) ** .5)
        torch._foreach_add_(root, 1e-8)
        torch._foreach_mul_(params, 1 - self.lrs[1] * scale * self.decay)
        torch._foreach_addcdiv_(params, m, root, -self.lrs[1] * scale / (1 - b1 ** self.count))
        for p in self.named.values():
            p.grad = None
        return norm


def schedule(step: int, steps: int, warm: int = 50, tail: float = .3) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero over the last `tail` of the steps."""
    return min(1., (step + 1) / warm, max(.01, (steps - step) / (tail * steps)))


def save_run(part: str, step: int, state: dict[str, Tensor], **header) -> None:
    """Write a resumable checkpoint aside, then rename it over the last one."""
    RUNS.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    write_tensors(state, RUNS / f"{part}.part", {"json": json.dumps({"step": step, **header})})
    with open(RUNS / f"{part}.part", "rb") as file:
        os.fsync(file.fileno())
    os.replace(RUNS / f"{part}.part", RUNS / f"{part}.safetensors")


def load_run(part: str) -> tuple[dict[str, Tensor], dict]:
    """The checkpoint of a part, or ({}, {"step": 0})."""
    path = RUNS / f"{part}.safetensors"
    if not path.exists():
        return {}, {"step": 0}
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k).to(DEVICE) for k in file.keys()}, json.loads(file.metadata()["json"])


def pack(net: nn.Module, optimizer: Optimizer, **more: dict) -> dict[str, Tensor]:
    """Network, optimiser and any further dicts of tensors as one flat dict; `unpack` is its inverse."""
    parts = {"net": dict(net.named_parameters()), "opt": optimizer.state, **more}
    return {f"{part}/{k}": v for part, tensors in parts.items() for k, v in tensors.items()}


@torch.no_grad()
def unpack(state: dict[str, Tensor], step: int, net: nn.Module, optimizer: Optimizer, **more: dict) -> None:
    for part, tensors in {"net": dict(net.named_parameters()), "opt": optimizer.state, **more}.items():
        for k, v in tensors.items():
            v.copy_(state[f"{part}/{k}"])
    optimizer.count = step


def log(part: str, **values) -> None:
    """One line of numbers to the screen and to runs/make_weights/{part}.jsonl."""
    RUNS.mkdir(parents=True, exist_ok=True)
    values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    with open(RUNS / f"{part}.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")
    print(part, " ".join(f"{k} {v}" for k, v in values.items()), flush=True)


def seeded(part: str, step: int) -> torch.Generator:
    """The draws of one step; a resumed run repeats them exactly."""
    return torch.Generator().manual_seed(1_000_003 * (1 + list(STEPS).index(part)) + step)


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().half().cpu().contiguous() if v.is_floating_point() else v.cpu() for k, v in state.items()}


# ---------------------------------------------------------------------------------------------------------------------
# VAE

VAE = VAEConfig(dim=8, z_dim=8, latents_mean=(0.,) * 8, latents_std=(1.,) * 8, res_blocks=1)


def is_kernel(name: str, p: Tensor) -> bool:
    return p.ndim >= 4 and p[0].numel() >= 16 and len(p) >= 8


def sprite_weight(x: Tensor, extra: float) -> Tensor:
    """1 on the room, 1 + extra on saturated pixels and two pixels around them, [B, 1, T, H, W]."""
    vivid = ((x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) > .5).float()
    return 1 + extra * F.max_pool3d(vivid, (1, 5, 5), 1, (0, 2, 2))


def crops(pool: Tensor, centre: Tensor, count: int, frames: int, size: int, rng: torch.Generator) -> Tensor:
    """Random windows near the shape from uint8 clips [N, 3, T, H, W] -> [count, 3, frames, size, size] in [-1, 1]."""
    draw = lambda n: torch.randint(n, (count,), generator=rng).tolist()
    out = []
    for i, t, dx, dy in zip(draw(len(pool)), draw(FRAMES - frames + 1), draw(25), draw(25)):
        corner = centre[i, t + frames // 2] - size / 2 + torch.tensor([dx - 12, dy - 12])
        x, y = corner.clamp(0, SIZE - size).int().tolist()
        out.append(pool[i, :, t:t + frames, y:y + size, x:x + size])
    return torch.stack(out).float().div_(127.5).sub_(1).to(DEVICE)


def recolour(x: Tensor, rng: torch.Generator) -> Tensor:
    """Mix the colour channels of a quarter of the clips, so that the VAE can also carry pictures of flow."""
    mix = torch.randn(len(x), 3, 3, generator=rng).mul_(.6)
    keep = (torch.rand(len(x), generator=rng) > .25).float()[:, None, None]
    return torch.einsum("bij,bjthw->bithw", (keep * torch.eye(3) + (1 - keep) * mix).to(x.device), x).clamp(-1, 1)


def vae_batch(pool: Tensor, centre: Tensor, step: int, steps: int) -> Tensor:
    """Images first, then images and short clips in turn, whole frames at the end."""
    rng = seeded("vae", step)
    kind = torch.rand(1, generator=rng).item()
    if step < .15 * steps or kind < .2:
        x = crops(pool, centre, 48, 1, 32, rng)
    elif step > .8 * steps and kind < .6:
        x = crops(pool, centre, 4, 9, SIZE, rng)
    else:
        x = crops(pool, centre, *((16, 5, 32, rng) if kind < .6 else (8, 9, 32, rng)))
    return recolour(x, rng)


class Probe(nn.Module):
    """Training only: latents must tell 4-px, 2-frame averages linearly, which keeps them smooth and easy to predict."""

    def __init__(self, z_dim: int):
        super().__init__()
        self.first, self.rest = nn.Conv3d(z_dim, 12, 1), nn.Conv3d(z_dim, 24, 1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        coarse = F.pixel_unshuffle(F.avg_pool2d(x.transpose(1, 2).flatten(0, 1), 4), 2)                # [B T, 12, h, w]
        coarse = coarse.unflatten(0, (len(x), -1))
        loss = F.mse_loss(self.first(z[:, :, :1])[:, :, 0], coarse[:, 0])
        if z.shape[2] > 1:
            pairs = coarse[:, 1:].unflatten(1, (-1, 2, 2)).mean(3).flatten(2, 3)                # [B, f-1, 24, h, w]
            loss = loss + F.mse_loss(self.rest(z[:, :, 1:]), pairs.transpose(1, 2))
        return loss


@torch.no_grad()
def vae_quality(vae: WanVAE, count: int = 24) -> dict[str, float]:
    """PSNR over all pixels and over the shape's, on clips no step has seen."""
    truth = clips(list(range(20_000_000, 20_000_000 + count)), device=DEVICE)
    x = truth.pixels
    y = torch.cat([vae.decode(vae.encode(b, 4), 4) for b in x.split(8)]).clamp(-1, 1)
    error, inside = (x - y).square().mean(1) / 4, truth.coverage > .5
    seen = score(y, truth.prompts)
    return {"psnr": -10 * error.mean().log10().item(), "sprite_psnr": -10 * error[inside].mean().log10().item(),
            **{k: seen[k] for k in ("shape", "direction", "iou", "jitter")}}


def train_vae(steps: int) -> None:
    torch.manual_seed(0)
    vae = WanVAE(VAE).to(DEVICE)
    net = nn.ModuleDict({"vae": vae, "probe": Probe(VAE.z_dim)}).to(DEVICE)
    optimizer = Optimizer(net, lambda n, p: n.startswith("vae") and is_kernel(n, p), .02, 3e-3)
    state, header = load_run("vae")
    if state:
        unpack(state, header["step"], net, optimizer)
    pool, centre, began, spent = [], [], time.time(), header.get("seconds", 0.)
    for i in range(0, 1536, 64):
        batch = clips(list(range(30_000_000 + i, 30_000_064 + i)))
        pool.append(batch.pixels.add(1).mul(127.5).round().byte()), centre.append(batch.position)
    pool, centre = torch.cat(pool), torch.cat(centre)
    for step in range(header["step"], steps):
        x = vae_batch(pool, centre, step, steps)
        mean, logvar = vae.moments(x, 4, False)
        logvar = logvar.clamp(-12, 4)
        z = mean + (.5 * logvar).exp() * torch.randn(mean.shape, generator=seeded("vae", step)).to(DEVICE)
        y, weight = vae.decode(z, 4, False), sprite_weight(x, 6.)
        pixel = ((y - x).abs() + (y - x).square()).mul(weight).mean() / weight.mean()
        kl = .5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        probe = net["probe"](z, x)
        (pixel + 3e-4 * kl + .3 * probe).backward()
        norm = optimizer.step(schedule(step, steps))
        if step % 20 == 0:
            log("vae", step=step, pixel=pixel.item(), kl=kl.item(), probe=probe.item(), norm=norm,
                seconds=spent + time.time() - began)
        if step % 100 == 99 or step == steps - 1:
            quality = vae_quality(vae)
            log("vae", step=step + 1, **quality, seconds=spent + time.time() - began)
            save_run("vae", step + 1, pack(net, optimizer), seconds=spent + time.time() - began)
    export_vae(vae, vae_quality(vae, 100), steps, spent + time.time() - began)


@torch.no_grad()
def export_vae(vae: WanVAE, quality: dict, steps: int, seconds: float) -> None:
    """Measure the latents' mean and std over 256 clips, put them into the config, round to fp16, write."""
    pixels = clips(list(range(40_000_000, 40_000_256)), device=DEVICE).pixels
    z = torch.cat([vae.moments(b, 4)[0] for b in pixels.split(32)])
    mean, std = z.mean((0, 2, 3, 4)).tolist(), z.std((0, 2, 3, 4)).tolist()
    rounded = [tuple(round(v, 4) for v in values) for values in (mean, std)]
    out = WanVAE(VAEConfig(**{**vars(VAE), "latents_mean": rounded[0], "latents_std": rounded[1]}))
    out.load_state_dict(half(vae.state_dict()))
    OUT.mkdir(exist_ok=True)
    save_vae(out.half(), OUT / "vae.safetensors", preset="toy", quality=json.dumps(quality),
             recipe=f"{steps} steps, {seconds / 60:.0f} min, Muon .02 + AdamW 3e-3, sprite-weighted L1 + MSE, KL 3e-4, "
                    "linear probe .3, crops of 1, 5, 9 frames, seed 0")


# ---------------------------------------------------------------------------------------------------------------------
# RAFT

def raft_batch(step: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames 1, 2, 4 or 6 apart: image1, image2 [N, 3, H, W], exact flow [N, 2, H, W], the shape's mask [N, H, W].

    CHOICE: the gaps, because motion under one cell (4 px) gives the matching no gradient and RAFT stays at zero flow.
    """
    rng = seeded("raft", step)
    truth = clips((torch.arange(batch) + 50_000_000 + step * batch).tolist(), device=DEVICE)
    gap = torch.tensor([1, 2, 4, 6])[torch.randint(4, (batch,), generator=rng)]
    first = (torch.rand(batch, generator=rng) * (FRAMES - gap)).long()
    rows = torch.arange(batch)
    mask = (truth.coverage[rows, first] > .5).float()
    flow = (truth.velocity * gap[:, None].to(DEVICE))[:, :, None, None] * mask[:, None]
    x = truth.pixels + .01 * torch.randn(truth.pixels.shape[:2] + (1, SIZE, SIZE), generator=rng).to(DEVICE)
    return x[rows, :, first], x[rows, :, first + gap], flow, mask


def match_loss(fmap1: Tensor, fmap2: Tensor, flow: Tensor, mask: Tensor, stride: int) -> Tensor:
    """Cross-entropy of the feature correlation against the true match, on the shape's cells. Training only."""
    N, D, h, w = fmap1.shape
    cells = F.avg_pool2d(flow, stride) / stride                                                     # [N, 2, h, w]
    inside = F.avg_pool2d(mask[:, None], stride)[:, 0] > .6
    y, x = torch.meshgrid(torch.arange(h, device=flow.device), torch.arange(w, device=flow.device), indexing="ij")
    goal = (y + cells[:, 1]).round().clamp(0, h - 1) * w + (x + cells[:, 0]).round().clamp(0, w - 1)
    logits = fmap1.flatten(2).transpose(1, 2) @ fmap2.flatten(2) / math.sqrt(D)                     # [N, h w, h w]
    return F.cross_entropy(logits[inside.flatten(1)], goal.flatten(1).long()[inside.flatten(1)])


@torch.no_grad()
def raft_quality(raft: RAFT, count: int = 24, iters: int = 4) -> dict[str, float]:
    """End-point error between neighbouring frames of unseen motion-rich clips, px: all, the shape, the room."""
    truth = clips(list(range(21_000_000, 21_000_000 + count)), motion_rich=True, device=DEVICE)
    t = torch.arange(count) % (FRAMES - 1)
    rows = torch.arange(count)
    guess, flow = raft(truth.pixels[rows, :, t], truth.pixels[rows, :, t + 1], iters), truth.flow[rows, :, t]
    error, mask = (guess - flow).norm(dim=1), truth.coverage[rows, t] > .5
    return {"epe": error.mean().item(), "sprite_epe": error[mask].mean().item(), "room_epe": error[~mask].mean().item(),
            "speed_error": (guess.norm(dim=1)[mask].mean() - flow.norm(dim=1)[mask].mean()).abs().item()}


def train_raft(steps: int) -> None:
    torch.manual_seed(0)
    raft = RAFT(RAFTS["toy"]).to(DEVICE)
    optimizer = Optimizer(raft, lambda n, p: False, 0., 8e-4, betas=(.9, .999), decay=.01)
    state, header = load_run("raft")
    if state:
        unpack(state, header["step"], raft, optimizer)
    began, spent = time.time(), header.get("seconds", 0.)
    for step in range(header["step"], steps):
        image1, image2, flow, mask = raft_batch(step, 12)
        both, context = raft.fnet(torch.cat([image1, image2])).chunk(2), raft.cnet(image1)
        loss = .1 * match_loss(*both, flow, mask, raft.cfg.stride)
        weight = mask / mask.sum() + .5 * (1 - mask) / (1 - mask).sum()
        for i, (cells, hidden) in enumerate(raft.refine(*both, context, 4)):
            loss = loss + .8 ** (3 - i) * ((raft.upsample(cells, hidden) - flow).abs().sum(1) * weight).sum()
        loss.backward()
        norm = optimizer.step(schedule(step, steps, 100, .5))
        if step % 20 == 0:
            log("raft", step=step, loss=loss.item(), norm=norm, seconds=spent + time.time() - began)
        if step % 100 == 99 or step == steps - 1:
            quality = raft_quality(raft)
            log("raft", step=step + 1, **quality, seconds=spent + time.time() - began)
            save_run("raft", step + 1, pack(raft, optimizer), seconds=spent + time.time() - began)
    raft.load_state_dict({k: v.half().float() for k, v in raft.state_dict().items()})
    save_raft(raft, OUT / "raft.safetensors", torch.float16, preset="toy", quality=json.dumps(raft_quality(raft, 200)),
              recipe=f"{steps} steps, {(spent + time.time() - began) / 60:.0f} min, AdamW 8e-4, "
                     "12 pairs 1-6 frames apart, matching loss .1, seed 0")


# ---------------------------------------------------------------------------------------------------------------------
# Text encoder

VOCAB = ["<pad>", "</s>", "<unk>", "a", "moving", *COLOURS, *SHAPES, *DIRECTIONS, *ADVERBS[1:]]
TEXT_LEN = 8
UMT5 = dict(vocab_size=len(VOCAB), d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, dropout_rate=0.,
            feed_forward_proj="gated-gelu")


def train_text(steps: int) -> None:
    """A small UMT5 that tells colour, shape, direction and adverb at every one of its tokens; unknown words tell none.

    CHOICE: attributes at every token, so that a young DiT's diffuse cross-attention already reads the whole prompt.
    """
    from transformers import UMT5Config, UMT5EncoderModel
    torch.manual_seed(0)
    model, heads = UMT5EncoderModel(UMT5Config(**UMT5)).to(DEVICE), nn.Linear(64, 7 + 4 + 5 + 4).to(DEVICE)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], 3e-3)
    index = {w: i for i, w in enumerate(VOCAB)}
    for step in range(steps):
        rng, rows, goals = seeded("text", step), [], []
        for i in torch.randint(len(PROMPTS), (48,), generator=rng).tolist() + [-1] * 6:
            words = torch.randint(TEXT_LEN, (1,), generator=rng).item()
            rows.append([index[w] for w in PROMPTS[i].split()] + [1] if i >= 0 else [2] * words + [1])
            goals.append(attributes(PROMPTS[i]) if i >= 0 else (6, 3, 4, 3))
        width = max(map(len, rows))
        ids = torch.tensor([r[:TEXT_LEN] + [0] * (min(width, TEXT_LEN) - len(r)) for r in rows], device=DEVICE)
        mask = (ids > 0).long()
        logits = heads(model(input_ids=ids, attention_mask=mask).last_hidden_state).split([7, 4, 5, 4], dim=2)
        goals = torch.tensor(goals, device=DEVICE)[:, None].expand(-1, ids.shape[1], -1)
        loss = sum(F.cross_entropy(p[mask > 0], goals[..., k][mask > 0]) for k, p in enumerate(logits))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            right = min((p.argmax(2) == goals[..., k])[mask > 0].float().mean().item() for k, p in enumerate(logits))
            log("text", step=step, loss=loss.item(), right=right)
    header = {"format": "pt", "preset": "toy", "vocab": json.dumps(VOCAB),
              "config": json.dumps({**UMT5, "text_len": TEXT_LEN}), "quality": json.dumps({"attributes_right": right}),
              "recipe": f"{steps} steps, AdamW 3e-3, every token tells every attribute, seed 0"}
    state = {k: v for k, v in half(model.state_dict()).items() if k != "encoder.embed_tokens.weight"}
    write_tensors(state, OUT / "text.safetensors", header)


def context_table() -> tuple[Tensor, Tensor]:
    """Contexts [216, text_len, text_dim] of PROMPTS, and [2, ...] of what stands for none: "" and Wan's negative."""
    encoder = load_text_encoder(OUT)
    return encoder(PROMPTS).to(DEVICE), encoder(["", WAN_NEGATIVE]).to(DEVICE)


# ---------------------------------------------------------------------------------------------------------------------
# Teacher

DIT = DiTConfig(dim=128, heads=4, ffn_dim=512, layers=6, in_dim=VAE.z_dim, freq_dim=64, text_dim=64, text_len=TEXT_LEN)
CHUNK = 256                     # clips a latents file
GUIDANCE = 2.0                  # of the 50-step sampler: v_neg + GUIDANCE (v_pos - v_neg)
TAP = 4                         # the auxiliary head reads the tokens after so many blocks


@torch.no_grad()
def make_latents(vae: WanVAE, index: int) -> dict[str, Tensor]:
    """Latents of CHUNK fresh clips, their prompts' rows, and their shape's coverage of 4-px cells; cached on disk."""
    path = RUNS / "latents" / f"{index:04d}.safetensors"
    if not path.exists():
        parts = []
        for i in range(0, CHUNK, 32):
            truth = clips([60_000_000 + index * CHUNK + i + j for j in range(32)], device=DEVICE)
            c, s, d, a = truth.attributes.T
            cells = F.avg_pool2d(truth.coverage, 4)
            parts.append({"z": vae.encode(truth.pixels, 4).half(), "cells": cells.mul(255).round().byte(),
                          "row": ((c * 3 + s) * 4 + d) * 3 + a})
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {k: torch.cat([p[k] for p in parts]).contiguous().cpu() for k in parts[0]}
        write_tensors(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}


def train_latents(chunks: int) -> None:
    """Fill the cache of latents ahead of the teacher: `latents --steps CHUNKS`."""
    vae = load_vae(OUT / "vae.safetensors").to(DEVICE)
    for index in range(chunks):
        began = time.time()
        make_latents(vae, index)
        log("latents", chunk=index, seconds=time.time() - began)


def train_decoder(steps: int) -> None:
    """Fine-tune the shipped VAE's decoder alone on whole frames: the encoder, so every cached latent, stays as it is.

    CHOICE: a little noise on the latents, because a generator's are not exact either and edges should survive that.
    """
    torch.manual_seed(0)
    vae = load_vae(OUT / "vae.safetensors").to(DEVICE)
    net = nn.ModuleList([vae.decoder, vae.conv2]).requires_grad_(True)
    optimizer = Optimizer(net, is_kernel, .006, 1e-3)
    state, header = load_run("decoder")
    if state:
        unpack(state, header["step"], net, optimizer)
    began, spent = time.time(), header.get("seconds", 0.)
    for step in range(header["step"], steps):
        rng = seeded("decoder", step)
        index = int(torch.randint(4, (1,), generator=rng))
        pick, start = torch.randint(CHUNK, (4,), generator=rng), int(torch.randint(3, (1,), generator=rng))
        truth = clips((60_000_000 + index * CHUNK + pick).tolist(), device=DEVICE)
        z = make_latents(vae, index)["z"][pick].float()
        z = (z + .1 * torch.rand(4, 1, 1, 1, 1, generator=rng) * torch.randn(z.shape, generator=rng)).to(DEVICE)
        y = vae.decode_window(z, start, 2, 4, False)
        x = truth.pixels[:, :, :9] if start == 0 else truth.pixels[:, :, 4 * start:4 * start + 9]
        weight = sprite_weight(x, 6.)
        pixel = ((y - x).abs() + (y - x).square()).mul(weight).mean() / weight.mean()
        pixel.backward()
        norm = optimizer.step(schedule(step, steps, tail=.5))
        if step % 20 == 0:
            log("decoder", step=step, pixel=pixel.item(), norm=norm, seconds=spent + time.time() - began)
        if step % 100 == 99 or step == steps - 1:
            quality = vae_quality(vae, 100 if step == steps - 1 else 24)
            log("decoder", step=step + 1, **quality, seconds=spent + time.time() - began)
            save_run("decoder", step + 1, pack(net, optimizer), seconds=spent + time.time() - began)
    with safe_open(OUT / "vae.safetensors", "pt") as file:
        meta = file.metadata()
    save_vae(vae.half(), OUT / "vae.safetensors", preset="toy", quality=json.dumps(quality),
             recipe=f"{meta['recipe']}; then the decoder alone, {steps} steps, "
                    f"{(spent + time.time() - began) / 60:.0f} min, noisy latents")


def compile_blocks() -> None:
    """Fuse the DiT's blocks for training (1.4 times faster on a CPU), with a rotation free of complex numbers."""
    def rotate(x, rope):
        (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rope
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    plain, run = model.rotate, model.Block.run
    model.rotate = lambda x, rope: rotate(x, rope) if isinstance(rope, tuple) else plain(x, rope)
    fused = torch.compile(run, dynamic=False)
    model.Block.run = lambda *args: (fused if torch.is_grad_enabled() else run)(*args)


def tapped(net: WanDiT, head: nn.Module, z_t: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """The DiT's velocity, and the auxiliary head's logits [B, L, 64] from the tokens after TAP blocks."""
    x, e, e0, context, rope = net.embed(z_t, t, context)
    rope = rope.real.contiguous(), rope.imag.contiguous()
    for i, block in enumerate(net.blocks):
        x = block(x, e0, context, rope)
        if i == TAP - 1:
            seen = head(x)
    return net.unpatchify(net.head(x, e), z_t.shape), seen


def token_cells(cells: Tensor) -> Tensor:
    """Coverage of 4-px cells [B, T, 16, 16] in 0..1 -> per token (16 px, 4 frames; frame 0 repeated) [B, L, 64]."""
    cells = torch.cat([cells[:, :1].expand(-1, 3, -1, -1), cells], 1)                                # [B, 4 f, 16, 16]
    cells = cells.unflatten(1, (-1, 4)).unflatten(3, (4, 4)).unflatten(5, (4, 4))              # [B, f, 4, h, 4, w, 4]
    return cells.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


@torch.no_grad()
def sample_clips(net: WanDiT, vae: WanVAE, pairs: list, steps: int, guidance: float, shift: float) -> Tensor:
    """Pixels of (prompt, noise seed) pairs by UniPC, guided against the empty prompt."""
    from sample import teacher_sample
    table, null = context_table()
    rows, out = {p: i for i, p in enumerate(PROMPTS)}, []
    for i in range(0, len(pairs), 50):
        part = pairs[i:i + 50]
        context = table[[rows[p] for p, _ in part]]
        noise = sample_noise([s for _, s in part], (DIT.in_dim, 5, 8, 8), 1)[0].to(DEVICE)
        z = teacher_sample(net, noise, context, null[:1].expand_as(context), steps, shift, guidance)
        out += [vae.decode(b, 4) for b in z.split(10)]
    return torch.cat(out)


def evaluate(net: WanDiT, vae: WanVAE, count: int = 200, guidance: float = GUIDANCE) -> dict[str, float]:
    """`world.score` of 50-step samples for the first `count` held-out pairs."""
    pairs = held_out()[:count]
    return score(sample_clips(net, vae, pairs, 50, guidance, 3.), [p for p, _ in pairs])


def average_gradients(net: nn.Module, ranks: int) -> None:
    """Mean gradient over processes: on a busy machine two one-thread processes beat one with two threads."""
    params = [p for p in net.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.div_(ranks).split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


def teacher_batch(pool: dict[str, Tensor], step: int, batch: int, table: Tensor, null: Tensor) -> tuple[Tensor, ...]:
    """z0, noise, t, context, coverage of one step; one prompt in ten is dropped for guidance.

    CHOICE: t = shift 3 of a logit-normal; where the shape goes is decided at high noise, how crisp it is at low.
    """
    rng = seeded("teacher", step)
    pick = torch.randint(len(pool["z"]), (batch,), generator=rng)
    z0 = pool["z"][pick].float()
    noise = torch.randn(z0.shape, generator=rng)
    t = shift_time(torch.sigmoid(1.2 * torch.randn(batch, generator=rng)), 3.)
    drop, which = torch.rand(batch, generator=rng) < .1, torch.randint(2, (batch,), generator=rng)
    context = torch.where(drop[:, None, None].to(DEVICE), null[which], table[pool["row"][pick]])
    cells = token_cells(pool["cells"][pick].float().div(255))
    return z0.to(DEVICE), noise.to(DEVICE), t.to(DEVICE), context, cells.to(DEVICE)


def train_teacher(steps: int, batch: int = 16, chunks: int = 48) -> None:
    compile_blocks()
    torch.manual_seed(0)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    vae = load_vae(OUT / "vae.safetensors").to(DEVICE)
    net = WanDiT(DIT).init_weights().to(DEVICE)
    head = nn.Sequential(nn.LayerNorm(DIT.dim), nn.Linear(DIT.dim, 64)).to(DEVICE)
    both = nn.ModuleDict({"net": net, "head": head})
    optimizer = Optimizer(both, lambda n, p: ".blocks." in n and p.ndim == 2 and "modulation" not in n, .02, 2e-3)
    ema = {n: p.detach().clone() for n, p in net.named_parameters()}
    state, header = load_run("teacher")
    if state:
        unpack(state, header["step"], both, optimizer, ema=ema)
    table, null = context_table()
    pool, loaded = {}, 0
    z_t = torch.zeros(batch, DIT.in_dim, 5, 8, 8, device=DEVICE)
    v, seen = tapped(net, head, z_t, z_t[:, 0, 0, 0, 0], table[:batch])
    (v.sum() + seen.sum()).backward()                            # compiles, before anybody waits for it
    both.zero_grad()
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{PORT}", rank=rank, world_size=ranks)
    began, spent, sums, saved = time.time(), header.get("seconds", 0.), [0., 0.], time.time()
    for step in range(header["step"], steps):
        if step % 200 == 0 or not pool:
            ready = len(list((RUNS / "latents").glob("*.safetensors")))
            loaded = max(loaded, min(chunks, ready), 1)
            parts = [make_latents(vae, i) for i in range(loaded)]
            pool = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        z0, noise, t, context, cells = teacher_batch(pool, step * ranks + rank, batch, table, null)
        v, seen = tapped(net, head, add_noise(z0, noise, t), t, context)
        loss, aux = F.mse_loss(v, noise - z0), F.binary_cross_entropy_with_logits(seen, cells)
        (loss + AUX * aux).backward()
        average_gradients(both, ranks)
        norm, keep = optimizer.step(schedule(step, steps, 200, .35)), min(.999, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in net.parameters()], 1 - keep)
        sums = [sums[0] + loss.item() / 50, sums[1] + aux.item() / 50]
        if rank:
            continue
        if step % 50 == 49:
            log("teacher", step=step + 1, loss=sums[0], aux=sums[1], norm=norm, clips=len(pool["z"]),
                seconds=spent + time.time() - began)
            sums = [0., 0.]
        if time.time() - saved > 100 or step == steps - 1:
            save_run("teacher", step + 1, pack(both, optimizer, ema=ema), seconds=spent + time.time() - began)
            saved = time.time()
        if step % EVERY == EVERY - 1 or step == steps - 1:
            export_teacher(net, ema, vae, step + 1, batch * ranks, spent + time.time() - began)


AUX, EVERY, PORT = 1., 2500, 29617         # weight of the auxiliary loss; steps between evaluations


def export_teacher(net: WanDiT, ema: dict, vae: WanVAE, step: int, batch: int, seconds: float, count: int = 48) -> None:
    """Evaluate the averaged weights as they will be shipped, in fp16 precision, and write them."""
    average = copy.deepcopy(net)
    average.load_state_dict({n: v.half().float() for n, v in ema.items()})
    recipe = (f"flow matching, {step} steps of {batch}, {seconds / 60:.0f} min, Muon .02 + AdamW 2e-3, EMA .999, "
              "coverage head, seed 0")
    header = {"preset": "toy", "step": step, "guidance": GUIDANCE, "recipe": recipe}
    save_dit(half(ema), OUT / "teacher.safetensors", DIT, **header)      # usable while it is being measured
    quality = {k: round(v, 4) for k, v in evaluate(average, vae, count).items()}
    log("teacher", step=step, count=count, **quality)
    header["quality"] = json.dumps({"clips": count, **quality})
    save_dit(half(ema), OUT / "teacher.safetensors", DIT, **header)


# ---------------------------------------------------------------------------------------------------------------------
# Student

STUDENT = {"timesteps": (1000, 857, 600), "shift": 3.0}     # three steps; their noise levels are 1, .857 and .6
DMD = ["--batch", "16", "--micro_batch", "8", "--fake_updates", "3", "--lr_generator", "2e-4", "--guidance", "1",
       "--ema", ".97"]                                     # guidance 1 is GUIDANCE - 1


@torch.no_grad()
def few_step_clips(net: WanDiT, vae: WanVAE, pairs: list[tuple[str, int]]) -> Tensor:
    """Pixels of (prompt, noise seed) pairs by the student's own sampler."""
    table, times = context_table()[0], few_step_times(**dict(steps=STUDENT["timesteps"], shift=STUDENT["shift"]))
    rows, out = {p: i for i, p in enumerate(PROMPTS)}, []
    for part in (pairs[i:i + 50] for i in range(0, len(pairs), 50)):
        noise = sample_noise([s for _, s in part], (DIT.in_dim, 5, 8, 8), len(times)).to(DEVICE)
        z = few_step(net, noise, table[[rows[p] for p, _ in part]], times)
        out += [vae.decode(b, 4) for b in z.split(10)]
    return torch.cat(out)


def train_student(steps: int) -> None:
    """Distil the teacher by train.py itself: its DMD warm-up alone, on two processes, resumable like all its runs."""
    began, out = time.time(), RUNS / "student"
    command = ["--nproc_per_node", "2", "--master_port", str(PORT + 1), str(REPO / "train.py"), "--preset", "toy",
               "--generator", str(OUT / "teacher.safetensors"), "--out", str(out), "--dmd_warmup", str(steps),
               "--steps", "0", "--fake_warmup", "0", "--discriminator_warmup", "0", "--samples", "0",
               "--save_every", "50", *DMD]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *command], check=True, cwd=REPO)
    state = load_dit(out / "generator_ema.safetensors").state_dict()
    save_dit(half(state), OUT / "student.safetensors", DIT, preset="toy", step=steps, sampler=json.dumps(STUDENT),
             recipe=f"train.py DMD warm-up, {steps} steps, {' '.join(DMD)}, averaged weights, "
                    f"{(time.time() - began) / 60:.0f} min")


def train_measure(_: int) -> None:
    """Score the shipped teacher and student on all held-out pairs and write the figures into their headers."""
    vae, pairs = load_vae(OUT / "vae.safetensors").to(DEVICE), held_out()
    for part in ("student", "teacher"):
        path = OUT / f"{part}.safetensors"
        net = load_dit(path).to(DEVICE)
        x = few_step_clips(net, vae, pairs) if part == "student" else sample_clips(net, vae, pairs, 50, GUIDANCE, 3.)
        quality = {k: round(v, 4) for k, v in score(x, [p for p, _ in pairs]).items()}
        log("measure", name=part, clips=len(pairs), **quality)
        with safe_open(path, "pt") as file:
            state, meta = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
        meta["quality"] = json.dumps({"clips": len(pairs), **quality})
        meta |= {"guidance": str(GUIDANCE)} if part == "teacher" else {}
        write_tensors(state, path.with_suffix(".part"), meta)
        os.replace(path.with_suffix(".part"), path)


# ---------------------------------------------------------------------------------------------------------------------

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("part", choices=[*STEPS, "all"])
    parser.add_argument("--steps", type=int, help="optimiser steps of the part (not with all)")
    args = parser.parse_args()
    for part in STEPS if args.part == "all" else [args.part]:
        globals()[f"train_{part}"](args.steps or STEPS[part])


if __name__ == "__main__":
    main()
