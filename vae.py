"""The Wan2.1 video VAE, chunk-recurrent: 1 + 4k frames [B, 3, T, H, W] in [-1, 1] <-> 1 + k latents.

Every temporal convolution is causal, so a clip passes through in chunks, the last input frames of each convolution
being all that a chunk needs of its past. Here that state is a value: `run` maps (x, state) -> (y, state) through a
stack of layers and nothing is stored on a module. Hence a chunk can be checkpointed, a gradient stops where the
state is detached, and nothing after a window need be decoded.
Module attributes carry the official checkpoint's names (numbers included), so that loading is strict.
"""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from weights import load_strict, read_state_dict, rename, save_weights

# ---------------------------------------------------------------------------------------------------------------------
# Layers: (x, past, after) -> y. x and y are lists of frames [B, C, H, W], so that slicing in time copies nothing. A
# layer takes its entries of the old state from the iterator `past`, None where a clip starts, and appends those of the
# new state to the list `after`. An entry is the list of the frames that a temporal convolution saw last.


def channels_last(x):
    """x with the channels of a pixel side by side in memory, the layout that norms and convolutions want."""
    return x.contiguous(memory_format=torch.channels_last_3d)


class RMSNorm(nn.Module):
    """x / |x| sqrt(C) gamma over the channels; the length is summed in fp32 whatever the dtype of x."""

    def __init__(self, dim, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x):
        return (x * to_unit(x)).mul_(self.gamma.view(-1, 1, 1))


def to_unit(x):
    """What gives the channels of a pixel a root mean square of one: sqrt(C) / |x|."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12)
    return (x.shape[1] ** 0.5 / length).to(x.dtype)


class NormSiLU(torch.autograd.Function):
    """F.silu(norm(x)) that keeps x alone: autograd would keep what enters the SiLU as well, a third of a pass.

    With n = s x, s = sqrt(C) / |x|, and d the gradient of n, that of x is s (d - n mean(d n)).
    """

    @staticmethod
    def forward(ctx, x, gamma):
        s = to_unit(x)
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


class Affine(torch.autograd.Function):
    """run(x), an affine map of the frames x with frozen weights; transpose(gradients of y) gives those of x.

    It keeps the weights alone; autograd's convolution keeps its input even where they take no gradient.
    """

    @staticmethod
    def forward(ctx, run, transpose, weight, *x):
        ctx.transpose = transpose
        ctx.save_for_backward(weight)
        return tuple(run(list(x)))

    @staticmethod
    def backward(ctx, *grads):
        ctx.saved_tensors  # asking makes a checkpoint recompute its pass now, before this layer's gradient takes memory
        return None, None, None, *ctx.transpose(grads)


def affine(weight, run, transpose, x):
    """run(x), through Affine where a graph is wanted and the weight is frozen."""
    if torch.is_grad_enabled() and not weight.requires_grad:
        return Affine.apply(run, transpose, weight, *x)
    return run(x)


def tap(conv, frame):
    """A 3-D convolution of one frame by its last temporal tap: the others see zeros, or there are none."""
    return F.conv2d(frame, conv.weight[:, :, -1], conv.bias, padding=conv.padding[1:])


def stack(x):
    """Frames [B, C, H, W] as [B, C, T, H, W], channels last in memory: one copy."""
    return torch.stack([frame.movedim(1, 3) for frame in x], dim=1).movedim(4, 1)


def unstack(x):
    return channels_last(x).unbind(2)


def time_conv(conv, x):
    """A convolution of frames x with three temporal taps; in fp32 on a CPU without a graph by 2-D ones, emptying x.

    Two neighbouring outputs share two of their inputs, so four products do instead of six (Winograd's F(2, 3)):
    with m = (b + c) * (w0 + w1 + w2) / 2 and n = (c - b) * (w0 - w1 + w2) / 2, of the frames a b c d
    a * w0 + b * w1 + c * w2 = (a - c) * w0 + m + n   and   b * w0 + c * w1 + d * w2 = (d - b) * w2 + m - n.
    """
    # CHOICE: bf16 and, on CUDA, TF32 stay with the one convolution, which sums in fp32; here parts would be rounded.
    # So do trainable weights, whose graph would keep the sums of the frames.
    if conv.weight.element_size() < 4 or conv.weight.is_cuda or torch.is_grad_enabled():
        return unstack(F.conv3d(stack(x), conv.weight, conv.bias, conv.stride, conv.padding))
    (w0, w1, w2), bias, step = conv.weight.unbind(2), conv.bias, conv.stride[0]
    conv2d, y = functools.partial(F.conv2d, padding=conv.padding[1:]), []
    if step == 1 and len(x) > 3:
        w_sum, w_difference = (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2
    while step == 1 and len(x) > 3:
        a, b, c, d = x[:4]
        del x[:2]
        even = conv2d(a - c, w0, bias)
        del a  # an old state's frame; at full resolution each counts
        odd = conv2d(d - b, w2, bias)
        m = conv2d(b + c, w_sum)
        even, odd = even.add_(m), odd.add_(m)
        m = conv2d(c - b, w_difference)
        y += [even.add_(m), odd.sub_(m)]
    while len(x) > 2:
        y.append(conv2d(x[0], w0, bias).add_(conv2d(x[1], w1)).add_(conv2d(x[2], w2)))
        del x[:step]
    return y


def stream(conv, x, last, after):
    """A causal convolution of x that goes on where the previous chunk ended: the one place where time passes.

    last: the final two frames of that chunk's input to conv (one frame if conv halves T), or None where a clip
    starts, which stands for zeros. Those of x are appended to `after`. Returns y.
    """
    if last is None:
        # A first chunk is one frame after zeros: only the last temporal tap sees anything.
        assert len(x) == 1, len(x)
        after.append([torch.zeros_like(x[0]), x[0]])
        return [tap(conv, x[0])]
    x, keep = [*last, *x], len(last)
    del last
    after.append(x[-keep:])
    B, C, H, W = x[0].shape
    shape = B, C, len(x), H, W

    def transpose(y):
        # Channels last for the weights, too: where the input is not at hand, they alone decide the gradient's layout.
        weight = channels_last(conv.weight)
        y = unstack(torch.nn.grad.conv3d_input(shape, weight, stack(y), conv.stride, conv.padding))
        return *(frame.clone() for frame in y[:keep]), *y[keep:]  # copies: a view kept for the past would keep all

    return affine(conv.weight, functools.partial(time_conv, conv), transpose, x)


class CausalConv(nn.Conv3d):
    def __init__(self, dim, out_dim):
        super().__init__(dim, out_dim, 3, padding=(0, 1, 1))  # time is padded by the past

    def forward(self, x, past, after):
        return stream(self, x, next(past), after)


class ResBlock(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.residual = nn.ModuleDict({"0": RMSNorm(dim), "2": CausalConv(dim, out_dim),
                                       "3": RMSNorm(out_dim), "6": CausalConv(out_dim, out_dim)})
        self.shortcut = nn.Conv3d(dim, out_dim, 1) if dim != out_dim else None

    def forward(self, x, past, after):
        norm1, conv1, norm2, conv2 = self.residual.values()
        # One expression, so that no name keeps what lies between the convolutions alive during the second.
        y = stream(conv2, norm_silu(norm2, stream(conv1, norm_silu(norm1, x), next(past), after)),
                   next(past), after)
        return [b + (tap(self.shortcut, a) if self.shortcut else a) for a, b in zip(x, y, strict=True)]


class Attention(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x, past, after):
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
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x, past, after):
        conv = self.resample["1"]
        x = affine(conv.weight, lambda x: [conv(F.pad(frame, (0, 1, 0, 1))) for frame in x],
                   lambda y: [F.conv_transpose2d(frame, conv.weight, None, 2)[:, :, :-1, :-1] for frame in y], x)
        last = next(past) if self.time_conv else None
        if last is not None:
            return stream(self.time_conv, x, last, after)
        if self.time_conv:
            after.append(x)
        return x


def upsample_conv(conv, x):
    """Nearest-neighbour doubling, then a 3x3 convolution, of frames x, as one transposed convolution.

    Doubled pixels repeat, so the nine taps fall on four inputs: 2.25 times less work, and the doubled x never exists.
    """
    weight = F.avg_pool2d(conv.weight, 2, stride=1, padding=1, divisor_override=1)  # [out, in, 4, 4]
    weight = weight.flip(2, 3).transpose(0, 1)
    return affine(weight, lambda x: [F.conv_transpose2d(frame, weight, conv.bias, 2, 1) for frame in x],
                  lambda y: [F.conv2d(frame, weight, None, 2, 1) for frame in y], x)


class Up(nn.Module):
    """Double H and W and halve C; if temporal first double T, except on the first frame, whose state is zero."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim // 2, 3)})
        self.time_conv = nn.Conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x, past, after):
        last = next(past) if self.time_conv else None
        if last is not None:
            pairs = stream(self.time_conv, x, last, after)                        # [B, 2 C, H, W]: even | odd
            x = [frame for pair in pairs for frame in pair.chunk(2, dim=1)]
        elif self.time_conv:
            after.append([torch.zeros_like(x[0])] * 2)
        return upsample_conv(self.resample["1"], x)


class Head(nn.ModuleDict):
    def __init__(self, dim, out_dim):
        super().__init__({"0": RMSNorm(dim), "2": CausalConv(dim, out_dim)})

    def forward(self, x, past, after):
        return stream(self["2"], norm_silu(self["0"], x), next(past), after)


# ---------------------------------------------------------------------------------------------------------------------
# Stacks of layers, chunk by chunk


def frame_rates(layers):
    """The layers in groups of one frame rate, each ending with what changes it."""
    group = []
    for layer in layers:
        group.append(layer)
        if getattr(layer, "time_conv", None):
            yield group
            group = []
    yield group


def handed_over(items):
    """Iterate over a list while emptying it, so that nothing but the consumer keeps an item alive."""
    while items:
        yield items.pop(0)


def run(layers, x, state):
    """Advance layers by one chunk: (frames x, state) -> (frames y, state).

    state: one list of frames per causal convolution, in order, or None where a clip starts. A pure function, but that
    without a gradient it empties the list `state` on the way: an entry is freed once its layer has made the new one.
    """
    # Without a graph, two frames at a time save memory: the fewest that every layer takes.
    grad, new = torch.is_grad_enabled(), []
    past = itertools.repeat(None) if state is None else iter(state) if grad else handed_over(state)
    for layers in frame_rates(layers):
        size, y, before = len(x) if grad else 2, [], past
        while x:
            part, x, after = x[:size], x[size:], []
            for layer in layers:
                part = layer(part, before, after)
            y += part
            before = handed_over(after)
        x = y
        new += after
    return x, new


def scan(layers, x, state, sizes, remat=True):
    """Advance layers over x in chunks of `sizes` frames: (x [B, C, T, H, W], state) -> (y, state) as in `run`.

    remat: where a gradient is needed, keep each chunk's input alone and compute the rest again.
    """
    # Copies, so that no frame of the state keeps all of x alive.
    x = [frame.clone(memory_format=torch.channels_last) for frame in x.unbind(2)]
    y, state = [], state and list(state)
    trainable = any(p.requires_grad for layer in layers for p in layer.parameters())
    grad = torch.is_grad_enabled() and (x[0].requires_grad or trainable)
    for size in sizes:
        chunk, x = x[:size], x[size:]
        if grad and remat:
            chunk, state = checkpoint(run, layers, chunk, state, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk, state = run(layers, chunk, state)
        y += chunk
    return torch.stack(y, dim=2), state


def chunk_sizes(length, step, first):
    """Sizes of the passes over `length` frames: first frame 0 alone, which no time_conv resamples, then `step` each."""
    rest = length - first
    return [1] * first + [step] * (rest // step) + [rest % step] * (rest % step > 0)


def middle(dim):
    return [ResBlock(dim, dim), Attention(dim), ResBlock(dim, dim)]


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        self.conv1, self.downsamples = CausalConv(3, dims[0]), nn.ModuleList()
        for i, (dim, out_dim) in enumerate(zip(dims, dims[1:])):
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
        for i, (dim, out_dim) in enumerate(zip(dims, dims[1:])):
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


class WanVAE(nn.Module):
    """Wan2.1's causal video autoencoder (Wan-Video/Wan2.1), strides 4 x 8 x 8.

    Computes in the weights' dtype and answers in the input's. Arguments that all methods share:
    latents_per_pass: how many latents (4 frames each) go through at once after the first, which goes alone. The result
        differs by rounding only. More means less overhead for small frames and fewer states kept for the backward
        pass (one per pass: 1.9 GB of bf16 at 480x832), but more memory for the pass at work.
    remat: recompute each pass in the backward pass instead of keeping its activations, see `scan`.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.conv1 = nn.Conv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = nn.Conv3d(cfg.z_dim, cfg.z_dim, 1)

    def mean_std(self, z):
        """The latents' mean and std, fp32, to broadcast against z."""
        cfg = self.cfg
        return [torch.tensor(v, device=z.device).view(-1, 1, 1, 1) for v in (cfg.latents_mean, cfg.latents_std)]

    def moments(self, x, latents_per_pass=1, remat=True):
        """Raw (mean, log variance) of the posterior of x, each [B, C, f, h, w]; takes what encode takes."""
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[2] % 4 != 1:
            raise ValueError(f"expected a clip [B, 3, 1 + 4k, H, W], got {list(x.shape)}: cut it to 1 + 4k frames")
        if x.shape[3] % 8 or x.shape[4] % 8:
            raise ValueError(f"expected sides divisible by 8, got {x.shape[3]}x{x.shape[4]}: crop or resize it")
        sizes = chunk_sizes(x.shape[2], 4 * latents_per_pass, first=True)
        y, _ = scan(self.encoder.layers(), x.to(self.conv1.weight.dtype), None, sizes, remat)
        return self.conv1(y).chunk(2, dim=1)

    def encode(self, x, latents_per_pass=1, remat=True):
        """The normalised mean latents z [B, C, f, h, w] of pixels x [B, 3, T, H, W] in [-1, 1].

        Raises ValueError unless T = 1 + 4k and H and W are divisible by 8.
        """
        mean, std = self.mean_std(x)
        return ((self.moments(x, latents_per_pass, remat)[0] - mean) / std).to(x.dtype)

    def advance(self, z, state=None, latents_per_pass=1, remat=True):
        """Decode the latents z that follow those behind `state` (None: a clip starts): (z, state) -> (x, state). Pure.

        z: [B, C, n, h, w] normalised. x: [B, 3, 4n, 8h, 8w], 4n - 3 frames at a clip's start. A state may be reused.
        """
        if z.ndim != 5 or z.shape[1] != self.cfg.z_dim or not z.shape[2]:
            raise ValueError(f"expected latents [B, {self.cfg.z_dim}, f, h, w], got {list(z.shape)}: are they "
                             "another VAE's?")
        mean, std = self.mean_std(z)
        y = self.conv2((z * std + mean).to(self.conv2.weight.dtype))
        sizes = chunk_sizes(z.shape[2], latents_per_pass, first=state is None)
        x, state = scan(self.decoder.layers(), y, state, sizes, remat)
        return x.to(z.dtype), state

    def decode(self, z, latents_per_pass=1, remat=True):
        """Pixels x [B, 3, T, H, W] of normalised latents z [B, C, f, h, w].

        About [-1, 1] and not clamped: a clamp has no gradient.
        """
        return self.advance(z, None, latents_per_pass, remat)[0]

    def decode_window(self, z, start, chunks, latents_per_pass=1, remat=True):
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
            return self.decode(z[:, :, :end], latents_per_pass, remat)
        with torch.no_grad():
            boundary, state = self.advance(z[:, :, : start + 1], None, latents_per_pass)
            boundary = boundary[:, :, -1:].clone()
        x, _ = self.advance(z[:, :, start + 1 : end], state, latents_per_pass, remat)
        return torch.cat([boundary, x], dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Weight files


FROM_DIFFUSERS = [  # applied in order: the residual blocks' conv1 goes before conv_in becomes conv1
    (r"((?:blocks|resnets)\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"((?:blocks|resnets)\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"((?:blocks|resnets)\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"((?:blocks|resnets)\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."), (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."), (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"^encoder\.down_blocks\.", "encoder.downsamples."),
]


def official_vae(state):
    """A VAE state dict of the official or the diffusers layout under the official keys."""
    if "quant_conv.weight" not in state:
        return state
    blocks = len({key.split(".")[4] for key in state if key.startswith("decoder.up_blocks.0.resnets.")})

    def flat(m):  # diffusers nests the levels
        return f"decoder.upsamples.{int(m[1]) * (blocks + 1) + int(m[2] or blocks)}."
    nested = r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\."
    return rename(state, [*FROM_DIFFUSERS, (nested, flat)])


def vae_config(state, meta, path):
    """A file's architecture: its header, else its shapes and the mean and std of a config.json beside it or of Wan."""
    if "config" in meta and "encoder.conv1.weight" in state:
        config = json.loads(meta["config"])
        return VAEConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in config.items()})
    try:
        dim, z_dim = len(state["encoder.conv1.weight"]), len(state["conv2.weight"])
        last = max(int(key.split(".")[2]) for key in state if key.startswith("decoder.upsamples."))
    except (KeyError, ValueError):
        raise ValueError(f"expected a Wan VAE in {path}, got keys such as {sorted(state)[:3]}") from None
    beside = path.parent / "config.json"
    given = json.loads(beside.read_text()) if beside.exists() else {}
    mean, std = given.get("latents_mean", WAN.latents_mean), given.get("latents_std", WAN.latents_std)
    if not len(mean) == len(std) == z_dim:
        raise ValueError(f"expected {z_dim} latent means and stds for {path}, got {len(mean)} and {len(std)}: "
                         "save it with save_vae, or put its config.json beside it")
    levels = len(WAN.dim_mult)
    return VAEConfig(dim, z_dim, tuple(mean), tuple(std), res_blocks=(last + 1 - (levels - 1)) // levels - 1)


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
    with torch.device("meta"):
        vae = WanVAE(vae_config(state, meta, path))
    # In another layout every convolution would reorder its weights anew.
    state = {key: channels_last(v.to(dtype)) if v.ndim == 5 else v.to(dtype) for key, v in state.items()}
    return load_strict(vae, state, path).requires_grad_(False).eval()


def save_vae(vae, path, **metadata):
    """Write a WanVAE's weights under the official keys; its config and metadata go into the header."""
    save_weights(vae.state_dict(), vae.cfg, path, metadata)
