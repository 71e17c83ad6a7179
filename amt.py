"""AMT-S (Li et al. 2023), the frame interpolator behind VBench's motion smoothness. Frozen, inference only.

From frames x0, x1 [B, 3, H, W] in [0, 1] it predicts the frame at time t between them. Flows from that frame to both
neighbours, 4 channels (u0, v0, u1, v1) in pixels, are refined from coarse to fine: a decoder doubles the resolution,
then a correlation lookup at 1/8 corrects flows and features. The last decoder makes three flow pairs, whose warped
blends are averaged. Written from the network's description; the published code and weights are CC BY-NC 4.0. Attribute
names are the checkpoint's.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from weights import load_strict, read_state_dict
from raft import Correlation, Encoder

LEVELS = (20, 32, 44, 56)   # feature channels at 1/2, 1/4, 1/8, 1/16
PAIRS = 3                   # flow pairs of the last decoder
SIDE = 20                   # channels that a residual block's second and fourth convolutions see


def resize(x, factor):
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def resize_flow(flow, factor):
    """Resize and rescale: flow is in pixels of its own grid."""
    return resize(flow, factor) * factor


def pixel_grid(x):
    """Coordinates (x, y) of the pixels of x [B, C, H, W], as [2, H, W]."""
    axes = (torch.arange(n, device=x.device, dtype=x.dtype) for n in x.shape[2:])
    rows, cols = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([cols, rows])


def warp(x, flow):
    """x [B, C, H, W] looked up at each pixel plus flow [B, 2, H, W]; outside, the nearest border pixel."""
    size = torch.tensor([x.shape[3] - 1, x.shape[2] - 1], device=x.device)
    grid = (pixel_grid(x) + flow).permute(0, 2, 3, 1) * 2 / size - 1      # [B, H, W, 2]
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def conv(dim_in, dim, kernel=3, stride=1):
    return nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2)


def conv_prelu(dim_in, dim, stride=1):
    return nn.Sequential(conv(dim_in, dim, stride=stride), nn.PReLU(dim))


class Pyramid(nn.Module):
    """Context features of one frame at 1/2, 1/4, 1/8, 1/16, in that order."""

    def __init__(self):
        super().__init__()
        for i, (dim_in, dim) in enumerate(zip((3, *LEVELS), LEVELS), 1):
            setattr(self, f"pyramid{i}", nn.Sequential(conv_prelu(dim_in, dim, stride=2), conv_prelu(dim, dim)))

    def forward(self, x):
        out = []
        for i in range(1, len(LEVELS) + 1):
            x = getattr(self, f"pyramid{i}")(x)
            out.append(x)
        return out


class ResBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv3 = conv_prelu(dim, dim), conv_prelu(dim, dim)
        self.conv2, self.conv4 = conv_prelu(SIDE, SIDE), conv_prelu(SIDE, SIDE)
        self.conv5, self.prelu = conv(dim, dim), nn.PReLU(dim)

    def forward(self, x):
        y = x
        for wide, narrow in (self.conv1, self.conv2), (self.conv3, self.conv4):
            y = wide(y)
            y = torch.cat([y[:, :-SIDE], narrow(y[:, -SIDE:])], dim=1)
        return self.prelu(x + self.conv5(y))


class Decoder(nn.Module):
    """Doubles the resolution: [B, dim_in, h, w] -> [B, out, 2h, 2w]."""

    def __init__(self, dim_in, dim, out):
        super().__init__()
        self.convblock = nn.Sequential(conv_prelu(dim_in, dim), ResBlock(dim), nn.ConvTranspose2d(dim, out, 4, 2, 1))

    def forward(self, *parts):
        return self.convblock(torch.cat(parts, dim=1))


class Update(nn.Module):
    """One correction of features and flow from the correlations at 1/8: RAFT's without the recurrent state."""

    def __init__(self, dim, corr_dim=2 * 4 * 49):
        super().__init__()
        def head(dim_in, out):
            return nn.Sequential(conv(dim_in, 76), nn.LeakyReLU(0.1), conv(76, out))
        self.convc1, self.convf1, self.convf2 = conv(corr_dim, 64, 1), conv(4, 40, 7), conv(40, 20)
        self.conv = conv(64 + 20, 68)
        self.gru = head(68 + 4 + dim, 76)
        self.feat_head, self.flow_head = head(76, dim), head(76, 4)

    def forward(self, feat, flow, corr):
        c = F.leaky_relu(self.convc1(corr), 0.1)
        f = F.leaky_relu(self.convf2(F.leaky_relu(self.convf1(flow), 0.1)), 0.1)
        motion = F.leaky_relu(self.conv(torch.cat([c, f], dim=1)), 0.1)
        x = self.gru(torch.cat([motion, flow, feat], dim=1))
        return self.feat_head(x), self.flow_head(x)


class AMT(nn.Module):
    """AMT-S: the frame between x0 and x1 [B, 3, H, W] in [0, 1], sides divisible by 16 and 128 or more; same shape."""

    def __init__(self):
        super().__init__()
        a, b, c, d = LEVELS
        self.feat_encoder = Encoder((32, 64, 96), (2, 1, 2, 2), 2, True, nn.InstanceNorm2d, 84)
        self.encoder = Pyramid()
        self.decoder4 = Decoder(2 * d + 1, 112, 4 + c)
        self.decoder3 = Decoder(3 * c + 4, 132, 4 + b)
        self.decoder2 = Decoder(3 * b + 4, 96, 4 + a)
        self.decoder1 = Decoder(3 * a + 4, 60, 8 * PAIRS)
        self.update4, self.update3, self.update2 = Update(c), Update(b), Update(a)
        self.comb_block = nn.Sequential(conv(3 * PAIRS, 6 * PAIRS), nn.PReLU(6 * PAIRS), conv(6 * PAIRS, 3))

    def forward(self, x0, x1, t=0.5):
        assert x0.shape == x1.shape and min(x0.shape[2:]) >= 128 and not any(n % 16 for n in x0.shape[2:]), x0.shape
        mean = torch.cat([x0, x1], dim=1).mean((1, 2, 3), keepdim=True)
        x0, x1 = x0 - mean, x1 - mean
        flow, feat, low0, low1 = self.flows(x0, x1, t)                                          # at 1/2
        out = self.decoder1(feat, warp(low0, flow[:, :2]), warp(low1, flow[:, 2:]), flow)       # [B, 8 PAIRS, H, W]
        return self.blend(x0, x1, mean, resize_flow(flow, 2), out)

    def flows(self, x0, x1, t):
        """Flow [B, 4, H/2, W/2] and features [B, 20, H/2, W/2] of the frame between; both frames' features at 1/2."""
        fmap0, fmap1 = self.feat_encoder(torch.cat([x0, x1])).chunk(2)                          # [B, 84, H/8, W/8]
        lookups = Correlation(fmap0, fmap1, 4, 3), Correlation(fmap1, fmap0, 4, 3)
        c0, c1 = self.encoder(x0), self.encoder(x1)
        time = torch.full_like(c0[3][:, :1], t)
        flow, feat = self.decoder4(c0[3], c1[3], time).tensor_split([4], dim=1)                 # at 1/8
        flow, feat = self.correct(self.update4, flow, feat, lookups, t, 1)
        for i, decoder, update in (2, self.decoder3, self.update3), (1, self.decoder2, self.update2):
            out = decoder(feat, warp(c0[i], flow[:, :2]), warp(c1[i], flow[:, 2:]), flow)
            delta, feat = out.tensor_split([4], dim=1)
            flow = resize_flow(flow, 2) + delta
            flow, feat = self.correct(update, flow, feat, lookups, t, 2 ** (3 - i))
        return flow, feat, c0[0], c1[0]

    def correct(self, update, flow, feat, lookups, t, factor):
        """Add one update block's residuals; `factor` is the resolution of flow and feat over 1/8."""
        coarse = resize_flow(flow, 1 / factor)
        grid = pixel_grid(coarse)
        # flow1 leads from t to 1: over t, by uniform motion, it is the way from frame 0 to frame 1; flow0 likewise.
        corr = torch.cat([lookups[0](grid + coarse[:, 2:] / t), lookups[1](grid + coarse[:, :2] / (1 - t))], dim=1)
        feat_delta, flow_delta = update(resize(feat, 1 / factor), coarse, corr)
        return flow + resize_flow(flow_delta, factor), feat + resize(feat_delta, factor)

    def blend(self, x0, x1, mean, flow, out):
        """Average of the masked blends of both frames under each flow pair, plus what a small convolution adds."""
        def warped(x, delta, flow):
            flows = (delta.unflatten(1, (PAIRS, 2)) + flow[:, None]).flatten(0, 1)              # [B PAIRS, 2, H, W]
            return warp(x.repeat_interleave(PAIRS, dim=0), flows).unflatten(0, (-1, PAIRS))
        delta0, delta1, mask, residual = out.split([2 * PAIRS, 2 * PAIRS, PAIRS, 3 * PAIRS], dim=1)
        mask = mask.sigmoid()[:, :, None]                                                       # [B, PAIRS, 1, H, W]
        mixed = torch.lerp(warped(x1, delta1, flow[:, 2:]), warped(x0, delta0, flow[:, :2]), mask)
        mixed = mixed + residual.unflatten(1, (PAIRS, 3)) + mean[:, None]                       # [B, PAIRS, 3, H, W]
        return (mixed.mean(1) + self.comb_block(mixed.flatten(1, 2))).clamp(0, 1)


def load_amt(path):
    """AMT-S from the published amt-s.pth, or its keys in a .safetensors, frozen; ValueError if it does not fit."""
    with torch.device("meta"):
        net = AMT()
    return load_strict(net, read_state_dict(path)[0], path).eval().requires_grad_(False)
