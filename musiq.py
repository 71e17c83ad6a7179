"""MUSIQ (Ke et al. 2021), the image-quality transformer behind VBench's imaging quality. Frozen, inference only.

A picture is cut into 32 x 32 patches at three scales (longer side 224, longer side 384, as it is); a small
convolutional stem turns each patch into a token, a hashed 10 x 10 position table and a scale embedding say where it
was, and a plain transformer reads one number off its class token. VBench uses the weights trained on SPAQ: 0 to 100.
Attribute names are those of the published checkpoint (chaofengc/IQA-PyTorch), so that loading is strict.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from weights import load_strict, read_state_dict

PATCH, SIDES, GRID = 32, (224, 384), 10     # patch px, longer sides of the small scales, position table
DIM, HEADS, MLP, LAYERS = 384, 6, 1152, 14


def pad_same(x, kernel, stride):
    """TensorFlow's SAME zero padding: the odd pixel goes to the right and the bottom."""
    total = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    h, w = total
    return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))


def patches(x):
    """Cut x [B, 3, H, W] into patches [B, L, 3, 32, 32] in reading order, with the table row of each [L]."""
    x = pad_same(x, PATCH, PATCH)
    h, w = x.shape[-2] // PATCH, x.shape[-1] // PATCH
    cut = F.unfold(x, PATCH, stride=PATCH).mT.unflatten(2, (3, PATCH, PATCH))                  # [B, L, 3, 32, 32]
    rows, cols = (torch.arange(n, device=x.device) * GRID // n for n in (h, w))
    return cut, (rows[:, None] * GRID + cols).flatten()


def scales(x):
    """x [B, 3, H, W] at the three scales, smallest first."""
    longer = max(x.shape[-2:])
    sizes = [[round(n * side / longer) for n in x.shape[-2:]] for side in SIDES]
    return [F.interpolate(x, size, mode="bicubic", align_corners=False) for size in sizes] + [x]


class StdConv2d(nn.Conv2d):
    """A convolution without bias, SAME-padded, on weights standardised per output channel."""

    def __init__(self, dim_in, dim_out, kernel, stride=1):
        super().__init__(dim_in, dim_out, kernel, stride, bias=False)

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), w, stride=self.stride)


class Bottleneck(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.conv1, self.gn1 = StdConv2d(dim, dim, 1), nn.GroupNorm(32, dim, 1e-4)
        self.conv2, self.gn2 = StdConv2d(dim, dim, 3), nn.GroupNorm(32, dim, 1e-4)
        self.conv3, self.gn3 = StdConv2d(dim, out, 1), nn.GroupNorm(32, out, 1e-4)
        self.conv_proj, self.gn_proj = StdConv2d(dim, out, 1), nn.GroupNorm(32, out, 1e-4)

    def forward(self, x):
        y = self.gn1(self.conv1(x)).relu()
        y = self.gn2(self.conv2(y)).relu()
        return (self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x))).relu()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))     # [B, L, D]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, 1e-6), nn.LayerNorm(DIM, 1e-6)
        self.attention = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(DIM, MLP), "fc2": nn.Linear(MLP, DIM)})

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Encoder(nn.Module):
    """Adds positions, scales and the class token; returns the class token after the blocks, [B, D]."""

    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, DIM))
        self.posembed_input = nn.ParameterDict({"position_emb": torch.zeros(1, GRID * GRID, DIM)})
        self.scaleembed_input = nn.ParameterDict({"scale_emb": torch.zeros(len(SIDES) + 1, DIM)})
        self.transformer = nn.ModuleDict({f"encoderblock_{i}": Block() for i in range(LAYERS)})
        self.encoder_norm = nn.LayerNorm(DIM, 1e-6)

    def forward(self, tokens, positions):
        """tokens: per scale [B, L, D]; positions: per scale the table rows [L]."""
        table, scale = self.posembed_input["position_emb"], self.scaleembed_input["scale_emb"]
        placed = [x + table[:, rows] + scale[i] for i, (x, rows) in enumerate(zip(tokens, positions))]
        x = torch.cat([self.cls.expand(len(placed[0]), -1, -1), *placed], dim=1)               # [B, 1 + sum L, D]
        for block in self.transformer.values():
            x = block(x)
        return self.encoder_norm(x)[:, 0]


class MUSIQ(nn.Module):
    """Image quality of x [B, 3, H, W] in [0, 1] -> [B]; about 0 to 100 with the SPAQ weights.

    The reference pads the two small scales with masked tokens to 49 and 144. Masked keys get no attention and only the
    class token is read, so they are not made here: one batch holds pictures of one size.
    """

    def __init__(self):
        super().__init__()
        self.conv_root, self.gn_root = StdConv2d(3, 64, 7, 2), nn.GroupNorm(32, 64, 1e-6)
        self.block1 = Bottleneck(64, 256)
        self.embedding = nn.Linear(256 * (PATCH // 4) ** 2, DIM)
        self.transformer_encoder = Encoder()
        self.head = nn.Linear(DIM, 1)

    def embed(self, cut):
        """Patches [B, L, 3, 32, 32] -> tokens [B, L, D]; the flattening is channels-last, as the weights expect."""
        x = self.gn_root(self.conv_root(cut.flatten(0, 1))).relu()                             # [B L, 64, 16, 16]
        x = self.block1(F.max_pool2d(pad_same(x, 3, 2), 3, 2))                                 # [B L, 256, 8, 8]
        return self.embedding(x.permute(0, 2, 3, 1).flatten(1)).unflatten(0, cut.shape[:2])

    def forward(self, x):
        cuts, positions = zip(*(patches(y) for y in scales(2 * x - 1)))
        return self.head(self.transformer_encoder([self.embed(cut) for cut in cuts], positions))[:, 0]


def load_musiq(path):
    """MUSIQ from the published .pth or the same keys in a .safetensors, frozen; ValueError if it does not fit."""
    state, _ = read_state_dict(path)
    with torch.device("meta"):
        net = MUSIQ()
    return load_strict(net, state, path).eval().requires_grad_(False)
