"""The Wan2.1 video VAE, chunk-recurrent: 1 + 4k frames [B, 3, T, H, W] in [-1, 1] <-> 1 + k latents.

Every temporal convolution is causal, so a clip passes through in chunks, the last input frames of each convolution
being all that a chunk needs of its past. Here that state is a value: `advance_chunk` maps (x, state) -> (y, state)
through a stack of layers and nothing is stored on a module. Hence a chunk can be checkpointed, a gradient stops where
the state is detached, and nothing after a window need be decoded.
Module attributes carry the official checkpoint's names (numbers included), so that loading is strict.
"""

import functools
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cli import from_json
from weights import load_strict, official_vae, on_meta, read_state_dict, save_weights, stated_config

# ---------------------------------------------------------------------------------------------------------------------
# Layers: (x, old_state, new_state) -> y. x and y are lists of frames [B, C, H, W]: a layer that works frame by frame
# then needs its intermediate results for one of them at a time, which is a third of the memory at full size.
# A causal convolution pops its entry from old_state (None where a clip starts) and appends one to new_state: the last
# frames of its input.


def channels_last(x):
    """x with the channels of a pixel side by side in memory, the layout that norms and convolutions want."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def stack(x):
    """Frames [B, C, H, W] as [B, C, T, H, W], channels last in memory: one copy."""
    return torch.stack([frame.movedim(1, 3) for frame in x], dim=1).movedim(4, 1)


def unstack(x):
    return channels_last(x).unbind(2)


class RMSNorm(nn.Module):
    """x / |x| sqrt(C) gamma over the channels; the length is summed in fp32 whatever the dtype of x."""

    def __init__(self, dim, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x):
        return (x * inverse_rms(x)).mul_(self.gamma.view(-1, 1, 1))


def inverse_rms(x):
    """sqrt(C) / |x| of each pixel."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12)
    return (x.shape[1] ** 0.5 / length).to(x.dtype)


class NormSiLU(torch.autograd.Function):
    """F.silu(norm(x)) that keeps x alone; autograd would keep what enters the SiLU as well.

    With n = s x, s = sqrt(C) / |x|, and d the gradient of n, that of x is s (d - n mean(d n)).
    """

    @staticmethod
    def forward(ctx, x, gamma):
        s = inverse_rms(x)
        ctx.save_for_backward(x, s, gamma)
        return F.silu((x * s).mul_(gamma.view(-1, 1, 1)), inplace=True)

    @staticmethod
    def backward(ctx, grad):
        x, s, gamma = ctx.saved_tensors
        n, wide = x * s, gamma.view(-1, 1, 1)
        d = torch.ops.aten.silu_backward(grad, n * wide)
        d_gamma = (d * n).sum((0, 2, 3)).view_as(gamma) if ctx.needs_input_grad[1] else None
        d = d.mul_(wide)
        return n.mul_((d * n).mean(1, keepdim=True)).sub_(d).mul_(-s), d_gamma


def norm_silu(norm, x):
    return [NormSiLU.apply(frame, norm.gamma) for frame in x]


def tap(conv, frame):
    """A 3-D convolution of one frame by its last temporal tap: the others see zeros, or there are none."""
    return F.conv2d(frame, conv.weight[:, :, -1], conv.bias, padding=conv.padding[1:])


class FrozenConv(torch.autograd.Function):
    """A causal convolution that keeps its weight alone; autograd's keeps its input even if the weight is frozen."""

    @staticmethod
    def forward(ctx, conv, weight, *x):
        x = stack(x)
        ctx.conv, ctx.shape = conv, x.shape
        ctx.save_for_backward(weight)
        return unstack(nn.Conv3d.forward(conv, x))

    @staticmethod
    def backward(ctx, *grads):
        # Asked for first: a checkpoint computes its chunk again now, before the gradient below takes memory.
        # Channels last, for without the input the weight alone decides the gradient's layout.
        weight, = map(channels_last, ctx.saved_tensors)
        conv = ctx.conv
        grads = unstack(nn.grad.conv3d_input(ctx.shape, weight, stack(grads), conv.stride, conv.padding))
        # A gradient waits for the chunk before: a copy, since a view would keep the gradients of all frames.
        return None, None, *(frame.clone() for frame in grads)


class CausalConv(nn.Conv3d):
    """A convolution that goes on where the previous chunk ended: the one place where time passes."""

    def __init__(self, dim, out_dim, kernel=3, stride=1):
        super().__init__(dim, out_dim, (3, kernel, kernel), (stride, 1, 1), padding=(0, kernel // 2, kernel // 2))

    def forward(self, x, old_state, new_state):
        if old_state is None:
            # A clip starts with one frame after zeros: only the last temporal tap sees anything.
            assert len(x) == 1, len(x)
            new_state.append([torch.zeros_like(x[0]), x[0]])
            return [tap(self, x[0])]
        last = old_state.pop(0)
        x = [*last, *x]
        new_state.append(x[-len(last):])
        if self.weight.requires_grad:
            return unstack(super().forward(stack(x)))
        return FrozenConv.apply(self, self.weight, *x)


class ResBlock(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.residual = nn.ModuleDict({"0": RMSNorm(dim), "2": CausalConv(dim, out_dim),
                                       "3": RMSNorm(out_dim), "6": CausalConv(out_dim, out_dim)})
        self.shortcut = nn.Conv3d(dim, out_dim, 1) if dim != out_dim else None

    def forward(self, x, old_state, new_state):
        norm1, conv1, norm2, conv2 = self.residual.values()
        # One expression, so that no name keeps what lies between the convolutions alive during the second.
        y = conv2(norm_silu(norm2, conv1(norm_silu(norm1, x), old_state, new_state)), old_state, new_state)
        return [b + (tap(self.shortcut, a) if self.shortcut else a) for a, b in zip(x, y, strict=True)]


class Attention(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x, old_state, new_state):
        return [frame + self.attend(frame) for frame in x]

    def attend(self, x):
        qkv = self.to_qkv(self.norm(x))                                           # [B, 3 C, H, W]
        q, k, v = qkv.flatten(2).transpose(1, 2)[:, None].chunk(3, dim=3)         # [B, 1, H W, C]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)         # [B, C, H W]
        return self.proj(y.unflatten(2, x.shape[2:]))


class Down(nn.Module):
    """Halve H and W; if temporal also T, except on the first frame, which only enters the state."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = CausalConv(dim, dim, kernel=1, stride=2) if temporal else None

    def forward(self, x, old_state, new_state):
        x = [self.resample["1"](F.pad(frame, (0, 1, 0, 1))) for frame in x]
        if self.time_conv and old_state is None:
            new_state.append(x)
        elif self.time_conv:
            x = self.time_conv(x, old_state, new_state)
        return x


class Up(nn.Module):
    """Double H and W and halve C; if temporal first double T, except on the first frame, whose state is zero."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim // 2, 3)})
        self.time_conv = CausalConv(dim, 2 * dim, kernel=1) if temporal else None

    def forward(self, x, old_state, new_state):
        if self.time_conv and old_state is None:
            new_state.append([torch.zeros_like(x[0])] * 2)
        elif self.time_conv:
            pairs = self.time_conv(x, old_state, new_state)                       # [B, 2 C, H, W]: even | odd
            x = [frame for pair in pairs for frame in pair.chunk(2, dim=1)]
        return upsample_conv(self.resample["1"], x)


def upsample_conv(conv, x):
    """Nearest-neighbour doubling, then a 3x3 convolution, of frames x, as one transposed convolution.

    Doubled pixels repeat, so the nine taps fall on four inputs: 2.25 times less work, and the doubled x never exists.
    """
    weight = F.avg_pool2d(conv.weight, 2, stride=1, padding=1, divisor_override=1)  # [out, in, 4, 4]
    weight = weight.flip(2, 3).transpose(0, 1)
    return [F.conv_transpose2d(frame, weight, conv.bias, 2, 1) for frame in x]


class Head(nn.ModuleDict):
    def __init__(self, dim, out_dim):
        super().__init__({"0": RMSNorm(dim), "2": CausalConv(dim, out_dim)})

    def forward(self, x, old_state, new_state):
        return self["2"](norm_silu(self["0"], x), old_state, new_state)


# ---------------------------------------------------------------------------------------------------------------------
# Stacks of layers, chunk by chunk


def advance_chunk(layers, x, state):
    """Advance layers by one chunk: (frames x, state) -> (frames y, state).

    state: a list of frames for each causal convolution, in order, or None where a clip starts. Without a graph it is
    emptied on the way, so that an entry is freed once the new one is made; with one a checkpoint may ask again.
    """
    old_state, new_state = list(state) if state and torch.is_grad_enabled() else state, []
    for layer in layers:
        x = layer(x, old_state, new_state)
    return x, new_state


def scan(layers, x, state, step):
    """Advance layers over x [B, C, T, H, W], `step` frames a chunk: (x, state) -> (y, state) as in advance_chunk.

    Frame 0 of a clip is a chunk of its own, which no time_conv resamples. Where a gradient is wanted and more than one
    chunk remains, each keeps its input alone for the backward pass and the rest is computed again.
    """
    # Copies, so that no frame of the state keeps all of x alive.
    x = [frame.clone(memory_format=torch.channels_last) for frame in x.unbind(2)]
    first, y, state = state is None, [], state and list(state)
    chunks = [x[:1]] * first + [x[i : i + step] for i in range(first, len(x), step)]
    recompute = torch.is_grad_enabled() and len(chunks) > 1 + first
    for chunk in chunks:
        if recompute:
            chunk, state = checkpoint(advance_chunk, layers, chunk, state,
                                      use_reentrant=False, preserve_rng_state=False)
        else:
            chunk, state = advance_chunk(layers, chunk, state)
        y += chunk
    return torch.stack(y, dim=2), state


def middle(dim):
    return [ResBlock(dim, dim), Attention(dim), ResBlock(dim, dim)]


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        self.conv1, self.downsamples = CausalConv(3, dims[0]), nn.ModuleList()
        for i, (dim, out_dim) in enumerate(pairwise(dims)):
            self.downsamples.extend(ResBlock(dim if j == 0 else out_dim, out_dim) for j in range(cfg.res_blocks))
            if i < len(cfg.temporal_down):
                self.downsamples.append(Down(out_dim, cfg.temporal_down[i]))
        self.middle = nn.ModuleList(middle(out_dim))
        self.head = Head(out_dim, 2 * cfg.z_dim)

    def layers(self):
        return [self.conv1, *self.downsamples, *self.middle, self.head]


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dim * m for m in (cfg.dim_mult[-1], *cfg.dim_mult[::-1])]
        self.conv1 = CausalConv(cfg.z_dim, dims[0])
        self.middle = nn.ModuleList(middle(dims[0]))
        self.upsamples = nn.ModuleList()
        for i, (dim, out_dim) in enumerate(pairwise(dims)):
            dim = dim // 2 if i else dim  # the Up before it halved the channels
            self.upsamples.extend(ResBlock(dim if j == 0 else out_dim, out_dim) for j in range(cfg.res_blocks + 1))
            if i < len(cfg.temporal_down):
                self.upsamples.append(Up(out_dim, cfg.temporal_down[-1 - i]))
        self.head = Head(out_dim, 3)

    def layers(self):
        return [self.conv1, *self.middle, *self.upsamples, self.head]


# ---------------------------------------------------------------------------------------------------------------------
# The VAE


@dataclass(frozen=True)
class VAEConfig:
    dim: int                                    # channels at full resolution
    z_dim: int                                  # latent channels C
    latents_mean: tuple                         # [C], of the raw latents; z = (mean - latents_mean) / latents_std
    latents_std: tuple                          # [C]
    dim_mult: tuple = (1, 2, 4, 4)              # channels of each level / dim; H and W halve between levels
    res_blocks: int = 2                         # a level of the encoder; the decoder has one more
    temporal_down: tuple = (False, True, True)  # where T halves as well


WAN = VAEConfig(
    dim=96, z_dim=16,
    latents_mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                  0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    latents_std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160))
CONFIGS = {
    "toy": VAEConfig(dim=8, z_dim=8, latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8, res_blocks=1),
    "wan1.3b": WAN,
    "wan14b": WAN,
}


@functools.lru_cache(maxsize=8)  # a copy to the device waits for all that is queued there
@torch.inference_mode(False)  # the cache outlives such a mode, and autograd refuses what was made in one
def mean_std(cfg, device):
    return [torch.tensor(v, device=device).view(-1, 1, 1, 1) for v in (cfg.latents_mean, cfg.latents_std)]


class WanVAE(nn.Module):
    """Wan2.1's causal video autoencoder (Wan-Video/Wan2.1), strides 4 x 8 x 8.

    Computes in the weights' dtype and answers in the input's. All methods take
    latents_per_pass: how many latents (4 frames each) make a chunk after the first, which goes alone. The result
        differs by rounding only. More means less overhead for small frames and fewer states kept for the backward
        pass (one a chunk: 1.9 GB of bf16 at 480x832), but more memory for the chunk at work. If one chunk holds them
        all, its activations are kept; of several only the inputs are, see `scan`.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.conv1 = nn.Conv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = nn.Conv3d(cfg.z_dim, cfg.z_dim, 1)

    def moments(self, x, latents_per_pass=1):
        """Raw (mean, log variance) of the posterior of x, each [B, C, f, h, w]; takes what encode takes."""
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[2] % 4 != 1:
            raise ValueError(f"expected a clip [B, 3, 1 + 4k, H, W], got {list(x.shape)}: cut it to 1 + 4k frames")
        if x.shape[3] % 8 or x.shape[4] % 8:
            raise ValueError(f"expected sides divisible by 8, got {x.shape[3]}x{x.shape[4]}: crop or resize it")
        y, _ = scan(self.encoder.layers(), x.to(self.conv1.weight.dtype), None, 4 * latents_per_pass)
        return self.conv1(y).chunk(2, dim=1)

    def encode(self, x, latents_per_pass=1):
        """The normalised mean latents z [B, C, f, h, w] of pixels x [B, 3, T, H, W] in [-1, 1].

        Raises ValueError unless T = 1 + 4k and H and W are divisible by 8.
        """
        mean, std = mean_std(self.cfg, x.device)
        return ((self.moments(x, latents_per_pass)[0] - mean) / std).to(x.dtype)

    def advance(self, z, state=None, latents_per_pass=1):
        """Decode the latents z that follow those behind `state` (None: a clip starts): (z, state) -> (x, state). Pure.

        z: [B, C, n, h, w] normalised. x: [B, 3, 4n, 8h, 8w], 4n - 3 frames at a clip's start. A state may be reused.
        """
        if z.ndim != 5 or z.shape[1] != self.cfg.z_dim or not z.shape[2]:
            raise ValueError(f"expected latents [B, {self.cfg.z_dim}, f, h, w], got {list(z.shape)}: are they "
                             "another VAE's?")
        mean, std = mean_std(self.cfg, z.device)
        y = self.conv2((z * std + mean).to(self.conv2.weight.dtype))
        x, state = scan(self.decoder.layers(), y, state, latents_per_pass)
        return x.to(z.dtype), state

    def decode(self, z, latents_per_pass=1):
        """Pixels x [B, 3, T, H, W] of normalised latents z [B, C, f, h, w].

        About [-1, 1] and not clamped: a clamp has no gradient.
        """
        return self.advance(z, None, latents_per_pass)[0]

    def decode_window(self, z, start, chunks, latents_per_pass=1):
        """The 1 + 4 chunks frames of a window of z [B, C, f, h, w]: a boundary frame, then whole latents.

        The boundary frame is the last one of latent `start`; latents start + 1 .. start + chunks give 4 frames each.
        Truncated BPTT: latents 0 .. start run under no_grad and the state they leave carries no gradient, which
        makes the gradient exact for the latents inside and zero for those before. With start = 0 the boundary is
        frame 0 and its latent lies inside. Nothing after the window is decoded. Pixels as from decode.
        Raises ValueError if the window does not fit into z.
        """
        # CHOICE: the paper's "12 latent chunks = 49 frames" is read as 12 chunks of 4 frames and the frame before them.
        end = start + 1 + chunks
        if start < 0 or chunks < 1 or end > z.shape[2]:
            raise ValueError(f"expected 0 <= start and 1 <= chunks <= latents - start - 1, got start {start}, "
                             f"chunks {chunks} and {z.shape[2]} latents: choose an earlier or shorter window")
        if start == 0:
            return self.decode(z[:, :, :end], latents_per_pass)
        with torch.no_grad():
            boundary, state = self.advance(z[:, :, : start + 1], None, latents_per_pass)
            boundary = boundary[:, :, -1:].clone()
        x, _ = self.advance(z[:, :, start + 1 : end], state, latents_per_pass)
        return torch.cat([boundary, x], dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Weight files


def vae_config(state, meta, path):
    """A file's architecture: its header, else Wan's at the file's width, with a config.json's mean and std."""
    if "config" in meta and "encoder.conv1.weight" in state:
        return stated_config(VAEConfig, meta, path)
    if not {"encoder.conv1.weight", "conv2.weight"} <= state.keys():
        raise ValueError(f"expected a Wan VAE in {path}, got keys such as {sorted(state)[:3]}")
    dim, z_dim = len(state["encoder.conv1.weight"]), len(state["conv2.weight"])
    beside = path.parent / "config.json"
    try:
        given = from_json(beside.read_text()) if beside.exists() else {}
        mean, std = given.get("latents_mean", WAN.latents_mean), given.get("latents_std", WAN.latents_std)
        torch.tensor([*mean, *std])
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"expected latents_mean and latents_std, numbers of a VAE, in {beside}") from None
    if not len(mean) == len(std) == z_dim:
        raise ValueError(f"expected {z_dim} latent means and stds for {path}, got {len(mean)} and {len(std)}: "
                         "save it with save_vae, or put its config.json beside it")
    return VAEConfig(dim, z_dim, tuple(mean), tuple(std))


def load_vae(path, dtype=torch.float32):
    """A frozen WanVAE from a file or folder: official Wan2.1_VAE.pth, one of save_vae's, or diffusers' layout.

    Raises ValueError naming what is missing.
    """
    path = Path(path)
    if path.is_dir():
        names = ["vae.safetensors", "Wan2.1_VAE.pth", "vae/diffusion_pytorch_model.safetensors",
                 "diffusion_pytorch_model.safetensors"]
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise ValueError(f"expected a VAE in {path}: none of {', '.join(names)} is there (README, 'Full size')")
        path = found[0]
    state, meta = read_state_dict(path)
    state = official_vae(state)
    vae = on_meta(WanVAE, vae_config(state, meta, path), path)
    # In another layout every convolution would reorder its weights anew.
    state = {key: channels_last(v.to(dtype)) if v.ndim == 5 else v.to(dtype) for key, v in state.items()}
    return load_strict(vae, state, path).requires_grad_(False).eval()


def save_vae(vae, path, **metadata):
    """Write a WanVAE's weights under the official keys; its config and metadata go into the header."""
    save_weights(vae.state_dict(), vae.cfg, path, metadata)
