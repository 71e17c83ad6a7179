"""The motion discriminator: optical flow as a three-channel video, seen by the first blocks of the DiT.

flow [B, 2, T-1, H, W] -> motion_tensor -> o [B, 3, T, H, W] -> vae.encode -> latents [B, C, f, h, w]
                       -> MotionDiscriminator -> [B].
Appearance never enters: real and generated differ only in how things move (paper Sec. 4.3, App. A).
"""

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Attention, WanDiT

PROMPT = "a video with good motion"  # paper App. A; CHOICE: no full stop, as in one of its two mentions


def motion_tensor(flow, scale=16.0):
    """The motion representation o [B, 3, T, H, W] in (-1, 1) of a flow [B, 2, T-1, H, W] in pixels per 1/16 s.

    The last flow is repeated, so that T = 1 + 4k like the video; the third channel is the magnitude (App. A).
    scale: the speed in pixels per 1/16 s that maps to 0.71, the same for real and generated clips.
    """
    flow = torch.cat([flow, flow[:, :, -1:]], dim=2)                              # [B, 2, T, H, W]
    # CHOICE: flow / sqrt(scale^2 + |flow|^2); the paper gives no range and the VAE expects [-1, 1]. It keeps
    # direction and, unlike a clamp, a gradient for fast motion. 1e-6 bounds the slope where nothing moves.
    squared = flow.square().sum(dim=1, keepdim=True) + 1e-6
    bound = (squared + scale**2).rsqrt()
    return torch.cat([flow * bound, 2 * squared.sqrt() * bound - 1], dim=1)       # [B, 3, T, H, W]


class PredictionHead(nn.Module):
    """A learned token cross-attends to one block's output, then an MLP. CHOICE: as in APT (arXiv 2501.08316)."""

    def __init__(self, cfg):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, cfg.dim))
        self.norm, self.norm_mlp = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)
        self.attn = Attention(cfg)
        self.mlp = nn.Sequential(nn.Linear(cfg.dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))

    def forward(self, x):
        dtype = self.token.dtype
        x = F.layer_norm(x, x.shape[-1:], self.norm.weight.float(), self.norm.bias.float()).to(dtype)
        token = self.token + self.attn(self.token.expand(len(x), -1, -1), x)      # [B, 1, D]
        return (token + self.mlp(self.norm_mlp(token))).sum(dim=1)                # [B, D]; no squeeze: see below


class MotionDiscriminator(nn.Module):
    """The first blocks of a WanDiT with heads after `taps`, the last of which ends it: motion latents to one logit."""

    def __init__(self, cfg, taps=(7, 13, 15), device=None):
        """device: of the trunk; on "meta" it takes no memory and waits for load_trunk."""
        super().__init__()
        if list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= cfg.layers:
            raise ValueError(f"expected rising taps below {cfg.layers}, the DiT's layers, got {list(taps)}")
        self.taps = taps  # CHOICE: 0-based, so that 15 is the last of 16 blocks
        self.heads = nn.ModuleList(PredictionHead(cfg) for _ in taps)
        self.logit = nn.Sequential(
            nn.LayerNorm(len(taps) * cfg.dim), nn.Linear(len(taps) * cfg.dim, cfg.dim), nn.SiLU(),
            nn.Linear(cfg.dim, 1))
        with torch.device(device or torch.get_default_device()):  # last: the heads' random numbers do not depend on it
            self.trunk = WanDiT(replace(cfg, layers=taps[-1] + 1))
        del self.trunk.head

    def forward(self, o, t, context):
        """Logits [B] fp32 of motion latents o [B, C, f, h, w]; t [B], the paper's t* = 0; context of PROMPT."""
        x, _, e0, context, rope = self.trunk.embed(o, t, context)
        tokens, heads = [], iter(self.heads)
        for i, block in enumerate(self.trunk.blocks):
            x = block(x, e0, context, rope)
            if i in self.taps:
                tokens.append(next(heads)(x))
        # Sums over one element, here and in the heads, where squeeze would give views, which FSDP's hooks mistrust.
        return self.logit(torch.cat(tokens, dim=1)).float().sum(dim=1)

    def load_trunk(self, dit):
        """Take the trunk from a WanDiT at least as deep and return self; the heads stay as they are.

        Both then share their parameters' memory, until `shard` of train.py copies it.
        """
        mine = self.trunk.state_dict()
        state = {key: value for key, value in dit.state_dict().items() if key in mine}
        self.trunk.load_state_dict(state, assign=True)
        return self
