"""Wan2.1's text-to-video DiT, flow matching, the few-step sampler and the random numbers that it starts from.

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
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from weights import find_weights, load_strict, official_dit, on_meta, read_state_dict, save_weights, stated_config


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
    if [*steps, 0] != sorted({*steps, 0}, reverse=True) or steps[0] > 1000:
        raise ValueError(f"expected falling --timesteps within 1000 to 1, got {list(steps)}")
    grid = shift_time(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000, shift)
    return [(s / 1000, grid[(grid - s / 1000).abs().argmin()].item()) for s in steps]


def sample_noise(seeds, shape, steps):
    """Noise of every step of every sample, [steps, B, *shape]; one generator per sample, whatever the batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(steps, *shape, generator=g) for g in generators], dim=1)


def seed_of(*key):
    """A seed that depends only on what it is for: a resumed run, or another number of ranks, draws the same."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


class Draw(NamedTuple):
    """The random numbers of one use (role) in one training cycle, for the samples of one micro-batch."""
    seed: int
    cycle: int
    role: str
    index: list

    def seeds(self, what):
        return [seed_of(self.seed, self.cycle, self.role, what, i) for i in self.index]

    def prompts(self, pool):
        """The prompt of each sample, one of a list's."""
        return [pool[seed % len(pool)] for seed in self.seeds("prompt")]

    @staticmethod
    def all_prompts(pool, seed, cycles, roles, count):
        """The set of those that samples 0 to count - 1 of each role get in these cycles."""
        return {p for cycle in cycles for role in roles for p in Draw(seed, cycle, role, range(count)).prompts(pool)}

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
        return seed_of(self.seed, self.cycle, self.role, what) % count

    def window(self, latents, length):
        """Where a window of `length` of `latents` starts; drawn over the ends too, then moved inside.

        With 13 of 21 the first and the last latent are judged 13 times in 33; of the places inside alone, once in nine.
        """
        place = self.choice("window", latents + length - 1) - (length - 1)
        return min(max(place, 0), latents - length)


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
@torch.inference_mode(False)  # the cache outlives such a mode, and autograd refuses what was made in one
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
        self.head_dim = cfg.dim // cfg.heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, cfg.eps), RMSNorm(cfg.dim, cfg.eps)

    def forward(self, x, context=None, rope=None):
        context = x if context is None else context
        q = self.norm_q(self.q(x)).unflatten(2, (-1, self.head_dim))              # [B, L, N, d]
        k = self.norm_k(self.k(context)).unflatten(2, (-1, self.head_dim))
        v = self.v(context).unflatten(2, (-1, self.head_dim))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        # Which kernel that is, `attention_backend` tells. FlashAttention 3, where its package is installed:
        # torch.nn.attention.activate_flash_attention_impl("FA3") at the start of a script; another: sdpa_kernel here.
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(x.transpose(1, 2).flatten(2))                               # [B, L, D]


def attention_backend(cfg, shape, dtype, device):
    """The name of the kernel that torch chooses for self-attention over latents of shape [C, f, h, w]."""
    tokens = math.prod(shape[1:]) // math.prod(cfg.patch)
    q = torch.empty(1, tokens, cfg.heads, cfg.dim // cfg.heads, dtype=dtype, device=device).transpose(1, 2)
    return SDPBackend(torch._fused_sdp_choice(q, q, q)).name


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
# Files


def dit_config(state, meta, source):
    """The architecture of a file: from our header, else from its shapes with Wan's head size of 128."""
    if "config" in meta and "patch_embedding.weight" in state:
        return stated_config(DiTConfig, meta, source)
    try:
        dim, in_dim, *patch = state["patch_embedding.weight"].shape
        layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        ffn_dim, freq_dim = len(state["blocks.0.ffn.0.weight"]), state["time_embedding.0.weight"].shape[1]
        return DiTConfig(dim, dim // 128, ffn_dim, layers, in_dim, freq_dim, patch=tuple(patch),
                         text_dim=state["text_embedding.0.weight"].shape[1])
    except (KeyError, ValueError):
        raise ValueError(f"expected a Wan DiT in {source}, got keys such as {sorted(state)[:3]}") from None


def load_dit(path, config=None, dtype=torch.float32, entry=None):
    """A WanDiT from a file, folder or hub name: official, diffusers, CausVid / Self-Forcing or rCM layout.

    dtype: None keeps the file's, and then the parameters are its pages, mapped: no memory until they are read.
    """
    state, meta = read_state_dict(find_weights(path, "a Wan DiT"), entry)
    state = official_dit(state)
    config = config or dit_config(state, meta, path)
    net = on_meta(WanDiT, config, path)
    return load_strict(net, {key: value.to(dtype) for key, value in state.items()}, path)


def save_dit(net, path, config=None, **metadata):
    """Write a WanDiT, or a state dict and config, under the official keys; metadata goes into the header."""
    save_weights(net if isinstance(net, dict) else net.state_dict(), config or net.cfg, path, metadata)
