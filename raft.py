"""RAFT optical flow (Teed & Deng, arXiv 2003.12039), frozen and differentiable, over a clip.

Flow is in pixels per frame, channels (u, v) = (x, y): u > 0 moves right, v > 0 down. Pixels are in [-1, 1], which
is what princeton's RAFT makes of its 0..255. Inside the network, N pairs of frames [N, 3, H, W] are matched on cells
of `cfg.stride` pixels, h = H / stride, w = W / stride; coordinates and flow are in cells there. The weights are fp32
and inputs are cast to them. Attributes carry the names of princeton-vl/RAFT, so that loading is strict.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from weights import REPO, load_strict, on_meta, princeton_raft, read_state_dict, save_weights, stated_config

GROUP_PIXELS = 4 * 480 * 832  # of the frames or pairs that share one checkpoint in video_flow: memory, not the result


# ---------------------------------------------------------------------------------------------------------------------
# Features. Images lie in memory with the channels of a pixel side by side (channels last), as convolutions want them.


class InstanceNorm(nn.InstanceNorm2d):
    """One batch norm per image: torch's instance norm copies channels-last images into another layout and back."""

    def forward(self, x):
        return torch.cat([F.batch_norm(image, None, None, training=True, eps=self.eps) for image in x.split(1)])


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 at a quarter of the width (bottleneck), beside a shortcut."""

    def __init__(self, dim_in, dim, stride, bottleneck, norm):
        super().__init__()
        mid = dim // 4
        plan = [(dim_in, dim, 3, stride), (dim, dim, 3, 1)]
        if bottleneck:
            plan = [(dim_in, mid, 1, 1), (mid, mid, 3, stride), (mid, dim, 1, 1)]
        for i, (a, b, kernel, step) in enumerate(plan, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2))
            setattr(self, f"norm{i}", norm(b))
        self.depth, self.downsample = len(plan), None
        if stride != 1 or dim_in != dim:
            self.downsample = nn.Sequential(nn.Conv2d(dim_in, dim, 1, stride), norm(dim))
            setattr(self, f"norm{len(plan) + 1}", self.downsample[1])  # one norm, two names in the official files

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y)).relu_()
        return ((x if self.downsample is None else self.downsample(x)) + y).relu_()


class Encoder(nn.Module):
    """Frames [N, 3, H, W] -> features [N, out_dim, h, w]: 7x7 stem, three stages of blocks, 1x1 head."""

    def __init__(self, widths, strides, blocks, bottleneck, norm, out_dim):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, widths[0], 7, strides[0], 3), norm(widths[0])
        dim_in = widths[0]
        for i, (dim, stride) in enumerate(zip(widths, strides[1:]), 1):
            first = Block(dim_in, dim, stride, bottleneck, norm)
            rest = [Block(dim, dim, 1, bottleneck, norm) for _ in range(blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
            dim_in = dim
        self.conv2 = nn.Conv2d(dim_in, out_dim, 1)

    def forward(self, x):
        x = x.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        x = self.norm1(self.conv1(x)).relu_()
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


# ---------------------------------------------------------------------------------------------------------------------
# Correlation


class Correlation:
    """All-pairs correlation pyramid of two feature maps [N, D, h, w]: built once, looked up by coordinates."""

    def __init__(self, fmap1, fmap2, levels, radius):
        N, D, h, w = fmap1.shape
        rows = (fmap1 / math.sqrt(D)).flatten(2).transpose(1, 2)                  # [N, h w, D]
        steps = torch.arange(-radius, radius + 1, device=fmap1.device, dtype=fmap1.dtype)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=2)
        self.levels = []
        for level in range(levels):
            # Pooling the second map equals pooling the volume, which is far larger.
            fmap2 = F.avg_pool2d(fmap2, 2) if level else fmap2
            # [w - 1, h - 1], made on the device: a copy from the host would wait for all that is queued there.
            last = torch.linspace(fmap2.shape[3] - 1, fmap2.shape[2] - 1, 2, device=fmap2.device, dtype=fmap2.dtype)
            assert min(fmap2.shape[2:]) > 1, fmap2.shape  # align_corners divides by the index of the last cell
            volume = rows @ fmap2.flatten(2)                                      # [N, h w, h w / 4^level]
            window = torch.view_as_complex(2 * offsets / last)                    # [2r+1, 2r+1] of x + iy
            self.levels.append((volume.view(N * h * w, 1, *fmap2.shape[2:]), last, window))

    def __call__(self, coords):
        """Correlations around coords [N, 2, h, w] (x, y in cells) -> [N, levels (2 radius + 1)^2, h, w].

        Bilinear, zero outside the map. Channels run over levels, then x offsets, then y offsets: princeton adds a
        (dy, dx) grid to (x, y) coordinates, and the trained weights expect the order that follows from it.
        """
        N, _, h, w = coords.shape
        centers = coords.permute(0, 2, 3, 1).contiguous().view(N * h * w, 1, 1, 2)
        windows = []
        for level, (volume, last, window) in enumerate(self.levels):
            middle = torch.view_as_complex(centers * (2 / 2**level / last) - 1)   # a pair as one number: faster to add
            points = torch.view_as_real(middle + window)                          # [N h w, 2r+1, 2r+1, 2]
            with torch.backends.cudnn.flags(enabled=False):  # cuDNN's refuses batches of more than 65535
                windows.append(F.grid_sample(volume, points, align_corners=True).view(N, h, w, -1))
        return torch.cat(windows, dim=3).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Update


class MotionEncoder(nn.Module):
    """Correlation window and current flow -> motion features [N, cfg.motion, h, w]; the last two are the flow."""

    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.levels * (2 * cfg.radius + 1) ** 2, *cfg.corr_dims]
        self.convc1 = nn.Conv2d(dims[0], dims[1], 1)
        self.convc2 = nn.Conv2d(dims[1], dims[2], 3, padding=1) if len(dims) > 2 else None
        self.convf1 = nn.Conv2d(2, cfg.flow_dims[0], 7, padding=3)
        self.convf2 = nn.Conv2d(cfg.flow_dims[0], cfg.flow_dims[1], 3, padding=1)
        self.conv = nn.Conv2d(dims[-1] + cfg.flow_dims[1], cfg.motion - 2, 3, padding=1)

    def forward(self, corr, flow):
        corr = self.convc1(corr).relu_()
        corr = corr if self.convc2 is None else self.convc2(corr).relu_()
        features = self.convf2(self.convf1(flow).relu_()).relu_()
        return torch.cat([self.conv(torch.cat([corr, features], dim=1)).relu_(), flow], dim=1)


class ConvGRU(nn.Module):
    """Convolutional GRUs on the input [context, motion], one after the other, one per kernel.

    The context is the same in every iteration: `prepare` convolves it once, the loop only [hidden, motion].
    """

    def __init__(self, cfg):
        super().__init__()
        self.split = [cfg.hidden, cfg.context, cfg.motion]
        self.names = ["1", "2"] if len(cfg.gru_kernels) == 2 else [""]
        for name, (kh, kw) in zip(self.names, cfg.gru_kernels):
            for gate in "zrq":
                conv = nn.Conv2d(sum(self.split), cfg.hidden, (kh, kw), padding=(kh // 2, kw // 2))
                setattr(self, f"conv{gate}{name}", conv)

    def prepare(self, context):
        """Per GRU: weights of z and r, and of q, on [hidden, motion]; what context adds to either; padding."""
        passes, gates = [], [2 * self.split[0], self.split[0]]
        for name in self.names:
            convs = [getattr(self, f"conv{gate}{name}") for gate in "zrq"]
            weight, bias = (torch.cat([getattr(conv, p) for conv in convs]) for p in ("weight", "bias"))
            of_hidden, of_context, of_motion = weight.split(self.split, dim=1)
            share = F.conv2d(context, of_context, bias, padding=convs[0].padding)
            weights = torch.cat([of_hidden, of_motion], dim=1).split(gates)
            passes.append((*weights, *share.split(gates, dim=1), convs[0].padding))
        return passes

    def forward(self, hidden, motion, passes):
        for weight_zr, weight_q, share_zr, share_q, padding in passes:
            zr = F.conv2d(torch.cat([hidden, motion], dim=1), weight_zr, padding=padding)
            z, r = zr.add_(share_zr).sigmoid_().chunk(2, dim=1)
            q = F.conv2d(torch.cat([r * hidden, motion], dim=1), weight_q, padding=padding)
            hidden = hidden.lerp(q.add_(share_q).tanh_(), z)
        return hidden


class UpdateBlock(nn.Module):
    """One refinement: the correlation at the flow updates the hidden state, which gives the flow's change."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.gru = MotionEncoder(cfg), ConvGRU(cfg)
        self.flow_head = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(cfg.hidden, cfg.head_dim, 3, padding=1), relu=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(cfg.head_dim, 2, 3, padding=1)))
        if cfg.mask_dim:
            self.mask = nn.Sequential(
                nn.Conv2d(cfg.hidden, cfg.mask_dim, 3, padding=1), nn.ReLU(inplace=True),
                nn.Conv2d(cfg.mask_dim, 9 * cfg.stride**2, 1))

    def forward(self, hidden, passes, corr, flow):
        hidden = self.gru(hidden, self.encoder(corr, flow), passes)
        return hidden, self.flow_head(hidden)


def convex_upsample(flow, mask, stride):
    """Flow [N, 2, h, w] in cells -> [N, 2, H, W] in pixels, each a convex combination of the 3x3 cells around.

    mask [N, 9 stride^2, h, w]: logits over the nine cells. Cells outside count as zero flow, as in princeton's.
    """
    N, _, h, w = flow.shape
    weights = mask.permute(0, 2, 3, 1).unflatten(3, (9, stride**2)).softmax(dim=3)  # [N, h, w, 9, stride^2]
    cells = F.unfold(stride * flow, 3, padding=1).view(N, 2, 9, h, w)
    flow = cells.permute(0, 3, 4, 1, 2) @ weights                                 # [N, h, w, 2, stride^2]
    return F.pixel_shuffle(flow.flatten(3).permute(0, 3, 1, 2), stride)           # [N, 2, H, W]


# ---------------------------------------------------------------------------------------------------------------------
# RAFT


@dataclass(frozen=True)
class RAFTConfig:
    widths: tuple           # of the stem and stage 1, of stage 2, of stage 3
    strides: tuple          # of the stem and the three stages; their product is the cell size in pixels
    blocks: int             # per stage
    bottleneck: bool        # kind of block
    context_norm: bool      # batch norm in the context encoder; the feature encoder always has instance norm
    fnet_dim: int           # D of the matched features
    hidden: int             # state of the GRU
    context: int            # its constant input
    levels: int             # of the correlation pyramid
    radius: int             # of the window looked up in each level, in cells
    corr_dims: tuple        # motion encoder, correlation branch
    flow_dims: tuple        # motion encoder, flow branch
    motion: int             # motion features, the raw flow included
    gru_kernels: tuple      # one convolutional GRU per (height, width)
    head_dim: int           # flow head
    mask_dim: int           # mask head of the convex upsampling; 0: bilinear upsampling

    @property
    def stride(self):
        return math.prod(self.strides)

    @property
    def min_size(self):
        """The smallest side in pixels that leaves two cells in the coarsest correlation level."""
        return self.stride * 2**self.levels


CONFIGS = {
    "large": RAFTConfig((64, 96, 128), (2, 1, 2, 2), 2, False, True, 256, 128, 128, 4, 4, (256, 192), (128, 64), 128,
                        ((1, 5), (5, 1)), 256, 256),
    "small": RAFTConfig((32, 64, 96), (2, 1, 2, 2), 2, True, False, 128, 96, 64, 4, 3, (96,), (64, 32), 82,
                        ((3, 3),), 128, 0),
    "toy": RAFTConfig((24, 32, 48), (2, 1, 2, 1), 1, False, False, 64, 48, 32, 2, 3, (64,), (32, 16), 40,
                      ((3, 3),), 64, 64),
}


class RAFT(nn.Module):
    """RAFT (princeton-vl/RAFT): all-pairs correlation of two frames, looked up and refined by a GRU.

    Stays in eval mode when a parent is set to train: batch statistics would make a flow depend on its batch.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        encoder = (cfg.widths, cfg.strides, cfg.blocks, cfg.bottleneck)
        context_norm = nn.BatchNorm2d if cfg.context_norm else nn.Identity
        self.fnet = Encoder(*encoder, InstanceNorm, cfg.fnet_dim)
        self.cnet = Encoder(*encoder, context_norm, cfg.hidden + cfg.context)
        self.update_block = UpdateBlock(cfg)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, image1, image2, iters=12):
        """Flow [N, 2, H, W] in pixels from image1 to image2 [N, 3, H, W].

        Raises ValueError for sides not divisible by cfg.stride or under cfg.min_size; video_flow pads.
        """
        H, W = image1.shape[2:]
        check_size(self.cfg, H, W)
        if H % self.cfg.stride or W % self.cfg.stride:
            raise ValueError(f"RAFT needs H, W divisible by {self.cfg.stride}, got {H}x{W}: use pad_to_cells")
        return self.match(self.fnet(image1), self.fnet(image2), self.cnet(image1), iters)

    def match(self, fmap1, fmap2, context, iters):
        """Flow [N, 2, H, W] in pixels from the features fnet(image1), fnet(image2) and cnet(image1)."""
        for flow, hidden in self.refine(fmap1, fmap2, context, iters):
            pass
        return self.upsample(flow, hidden)  # the last alone: the mask head costs a seventh of an iteration

    def refine(self, fmap1, fmap2, context, iters):
        """Yield flow [N, 2, h, w] in cells and hidden state after each iteration; `upsample` makes them pixels."""
        assert iters >= 1, iters
        hidden, context = context.split([self.cfg.hidden, self.cfg.context], dim=1)
        hidden, passes = hidden.tanh(), self.update_block.gru.prepare(F.relu(context))
        correlation = Correlation(fmap1, fmap2, self.cfg.levels, self.cfg.radius)
        N, _, h, w = fmap1.shape
        y, x = torch.meshgrid(*(torch.arange(n, device=fmap1.device) for n in (h, w)), indexing="ij")
        # Channels last, as is all that this flow meets: one tensor of another layout in a sum or a cat decides for all.
        grid, flow = torch.stack([x, y]).to(fmap1), fmap1.new_zeros(N, h, w, 2).permute(0, 3, 1, 2)
        for _ in range(iters):
            flow = flow.detach()  # as in princeton's: the hidden state carries gradients between iterations
            hidden, change = self.update_block(hidden, passes, correlation(grid + flow), flow)
            flow = flow + change
            yield flow, hidden

    def upsample(self, flow, hidden):
        """Flow [N, 2, h, w] in cells -> [N, 2, H, W] in pixels."""
        stride = self.cfg.stride
        if self.cfg.mask_dim:
            return convex_upsample(flow, 0.25 * self.update_block.mask(hidden), stride)
        return stride * F.interpolate(flow, scale_factor=stride, mode="bilinear", align_corners=True)


# ---------------------------------------------------------------------------------------------------------------------
# The flow of a clip


def check_size(cfg, H, W):
    """Raise ValueError for frames that leave the coarsest correlation level a single cell."""
    if min(H, W) < cfg.min_size:
        raise ValueError(
            f"RAFT with {cfg.levels} correlation levels on {cfg.stride}-px cells needs H, W >= {cfg.min_size}, "
            f"got {H}x{W}, which leaves the coarsest level one cell: enlarge the frames or use fewer levels")


def pad_to_cells(frames, stride):
    """[N, 3, H, W] replicate-padded to multiples of stride, centred; and the padding (left, right, top, bottom)."""
    H, W = frames.shape[2:]
    across, down = -W % stride, -H % stride
    padding = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(frames, padding, mode="replicate"), padding


def in_groups(function, group, *tensors):
    """function(*tensors) in slices of `group` along dim 0, each recomputing its activations in backward.

    A single slice keeps them: nothing would be saved by computing them twice.
    """
    if len(tensors[0]) <= group:
        return function(*tensors)
    slices = zip(*(t.split(group) for t in tensors))
    return torch.cat([checkpoint(function, *s, use_reentrant=False, preserve_rng_state=False) for s in slices])


def video_flow(raft, x, iters=12, group=None):
    """Flow [B, 2, T-1, H, W] in px/frame between consecutive frames of x [B, 3, T, H, W], pixels in [-1, 1].

    Equals RAFT pair by pair, but each frame's features are computed once, and backward holds the activations of
    `group` frames or pairs at a time, by default of GROUP_PIXELS. Raises ValueError for fewer than two frames or sides
    under raft.cfg.min_size.
    """
    B, _, T, H, W = x.shape
    if T < 2:
        raise ValueError(f"flow needs at least 2 frames, got {T}")
    check_size(raft.cfg, H, W)
    group = group or max(1, GROUP_PIXELS // (H * W))
    frames, (left, _, top, _) = pad_to_cells(x.transpose(1, 2).flatten(0, 1), raft.cfg.stride)
    firsts = frames.unflatten(0, (B, T))[:, :-1].flatten(0, 1)                    # [B (T-1), 3, H, W]
    fmaps = in_groups(raft.fnet, group, frames).unflatten(0, (B, T))              # [B, T, D, h, w]
    context = in_groups(raft.cnet, group, firsts)                                 # [B (T-1), D', h, w]
    flow = in_groups(lambda *pairs: raft.match(*pairs, iters), group,
                     fmaps[:, :-1].flatten(0, 1), fmaps[:, 1:].flatten(0, 1), context)
    flow = flow[:, :, top : top + H, left : left + W]
    return flow.unflatten(0, (B, T - 1)).transpose(1, 2)                          # [B, 2, T-1, H, W]


# ---------------------------------------------------------------------------------------------------------------------
# Weight files


def raft_config(state, meta, source):
    """The architecture of a file: from our header, else the row of CONFIGS with its stem."""
    if "config" in meta and "fnet.conv1.weight" in state:
        return stated_config(RAFTConfig, meta, source)
    stem = state.get("fnet.conv1.weight")
    found = [cfg for cfg in CONFIGS.values() if stem is not None and cfg.widths[0] == len(stem)]
    if not found:
        raise ValueError(f"expected RAFT weights in princeton's or torchvision's naming in {source}, "
                         f"got keys such as {sorted(state)[:3]}")
    return found[0]


def find_raft(weights, given=""):
    """The flow network of a preset: a given file, the one in its weights folder, or RAFT-things in either naming."""
    names = [Path(weights) / "raft.safetensors", REPO / "weights" / "raft-things.pth",
             REPO / "weights" / "raft_large_C_T_V1-22a6c225.pth"]
    return given or next((path for path in names if path.exists()), names[1])


def load_raft(path, device="cpu"):
    """A frozen fp32 RAFT from a file of princeton's or torchvision's (.pth or .safetensors), or of save_raft."""
    state, meta = read_state_dict(path)
    state = princeton_raft(state)
    net = on_meta(RAFT, raft_config(state, meta, path), path)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    return load_strict(net, state, path).requires_grad_(False).to(device, memory_format=torch.channels_last)


def save_raft(net, path, dtype=torch.float32, **metadata):
    """Write a RAFT under princeton's keys, floats as dtype; its config and the metadata go into the header."""
    state = {key: value.to("cpu", dtype if value.is_floating_point() else None, copy=True)
             for key, value in net.state_dict().items()}  # copies: a norm with two names is two tensors to safetensors
    save_weights(state, net.cfg, path, metadata)
