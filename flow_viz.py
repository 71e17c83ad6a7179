"""Pictures of optical flow: the colour wheel of Baker et al. (IJCV 2011), its legend, a clip beside its flow."""

import math

import torch

FONT = {  # five rows of three pixels a glyph, each row an octal digit
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757",
    "7": "71111", "8": "75757", "9": "75717", ".": "00002", " ": "00000", "/": "11244", "p": "65644",
    "x": "55255", "f": "74644", "r": "65655", "a": "25755", "m": "57755", "e": "74647",
}


def draw_text(text, zoom):
    """[5 zoom, 4 zoom len(text)] booleans, a blank column before each glyph."""
    rows = [[int(FONT[c][row]) >> column & 1 for c in text for column in (3, 2, 1, 0)] for row in range(5)]
    return torch.tensor(rows, dtype=torch.bool).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def color_wheel():
    """The 55 hues of Baker et al. (IJCV 2011), [55, 3] in 0..1: red, yellow, green, cyan, blue, magenta, red."""
    red, yellow, green, cyan = (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1)
    corners = torch.tensor([red, yellow, green, cyan, (0, 0, 1), (1, 0, 1), red]).float()
    ramps = zip(corners, corners[1:], (15, 6, 4, 11, 13, 6))
    return torch.cat([torch.lerp(a, b, torch.arange(n)[:, None] / n) for a, b, n in ramps])


def flow_to_color(flow, scale):
    """Flow [..., 2, T, H, W] as pixels [..., 3, T, H, W] in [-1, 1] on the wheel of Baker et al. (IJCV 2011).

    Hue is the direction (right red, down yellow, left cyan, up violet), saturation the speed: white is zero,
    full colour `scale` px/frame, anything faster is drawn darker.
    """
    assert scale > 0, scale
    u, v = (flow.float() / scale).unbind(-4)
    wheel, speed = color_wheel().to(flow.device), torch.hypot(u, v).unsqueeze(-1)
    hue = (torch.atan2(-v, -u) / math.pi + 1) / 2 * len(wheel)                    # 0 is red, at u > 0
    index = hue.floor()
    low, high = (wheel[(index.long() + i) % len(wheel)] for i in (0, 1))
    color = torch.lerp(low, high, (hue - index).unsqueeze(-1))                    # [..., T, H, W, 3]
    color = torch.where(speed <= 1, 1 - speed * (1 - color), 0.75 * color)
    return 2 * color.movedim(-1, -4) - 1


def flow_legend(scale, size):
    """The wheel, `size` pixels wide, over its radius in px/frame: pixels [3, height, width] in [-1, 1]."""
    axis = torch.linspace(-1, 1, size)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    disc = torch.stack([u, v]) * (torch.hypot(u, v) <= 1)
    wheel = flow_to_color(disc.unsqueeze(1), 1.0).squeeze(1)                      # [3, size, size]
    label = f"{scale:.2f}".rstrip("0").rstrip(".") + " px/frame"
    text = 1 - 2.0 * draw_text(label, max(1, size // (4 * len(label))))           # black on white
    width = max(size, text.shape[1]) + 8
    picture = torch.ones(3, size + text.shape[0] + 12, width)
    for part, top in (wheel, 4), (text, size + 8):
        left = (width - part.shape[-1]) // 2
        picture[:, top : top + part.shape[-2], left : left + part.shape[-1]] = part
    return picture


def common_scale(flows):
    """px/frame of full colour for flows [2, T-1, H, W]: their largest 99th percentile, but 0.5 or noise looks fast."""
    speeds = [torch.hypot(*flow.float()).flatten() for flow in flows]
    return max(0.5, *(float(f"{speed.kthvalue(math.ceil(0.99 * len(speed))).values:.2g}") for speed in speeds))


def clip_beside_flow(x, flow, scale=None):
    """A clip x [3, T, H, W] with its flow [2, T-1, H, W] to the right: pixels [3, T, k H, 2 k W] in [-1, 1].

    The last flow is shown twice. scale: px/frame of full colour, default `common_scale` of this flow. Small clips are
    enlarged by an integer k to 256 px of height or more. The legend stands in the lower right corner. Raises ValueError
    if the flow does not fit the clip.
    """
    _, T, H, W = x.shape
    if flow.shape != (2, T - 1, H, W):
        raise ValueError(f"expected a flow {[2, T - 1, H, W]} beside a clip {list(x.shape)}, got {list(flow.shape)}")
    scale = scale or common_scale([flow])
    color = torch.cat([flow_to_color(frame, scale) for frame in (*flow.split(1, dim=1), flow[:, -1:])], dim=1)
    zoom = math.ceil(256 / H)
    both = torch.cat([x.float().clamp(-1, 1), color], dim=3)
    both = both.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)     # [3, T, k H, 2 k W]
    legend = flow_legend(scale, zoom * min(H, W) // 4).to(both)
    both[:, :, -legend.shape[1] :, -legend.shape[2] :] = legend.unsqueeze(1)
    return both
