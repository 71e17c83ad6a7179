"""Video files in and out, and the real clips of training."""

import contextlib
import hashlib
import itertools
import math
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Interpolation
from torch.utils.data import DataLoader, Dataset

from cli import from_json, print0, say, writing
from model import Draw, seed_of

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")
FPS = 16               # of the videos that Wan makes; speeds are in pixels per 1/16 s
BT601, LIMITED = 6, 1  # ffmpeg's numbers of SMPTE 170M and of the range 16..235
CHROMA = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP  # the default rings at edges
TOLERANCE = 2e-3       # seconds; Matroska rounds time stamps to 1 ms
SEEK_MARGIN = 1.0      # seconds; containers seek by decoding time, which runs ahead of the time on show


def write_video(path, x, fps, comment=""):
    """Write pixels x [3, T, H, W], clamped to [-1, 1], as an H.264 mp4 of `fps` frames per second.

    The file appears whole or not at all. comment goes into its metadata. Raises ValueError for odd sides.
    """
    if x.ndim != 4 or len(x) != 3 or 0 in x.shape or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"{path}: expected [3, T, H, W] with even H and W (H.264), got {list(x.shape)}: crop or pad")
    x = to_bytes(x.detach().float().clamp(-1, 1)).cpu()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{hashlib.md5(os.fsencode(path.name)).hexdigest()[:12]}.part"  # prompts make long names
    try:
        images = x.permute(1, 2, 3, 0).contiguous().numpy()
        with writing(path):
            encode_h264(part.absolute(), images, Fraction(fps).limit_denominator(1001), comment)  # as in open_video
            part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def is_made(path):
    """Whether a file that is written whole is there; a power loss may leave it empty."""
    return path.exists() and path.stat().st_size > 0


def encode_h264(path, images, fps, comment):
    """Images uint8 [T, H, W, 3] at fps, a Fraction, into an mp4."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        # crf 17 looks lossless. A fixed number of threads and cpu-independent make the bytes those of the pixels alone:
        # x264's AVX-512 macroblock tree, which the latter leaves out, gave one small clip in twenty another file.
        options = {"crf": "17", "preset": "medium", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        codec = stream.codec_context
        codec.thread_count, codec.color_range = 4, LIMITED
        # CHOICE: BT.601, tagged as such: what readers assume of a file without a tag.
        codec.colorspace = codec.color_primaries = codec.color_trc = BT601
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=BT601, dst_color_range=LIMITED, interpolation=CHROMA)
            frame.pts, frame.time_base = i, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@contextlib.contextmanager
def open_video(path):
    """A file's container and video stream; what ffmpeg finds wrong becomes one ValueError line that names the file."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device read for ever
            raise ValueError(f"{path}: expected a video, it is no regular file")
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{path}: expected a video, the file is empty")
        with av.open(str(path.absolute())) as container:  # ffmpeg takes "a: b.mp4" for the protocol a
            if not container.streams.video:
                raise ValueError(f"{path}: expected a video, the file has no video stream")
            stream = container.streams.video[0]
            if not (stream.average_rate or stream.guessed_rate):
                raise ValueError(f"{path}: expected a frame rate, the file states none: remux it with one")
            stream.thread_type, stream.codec_context.thread_count = "AUTO", 2  # there may be many worker processes
            yield container, stream
    except av.error.FFmpegError as error:
        what = "no video, damaged or cut short" if isinstance(error, ValueError) else "cannot be read"
        raise ValueError(f"{path}: {what} ({error.strerror})") from None


def frame_rate(stream):
    """Frames per second; of two, as the header of a live recording may average to 1000."""
    return float(min(rate for rate in (stream.average_rate, stream.guessed_rate) if rate))


def stated_duration(container, stream):
    """Seconds the file says it lasts, or None; the lesser of two, since the container's may be its sound's."""
    known = [float(stream.duration * stream.time_base)] if stream.duration else []
    return min(known + ([container.duration / av.time_base] if container.duration else []), default=None)


def full_duration(container, stream):
    """Seconds it lasts; where the header is a live recording's, to the last time stamp, without decoding."""
    duration = stated_duration(container, stream)
    if duration is None:
        last = max((packet.pts for packet in container.demux(stream) if packet.pts is not None), default=0)
        duration = float((last - (stream.start_time or 0)) * stream.time_base)
        container.seek(0)
    return duration


def timed_frames(path, container, stream, start):
    """Yield (seconds since the first frame, frame) from the keyframe before `start` on, one frame in memory at a time.

    CHOICE: damage counts from `start` to the last frame that the caller takes; what lies outside is not looked at.
    """
    step, seek, origin, t = 1 / frame_rate(stream), start > SEEK_MARGIN, None, None
    counted = container.format.name == "avi"  # AVI has a constant rate and no time stamps; ffmpeg's are in coding order
    if seek:
        origin = float((stream.start_time or 0) * stream.time_base)
        with contextlib.suppress(av.error.FFmpegError):  # a file without an index is decoded from its beginning
            container.seek(int((origin + start - SEEK_MARGIN) / stream.time_base), stream=stream)
    for frame in container.decode(stream):
        origin = (frame.time or 0.0) if origin is None else origin
        time = None if frame.time is None else frame.time - origin
        if time is None or (t is not None and (counted or time <= t)):  # no time stamp, or a repeated one
            time = t + step if t is not None else start if seek else 0.0
        t = time
        if frame.is_corrupt and t >= start - TOLERANCE:
            raise ValueError(f"{path}: the frame at {t:.2f} s is damaged")
        yield t, frame
    duration = stated_duration(container, stream)
    if duration and (t or 0) + 2 * step < 0.9 * duration:  # mkv and webm end early without an error
        raise ValueError(f"{path}: ends at {t or 0:.2f} s of the {duration:.2f} s that it states, it is cut short")


def upright_size(frame, aspect=1.0):
    """(H, W) of a decoded frame as it is to be shown: its width scaled by the samples' aspect ratio, then turned."""
    H, W = frame.height, round(frame.width * aspect)
    return (W, H) if frame.rotation // 90 % 2 else (H, W)


def to_pixels(frame, size=None, crop=None, aspect=1.0):
    """A decoded frame, upright, as uint8 RGB [3, H, W]; with a size (H, W), resized to cover it and cut to its centre.

    crop: (top, left, height, width) that alone is read, in pixels of `upright_size`.
    CHOICE: swscale's default conversion, a level too dark on average: OpenCV and decord, hence VBench, read with it.
    """
    x = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))
    shown = upright_size(frame, aspect)
    top, left, h, w = crop or (0, 0, *shown)
    high, wide = shown[0] / x.shape[1], shown[1] / x.shape[2]  # of a stored pixel, in those shown
    x = x[:, round(top / high) : round((top + h) / high), round(left / wide) : round((left + w) / wide)]
    H, W = size or (round(h), round(w))
    scale = max(H / h, W / w)
    cover = max(H, round(h * scale)), max(W, round(w * scale))
    if cover != x.shape[1:]:
        x = F.interpolate(x[None], cover, mode="bicubic", antialias=True)[0]
    top, left = (x.shape[1] - H) // 2, (x.shape[2] - W) // 2
    return x[:, top : top + H, left : left + W]


def to_float(x):
    """uint8 -> [-1, 1]"""
    return x.float().div_(127.5).sub_(1)


def to_bytes(x):
    """[-1, 1] -> uint8. CHOICE: rounded, which makes to_bytes(to_float(x)) x; Wan truncates, half a level too dark."""
    return x.add(1).mul(127.5).round().byte()


def read_frames(path, size=None):
    """Yield a video's frames, uint8 [3, H, W], holding one at a time. Raises as read_video.

    The sample aspect ratio is not applied: VBench's readers do not, and its scores are to be reproduced.
    """
    with open_video(path) as (container, stream):
        for _, frame in timed_frames(path, container, stream, 0.0):
            yield to_pixels(frame, size)


def read_video(path, frames=None, size=None):
    """x [3, T, H, W] in [-1, 1] of a whole video or its first frames, as read_frames, and its frame rate.

    Raises ValueError, one line naming the file: no video, damaged or cut short within those frames, or fewer.
    """
    clip = list(itertools.islice(read_frames(path, size), frames))
    if len(clip) < (frames or 1):
        raise ValueError(f"{path}: has {len(clip)} frames, {frames or 1} needed")
    with open_video(path) as (_, stream):
        return to_float(torch.stack(clip, dim=1)), frame_rate(stream)


def video_files(folder):
    """Every video under a folder, sorted, but for sample.py's flow pictures; ValueError if there is none.

    Links are followed, also those to folders.
    """
    files, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        folders.sort()  # where links lead to a folder twice, the same way is found on every machine
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(here) / name for name in names if Path(name).suffix.lower() in SUFFIXES]
    files = sorted(p for p in files if not p.name.endswith(".flow.mp4"))
    if not files:
        raise ValueError(f"expected a folder with videos ({', '.join(SUFFIXES)}) in it, found none in {folder}")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Real clips: runs of native frames, whose motion is as even as it was filmed

# CHOICE: every k-th frame of the file, k = fps / 16 rounded, 1.5 down, and `speed`, by which their flow becomes
# pixels per 1/16 s. The frames on show at i/16 s are 1, 2, 1, 2 apart in a file of 24 fps: even motion would be
# seen with a coefficient of variation of .33 (30 fps: .18), a stutter that the discriminator would call real. What it
# costs: 49 frames do not span 3.0 s but 2.0 (24 fps), 2.9 (50), 3.2 (30 and 60) or 3.8 (25).
# CHOICE: frames 1/11 to 1/25 s apart, about 1/16 s times or over 1.5: 12 and 24 fps are within.
# A flow over 1/8 s would hide half of the accelerations that one over 1/16 s shows.
RATES = 11, 25
# CHOICE: runs in which the frames' distance in time differs from its mean by more than a tenth are refused, not
# resampled. Even motion, rendered at 24, 30 and 60 fps with time stamps that jitter by 1 to 8 ms or with 1 to 10 % of
# the frames missing: speed varies by at most .06 in the runs that pass, by .11 to .37 in the same files resampled to
# 16 fps. Of files that miss 1 % most runs pass, of those that miss 10 % none.
UNEVEN = 0.1
# CHOICE: on real clips in H.264 of crf 18 to 34 with frames repeated, these find every run with telecine or on twos,
# nine of ten with a single repetition, and none in what has none. Motion came no closer to a cut than a ratio of 1.8.
SMALL = 64, 36                # width, height of the grey pictures that are compared with the next
CUT, CUT_RATIO = 8, 3         # grey levels, and times the change of the three frames before and after
STILL, STILL_RATIO = 0.1, .2  # grey levels, and share of the change before and after, of a repeated frame


class BadRun(ValueError):
    """A run of frames that cannot be used, in a file that may have others."""


def stride_of(fps):
    """k, every k-th frame of a file: fps / 16 rounded; 1 for 24 fps, also where a header says 24.01."""
    return max(1, math.ceil(fps / FPS - 0.53))


def check_rate(path, rate, k, rates):
    if not rates[0] <= rate <= rates[1]:
        raise ValueError(f"{path}: expected {rates[0]:.4g} to {rates[1]:.4g} frames per second, or a multiple, "
                         f"got {rate * k:.4g}, which are {rate:.4g} with stride {k}")


def break_in(small):
    """What breaks the motion of consecutive frames, uint8 SMALL and grey: ("a cut", i), before frame i + 1, or None."""
    change = np.abs(np.diff(np.stack(small).astype(np.float32), axis=0)).mean(axis=(1, 2))
    for i, now in enumerate(change):
        before, after = (part.max(initial=0) for part in (change[max(0, i - 3) : i], change[i + 1 : i + 4]))
        if now > max(CUT, CUT_RATIO * max(before, after)):
            return "a cut", i
        if min(before, after) > STILL and now < STILL_RATIO * min(before, after):
            return "a repeated frame", i
    return None


def read_run(path, frames, size, place=0.0, start=None, crop=None, stride=None, rates=RATES):
    """read_clip's x as uint8, its speed, and the share of the picture that `size` keeps."""
    with open_video(path) as (container, stream):
        fps, aspect = frame_rate(stream), float(stream.sample_aspect_ratio or 1)
        k = stride or stride_of(fps)
        check_rate(path, fps / k, k, rates)
        drawn = start is None
        if drawn:
            start = place * max(0.0, full_duration(container, stream) - ((frames - 1) * k + 1) / fps)
        due = first = max(0.0, start - 0.5 / fps)  # the frame nearest to start
        clip, times, shown, small = [], [], [], []
        for t, frame in timed_frames(path, container, stream, first):
            if t < first:
                continue
            if drawn:
                small.append(frame.reformat(*SMALL, "gray", interpolation=Interpolation.AREA).to_ndarray())
                shown.append(t)
            if t >= due:
                H, W = upright_size(frame, aspect)
                top, left, h, w = crop or (0, 0, H, W)
                if top + h > H or left + w > W:
                    raise ValueError(f"{path}: expected a crop [top, left, height, width] in {H} x {W}, got {crop}")
                clip.append(to_pixels(frame, size, crop, aspect))
                times.append(t)
                due = t + (k - 0.5) / fps  # by time: one that is missing in between does no harm
            if len(clip) == frames:
                break
    if len(clip) < frames:
        raise (BadRun if start else ValueError)(
            f"{path}: has {len(clip)} frames at {fps / k:.4g} fps after {start:.2f} s, {frames} needed")
    steps = np.diff(times)
    if abs(steps / steps.mean() - 1).max() > UNEVEN:
        raise BadRun(f"{path}: its frames after {start:.2f} s are {steps.min():.3f} to {steps.max():.3f} s apart")
    check_rate(path, 1 / steps.mean(), k, rates)
    if drawn and (found := break_in(small)):
        raise BadRun(f"{path}: {found[0]} at {shown[found[1] + 1]:.2f} s")
    ratio = (h / w) / (size[0] / size[1])
    return torch.stack(clip, dim=1), float(1 / steps.mean() / FPS), min(ratio, 1 / ratio)


def read_clip(path, frames, size, place=0.0, start=None, crop=None, stride=None):
    """Read a run of native frames: x [3, T, H, W] in [-1, 1], and speed: flow of x times speed is px per 1/16 s.

    frames: T, 2 or more. size: (H, W), covered and centre-cropped; the sample aspect ratio is applied. place: which
    run, 0 the first to 1 the last; no more than it needs is decoded. start: seconds of its first frame, instead of
    place. crop: (top, left, height, width) of the upright picture in square pixels. stride: k, default stride_of.
    Raises ValueError, one line naming the file: as read_video, a rate that is not in RATES, uneven time stamps, and
    with place, not with start, a cut or a repeated frame.
    """
    x, speed, _ = read_run(path, frames, size, place, start, crop, stride)
    return to_float(x), speed


def read_clip_list(path, frames):
    """Clips [(file, start, crop, stride, play)] of a list's lines that have `frames`; play: seconds start may move on.

    A line is {"file": absolute or relative to the list, "start": seconds, "frames": n, every "stride"-th of the file's
    "fps", "crop": [top, left, height, width] or absent}; other keys are ignored. Raises ValueError for a bad line.
    """
    clips, most = [], 0
    lines = [line for line in enumerate(Path(path).read_text("utf-8", "replace").split("\n"), 1) if line[1].strip()]
    for number, line in lines:
        try:
            row = from_json(line)
            file, start, n, fps, k = (row[key] for key in ("file", "start", "frames", "fps", "stride"))
            file, crop = Path(path).parent / file, row.get("crop")
            good = 0 <= start < 1e6 and 0 < fps < 1e3 and all(isinstance(v, int) and 0 < v < 1e6 for v in (n, k))
            good = good and (crop is None or len(crop) == 4 and min(crop[:2]) >= 0 and min(crop[2:]) >= 2)
        except (ValueError, TypeError, KeyError):
            good = False
        if not good:
            raise ValueError(f'{path}, line {number}: expected {{"file": ..., "start": seconds, "frames": n, "fps": f, '
                             f'"stride": k, "crop": [top, left, height, width]}}, got {line[:80]!r}')
        most = max(most, n)
        if n >= frames:
            clips.append((file, start, crop, k, (n - frames) * k / fps))
    if not clips:
        raise ValueError(f"expected clips of {frames} frames or more in {path}, its {len(lines)} have {most} at most")
    if len(clips) < len(lines):
        print0(f"{path}: {len(lines) - len(clips)} of {len(lines)} clips are passed over, shorter than {frames} frames")
    return clips


# ---------------------------------------------------------------------------------------------------------------------
# Real clips, decoded by workers ahead of the step

TURNS = 8        # other runs of a file that are tried if none of the first can be used
LOOKED_AT = 100  # clips, before it is told how many lose most of their picture


class RealClips(Dataset):
    """(cycle, index) -> read_run of a random real clip and its file, or None; and [(file, why it was passed over)]."""

    def __init__(self, clips, frames, size, seed, rates):
        self.clips, self.frames, self.size, self.seed, self.rates = clips, frames, size, seed, rates

    def __getitem__(self, key):
        cycle, index = key
        place = Draw(self.seed, cycle, "real", [index]).uniform("place").item()
        seed, passed = seed_of(self.seed, cycle, index, "file"), []
        if not self.clips:
            from toy.world import clip
            [x], [name], *_ = clip(seed, motion_rich=True)
            first = int(place * (x.shape[1] - self.frames + 1))
            return (to_bytes(x[:, first : first + self.frames]), 1.0, 1.0, name), passed  # as a file would hold it
        order = torch.randperm(len(self.clips), generator=torch.Generator().manual_seed(seed)).tolist()
        for turn in range(TURNS):
            again, at = [], (place + 0.618 * turn) % 1
            for i in order:
                file, start, crop, stride, play = self.clips[i]
                start = None if start is None else start + at * play
                try:
                    clip = read_run(file, self.frames, self.size, at, start, crop, stride, self.rates)
                    return (*clip, str(file)), passed
                except (ValueError, OSError) as error:
                    passed.append((str(file), str(error)))
                    again += [i] * isinstance(error, BadRun)
            order = again
        return None, passed


def collate(items):
    """Clips [B, 3, T, H, W], speed [B], [(file, share kept)], or None for these if one is missing; [(file, why)]."""
    clips, passed = zip(*items)
    passed = list(itertools.chain(*passed))
    if None in clips:
        return None, None, None, passed
    x, speed, kept, files = zip(*clips)
    return torch.stack(x), torch.tensor(speed), list(zip(files, kept)), passed


def real_clips(videos, keys, frames, size, seed, workers, latent=False):
    """Batches of real clips, an iterator: for each list of (cycle, index) in keys x, speed, decoded ahead.

    x: uint8 [B, 3, T, H, W], pinned where there is CUDA: a quarter of the bytes. speed: [B], as read_clip's.
    videos: a folder; a list of clips (read_clip_list); "": the toy world. latent: there is no flow to bring to one
    speed, so files must be within 5 % of 16 frames per second, or of a multiple.
    What cannot be used is passed over, each file named once per rank; ValueError if a clip finds none that can.
    """
    if not videos and (size != (64, 64) or frames > 17):
        raise ValueError("expected 64 x 64 and at most 17 frames, the toy world's real clips, got "
                         f"{size[0]} x {size[1]} x {frames}: give --videos for other sizes")
    rates, clips = RATES, []
    if videos and latent:
        rates = 0.95 * FPS, 1.05 * FPS
        print0(f"without flow, only videos within 5 % of a multiple of {FPS} frames per second are taken")
    if videos:
        clips = read_clip_list(videos, frames) if Path(videos).is_file() else [
            (path, None, None, None, 0.0) for path in video_files(videos)]
    loader = DataLoader(RealClips(clips, frames, size, seed, rates), batch_sampler=keys, num_workers=workers,
                        collate_fn=collate, pin_memory=torch.cuda.is_available())
    return usable(loader, videos, frames, size, min(LOOKED_AT, sum(map(len, keys))))


def usable(loader, videos, frames, size, looked_at):
    """Yield a loader's x and speed; name what was passed over, and tell once how many lose most of their picture."""
    runs, shares, seen = Counter(), {}, 0
    for x, speed, kept, passed in loader:
        for file, why in passed:
            runs[file] += 1
            if runs[file] == 1:
                say(f"skipped: {why} ({runs.total()} runs of {len(runs)} files so far)")
        if x is None:
            raise ValueError(f"expected videos of {frames} frames or more in {videos}, "
                             f"none of {len(loader.dataset.clips)} can be used")
        before, seen = seen, seen + len(x)
        shares.update(kept)
        lost = sum(share < 0.5 for share in shares.values())
        if before < looked_at <= seen and lost:
            print0(f"{lost} of the first {len(shares)} videos, such as portrait ones, keep less than half of their "
                   f"picture in {size[0]} x {size[1]}")
        yield x, speed
