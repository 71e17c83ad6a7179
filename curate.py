"""A folder of videos -> a list of clips in which something moves, and nothing is cut, doubled or combed.

    python curate.py DIR --out clips.jsonl              # then: python train.py --videos clips.jsonl

Every file is decoded once and measured small. Out fall cuts, fades, dissolves, wipes, pushes, black, repeated frames
(telecine, animation on twos, slide shows, frozen streams), interlacing and uneven time stamps; black bars are cropped
away. The rest is divided into clips as long as training reads them. Not found are transitions of over a second or
between fast pans, and wipes and pushes between wide black bars. A line of the list is one clip:

  file           relative to the list's folder where it lies under it, else absolute
  start, fps     seconds of the first frame, and the file's rate
  frames, stride how many, and that they are every stride-th of the file's
  crop           [top, left, height, width] in the upright picture, its width scaled to square pixels
  motion         VBench's statistic, the mean of the fastest 5 % of the flow, on a few pairs of frames: pixels of a
                 480 x 832 frame per 1/16 s
  camera         0..1, the share of the flow that one affine motion of the whole picture explains

1080p at 30 frames a second passes at 2.7 times real time on a core, .8 clips a second, of which decoding takes half:
15,000 files of ten seconds cost 16 hours of a core.

Beside the list: OUT.files, a line a file, by which a stopped run goes on and a repeated one reads only what is new; and
OUT.html, clips with the most, the middling and the least motion to look at.
"""

import argparse
import base64
import html
import itertools
import json
import math
import os
from collections import Counter, deque
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Interpolation
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli import expect, fail, one_line, say, writing
from report import read_jsonl, write_page
from video import (FPS, RATES, TOLERANCE, UNEVEN, check_rate, frame_rate, open_video, stride_of, timed_frames,
                   upright_size, video_files)

SIZE = 480, 832          # of the frames that motion is counted in
MIN_MOTION = 5.6         # px of SIZE per 1/16 s: VBench's 6 * 480 / 256 px per 1/8 s, above which a clip is dynamic
FASTEST = 0.05           # VBench: share of the flow vectors whose mean counts
PAIRS = 4                # of frames whose flow is measured in a clip
SEARCH = 12              # px of SMALL, 48 of SIZE, between two frames of a clip: the fastest motion that is seen
SMALL, CELL = 208, 4     # px, longer side of what is measured on, a quarter of 832; and side of its cells
CUT, CUT_RATIO = 15, 3   # PySceneDetect's AdaptiveDetector: change in HSV, and that over its four neighbours' mean
BLACK = 12               # PySceneDetect's ThresholdDetector: mean level of a black frame
BLEND_SPANS = 0.5, 1     # CHOICE: s between two frames that the one in the middle is compared with, see `blended`;
BLEND = 8                # their mean change of level at least, and shares of that by which the middle may be off:
FADE_BEND, WIPE_BEND, PUSH_BEND, WIPE_AREA = .3, .2, .25, .75  # and the share of the picture that a wipe changes
STILL = 0.25             # ffmpeg's freezedetect, -60 dB of 255 levels; here of the cells that change most
REPEAT = 0.2             # CHOICE: a frame that changes less than this share of those before and after repeats
COMB, COMB_EVERY = 1.2, 3  # CHOICE: see `comb`; progressive pictures reach 0.9, grain 1. Telecine combs 2 frames of 5
BAR = 24                 # ffmpeg's cropdetect: mean level of a row or column that is bar
SHOWN, STILLS = 12, 6    # clips in each part of the page, and pictures of a clip


# ---------------------------------------------------------------------------------------------------------------------
# Measures. Small frames are uint8 RGB [h, w, 3] or float32 luma [h, w]; levels are 0..255.


def hsv(rgb):
    """RGB -> float32 [h, w, 3]: hue 0..180, saturation and value 0..255, which PySceneDetect's numbers are for."""
    r, g, b = np.moveaxis(rgb.astype(np.float32), 2, 0)
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    c = np.maximum(chroma, 1)
    hue = np.where(value == r, (g - b) / c, np.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c))
    return np.stack([30 * hue % 180, 255 * chroma / np.maximum(value, 1), value], axis=2)


def content_change(a, b):
    """PySceneDetect's score of two `hsv` frames: mean absolute change of hue, saturation and value."""
    change = np.abs(a - b)
    return np.minimum(change, [180, 510, 510] - change).mean()  # hue is a circle


def fastest(x):
    """Mean of the largest FASTEST of the values."""
    n = max(1, int(FASTEST * x.size))
    return float(np.partition(np.ravel(x), -n)[-n:].mean())


def comb(luma, moving):
    """How much lines of luma [H, W] differ from their neighbours, over how much from the next of their own field.

    Measured in the cells that move [h, w], 0 if few do. Grain gives 1, a picture less; two moments in one frame more.
    """
    (H, W), (h, w) = luma.shape, moving.shape
    mask = moving[np.arange(2, H - 2) * h // H]
    x = luma[:, (2 * np.arange(w) + 1) * W // (2 * w)].astype(np.int16)  # one column of each cell
    near, far = (np.abs(2 * x[2:-2] - x[2 - k : H - 2 - k] - x[2 + k : H - 2 + k])[mask].sum() for k in (1, 2))
    return near / max(1, far) if moving.mean() > 0.01 else 0.0


def blended(first, middle, last):
    """Is luma `middle` the mean of the others, as in a fade, or in each place one of them, as in a wipe or a push?

    What moves is mostly neither: halfway it covers a third place. The exception is what sweeps over most of a still
    picture. Away from cuts, real clips came no closer to WIPE_BEND than .22 and to PUSH_BEND than .28.
    """
    change, before, after = np.abs(last - first), np.abs(middle - first), np.abs(last - middle)
    mean = change.mean()
    if mean < BLEND:
        return False
    if np.abs(middle - (first + last) / 2).mean() < FADE_BEND * mean:
        return True
    # What begins or stops to move is near one of them too, but everywhere the same one.
    if min(before.mean(), after.mean()) < 0.3 * mean:
        return False
    wipe = np.minimum(before, after).mean() < WIPE_BEND * mean and (change > 3).mean() > WIPE_AREA
    return wipe or pushed(first, middle, last)


def pushed(first, middle, last):
    """Is luma `middle` a part of `first` and beside it one of `last`, of which one or both have come from outside?"""
    for turn in range(4):  # `last` comes from the right, or with the picture turned
        a, m, b = (np.rot90(x, turn) for x in (first, middle, last))
        a, m, b = (x[: len(x) // 8 * 8].reshape(8, 1, len(x) // 8, -1, 2).mean(axis=(2, 4)) for x in (a, m, b))
        W = m.shape[2]
        come, x = np.arange(W // 4, 3 * W // 4)[:, None], np.arange(W)  # px of `last` that are seen
        going, coming = a[:, 0, np.minimum(x + come, W - 1)], b[:, 0, np.maximum(x + come - W, 0)]
        for old, new in ((going, coming), (a, coming), (going, b)):  # a push; `last` covers `first`; or uncovers
            off = np.abs(np.where(x < W - come, old, new) - m).mean(axis=(0, 2)).min()
            if off < PUSH_BEND * np.abs(b - a).mean():
                return True
    return False


def block_flow(a, b):
    """Flow [gh, gw, 2] in pixels (x, y) from luma a to b, and where it can be trusted [gh, gw].

    Blocks of 2 x 2 cells, one a cell, matched within SEARCH pixels, to parts of a pixel by a parabola.
    CHOICE: not RAFT: on a CPU, RAFT large takes 0.8 s for a pair of 240 x 416 frames, this 0.04; and with the same flow
    on every machine, so is the list. Of real clips it ranks pairs as a full-size dense flow does (Spearman's rho 0.98).
    """
    h, w = a.shape
    a, b = torch.from_numpy(a - a.mean()), torch.from_numpy(b - b.mean())
    b = F.pad(b[None, None], [SEARCH] * 4, mode="replicate")[0, 0]
    shifts = torch.arange(-SEARCH, SEARCH + 1.0)
    n = len(shifts)
    cost = [F.avg_pool2d((b[y : y + h].unfold(1, w, 1).transpose(0, 1) - a).abs_(), CELL) for y in range(n)]
    cost = F.avg_pool2d(torch.cat(cost), 2, 1)                                        # [n n, gh, gw]
    sure = cost.mean(dim=0) - cost.amin(dim=0) > 4
    # Of places that fit alike, the nearest: a plain wall is still.
    cost += 0.1 * torch.hypot(shifts[:, None], shifts).view(-1, 1, 1)
    best = cost.argmin(dim=0)
    y, x = best // n, best % n

    def part(step, at):  # of a pixel, from the costs on both sides
        sides = best - step * (at > 0), best, best + step * (at < n - 1)
        low, mid, high = (cost.gather(0, i[None])[0] for i in sides)
        return ((low - high) / (2 * (low + high - 2 * mid)).clamp(min=1e-3)).clamp(-0.5, 0.5)

    flow = F.pad(torch.stack([shifts[x] + part(1, x), shifts[y] + part(n, y)])[None], [1] * 4, mode="replicate")
    flow = F.unfold(flow, 3).view(2, 9, *best.shape).median(dim=1).values             # of 3 x 3 blocks: no strays
    return flow.permute(1, 2, 0).numpy(), sure.numpy()


def camera_share(flow, places):
    """Share 0..1 of the flow [n, 2] at places [n, 2] that an affine motion explains, fitted to most of it."""
    basis, weight = np.concatenate([places, np.ones((len(places), 1))], axis=1), np.ones((len(places), 1))
    for _ in range(8):  # towards least absolute deviations: what moves by itself does not pull
        rest = np.linalg.norm(flow - basis @ np.linalg.lstsq(basis * weight, flow * weight, rcond=None)[0], axis=1)
        weight = 1 / np.sqrt(np.maximum(rest, 0.1))[:, None]
    return max(0.0, 1 - rest.sum() / max(np.linalg.norm(flow, axis=1).sum(), 1e-6))


# ---------------------------------------------------------------------------------------------------------------------
# One file: measure every frame, name what is wrong with it, divide what is left into clips


def upright(frame, H, W):
    """A decoded frame as uint8 RGB [H, W, 3], turned as it is to be shown."""
    h, w = (W, H) if frame.rotation % 180 else (H, W)
    return np.rot90(frame.reformat(w, h, "rgb24", interpolation=Interpolation.AREA).to_ndarray(), frame.rotation // 90)


def measure(path, frames):
    """One pass over a file, up to its damage if it has any, as a dict of what `faults` and `clips_of` need.

    fps, stride and span, the file's frames that a clip of `frames` covers; size (H, W) upright; error, a line or "";
    a value a frame of time, change (of the cells that change most), content, blend (0, or n if it is `blended` of those
    n before and after), comb, rows and columns (mean levels); pairs, (frame, *block_flow).
    """
    m = {name: [] for name in ("time", "change", "content", "blend", "comb", "rows", "columns", "pairs")}
    m["error"], size, held = "", None, None
    try:
        with open_video(path) as (container, stream):
            stream.codec_context.thread_count = 1  # one core a file
            fps, aspect = frame_rate(stream), float(stream.sample_aspect_ratio or 1)
            m["fps"], m["stride"] = fps, stride_of(fps)
            stride = m["stride"]
            check_rate(path, fps / stride, stride, RATES)
            m["span"] = span = (frames - 1) * stride + 1
            reaches = [max(2, round(fps * seconds / 2)) for seconds in BLEND_SPANS]
            recent = deque(maxlen=2 * reaches[-1] + 1)
            for i, (time, frame) in enumerate(timed_frames(path, container, stream, 0.0)):
                m["size"] = size = size or upright_size(frame, aspect)
                expect(upright_size(frame, aspect) == size, f"one size of frames in {path}", f"another at {time:.2f} s")
                rgb = upright(frame, *(CELL * max(4, round(SMALL * n / max(size) / CELL)) for n in size))
                luma, colour = rgb @ np.float32([0.299, 0.587, 0.114]), hsv(rgb[::2, ::2])
                before, colour_before = recent[-1] if recent else (luma, colour)
                recent.append((luma, colour))
                moved = F.avg_pool2d(torch.from_numpy(np.abs(luma - before))[None], CELL)[0].numpy()
                m["time"].append(time)
                m["change"].append(fastest(moved) if i else math.inf)
                m["content"].append(content_change(colour, colour_before))
                m["rows"].append(luma.mean(axis=1).astype(np.uint8))
                m["columns"].append(luma.mean(axis=0).astype(np.uint8))
                m["comb"].append(0 if i % COMB_EVERY else comb(
                    frame.reformat(format="gray").to_ndarray(), np.rot90(moved > 6, -frame.rotation // 90)))
                m["blend"].append(0)
                for n in reaches:
                    if i >= 2 * n and blended(*(recent[k][0][::2, ::2] for k in (-1 - 2 * n, -1 - n, -1))):
                        m["blend"][i - n] = n
                if held and i == held[0] + stride:
                    m["pairs"].append((held[0], *block_flow(held[1], luma)))
                if i % max(stride + 1, span // PAIRS) == 0:
                    held = i, luma
    except (ValueError, OSError) as error:
        m["error"] = str(error)
    return m


def around(x, n, reduce):
    """reduce over the n values before, and over the n after, each of x [N]; the ends are repeated."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, n, mode="edge"), n)
    return reduce(windows[: len(x)], axis=1), reduce(windows[n + 1 :], axis=1)


def faults(m):
    """What is wrong with each frame, "" if nothing: an array of strings."""
    why = np.full(len(m["time"]), "", dtype=object)
    change, content = np.array(m["change"]), np.array(m["content"])
    off = np.abs(np.diff(m["time"]) * m["fps"] - 1)
    why[1:][off > max(UNEVEN, TOLERANCE * m["fps"])] = "uneven time stamps"
    why[np.array(m["comb"]) > COMB] = "interlaced"
    usual = np.minimum(*around(change, 3, np.max))
    # Beside a repeat lies a full step; where a pendulum turns, the steps die away.
    repeats = (change < REPEAT * usual) & (np.maximum(*around(change, 1, np.max)) > usual / 2)
    why[repeats | (change < STILL)] = "repeated frames"
    why[(content >= CUT) & (content >= CUT_RATIO * np.mean(around(content, 2, np.mean), axis=0))] = "cut"
    for i in np.flatnonzero(m["blend"]):
        n = m["blend"][i]
        why[i - n : i + n + 1] = "fade, wipe or push"
    why[np.mean(m["rows"], axis=1) < BLACK] = "black"
    return why


def within_bars(levels, side):
    """(first, size) in pixels of what black bars leave of a side, from the mean levels [frames, n] across it."""
    n = levels.shape[1]
    lit = np.flatnonzero(levels.max(axis=0) > BAR)
    first, end = lit.min(initial=n), lit.max(initial=0) + 1
    if end - first < n / 8:  # a spark in the dark is no picture
        first, end = 0, n
    first, end = first + (first > 0), end - (end < n)  # the outermost may be half bar
    first, end = math.ceil(first * side / n), int(end * side / n)
    return first, end - first


def scores(m, start, crop):
    """(motion, camera) of the clip from frame `start` on, in what training sees of the crop."""
    (top, left, height, width), fast, shares, totals = crop, [], [], []
    scale = max(SIZE[0] / height, SIZE[1] / width)
    pixel = np.array([m["size"][1] / len(m["columns"][0]), m["size"][0] / len(m["rows"][0])]) * scale
    for i, flow, sure in m["pairs"]:
        if start <= i and i + m["stride"] < start + m["span"]:
            places = np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in flow.shape[1::-1])), axis=2) * CELL * pixel
            places -= np.array([left + width / 2, top + height / 2]) * scale
            seen = (np.abs(places) < [SIZE[1] / 2, SIZE[0] / 2]).all(axis=2)
            flow = flow * pixel * m["fps"] / (FPS * m["stride"])
            speed = np.linalg.norm(flow, axis=2)[seen]
            fast.append(fastest(speed))
            shares.append(camera_share(flow[seen & sure], places[seen & sure] / SIZE[1]))
            totals.append(speed.mean() + 1e-6)
    return (round(float(np.mean(fast)), 2), round(float(np.average(shares, weights=totals)), 3)) if fast else (0.0, 0.0)


def clips_of(m):
    """The clips of a measured file, and how many of its frames each reason kept from them."""
    clips, lost, first, span = [], Counter(), 0, m["span"]
    runs = [(fault, len(list(group))) for fault, group in itertools.groupby(faults(m))]
    for k, (fault, length) in enumerate(runs):
        whole = 0 if fault else length // span
        for i in range(first, first + whole * span, span):
            (top, height), (left, width) = (within_bars(np.stack(m[name][i : i + span]), side)
                                            for name, side in zip(("rows", "columns"), m["size"]))
            motion, camera = scores(m, i, (top, left, height, width))
            clips.append(dict(start=round(m["time"][i], 4), frames=(span - 1) // m["stride"] + 1,
                              crop=[top, left, height, width], fps=round(m["fps"], 4), stride=m["stride"],
                              motion=motion, camera=camera))
        # A run that is too short for a clip is lost to what ends it.
        beside = [runs[j][0] for j in (k + 1, k - 1) if 0 <= j < len(runs)] + ["too short a file"]
        lost[fault or ("the rest of a run" if whole else beside[0])] += length - whole * span
        first += length
    return clips, lost


def stamp(path):
    """What tells a file from another of its name; nothing where a link leads nowhere."""
    return dict(bytes=path.stat().st_size, mtime=path.stat().st_mtime_ns) if path.exists() else {}


def examine(path, frames):
    """The record of a file: its clips, and the seconds that each reason kept from them."""
    torch.set_num_threads(1)
    record = dict(file=str(path), frames=frames, clips=[], lost={}, error="")
    try:
        record.update(stamp(path))
        m = measure(path, frames)
        record["error"] = m["error"] or ("" if m["time"] else f"{path}: expected a video, it has no frames")
        if m["time"]:
            record["clips"], lost = clips_of(m)
            record["lost"] = {why: round(n / m["fps"], 3) for why, n in lost.items() if n}
            record["error"] += f"; used up to {m['time'][-1]:.2f} s" if m["error"] else ""
    except Exception as error:  # one file, whatever is wrong with it, must not end a night's work
        record["error"] = f"{path}: {type(error).__name__}: {error}"
    record["error"] = " ".join(record["error"].encode(errors="replace").decode().split())  # names need be no text
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Many files: records, list, table, page


def with_index(function, item):
    return item[0], function(item[1])


def in_parallel(function, jobs, workers, label):
    """Yield function(job) of every job, as they come from `workers` processes, under a progress bar."""
    left = dict(enumerate(jobs))
    # DataLoader's processes, unlike those of a pool, end when this one is killed.
    loader = DataLoader(list(left.items()), None, collate_fn=partial(with_index, function), in_order=False,
                        num_workers=min(workers, len(jobs)) if workers > 1 else 0)
    try:
        for i, result in tqdm(loader, label, dynamic_ncols=True):
            del left[i]
            yield result
    except RuntimeError:
        at = ", ".join(str(job) for job in itertools.islice(left.values(), workers))
        raise ValueError("a process died, out of memory or by a damaged file: run this again to go on, with fewer "
                         f"--workers or without the file, perhaps one of {at}") from None


def verdicts(record, args):
    """Why each clip of a file stays out of the list, "" if it does not."""
    clips = record["clips"]
    why = ["too little motion" if clip["motion"] < args.min_motion else
           "only the camera moves" if clip["camera"] > args.max_camera else "" for clip in clips]
    fit = sorted((i for i, reason in enumerate(why) if not reason), key=lambda i: -clips[i]["motion"])
    for i in fit[args.per_file or len(fit) :]:
        why[i] = "more than --per_file"
    return why


def print_table(records, args):
    """What the hours went to; a file counts as listed, or where most of it went."""
    hours, files, clips = Counter(), Counter(), 0
    for record in records:
        here = Counter(record["lost"])
        for clip, why in zip(record["clips"], verdicts(record, args)):
            here[why or "listed"] += ((clip["frames"] - 1) * clip["stride"] + 1) / clip["fps"]
            clips += not why
        hours += here
        files["listed" if "listed" in here else max(here, key=here.get, default="cannot be used")] += 1
    print(f"{'':24}{'files':>7}{'hours':>10}{'share':>8}")
    for why in sorted(hours | files, key=lambda why: (why != "listed", -hours[why])):
        print(f"{why:24}{files[why]:7}{hours[why] / 3600:10.3f}{hours[why] / (hours.total() or 1):8.1%}")
    damaged = [bool(record["clips"]) for record in records if record["error"]]
    print(f"{'all':24}{len(records):7}{hours.total() / 3600:10.3f}\n{clips} clips listed; flow by block matching"
          + (f"; {len(damaged)} files cannot be used, {sum(damaged)} of them from some point on" if damaged else ""))


def strip(clip):
    """(file, start) of a clip, and STILLS pictures of it side by side as a JPEG in base64."""
    (top, left, height, width), pictures = clip["crop"], []
    z, length = 128 / height, (clip["frames"] - 1) * clip["stride"] + 1
    with open_video(clip["file"]) as (container, stream):
        timed = timed_frames(clip["file"], container, stream, clip["start"])
        shown = (frame for t, frame in timed if t >= clip["start"] - TOLERANCE)
        for frame in itertools.islice(shown, 0, length, max(1, (length - 1) // (STILLS - 1))):
            size = upright_size(frame, float(stream.sample_aspect_ratio or 1))
            x = upright(frame, *(round(n * z) for n in size))
            pictures.append(x[round(top * z) :, round(left * z) :][:128, : round(width * z)])
    image = np.concatenate(pictures[:STILLS], axis=1)
    image = np.ascontiguousarray(image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2])
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuvj420p")
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = frame.height, frame.width, "yuvj420p", Fraction(1, 25)
    return (clip["file"], clip["start"]), base64.b64encode(bytes(codec.encode(frame)[0])).decode()


def write_contact_sheet(path, records, args):
    """A page with the clips that move most, middling and least, those that just fell out, and the unusable files."""
    clips = [(why, dict(clip, file=record["file"])) for record in records
             for clip, why in zip(record["clips"], verdicts(record, args))]
    clips.sort(key=lambda pair: -pair[1]["motion"])
    listed, still = ([clip for why, clip in clips if why == wanted] for wanted in ("", "too little motion"))
    middle = max(0, (len(listed) - SHOWN) // 2)
    parts = {"Most motion": listed[:SHOWN], "Middling": listed[middle : middle + SHOWN], "Least": listed[-SHOWN:],
             "Left out, under --min_motion": still[:SHOWN]}
    shown = {(clip["file"], clip["start"]): clip for part in parts.values() for clip in part}
    pictures = dict(in_parallel(strip, list(shown.values()), args.workers, "pictures"))
    page = ["<!doctype html><meta charset=utf-8><title>Clips</title><style>img{max-width:100%}</style>"]
    for name, part in parts.items():
        page.append(f"<h2>{name}</h2>")
        for clip in part:
            file = html.escape(clip["file"].encode(errors="replace").decode())
            page.append(f"<p><img src='data:image/jpeg;base64,{pictures[clip['file'], clip['start']]}'><br>motion "
                        f"{clip['motion']:g}, camera {clip['camera']:g}, {file} at {clip['start']:.2f} s")
    page += ["<h2>Files that cannot be used</h2>"] + [f"<p>{html.escape(r['error'])}" for r in records if r["error"]]
    write_page(path, "\n".join(page))


def curate(args):
    """Examine the files that no record tells of; then print the table, write page and list."""
    files = [Path(os.path.abspath(file)) for file in video_files(args.folder)]
    log, home = args.out.with_suffix(".files"), Path(os.path.abspath(args.out.parent))
    home.mkdir(parents=True, exist_ok=True)
    old = {str(row["file"]): row for row in read_jsonl(log, "file", "clips", "lost")}
    # Of them, files that could not be used are tried again.
    old = {str(file): old[str(file)] for file in files
           if dict(frames=args.frames, error="", **stamp(file)).items() <= old.get(str(file), {}).items()}
    if old:
        say(f"{len(old)} of {len(files)} files are known from {log}")
    with open(log, "ab", buffering=0) as out:
        jobs = [file for file in files if str(file) not in old]
        for record in in_parallel(partial(examine, frames=args.frames), jobs, args.workers, "files"):
            with writing(log):
                out.write(b"\n" + json.dumps(record).encode())  # a killed run may have left half a line
            old[record["file"]] = record
            if record["error"]:
                say(f"skipped: {record['error']}")
    records = [old[str(file)] for file in files]
    lines = []
    for record in records:
        file = Path(record["file"])
        name = str(file.relative_to(home) if file.is_relative_to(home) else file)
        lines += [json.dumps(dict(file=name, **clip)) for clip, why in zip(record["clips"], verdicts(record, args))
                  if not why]
    print_table(records, args)
    write_contact_sheet(args.out.with_suffix(".html"), records, args)
    expect(lines, "videos with a clip to list", f"none in {len(files)} files: see {args.out.with_suffix('.html')}")
    write_page(args.out, "\n".join(lines) + "\n")
    say(f"wrote {args.out}; look at {args.out.with_suffix('.html')}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail("curate.py", f"{message} (--help lists the flags)")
    add = parser.add_argument
    add("folder", metavar="DIR", help="videos, also in folders below")
    add("--out", type=Path, default=Path("clips.jsonl"), help="the list, default %(default)s")
    add("--frames", type=int, default=49, help="of a clip: 49, the discriminator's window; 81 for --latent_gan")
    add("--min_motion", type=float, default=MIN_MOTION, help="px of 480 x 832 per 1/16 s, default %(default)s")
    add("--max_camera", type=float, default=1.0, help="share of the flow that the camera may explain, default all")
    add("--per_file", type=int, default=10, help="clips, those that move most; 0: all; default %(default)s")
    add("--workers", type=int, default=os.cpu_count(), help="processes, default one a core")
    args = parser.parse_args(argv)
    with one_line("curate.py"):
        expect(args.out.suffix == ".jsonl", "--out with the suffix .jsonl", args.out)
        expect(args.frames > 1 and args.workers > 0 and args.per_file >= 0, "--frames of 2 or more, --workers of 1 or "
               "more and --per_file of 0 or more", f"{args.frames}, {args.workers} and {args.per_file}")
        curate(args)


if __name__ == "__main__":
    main()
