"""Wan2.1 text-to-video DiT, flow matching, the few-step sampler, the text encoder, and their weight files.

Conventions, true in every file of this repository:
  axes    [B, C, T, H, W]. UPPER case is the pixel grid, lower case the latent grid (f, h, w):
          T = 1 + 4 (f - 1), H = 8 h, W = 8 w. L tokens, D width, N heads.
  time    t in [0, 1], 0 = data, 1 = noise: z_t = (1 - t) z0 + t noise, v = noise - z0. The checkpoints' factor
          1000 enters once, inside the DiT. (The paper's Sec. 3.1 has noise at 0, its Alg. 1 l.6 data at 0.)
  range   pixels in [-1, 1]; latents normalised by the VAE's mean and std; flow in pixels per frame, channels
          (u, v) = (x, y).
Module attributes carry the official checkpoint's names, so that loading is strict and needs no converter.
"""

import functools
import hashlib
import html
import json
import math
import os
import re
import time
import unicodedata
import uuid
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

REPO = Path(__file__).resolve().parent
WEIGHTS = {  # the folder of each preset; the full-size ones are the hub repositories' own layout
    "toy": REPO / "toy" / "weights",
    "wan1.3b": REPO / "weights" / "Wan2.1-T2V-1.3B",
    "wan14b": REPO / "weights" / "Wan2.1-T2V-14B",
}
# Wan's own negative prompt (Wan-Video/Wan2.1, shared_config.py); DMD teachers were guided with it.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching and the few-step sampler


def per_sample(t, z):
    """A float or t [B] as something that broadcasts against z [B, ...]."""
    return t.view(-1, *[1] * (z.ndim - 1)) if torch.is_tensor(t) else t


def add_noise(z0, noise, t):
    """z_t = (1 - t) z0 + t noise; t a float or [B] in [0, 1]."""
    t = per_sample(t, z0)
    return (1 - t) * z0 + t * noise


def velocity_to_x0(v, z_t, t):
    """The clean latent that a velocity v = noise - z0 at z_t implies: z0 = z_t - t v."""
    return z_t - per_sample(t, z_t) * v


def shift_time(u, shift):
    """Wan's timestep shift, [0, 1] -> [0, 1]: moves time towards noise for shift > 1."""
    return shift * u / (1 + (shift - 1) * u)


def few_step_times(steps=(1000, 757, 522), shift=8.0):
    """The sampler's (t, sigma) pairs: t is what the network is told, sigma what the noise level is.

    steps: network timesteps in 0..1000, used as they stand; sigma is the nearest level of the shifted 1000-step
    grid (for 1000, 757, 522 at shift 8: 1, 28/37, 12/23).
    """
    grid = shift_time(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000, shift)
    return [(s / 1000, grid[(grid - s / 1000).abs().argmin()].item()) for s in steps]


def sample_noise(seeds, shape, steps):
    """Noise of every step of every sample, [steps, B, *shape]; one generator per sample, whatever the batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(steps, *shape, generator=g) for g in generators], dim=1)


def few_step(generator, noise, context, times, stop=None):
    """Sample with a few-step generator; in training, also the backward simulation of Alg. 1 l.4 (DMD2).

    noise: [S, B, C, f, h, w], noise[0] the start, noise[i] the re-noising before step i.
    times: from few_step_times. stop: index of the step whose prediction is returned, default the last; only
    that call carries a gradient. Returns z0 [B, C, f, h, w].
    """
    stop = len(times) - 1 if stop is None else stop
    z_t = noise[0]
    for i, (t, sigma) in enumerate(times[: stop + 1]):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == stop):
            v = generator(z_t, torch.full((len(z_t),), t, device=z_t.device), context)
            z0 = velocity_to_x0(v, z_t, sigma)
        if i < stop:
            z_t = add_noise(z0, noise[i + 1], times[i + 1][1])
    return z0


# ---------------------------------------------------------------------------------------------------------------------
# Wan DiT


def linear32(layer, x):
    """A linear layer in fp32 whatever the weights' dtype: Wan keeps the time path and the head there."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def sinusoid(t, dim):
    """[B] -> [B, dim], cosines first; float64 as in Wan, since angles rounded to fp32 change the sample."""
    freqs = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angles = t.double()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


@functools.lru_cache(maxsize=8)
def rope_table(f, h, w, head_dim, device):
    """exp(i angle) of 3-D rotary positions, complex64 [f h w, 1, head_dim / 2].

    h and w get 2 (head_dim // 6) dimensions each, t the rest.
    """
    hw = 2 * (head_dim // 6)
    axes = []
    for length, dim in (f, head_dim - 2 * hw), (h, hw), (w, hw):
        freqs = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        axes.append(torch.outer(torch.arange(length, dtype=torch.float64), freqs))
    axes = axes[0][:, None, None], axes[1][:, None], axes[2]
    angles = torch.cat([a.expand(f, h, w, -1) for a in axes], dim=3).reshape(f * h * w, 1, -1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(device)


def rotate(x, rope):
    """Apply rope to x [B, L, N, d] on interleaved pairs, in fp32 (bf16 angles blur positions)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Self-attention (context None) or cross-attention; q and k are RMS-normed at full width, before the split."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, cfg.eps), RMSNorm(cfg.dim, cfg.eps)

    def forward(self, x, context=None, rope=None):
        context = x if context is None else context
        q = self.norm_q(self.q(x)).unflatten(2, (self.heads, -1))                 # [B, L, N, d]
        k = self.norm_k(self.k(context)).unflatten(2, (self.heads, -1))
        v = self.v(context).unflatten(2, (self.heads, -1))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(x.transpose(1, 2).flatten(2))                               # [B, L, D]


class GELU(nn.Module):
    """GELU, tanh approximation; in place where no graph wants its input, the widest tensor of a forward."""

    def forward(self, x):
        return F.gelu(x, approximate="tanh", out=None if torch.is_grad_enabled() else x)


class Block(nn.Module):
    """One Wan block; `norm3`, before cross-attention, is the only norm with parameters, as in Wan."""

    def __init__(self, cfg):
        super().__init__()
        self.eps, self.checkpointing = cfg.eps, False
        self.self_attn, self.cross_attn = Attention(cfg), Attention(cfg)
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), GELU(), nn.Linear(cfg.ffn_dim, cfg.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)

    def forward(self, x, e0, context, rope):
        """The residual stream x [B, L, D] fp32; e0 [B, 6, D] fp32; context [B, text_len, D]; a rope_table."""
        # Checkpointing inside the sharded block: recomputation finds its parameters already gathered. The last sum lies
        # outside and keeps the FFN's output: its product, a tenth of a full-size forward, is not computed again.
        if self.checkpointing and torch.is_grad_enabled():
            y = checkpoint(self.run, x, e0, context, rope, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.run(x, e0, context, rope)
        return torch.addcmul(*y)

    def run(self, x, e0, context, rope):
        """The stream before the FFN, the FFN's gate [B, 1, D] and its output: what the last sum takes."""
        dtype = self.ffn[0].weight.dtype
        modulation = (self.modulation.float() + e0).chunk(6, dim=1)
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation
        y = torch.addcmul(shift_sa, F.layer_norm(x, x.shape[-1:], eps=self.eps), 1 + scale_sa)
        x = torch.addcmul(x, gate_sa, self.self_attn(y.to(dtype), rope=rope))
        y = F.layer_norm(x, x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps)
        x = x + self.cross_attn(y.to(dtype), context)
        y = torch.addcmul(shift_ff, F.layer_norm(x, x.shape[-1:], eps=self.eps), 1 + scale_ff)
        return x, gate_ff, self.ffn(y.to(dtype))


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.eps = cfg.eps
        self.head = nn.Linear(cfg.dim, math.prod(cfg.patch) * cfg.in_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x, e):
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)
        x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=self.eps), 1 + scale)
        return linear32(self.head, x)


@dataclass(frozen=True)
class DiTConfig:
    dim: int                # width D
    heads: int              # N
    ffn_dim: int
    layers: int
    in_dim: int = 16        # latent channels C, in and out
    freq_dim: int = 256     # sinusoid of t
    text_dim: int = 4096    # width of the text encoder
    text_len: int = 512     # text tokens, zero-padded; the padding takes part in cross-attention
    patch: tuple = (1, 2, 2)
    eps: float = 1e-6


CONFIGS = {
    "toy": DiTConfig(dim=128, heads=4, ffn_dim=512, layers=6, in_dim=8, freq_dim=64, text_dim=64, text_len=8),
    "wan1.3b": DiTConfig(dim=1536, heads=12, ffn_dim=8960, layers=30),
    "wan14b": DiTConfig(dim=5120, heads=40, ffn_dim=13824, layers=40),
}


class WanDiT(nn.Module):
    """Wan2.1's text-to-video diffusion transformer (Wan-Video/Wan2.1), the velocity network of flow matching.

    Matrix products run in the weights' dtype; residual stream, norms, modulation, time path and head in fp32.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = nn.Conv3d(cfg.in_dim, cfg.dim, cfg.patch, cfg.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, cfg.dim), nn.GELU(approximate="tanh"), nn.Linear(cfg.dim, cfg.dim))
        self.time_embedding = nn.Sequential(
            nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = Head(cfg)

    def forward(self, z, t, context):
        """Velocity, shaped as z [B, C, f, h, w], at t [B] in [0, 1] and context [B, text_len, text_dim]."""
        x, e, e0, context, rope = self.embed(z, t, context)
        for block in self.blocks:
            x = block(x, e0, context, rope)
        return self.unpatchify(self.head(x, e), z.shape)

    def embed(self, z, t, context):
        """Tokens x [B, L, D], time e [B, D] and e0 [B, 6, D], text [B, text_len, D], and the rope table."""
        cfg, dtype = self.cfg, self.patch_embedding.weight.dtype
        B, C, f, h, w = z.shape
        if C != cfg.in_dim or h % cfg.patch[1] or w % cfg.patch[2]:
            raise ValueError(f"expected latents [B, {cfg.in_dim}, f, h, w] with even h and w, got "
                             f"{list(z.shape)}: pixel sides must be divisible by 16")
        if context.shape[1:] != (cfg.text_len, cfg.text_dim):
            raise ValueError(f"expected a context [B, {cfg.text_len}, {cfg.text_dim}], got "
                             f"{list(context.shape)}: the text encoder and the DiT must be of one preset")
        x = self.patch_embedding(z.to(dtype))                                     # [B, D, f, h/2, w/2]
        rope = rope_table(*x.shape[2:], cfg.dim // cfg.heads, x.device)
        # Contiguous: else the residual stream stays transposed, and every norm copies it.
        x = x.flatten(2).transpose(1, 2).float().contiguous()                     # [B, L, D]
        e = linear32(self.time_embedding[0], sinusoid(1000 * t, cfg.freq_dim))
        e = linear32(self.time_embedding[2], F.silu(e))                           # [B, D]
        e0 = linear32(self.time_projection[1], F.silu(e)).unflatten(1, (6, -1))   # [B, 6, D]
        return x, e, e0, self.text_embedding(context.to(dtype)), rope

    def unpatchify(self, x, shape):
        """Head output [B, L, patch * C] -> [B, C, f, h, w]; the channel is a token's innermost axis."""
        B, C, f, h, w = shape
        pt, ph, pw = self.cfg.patch
        x = x.view(B, f // pt, h // ph, w // pw, pt, ph, pw, C)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(shape)

    def init_weights(self):
        """Wan's initialisation, from nothing: xavier, N(0, 0.02) for text and time, a zero head."""
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv3d)):
                if name.startswith(("text_embedding", "time_embedding")):
                    nn.init.normal_(layer.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(layer.weight.flatten(1))
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.head.head.weight)
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Weight files: read any public layout, write the official one


def find_weights(path, what="weights"):
    """The weights file behind a path: a file, a folder (official, diffusers, ours) or a hub 'owner/name'."""
    path = Path(path)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        from huggingface_hub import snapshot_download
        try:
            kinds, other = ["*.json", "*.safetensors", "*.pt", "*.pth"], ["*vae*", "*VAE*", "text_encoder*", "*t5*"]
            path = Path(snapshot_download(str(path), allow_patterns=kinds, ignore_patterns=other))
        except Exception as error:  # offline, misspelt, gated: to the caller each is a missing file
            raise ValueError(f"expected {what} at {path}: no such file, and the hub gave none "
                             f"({type(error).__name__})") from None
    if path.is_dir():
        names = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
                 "model.safetensors", "model.safetensors.index.json", "generator.safetensors",
                 "teacher.safetensors", "model.pt"]
        found = [p / n for p in (path, path / "transformer") for n in names if (p / n).exists()]
        if not found:
            raise ValueError(f"expected {what} in {path}: none of {', '.join(names[:2])}, ... is there")
        path = found[0]
    if not path.exists():
        raise ValueError(f"expected {what} at {path}: no such file (to download: README, 'Full size')")
    return path


# AMT's file has its optimizer beside the weights; learning rates are numpy scalars there, which torch.load refuses
# unless they are allowed, under the names of numpy 1 and 2.
NUMPY_SCALAR = [np.dtype, type(np.dtype(float)),
                *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def read_state_dict(path, entry=None):
    """Tensors and string metadata of a .safetensors, an index.json of shards, or a .pt/.pth (no other objects).

    entry: the network to read from a training checkpoint (CausVid, Self-Forcing); default its generator, EMA first.
    Raises ValueError, naming the file, when it is missing, truncated or not a weights file.
    """
    path = find_weights(path)
    state, meta, shards = {}, {}, []
    try:
        if path.suffix == ".json":
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        else:
            mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 (RAFT's) are plain streams
            with torch.serialization.safe_globals(NUMPY_SCALAR):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise ValueError(f"expected a weights file, got {path}, which cannot be read "
                         f"({type(error).__name__}): it may be cut short, or hold more than tensors") from None
    for shard in shards:
        state.update(read_state_dict(path.parent / shard)[0])
    if not isinstance(state, dict):
        raise ValueError(f"expected tensors by name in {path}, got a {type(state).__name__}")
    dicts = [name for name, value in state.items() if isinstance(value, dict)]
    if entry and dicts and entry not in dicts:
        raise ValueError(f"expected {entry!r} in {path}, got {', '.join(dicts)}")
    for name in entry, "generator_ema", "generator", "model", "state_dict":
        if name in dicts:
            return state[name], meta
    return state, meta


def write_tensors(state, path, metadata=None):
    """Write a .safetensors that others may read as any new file: the library's are for their owner alone."""
    save_file(state, path, metadata=metadata)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def save_weights(state, config, path, metadata):
    """Write tensors to a .safetensors whose header holds the config, as JSON, and the metadata, as strings."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    header = {"config": json.dumps(asdict(config)), **{key: str(value) for key, value in metadata.items()}}
    write_tensors(state, path, {"format": "pt", **header})


def assign(module, state, source):
    """Load state strictly into a module, on meta or not; ValueError names the first wrong keys."""
    want = {key: value.shape for key, value in module.state_dict().items()}
    wrong = [f"missing {key}" for key in want.keys() - state.keys()]
    wrong += [f"unexpected {key}" for key in state.keys() - want.keys()]
    wrong += [f"{key} is {list(state[key].shape)}, not {list(want[key])}"
              for key in want.keys() & state.keys() if state[key].shape != want[key]]
    if wrong:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {len(wrong)} of {len(want)} keys "
                         f"differ ({'; '.join(sorted(wrong)[:3])}{'; ...' if len(wrong) > 3 else ''})")
    module.load_state_dict(state, assign=True)
    return module


PREFIXES = [  # of FSDP1; of ComfyUI, CausVid and rCM
    (r"_fsdp_wrapped_module\.", ""), (r"^(model\.diffusion_model\.|model\.|net\.)+", ""),
]
FROM_DIFFUSERS = [  # applied in order; diffusers' norm2 is the official norm3
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."), (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"), (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."), (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."), (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
]


def rename(state, rules):
    """A state dict with every (pattern, replacement) applied to its keys, in order."""
    def renamed(key):
        return functools.reduce(lambda key, rule: re.sub(*rule, key), rules, key)
    return {renamed(key): value for key, value in state.items()}


def official_dit(state):
    """A DiT state dict of any public layout under the official keys."""
    state = rename(state, PREFIXES)
    if "condition_embedder.time_proj.weight" in state:
        state = rename(state, FROM_DIFFUSERS)
    patch = state.get("patch_embedding.weight")
    if patch is not None and patch.ndim == 2:  # rCM stores the same numbers as a linear layer
        state["patch_embedding.weight"] = patch.view(len(patch), -1, 1, 2, 2)
    return state


def dit_config(state, meta, source):
    """The architecture of a file: from our header, else from its shapes with Wan's head size of 128."""
    try:
        if "config" in meta and "patch_embedding.weight" in state:
            config = json.loads(meta["config"])
            return DiTConfig(**{**config, "patch": tuple(config["patch"])})
        dim, in_dim, *patch = state["patch_embedding.weight"].shape
        layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        ffn_dim, freq_dim = len(state["blocks.0.ffn.0.weight"]), state["time_embedding.0.weight"].shape[1]
        return DiTConfig(dim, dim // 128, ffn_dim, layers, in_dim, freq_dim, patch=tuple(patch),
                         text_dim=state["text_embedding.0.weight"].shape[1])
    except (KeyError, ValueError):
        raise ValueError(f"expected a Wan DiT in {source}, got keys such as {sorted(state)[:3]}") from None


def load_dit(path, config=None, dtype=torch.float32, entry=None):
    """A WanDiT from a file, folder or hub name: official, diffusers, CausVid / Self-Forcing or rCM layout."""
    state, meta = read_state_dict(find_weights(path, "a Wan DiT"), entry)
    state = official_dit(state)
    config = config or dit_config(state, meta, path)
    with torch.device("meta"):
        net = WanDiT(config)
    return assign(net, {key: value.to(dtype) for key, value in state.items()}, path)


def save_dit(net, path, config=None, **metadata):
    """Write a WanDiT, or a state dict and config, under the official keys; metadata goes into the header."""
    save_weights(net if isinstance(net, dict) else net.state_dict(), config or net.cfg, path, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Text


T5_KEYS = [  # official UMT5 encoder file -> transformers
    (r"^token_embedding\.", "shared."), (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
     r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
]
UMT5_XXL = dict(vocab_size=256384, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24,
                feed_forward_proj="gated-gelu")

FULL_WIDTH = 0x3000, *range(0xFF01, 0xFFF0)
LIGATURES = 0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)
CONTROLS = *range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)
PLAIN = {code: unicodedata.normalize("NFKC", chr(code)) for code in FULL_WIDTH + LIGATURES}  # for str.translate
PLAIN |= dict.fromkeys(CONTROLS, "") | {0x149: "'n", 0xFB05: "ſt"}
PLAIN |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')


def clean_prompt(prompt):
    """Wan's cleaning: plain quotes, widths and letters, no HTML entities, single spaces.

    CHOICE: this is what ftfy, with which Wan begins, does to sound text; wrongly decoded text is left as it is.
    """
    prompt = unicodedata.normalize("NFC", html.unescape(html.unescape(prompt)).translate(PLAIN))
    return " ".join(prompt.split())


def pad_context(rows, text_len):
    """[len, text_dim] -> [text_len, text_dim]: zero rows at the end, as in Wan, not what UMT5 makes of padding."""
    return F.pad(rows[:text_len], (0, 0, 0, text_len - len(rows[:text_len])))


class TextEncoder:
    """list[str] -> context [B, text_len, text_dim] fp32: UMT5 on each prompt's own tokens, zero-padded."""

    def __init__(self, model, tokenize, text_len):
        # transformers 5.0 to 5.2 leave these files' embedding at zero, which would silently drop the prompt.
        embedding = model.encoder.embed_tokens.weight
        if embedding.data_ptr() != model.shared.weight.data_ptr() or not embedding.any():
            raise ValueError("the UMT5 embedding is not tied to its table or is zero: upgrade transformers")
        self.model, self.tokenize, self.text_len = model.eval().requires_grad_(False), tokenize, text_len

    @torch.no_grad()
    def rows(self, prompt):
        """[len, text_dim] of one prompt, its true tokens only."""
        ids = self.tokenize(clean_prompt(prompt))
        ids = ids if len(ids) <= self.text_len else ids[: self.text_len - 1] + ids[-1:]  # the end of text stays
        ids = torch.tensor([ids], device=self.model.shared.weight.device)
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].float()

    def __call__(self, prompts):
        return torch.stack([pad_context(self.rows(prompt), self.text_len) for prompt in prompts])


def words_to_ids(prompt, vocab):
    """Word-level tokens of the toy world: lower-case words, 2 for an unknown one, then 1 for the end."""
    return [vocab.get(word, 2) for word in re.findall(r"\w+", prompt.lower())] + [1]


def load_tokenizer(folder):
    """str -> ids as tokenizer.json has it: transformers 5 builds T5's anew, with other ids for unknown characters."""
    from tokenizers import Tokenizer
    file = find_weights(Path(folder) / "tokenizer.json", "UMT5's tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library's own is nothing more special
        raise ValueError(f"expected UMT5's tokenizer at {file}, which cannot be read ({error})") from None
    tokenizer.no_padding(), tokenizer.no_truncation()
    return lambda prompt: tokenizer.encode(prompt).ids


def load_text_encoder(path, device="cpu"):
    """The text encoder of a preset's folder: the toy's, Wan's official file, or diffusers' `text_encoder/`.

    The full-size one runs on `device` in bf16, as Wan's does. Raises ValueError naming the missing files.
    """
    from transformers import UMT5Config, UMT5EncoderModel
    path = Path(path)
    toy, official = path / "text.safetensors", path / "models_t5_umt5-xxl-enc-bf16.pth"
    if toy.exists():
        state, meta = read_state_dict(toy)
        config, words = json.loads(meta["config"]), json.loads(meta["vocab"])
        vocab = {word: i for i, word in enumerate(words)}
        text_len, tokenize = config.pop("text_len"), functools.partial(words_to_ids, vocab=vocab)
        state = {key: value.float() for key, value in state.items()}
    elif official.exists():
        state, config, text_len = rename(read_state_dict(official)[0], T5_KEYS), UMT5_XXL, 512
        tokenize = load_tokenizer(path / "google" / "umt5-xxl")
    elif (path / "text_encoder" / "config.json").exists():
        state = read_state_dict(path / "text_encoder")[0]
        config, text_len = UMT5Config.from_pretrained(path / "text_encoder").to_dict(), 512
        tokenize = load_tokenizer(path / "tokenizer")
    else:
        raise ValueError(f"expected a text encoder in {path}, found none of text.safetensors, {official.name}, "
                         "text_encoder/")
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**config))
    if model.config.d_model == UMT5_XXL["d_model"]:
        state = {key: value.to(torch.bfloat16) for key, value in state.items()}
    assign(model, state, path)
    model.encoder.embed_tokens = model.shared
    return TextEncoder(model.to(device), tokenize, text_len)


def encode_prompts(prompts, path, cache, device="cpu", wait=False):
    """Encode every prompt once into `cache`, one file per prompt and encoder; return their reader.

    The reader maps list[str] -> context [B, text_len, text_dim] as a TextEncoder does, without holding one
    (UMT5-XXL takes 11 GB): it is loaded only if a prompt is missing. Files appear whole, so that several
    processes may share the folder. wait: leave the encoding to another process.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    kinds = "text.safetensors", "models_t5*.pth", "text_encoder/*", "google/umt5-xxl/tokenizer.json", "tokenizer/*.json"
    files = [file for kind in kinds for file in sorted(Path(path).glob(kind))]
    weights = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]

    def file_of(prompt):
        key = hashlib.sha256("\n".join([clean_prompt(prompt), *weights]).encode()).hexdigest()[:32]
        return cache / f"{key}.safetensors"

    encoder = None
    for prompt in dict.fromkeys(prompts):
        while wait and not file_of(prompt).exists():
            time.sleep(0.2)
        if not file_of(prompt).exists():
            encoder = encoder or load_text_encoder(path, device)
            rows = encoder.rows(prompt).to(encoder.model.dtype).cpu().contiguous()
            part = file_of(prompt).with_suffix(f".{uuid.uuid4().hex}.part")
            write_tensors({"rows": rows}, part, {"prompt": prompt, "text_len": str(encoder.text_len)})
            part.rename(file_of(prompt))

    def read(batch):
        out = []
        for prompt in batch:
            state, meta = read_state_dict(file_of(prompt))
            out.append(pad_context(state["rows"].float(), int(meta["text_len"])))
        return torch.stack(out)
    return read
