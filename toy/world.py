"""The toy world: short clips of one coloured shape crossing a quiet room, rendered with everything known.

A clip is 64 x 64 pixels, 17 frames at 16 fps, and has a prompt "a {colour} {shape} moving {direction} {adverb}".
The renderer knows the exact flow and the exact state of every frame, so motion and quality are measured against
truth; `track` reads the same state back from pixels alone, for clips that a network made.

The adverb decides the speed: "slowly" and "quickly" name a range, no adverb draws from a mix in which nearly half
of the clips hardly move. A mode-seeking student may keep the still half of that mix and lose the rest; that is the
effect this world is made to show. `motion_rich=True` draws only the fast range: the discriminator's real clips.

Everything is a function of an integer seed. Axes and ranges are model.py's: pixels in [-1, 1], flow (x, y) in px/frame.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE, FRAMES = 64, 17
COLOURS = {"red": (.88, .16, .16), "yellow": (.88, .82, .14), "green": (.14, .76, .22),
           "cyan": (.12, .78, .84), "blue": (.16, .30, .90), "magenta": (.82, .16, .84)}   # RGB in [0, 1]
SHAPES = ("circle", "square", "triangle")
AREAS = (math.pi, 4 * .9 ** 2, 3 * math.sqrt(3) * .65 ** 2)                               # of SHAPES at radius 1, px
DIRECTIONS = {"right": (1., 0.), "down": (0., 1.), "left": (-1., 0.), "up": (0., -1.)}     # y points down
ADVERBS = ("", "slowly", "quickly")
SLOW, FAST, STILL = (.3, .9), (1.2, 2.2), (0., .2)  # px/frame
MIX = (.45, .75)                                    # no adverb: STILL below the first, SLOW below the second, else FAST
RADIUS = (8., 10.)                                  # px; a shape's extent from its centroid is at most MARGIN radii
MARGIN = 1.3
VEER = math.radians(10)                             # a direction word means its axis plus or minus this angle
CHROMA = .30                                        # the tracker's threshold on max(RGB) - min(RGB); the room has < .1
MOVES = .25                                         # px/frame; slower clips are `still`, and have no figures per speed


class Clip(NamedTuple):
    """A batch of rendered clips and their truth."""
    pixels: Tensor                                                          # [B, 3, T, H, W] in [-1, 1]
    prompts: list[str]
    flow: Tensor                                                            # [B, 2, T-1, H, W] px/frame, exact
    position: Tensor                                                        # [B, T, 2] centroid (x, y), px
    velocity: Tensor                                                        # [B, 2] px/frame, without lurches
    coverage: Tensor                                                        # [B, T, H, W] the shape's share of a pixel
    attributes: Tensor                                                      # [B, 4] as `prompt` takes them
    radius: Tensor                                                          # [B] px


def prompt(colour: int, shape: int, direction: int, adverb: int) -> str:
    """The words of one choice of attributes, given as indices into COLOURS, SHAPES, DIRECTIONS, ADVERBS."""
    words = f"a {list(COLOURS)[colour]} {SHAPES[shape]} moving {list(DIRECTIONS)[direction]} {ADVERBS[adverb]}"
    return words.strip()


def attributes(text: str) -> tuple[int, int, int, int]:
    """The inverse of `prompt`; raises ValueError for words outside this world."""
    words = text.split()
    names = list(COLOURS), list(SHAPES), list(DIRECTIONS), list(ADVERBS)
    if len(words) not in (5, 6) or [words[0], words[3]] != ["a", "moving"]:
        raise ValueError(f"toy prompts read 'a COLOUR SHAPE moving DIRECTION [slowly|quickly]', got {text!r}")
    for word, allowed in zip(words[1:3] + words[4:], (*names[:3], names[3][1:])):
        if word not in allowed:
            raise ValueError(f"the toy world has no {word!r} in {text!r}: use one of {', '.join(allowed)}")
    return tuple(n.index(w) for n, w in zip(names, (words[1], words[2], words[4], " ".join(words[5:]))))


PROMPTS = [prompt(c, s, d, a) for c in range(6) for s in range(3) for d in range(4) for a in range(3)]


def held_out(count: int = 200) -> list[tuple[str, int]]:
    """(prompt, noise seed) pairs that no training run draws: every figure we report is measured on these."""
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(2511)).tolist()
    return [(PROMPTS[order[i % len(order)]], 10_000_000 + i) for i in range(count)]


def distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline, px, positive inside; (x, y) is relative to the centroid."""
    circle = radius - (x * x + y * y).sqrt()
    square = .9 * radius - torch.maximum(x.abs(), y.abs())
    triangle = .65 * radius - torch.maximum(y, .5 * (math.sqrt(3) * x.abs() - y))         # points up
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))


def silhouette(shape: Tensor, position: Tensor, radius: Tensor) -> Tensor:
    """Share of each pixel that the shape [B] covers; position [B, T, 2], radius [B] or [B, T], px -> [B, T, H, W]."""
    axis = torch.arange(SIZE, dtype=torch.float32, device=position.device)
    x = axis[None, None, None, :] - position[..., 0, None, None]
    y = axis[None, None, :, None] - position[..., 1, None, None]
    radius = radius.view(len(radius), -1, 1, 1)
    out = torch.empty(*position.shape[:2], SIZE, SIZE, device=position.device)
    for index in range(len(SHAPES)):                # one shape at a time: a third of the arithmetic of torch.where
        rows = shape == index
        if rows.any():
            kind = torch.tensor(index, device=shape.device)
            out[rows] = (distance(kind, x[rows], y[rows], radius[rows]) + .5).clamp(0, 1)
    return out


def wallpaper() -> Tensor:
    """The room: light from the upper left and a faint fixed pattern, the same in every clip.         [H, W], mean 0

    CHOICE: fixed, because texture that differs from clip to clip dominates a small model's loss, and because Wan's
    attention knows relative positions only: the room tells a token where it is, RAFT what stands still.
    """
    axis = torch.arange(SIZE) / (SIZE - 1.) - .5
    x, y = axis[None, :], axis[:, None]
    pattern = torch.sin(17 * x + 5 * y) * torch.sin(4 * x - 19 * y)
    return -.16 * x - .24 * y + .035 * pattern


def draw(seed: int, motion_rich: bool) -> tuple[list[int], list[float]]:
    """One clip's attributes and numbers (speed, angle, radius, start x, start y, tint r, g, b) from its seed."""
    u = torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    colour, shape, direction = int(u[0] * 6), int(u[1] * 3), int(u[2] * 4)
    adverb = (0, 2)[int(u[3] * 2)] if motion_rich else int(u[3] * 3)
    still, slow = (0., 0.) if motion_rich else MIX
    low, high = (STILL if u[4] < still else SLOW if u[4] < slow else FAST, SLOW, FAST)[adverb]
    angle = math.atan2(*list(DIRECTIONS.values())[direction][::-1]) + (2 * u[6] - 1) * VEER
    radius = RADIUS[0] + u[7] * (RADIUS[1] - RADIUS[0])
    return [colour, shape, direction, adverb], [low + u[5] * (high - low), angle, radius, *u[8:13]]


def clips(seeds: list[int], motion_rich: bool = False, device: str | torch.device = "cpu", lurch: float = 0.) -> Clip:
    """Render one clip per seed, with its exact flow and state; a clip depends on its own seed only.

    lurch: share by which the speed falls for four frames, rises for four, and so on: motion that is wrong in time
    alone. A faster wobble would be of no use: the VAE, four frames a latent, decodes an alternation of .59 as .05.
    """
    picks, numbers = zip(*(draw(int(s), motion_rich) for s in seeds))
    picks, numbers = torch.tensor(picks, device=device), torch.tensor(numbers, device=device)   # [B, 4], [B, 8]
    speed, angle, radius, tint = numbers[:, 0], numbers[:, 1], numbers[:, 2], .44 + .06 * (2 * numbers[:, 5:8] - 1)
    velocity = speed[:, None] * torch.stack([angle.cos(), angle.sin()], 1)                    # [B, 2]
    travel, margin = velocity * (FRAMES - 1), (MARGIN * radius)[:, None]
    low = margin - travel.clamp(max=0)                          # the whole path keeps the shape inside the frame
    start = low + numbers[:, 3:5] * (SIZE - 1 - 2 * margin - travel.abs()).clamp(min=0)
    position = start[:, None] + velocity[:, None] * torch.arange(FRAMES, device=device)[:, None]      # [B, T, 2]
    ahead = 4 * (torch.arange(FRAMES, device=device) % 8 / 4 - 1).abs() - 2     # frames, from 2 to -2 and back, [T]
    position = position + lurch * ahead[:, None] * velocity[:, None]
    coverage = silhouette(picks[:, 1], position, radius)                                        # [B, T, H, W]
    pixels = paint(torch.tensor(list(COLOURS.values()), device=device)[picks[:, 0]], tint, position, radius, coverage)
    speed = velocity[:, :, None] * (1 + lurch * ahead.diff())                                   # [B, 2, T-1]
    flow = speed[..., None, None] * (coverage[:, None, :-1] > .5)                                # [B, 2, T-1, H, W]
    return Clip(pixels, [prompt(*p) for p in picks.tolist()], flow, position, velocity, coverage, picks, radius)


def paint(colour: Tensor, tint: Tensor, position: Tensor, radius: Tensor, coverage: Tensor) -> Tensor:
    """Lay a lit shape of `colour` [B, 3] over the room tinted `tint` [B, 3].  -> [B, 3, T, H, W] in [-1, 1]"""
    axis = torch.arange(SIZE, dtype=torch.float32, device=coverage.device)
    lit = (position[..., 0, None, None] - axis) + (position[..., 1, None, None] - axis[:, None])  # [B, T, H, W]
    light = 1 + .08 * (lit / radius[:, None, None, None]).clamp(-1.5, 1.5)
    room = tint[:, :, None, None] + wallpaper().to(tint.device)                                   # [B, 3, H, W]
    shape = light[:, None] * colour[:, :, None, None, None]                                       # [B, 3, T, H, W]
    return torch.lerp(room[:, :, None], shape, coverage[:, None]).clamp_(0, 1).mul_(2).sub_(1)


def clip(seed: int, motion_rich: bool = False) -> Clip:
    """`clips` for one seed: a batch of one."""
    return clips([seed], motion_rich)


def count_blobs(mask: Tensor, steps: int = 22, most: int = 3) -> Tensor:
    """How many of the first `most` pieces of each frame, from the top, have at least 12 px. mask [N, H, W] -> [N]"""
    rest = (F.avg_pool2d(mask.float()[:, None], 2) > .49).float()                    # [N, 1, H/2, W/2], specks gone
    count = torch.zeros(len(mask), device=mask.device)
    for _ in range(most):
        left = rest.flatten(1).sum(1) >= 3
        if not left.any():
            break
        piece = torch.zeros_like(rest).flatten(1)
        piece.scatter_(1, rest.flatten(1).argmax(1, keepdim=True), 1.)
        piece = piece.view_as(rest) * rest
        for _ in range(steps):
            piece = F.max_pool2d(piece, 3, 1, 1) * rest
        count += left & (piece.flatten(1).sum(1) >= 3)
        rest = rest - piece
    return count


def outline_match(mask: Tensor, position: Tensor, area: Tensor) -> Tensor:
    """IoU of a mask with each ideal silhouette of its own centroid and area, mean over frames.  -> [B, 3]"""
    unit = torch.tensor(AREAS, device=mask.device)
    scores = []
    for index in range(len(SHAPES)):
        shape = torch.full((len(mask),), index, device=mask.device)
        ideal = silhouette(shape, position[:, ::2], (area[:, ::2] / unit[index]).sqrt().clamp(min=.5)) > .5
        both, either = (mask[:, ::2] & ideal).sum((2, 3)), (mask[:, ::2] | ideal).sum((2, 3))
        scores.append((both / either.clamp(min=1)).mean(1))
    return torch.stack(scores, 1)


def centroid(weight: Tensor) -> Tensor:
    """Mean position (x, y) of the pixels of each frame by their weight [B, T, H, W].                    [B, T, 2] px"""
    axis = torch.arange(weight.shape[-1], dtype=torch.float32, device=weight.device)
    total = weight.sum((2, 3)).clamp(min=1)
    return torch.stack([(weight.sum(2) * axis).sum(2) / total, (weight.sum(3) * axis).sum(2) / total], 2)


def alternation(step: Tensor) -> Tensor:
    """Amplitude of the 2-frame period of steps [B, T-1, 2], relative to their mean length.         [B], 0 to about 1

    The second difference of the steps with alternating sign, mean over time: 0 for even and for evenly accelerated
    motion, 1/3 for steps of 1, 2, 1, 2, 1 for leaps to and fro, along the path or across it. One leap alone, six times
    as long as the other steps, counts as .27.
    """
    change = step.diff(n=2, dim=1)
    sign = 1 - 2 * (torch.arange(change.shape[1], device=step.device) % 2)
    return (change * sign[:, None]).mean(1).norm(dim=1) / 4 / step.norm(dim=2).mean(1)


def track(pixels: Tensor) -> dict[str, Tensor]:
    """Read the state of a clip from its pixels [B, 3, T, H, W] in [-1, 1].

    Returns, per clip: colour, shape, direction (indices as in `attributes`), iou (with the best ideal silhouette),
    blobs (most in any frame; 0 if some frame has none), one_blob (bool), position [B, T, 2] px, area [B, T] px,
    velocity [B, 2] and net_speed (end to end), path_speed (mean length of a step), px/frame, and jitter (mean length
    of the second difference of position, px/frame^2); jitter_ratio (jitter per path speed, 0 to about 2) and
    `alternation`, both NaN where the path is slower than MOVES; wander, px, by which the path misses uniform motion
    (root mean square).

    CHOICE: the last three follow a finer centroid, to which a pixel on the edge counts by its share: the mask's own
    moves in leaps, in twos at half a pixel a frame. On rendered clips that leaves a ratio of .08 instead of .39,
    alternation of .01 instead of .06, wander of .03; through the VAE .25, .07 and .15. Under MOVES the VAE's wobble is
    most of a step: no figure per speed.
    """
    rgb = pixels.clamp(-1, 1).add(1).div(2)
    chroma = rgb.amax(1) - rgb.amin(1)                                                            # [B, T, H, W]
    mask = chroma > CHROMA
    area = mask.sum((2, 3)).float()                                                               # [B, T]
    position, fine = centroid(mask.float()), centroid((chroma - CHROMA / 2).clamp(min=0))         # [B, T, 2]
    mean = (rgb * mask[:, None]).sum((2, 3, 4)) / area.sum(1, keepdim=True).clamp(min=1)          # [B, 3]
    palette = F.normalize(torch.tensor(list(COLOURS.values()), device=mean.device), dim=1)
    scores = outline_match(mask, position, area)
    blobs = count_blobs(mask.flatten(0, 1)).view(area.shape)
    blobs = torch.where((blobs == 0).any(1), 0., blobs.amax(1))
    step, velocity = position.diff(dim=1), (position[:, -1] - position[:, 0]) / (area.shape[1] - 1)
    fine_step = fine.diff(dim=1)
    time = torch.arange(area.shape[1], device=mean.device) - (area.shape[1] - 1) / 2
    uniform = (fine * time[:, None]).sum(1, keepdim=True) / time.square().sum() * time[:, None]   # [B, T, 2]
    fine_speed = fine_step.norm(dim=2).mean(1)
    per_speed = lambda value: torch.where(fine_speed > MOVES, value, torch.nan)
    compass = torch.tensor(list(DIRECTIONS.values()), device=mean.device)
    return {"colour": (F.normalize(mean, dim=1) @ palette.T).argmax(1),
            "shape": scores.argmax(1), "iou": scores.amax(1),
            "direction": (velocity @ compass.T).argmax(1), "position": position, "area": area, "velocity": velocity,
            "net_speed": velocity.norm(dim=1), "path_speed": step.norm(dim=2).mean(1),
            "jitter": step.diff(dim=1).norm(dim=2).mean(1), "blobs": blobs, "one_blob": blobs == 1,
            "jitter_ratio": per_speed(fine_step.diff(dim=1).norm(dim=2).mean(1) / fine_speed),
            "alternation": per_speed(alternation(fine_step)),
            "wander": (fine - fine.mean(1, keepdim=True) - uniform).square().sum(2).mean(1).sqrt()}


def measure(pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """What `track` sees, against what the prompts say: figures [B] of each clip, NaN where one does not apply.

    direction applies where the prompt names a speed, and else if the clip moves (net speed over STILL); dynamic (net
    speed over 1 px/frame), still (under MOVES) and plain_speed to prompts without an adverb; slowly and quickly are the
    speeds of prompts with that word.
    """
    seen, named = track(pixels), torch.tensor([attributes(p) for p in prompts], device=pixels.device)
    right = {n: (seen[n] == named[:, i]).float() for i, n in enumerate(("colour", "shape", "direction"))}
    speed, adverb = seen["net_speed"], named[:, 3]
    of = lambda mask, value: torch.where(mask, value.float(), torch.nan)
    return {**right, "direction": of((adverb > 0) | (speed > STILL[1]), right["direction"]),
            "one_blob": seen["one_blob"].float(), "iou": seen["iou"], "jitter": seen["jitter"],
            "jitter_ratio": seen["jitter_ratio"], "alternation": seen["alternation"], "wander": seen["wander"],
            "net_speed": speed, "path_speed": seen["path_speed"],
            "slowly": of(adverb == 1, speed), "quickly": of(adverb == 2, speed), "plain_speed": of(adverb == 0, speed),
            "dynamic": of(adverb == 0, speed > 1), "still": of(adverb == 0, speed < MOVES)}


def score(pixels: Tensor, prompts: list[str]) -> dict[str, float]:
    """The means of `measure` over the clips they apply to, and the relative errors of the named speeds' means."""
    out = {name: value.nanmean().item() for name, value in measure(pixels, prompts).items()}
    out["slowly_error"] = out["slowly"] / (sum(SLOW) / 2) - 1
    out["quickly_error"] = out["quickly"] / (sum(FAST) / 2) - 1
    return out
