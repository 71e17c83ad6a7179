"""Video files in and out, and the real clips of training."""

import contextlib
import hashlib
import itertools
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Interpolation
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model import Draw, seed_of

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")
FPS = 16               # of the videos that Wan makes, and of the real ones that they are compared with
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
    # CHOICE: rounded. Wan truncates, half a level too dark on average; this way 8 bits -> [-1, 1] -> 8 bits is exact.
    x = x.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{hashlib.md5(path.name.encode()).hexdigest()[:12]}.part"  # prompts make long names
    try:
        encode_h264(part, x.permute(1, 2, 3, 0).contiguous().numpy(), Fraction(fps).limit_denominator(1001), comment)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


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
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{path}: expected a video, the file is empty")
        with av.open(str(path)) as container:
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
    return float(stream.average_rate or stream.guessed_rate)


def stated_duration(container, stream):
    """Seconds the file says it lasts, or None; the lesser of two, since the container's may be its sound's."""
    known = [float(stream.duration * stream.time_base)] if stream.duration else []
    return min(known + ([container.duration / av.time_base] if container.duration else []), default=None)


def video_info(path):
    """(duration in s, frames per second, H, W) of a video, from header and first frame. Raises as read_video."""
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError(f"{path}: expected a video, it has no frames")
        H, W = (frame.height, frame.width) if frame.rotation % 180 == 0 else (frame.width, frame.height)
        duration = stated_duration(container, stream)
        if duration is None:  # the header of a live recording: the last time stamp, without decoding
            container.seek(0)
            times = (p.pts * p.time_base for p in container.demux(stream) if p.pts is not None)
            duration = float(max(times, default=0))
        return duration, frame_rate(stream), H, W


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


def resample(timed, fps, start, step):
    """Of (time, frame) pairs, the frame on show at each of start + k / fps: the last one not after it."""
    k, held, end = 0, None, 0.0
    for t, frame in itertools.chain(timed, [(None, None)]):
        t = end if frame is None else t
        while held is not None and start + k / fps < t - TOLERANCE:
            yield held
            k += 1
        if frame is not None:
            held, end = frame, t + (float((frame.duration or 0) * frame.time_base) or step)


def to_pixels(frame, size):
    """A decoded frame, upright, as uint8 RGB [3, H, W]; with a size (H, W), resized to cover it and cut to its centre.

    CHOICE: swscale's default conversion, a level too dark on average: OpenCV and decord, hence VBench, read with it.
    """
    x = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))
    (h, w), (H, W) = x.shape[1:], size or x.shape[1:]
    scale = max(H / h, W / w)
    if scale != 1:
        cover = max(H, round(h * scale)), max(W, round(w * scale))
        x = F.interpolate(x[None], cover, mode="bicubic", antialias=True)[0]
    top, left = (x.shape[1] - H) // 2, (x.shape[2] - W) // 2
    return x[:, top : top + H, left : left + W]


def read_frames(path, fps=None, size=None, start=0.0):
    """Yield a video's frames from `start` seconds on, uint8 [3, H, W], holding one at a time; else as read_video."""
    with open_video(path) as (container, stream):
        timed = timed_frames(path, container, stream, start)
        shown = (frame for t, frame in timed if t >= start - TOLERANCE)
        for frame in shown if fps is None else resample(timed, fps, start, 1 / frame_rate(stream)):
            yield to_pixels(frame, size)


def read_video(path, frames=None, size=None, fps=None, place=0.0):
    """Read a clip: x [3, T, H, W] in [-1, 1], and the frame rate of the file.

    frames: how many, default all. size: (H, W), covered and centre-cropped. fps: resample by time stamps to this rate,
    each frame being the one on show at its time (repeated where the file is slower); default every frame. place: which
    run of `frames`, 0 the first to 1 the last; no more than it needs is decoded.
    Raises ValueError, one line naming the file: no video, damaged or cut short within the run, or too short.
    """
    duration, source, *_ = video_info(path)
    rate = fps or source
    start = place * max(0.0, duration - frames / rate) if frames else 0.0
    clip = list(itertools.islice(read_frames(path, fps, size, start), frames))
    if len(clip) < (frames or 1):
        after = f" after {start:.2f} s" if start else ""
        raise ValueError(f"{path}: has {len(clip)} frames at {rate:g} fps{after}, {frames or 1} needed")
    return torch.stack(clip, dim=1).float().div_(127.5).sub_(1), source


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
# Real clips, decoded by workers ahead of the step


class RealClips(Dataset):
    """(cycle, index) -> uint8 [3, T, H, W] of a random real clip, or None, and why files were skipped."""

    def __init__(self, files, frames, size, seed):
        self.files, self.frames, self.size, self.seed = files, frames, size, seed

    def __getitem__(self, key):
        cycle, index = key
        place = Draw(self.seed, cycle, "real", [index]).uniform("place").item()
        seed, skipped = seed_of(self.seed, cycle, index, "file"), []
        if not self.files:
            from toy.world import clip
            x = clip(seed, motion_rich=True).pixels[0]
            first = int(place * (x.shape[1] - self.frames + 1))
            return to_bytes(x[:, first : first + self.frames]), skipped
        for i in torch.randperm(len(self.files), generator=torch.Generator().manual_seed(seed)).tolist():
            try:
                x, fps = read_video(self.files[i], self.frames, self.size, FPS, place)
                if fps > 0.9 * FPS:  # slower ones would repeat frames: flow that is zero every other time
                    return to_bytes(x), skipped
                skipped.append(f"{self.files[i]}: has {fps:.3g} frames per second, {FPS} needed")
            except (ValueError, OSError) as error:
                skipped.append(str(error))
        return None, skipped


def to_bytes(x):
    """[-1, 1] -> uint8, as a file would hold it: a quarter of the shared memory between workers and step."""
    return x.add(1).mul(127.5).round().byte()


def real_clips(videos, keys, frames, size, seed, workers):
    """Yield batches of real clips [B, 3, T, H, W], one for each list of (cycle, index) in keys, decoded ahead.

    videos: a folder; "": clips of the toy world. A file that cannot be used is named, once per rank, and passed over;
    ValueError if none can be used.
    """
    files, named = (video_files(videos) if videos else []), set()
    if not videos and (size != (64, 64) or frames > 17):
        raise ValueError("expected 64 x 64 and at most 17 frames, the toy world's real clips, got "
                         f"{size[0]} x {size[1]} x {frames}: give --videos for other sizes")
    clips = RealClips(files, frames, size, seed)
    for batch in DataLoader(clips, batch_sampler=keys, collate_fn=list, num_workers=workers):
        for line in dict.fromkeys(line for _, skipped in batch for line in skipped if line not in named):
            named.add(line)
            tqdm.write(f"skipped: {line} ({len(named)} of {len(files)} files)")
        if any(x is None for x, _ in batch):
            raise ValueError(f"expected videos of at least {frames / FPS:.2f} s in {videos}, "
                             f"none of {len(files)} can be used")
        yield torch.stack([x for x, _ in batch]).float().div(127.5).sub(1)
