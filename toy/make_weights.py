"""Train the toy world's networks from nothing: the recipe of the files in toy/weights.

    python toy/make_weights.py all                   # every part, in the order of this table
    python toy/make_weights.py teacher               # one part; the same command again goes on where it was stopped
    python toy/make_weights.py teacher --steps 500   # a trial: another length leaves toy/weights as they are

| part    | what is trained                             | steps      | minutes | reached                |
|---------|---------------------------------------------|------------|---------|------------------------|
| vae     | the VAE, on crops of images and short clips | 760        | 20      | PSNR 29.1 dB           |
| raft    | RAFT, on pairs of frames with exact flow    | 700 of 12  | 47      | error .072 px          |
| text    | UMT5: every token tells every attribute     | 600 of 54  | 1       | all attributes right   |
| decoder | the VAE's decoder alone, on whole frames    | 1500 of 4  | 14      | PSNR 35.9 dB, IoU .940 |
| teacher | the DiT, by flow matching                   | 6300 of 32 | 49      | IoU .910, jitter .397  |
| student | the DiT at three steps, by train.py's DMD   | 200 of 16  | 10      | IoU .908, jitter .385  |

The minutes are those of two CPU cores with other work besides; on quiet ones vae and raft took 5 each. A part builds on
the files in toy/weights and draws by (part, step). Its log, checkpoint and result are under runs/make_weights: delete
that folder to begin anew. Weights are fp16, with recipe and figures in their header.
"""
import argparse
import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from cli import one_line                                                                           # noqa: E402
from model import CONFIGS as DITS, WanDiT, add_noise, few_step, few_step_times                     # noqa: E402
from model import load_dit, sample_noise, save_dit, shift_time                                     # noqa: E402
from raft import CONFIGS as RAFTS, RAFT, save_raft                                                 # noqa: E402
from sample import teacher_sample                                                                  # noqa: E402
from toy.fit import fit, log, muon_adamw, schedule                                                 # noqa: E402
from toy.world import ADVERBS, COLOURS, DIRECTIONS, FRAMES, PROMPTS, SHAPES, SIZE                  # noqa: E402
from toy.world import attributes, clips, held_out, score                                           # noqa: E402
from vae import CONFIGS as VAES, WanVAE, load_vae, save_vae                                        # noqa: E402
from text import WAN_NEGATIVE, load_text_encoder                                                   # noqa: E402
from weights import write_tensors                                                                  # noqa: E402

RUNS, WEIGHTS = REPO / "runs" / "make_weights", REPO / "toy" / "weights"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = {"vae": 1, "raft": 2, "text": 3, "decoder": 5, "teacher": 6}


def seeded(part: str, step: int) -> torch.Generator:
    """The draws of one step, which a resumed run repeats."""
    return torch.Generator().manual_seed(1_000_003 * SEEDS[part] + step)


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().half().cpu().contiguous() if v.is_floating_point() else v.cpu() for k, v in state.items()}


# ---------------------------------------------------------------------------------------------------------------------
# VAE

VAE = VAES["toy"]


def is_kernel(name: str, p: Tensor) -> bool:
    return p.ndim >= 4 and p[0].numel() >= 16 and len(p) >= 8


def pixel_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + MSE, weighted by 1 on the room and by 7 on saturated pixels and two pixels around them."""
    vivid = ((x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) > .5).float()                    # [B, 1, T, H, W]
    weight = 1 + 6 * F.max_pool3d(vivid, (1, 5, 5), 1, (0, 2, 2))
    return ((y - x).abs() + (y - x).square()).mul(weight).mean() / weight.mean()


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
    """PSNR over all pixels and over the shape's, and what the tracker sees, on clips that no step has seen."""
    truth = clips(list(range(20_000_000, 20_000_000 + count)), device=DEVICE)
    x = truth.pixels
    y = torch.cat([vae.decode(vae.encode(b, 4), 4) for b in x.split(8)]).clamp(-1, 1)
    error, inside = (x - y).square().mean(1) / 4, truth.coverage > .5
    seen = score(y, truth.prompts)
    return {"psnr": -10 * error.mean().log10().item(), "sprite_psnr": -10 * error[inside].mean().log10().item(),
            **{k: seen[k] for k in ("shape", "direction", "iou", "jitter")}}


def train_vae(steps: int, folder: Path, out: Path) -> None:
    torch.manual_seed(0)
    vae = WanVAE(VAE).to(DEVICE)
    net = nn.ModuleDict({"vae": vae, "probe": Probe(VAE.z_dim)}).to(DEVICE)
    pool, centre = [], []
    for i in range(30_000_000, 30_001_536, 64):
        batch = clips(list(range(i, i + 64)))
        pool.append(batch.pixels.add(1).mul(127.5).round().byte()), centre.append(batch.position)
    pool, centre = torch.cat(pool), torch.cat(centre)

    def loss(step):
        x = vae_batch(pool, centre, step, steps)
        mean, logvar = vae.moments(x, 4)
        logvar = logvar.clamp(-12, 4)
        z = mean + (.5 * logvar).exp() * torch.randn(mean.shape, generator=seeded("vae", step)).to(DEVICE)
        pixel, probe = pixel_loss(vae.decode(z, 4), x), net["probe"](z, x)
        kl = .5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return pixel + 3e-4 * kl + .3 * probe, {"pixel": pixel, "kl": kl, "probe": probe}

    opts = muon_adamw(net, lambda name, p: name.startswith("vae") and is_kernel(name, p), .02, 3e-3)
    minutes = fit(folder, steps, net, opts, loss, lambda: vae_quality(vae))
    quality = vae_quality(vae, 100)
    with torch.no_grad():                                        # normalised latents: their mean and std over 256 clips
        pixels = clips(list(range(40_000_000, 40_000_256)), device=DEVICE).pixels
        z = torch.cat([vae.moments(b, 4)[0] for b in pixels.split(32)])
    mean, std = (tuple(round(v, 4) for v in x.tolist()) for x in (z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))))
    vae.cfg = replace(VAE, latents_mean=mean, latents_std=std)
    save_vae(vae.half(), out, preset="toy", quality=json.dumps(quality),
             recipe=f"{steps} steps, {minutes:.0f} min, Muon .02 + AdamW 3e-3, sprite-weighted L1 + MSE, KL 3e-4, "
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


def train_raft(steps: int, folder: Path, out: Path) -> None:
    torch.manual_seed(0)
    raft = RAFT(RAFTS["toy"]).to(DEVICE)

    def loss(step):
        image1, image2, flow, mask = raft_batch(step, 12)
        both, context = raft.fnet(torch.cat([image1, image2])).chunk(2), raft.cnet(image1)
        total = .1 * match_loss(*both, flow, mask, raft.cfg.stride)
        weight = mask / mask.sum() + .5 * (1 - mask) / (1 - mask).sum()
        for i, (cells, hidden) in enumerate(raft.refine(*both, context, 4)):
            total = total + .8 ** (3 - i) * ((raft.upsample(cells, hidden) - flow).abs().sum(1) * weight).sum()
        return total, {"loss": total}

    adamw = torch.optim.AdamW(raft.parameters(), 8e-4)
    minutes = fit(folder, steps, raft, [adamw], loss, lambda: raft_quality(raft), warm=100, tail=.5)
    raft.load_state_dict({k: v.half().float() for k, v in raft.state_dict().items()})
    save_raft(raft, out, torch.float16, preset="toy",
              quality=json.dumps(raft_quality(raft, 200)),
              recipe=f"{steps} steps, {minutes:.0f} min, AdamW 8e-4, 12 pairs 1-6 frames apart, matching loss .1, "
                     "seed 0")


# ---------------------------------------------------------------------------------------------------------------------
# Text encoder

VOCAB = ["<pad>", "</s>", "<unk>", "a", "moving", *COLOURS, *SHAPES, *DIRECTIONS, *ADVERBS[1:]]
TEXT_LEN = 8
UMT5 = dict(vocab_size=len(VOCAB), d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, dropout_rate=0.,
            feed_forward_proj="gated-gelu")


def train_text(steps: int, folder: Path, out: Path) -> None:
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
        ids = torch.tensor([row + [0] * (TEXT_LEN - len(row)) for row in rows], device=DEVICE)
        mask = (ids > 0).long()
        logits = heads(model(input_ids=ids, attention_mask=mask).last_hidden_state).split([7, 4, 5, 4], dim=2)
        goals = torch.tensor(goals, device=DEVICE)[:, None].expand(-1, TEXT_LEN, -1)
        loss = sum(F.cross_entropy(p[mask > 0], goals[..., k][mask > 0]) for k, p in enumerate(logits))
        optimizer.param_groups[0]["lr"] = 3e-3 * schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            right = min((p.argmax(2) == goals[..., k])[mask > 0].float().mean().item() for k, p in enumerate(logits))
            log(folder, step=step, loss=loss.item(), right=right)
    header = {"format": "pt", "preset": "toy", "vocab": json.dumps(VOCAB),
              "config": json.dumps({**UMT5, "text_len": TEXT_LEN}), "quality": json.dumps({"attributes_right": right}),
              "recipe": f"{steps} steps, AdamW 3e-3, every token tells every attribute, seed 0"}
    state = {k: v for k, v in half(model.state_dict()).items() if k != "encoder.embed_tokens.weight"}
    write_tensors(state, out, header)


def context_table() -> tuple[Tensor, Tensor]:
    """Contexts [216, text_len, text_dim] of PROMPTS, and [2, ...] of what stands for none: "" and Wan's negative."""
    encoder = load_text_encoder(WEIGHTS)
    return encoder(PROMPTS).to(DEVICE), encoder(["", WAN_NEGATIVE]).to(DEVICE)


# ---------------------------------------------------------------------------------------------------------------------
# Latents, and the decoder's second training

CHUNK, CHUNKS = 256, 28


@torch.no_grad()
def latents(vae: WanVAE, chunks: int = CHUNKS, lurch: float = 0.) -> dict[str, Tensor]:
    """z, the prompt's row in PROMPTS, and the shape's cover of 4-px cells, of 256 clips a chunk; made once."""
    encoder = torch.cat([p.flatten() for p in [*vae.encoder.parameters(), *vae.conv1.parameters()]]).cpu()
    path = RUNS / f"latents-{zlib.crc32(encoder.numpy()):08x}-{chunks}{f'-lurch-{lurch}' if lurch else ''}.safetensors"
    if not path.exists():
        parts = []
        for seed in range(60_000_000, 60_000_000 + CHUNK * chunks, 32):
            truth = clips(list(range(seed, seed + 32)), device=DEVICE, lurch=lurch)
            c, s, d, a = truth.attributes.T
            parts.append({"z": vae.encode(truth.pixels, 4).half(), "row": ((c * 3 + s) * 4 + d) * 3 + a,
                          "cells": F.avg_pool2d(truth.coverage, 4).mul(255).round().byte()})
        pool = {k: torch.cat([p[k] for p in parts]).contiguous().cpu() for k in parts[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(pool, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    return load_file(path)


def train_decoder(steps: int, folder: Path, out: Path) -> None:
    """Train the VAE's decoder on, alone: the encoder, so every latent, stays as it is.

    CHOICE: a little noise on the latents, because a generator's are not exact either and edges should survive that.
    """
    with safe_open(WEIGHTS / "vae.safetensors", "pt") as file:
        recipe = file.metadata()["recipe"]
    if folder.name == "decoder" and "decoder alone" in recipe:               # at full length: it would ship
        sys.exit(f"make_weights.py: expected a VAE as the part vae makes it, got {WEIGHTS / 'vae.safetensors'}, whose "
                 "decoder has had this training: run vae before")
    vae = load_vae(WEIGHTS / "vae.safetensors").to(DEVICE)
    net, pool = nn.ModuleList([vae.decoder, vae.conv2]).requires_grad_(True), latents(vae)["z"]

    def loss(step):
        rng = seeded("decoder", step)
        index = int(torch.randint(4, (1,), generator=rng)) * CHUNK
        pick, start = index + torch.randint(CHUNK, (4,), generator=rng), int(torch.randint(3, (1,), generator=rng))
        x, z = clips((60_000_000 + pick).tolist(), device=DEVICE).pixels, pool[pick].float()
        z = (z + .1 * torch.rand(4, 1, 1, 1, 1, generator=rng) * torch.randn(z.shape, generator=rng)).to(DEVICE)
        pixel = pixel_loss(vae.decode_window(z, start, 2, 4), x[:, :, 4 * start:4 * start + 9])
        return pixel, {"pixel": pixel}

    opts = muon_adamw(net, is_kernel, .006, 1e-3)
    minutes = fit(folder, steps, net, opts, loss, lambda: vae_quality(vae), tail=.5)
    quality = json.dumps(vae_quality(vae, 100))
    save_vae(vae.half(), out, preset="toy", quality=quality,
             recipe=f"{recipe}; then the decoder alone, {steps} steps, {minutes:.0f} min, noisy latents")


# ---------------------------------------------------------------------------------------------------------------------
# Teacher

DIT = DITS["toy"]
GUIDANCE = 2.0                  # of the 50-step sampler: v_neg + GUIDANCE (v_pos - v_neg)
TAP = 4                         # the auxiliary head reads the tokens after so many blocks


def tapped(net: WanDiT, head: nn.Module, z_t: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """The DiT's velocity, and the auxiliary head's logits [B, L, 64] from the tokens after TAP blocks."""
    x, e, e0, context, rope = net.embed(z_t, t, context)
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


def teacher_batch(pool: dict[str, Tensor], seed: int, table: Tensor, null: Tensor) -> tuple[Tensor, ...]:
    """z0, noise, t, context, coverage of 16 samples; one prompt in ten is dropped for guidance.

    CHOICE: t = shift 3 of a logit-normal; where the shape goes is decided at high noise, how crisp it is at low.
    """
    rng = seeded("teacher", seed)
    pick = torch.randint(len(pool["z"]), (16,), generator=rng)
    z0 = pool["z"][pick].float()
    noise = torch.randn(z0.shape, generator=rng)
    t = shift_time(torch.sigmoid(1.2 * torch.randn(16, generator=rng)), 3.)
    drop, which = torch.rand(16, generator=rng) < .1, torch.randint(2, (16,), generator=rng)
    context = torch.where(drop[:, None, None].to(DEVICE), null[which], table[pool["row"][pick]])
    cells = token_cells(pool["cells"][pick].float().div(255))
    return z0.to(DEVICE), noise.to(DEVICE), t.to(DEVICE), context, cells.to(DEVICE)


def train_teacher(steps: int, folder: Path, out: Path) -> None:
    """Flow matching, and in training only a linear head that tells from the middle tokens where the shape is."""
    torch.manual_seed(0)
    vae, net = load_vae(WEIGHTS / "vae.safetensors").to(DEVICE), WanDiT(DIT).init_weights().to(DEVICE)
    head = nn.Sequential(nn.LayerNorm(DIT.dim), nn.Linear(DIT.dim, 64)).to(DEVICE)
    both, pool, (table, null) = nn.ModuleDict({"net": net, "head": head}), latents(vae), context_table()

    def loss(step):
        halves = [teacher_batch(pool, 2 * step + i, table, null) for i in (0, 1)]
        z0, noise, t, context, cells = map(torch.cat, zip(*halves))
        v, seen = tapped(net, head, add_noise(z0, noise, t), t, context)
        flow, aux = F.mse_loss(v, noise - z0), F.binary_cross_entropy_with_logits(seen, cells)
        return flow + aux, {"loss": flow, "aux": aux}

    mean = copy.deepcopy(both)
    opts = muon_adamw(both, lambda name, p: ".blocks." in name and p.ndim == 2 and "modulation" not in name, .02, 2e-3)
    minutes = fit(folder, steps, both, opts, loss, mean=mean, warm=200, tail=.35)
    state = half(mean["net"].state_dict())
    net.load_state_dict(state)                                   # judged as it is shipped, rounded to fp16
    quality = evaluate(folder, lambda pairs: sample_clips(net, vae, pairs, 50, GUIDANCE, 3.))
    save_dit(state, out, DIT, preset="toy", step=steps, guidance=GUIDANCE, quality=quality,
             recipe=f"flow matching, {steps} steps of 32, {minutes:.0f} min, Muon .02 + AdamW 2e-3, EMA .999, "
                    "coverage head, seed 0")


def evaluate(folder: Path, sample) -> str:
    """`world.score` of the 200 held-out pairs, as JSON for the header; sample(pairs) -> pixels."""
    pairs = held_out()
    figures = {k: round(v, 4) for k, v in score(sample(pairs), [p for p, _ in pairs]).items()}
    log(folder, clips=len(pairs), **figures)
    return json.dumps({"clips": len(pairs), **figures})


@torch.no_grad()
def decoded(vae: WanVAE, pairs: list[tuple[str, int]], calls: int, sample) -> Tensor:
    """Pixels of (prompt, noise seed) pairs by sample(noise [calls, B, ...], context, null context) -> z0."""
    (table, null), out = context_table(), []
    for part in (pairs[i:i + 50] for i in range(0, len(pairs), 50)):
        context = table[[PROMPTS.index(p) for p, _ in part]]
        noise = sample_noise([s for _, s in part], (DIT.in_dim, 5, 8, 8), calls).to(DEVICE)
        out += [vae.decode(b, 4) for b in sample(noise, context, null[:1].expand_as(context)).split(10)]
    return torch.cat(out)


def sample_clips(net: WanDiT, vae: WanVAE, pairs: list, steps: int, guidance: float, shift: float) -> Tensor:
    """Pixels of (prompt, noise seed) pairs by UniPC, guided against the empty prompt."""
    return decoded(vae, pairs, 1, lambda noise, context, null: teacher_sample(
        net, noise[0], context, null, steps, shift, guidance))


# ---------------------------------------------------------------------------------------------------------------------
# Student

STUDENT = {"timesteps": (1000, 857, 600), "shift": 3.0}     # three steps; their noise levels are 1, .857 and .6
ALONE = "--preset toy --cycles 0 --fake_warmup 0 --discriminator_warmup 0 --samples 0 --save_every 50".split()
DMD = ["--batch", "16", "--micro_batch", "8", "--fake_updates", "3", "--lr_generator", "2e-4", "--guidance", "1",
       "--ema", ".97"]                                     # guidance 1 is GUIDANCE - 1


def few_step_clips(net: WanDiT, vae: WanVAE, pairs: list[tuple[str, int]]) -> Tensor:
    """Pixels of (prompt, noise seed) pairs by the student's own sampler."""
    times = few_step_times(STUDENT["timesteps"], STUDENT["shift"])
    return decoded(vae, pairs, len(times), lambda noise, context, _: few_step(net, noise, context, times))


def train_student(steps: int, folder: Path, out: Path) -> None:
    """Distil the teacher by train.py itself: its DMD warm-up alone, resumable like all its runs."""
    began = time.time()
    command = ["--standalone", "--nproc_per_node", "2", str(REPO / "train.py"), *ALONE, "--generator",
               str(WEIGHTS / "teacher.safetensors"), "--out", str(folder / "run"), "--dmd_warmup", str(steps), *DMD]
    if subprocess.run([sys.executable, "-m", "torch.distributed.run", *command], cwd=REPO).returncode:
        sys.exit("make_weights.py: train.py ended with an error, see above; the same command resumes it")
    minutes, net = (time.time() - began) / 60, load_dit(folder / "run" / "generator_ema.safetensors").to(DEVICE)
    state, vae = half(net.state_dict()), load_vae(WEIGHTS / "vae.safetensors").to(DEVICE)
    net.load_state_dict(state)
    quality = evaluate(folder, lambda pairs: few_step_clips(net, vae, pairs))
    save_dit(state, out, DIT, preset="toy", step=steps, sampler=json.dumps(STUDENT), quality=quality,
             recipe=f"train.py DMD warm-up, {steps} steps, {' '.join(DMD)}, averaged weights, {minutes:.0f} min")


# ---------------------------------------------------------------------------------------------------------------------

PARTS = {"vae": (760, train_vae), "raft": (700, train_raft), "text": (600, train_text),
         "decoder": (1500, train_decoder), "teacher": (6300, train_teacher), "student": (200, train_student)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--steps", type=int, help="another length of one part; toy/weights are then left as they are")
    args = parser.parse_args(argv)
    if args.steps is not None and (args.part == "all" or args.steps < 1):
        sys.exit(f"make_weights.py: expected one part and --steps of at least 1, got {args.part} --steps {args.steps}; "
                 "without --steps every part has its full length")
    for part in PARTS if args.part == "all" else [args.part]:
        full, train = PARTS[part]
        steps = args.steps or full
        folder, name = RUNS / (part if steps == full else f"{part}-{steps}"), "vae" if part == "decoder" else part
        made, shipped = folder / f"{name}.safetensors", WEIGHTS / f"{name}.safetensors"
        if made.exists():
            print(f"{made} is there already: delete {folder} to make it anew")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        train(steps, folder, made.with_suffix(".part"))
        if steps == full:                        # the only way into toy/weights
            shutil.copyfile(made.with_suffix(".part"), shipped.with_suffix(".part"))
            os.replace(shipped.with_suffix(".part"), shipped)
        os.replace(made.with_suffix(".part"), made)
        print(f"wrote {made}" + f" and {shipped}" * (steps == full))


if __name__ == "__main__":
    with one_line("make_weights.py"):
        main()
