"""Score folders of video files by the paper's metrics, and make what they find visible.

    python eval.py runs/dmd/samples runs/mogan/samples           tables, paired differences, runs/eval/report.html
    python eval.py samples --prompts FILE --run runs/wan1.3b     only these prompts; training curves in the report
    python eval.py --survey runs/mogan/samples runs/dmd/samples  the human study's page: side by side, blind
    python eval.py --tally answers-*.json                        win / tie / lose of its answers

Motion smoothness, dynamic degree, aesthetic and imaging quality equal those of VBench (Vchitect/VBench 45e14ec)
on the same files; the motion score is the mean of the first two. All run in fp32, where VBench on a GPU runs CLIP
in fp16. Files are named {prompt}-{i}.mp4, as sample.py --out_dir names them.

Weights are looked for in weights/eval, under the names in FILES, and downloaded if the machine is online. A metric
whose weights are missing is left out with a message. AMT-S's weights are CC BY-NC 4.0; MUSIQ's come from a port
for non-commercial use.

Prompts: VBench's are in github.com/Vchitect/VBench, prompts/prompts_per_dimension: subject_consistency.txt (72) for
smoothness and dynamics, overall_consistency.txt (93) for the two qualities; score each list by itself with --prompts.
VideoJAM-Bench's 128 prompts are not public.

The same command again continues a killed run: each video's scores are one line of a jsonl file, written when known.
"""

import argparse
import collections
import hashlib
import itertools
import json
import math
import os
import re
import socket
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

from amt import load_amt
from musiq import load_musiq
from raft import load_raft, pad_to_cells
from report import QUESTIONS, read_run, write_report, write_survey
from sample import find_device
from text import read_prompts
from video import SUFFIXES, open_video, read_frames
from weights import REPO, WEIGHTS, load_strict, read_state_dict

FOLDER = REPO / "weights" / "eval"
FILES = {  # metric: its files in FOLDER, each with the hub repository or the address it comes from
    "smoothness": {"amt-s.pth": "lalala125/AMT"},
    "dynamic": {"raft_large_C_T_V1-22a6c225.pth": "https://download.pytorch.org/models"},  # princeton's raft-things
    "aesthetic": {"clip-vit-large-patch14/config.json": "openai/clip-vit-large-patch14",
                  "clip-vit-large-patch14/model.safetensors": "openai/clip-vit-large-patch14",
                  "sa_0_4_vit_l_14_linear.pth": "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main"},
    "imaging": {"musiq_spaq_ckpt-358bb6af.pth": "chaofengc/IQA-PyTorch-Weights"},
}
COLUMNS = {"smoothness": "smoothness", "dynamic": "dynamics", "motion": "motion score", "aesthetic": "aesthetic",
           "imaging": "imaging"}
TOY = {  # figures of `score` in toy/world.py and of `toy_truth`; exact because the renderer's rules are known
    "colour": "right colour", "shape": "right shape", "direction": "right direction",
    "one_blob": "one blob in every frame", "iou": "IoU with the ideal outline",
    "net_speed": "net speed, px/frame", "path_speed": "path speed, px/frame", "jitter": "jitter, px/frame²",
    "dynamic": "net speed over 1, no adverb", "still": "net speed under .25, no adverb",
    "position_error": "off uniform motion, px", "slowly_error": "speed of 'slowly', relative error",
    "quickly_error": "speed of 'quickly', relative error",
}
PAPER = [  # what the text (Sec. 6.1) of arXiv 2511.21592v1 states of Table 1; the rest stands in the table alone
    ("VBench", "Wan2.1-T2V-1.3B, 50 steps", {"dynamic": .83}),
    ("VBench", "DMD, 3 steps", {"smoothness": .988, "dynamic": .73, "motion": .859}),
    ("VBench", "MoGAN, 3 steps", {"smoothness": .986, "dynamic": .96, "motion": .973}),
    ("VideoJAM-Bench", "DMD, 3 steps (sic)", {"dynamic": .81, "motion": .830}),  # this would take a smoothness of .850
    ("VideoJAM-Bench", "MoGAN, 3 steps", {"dynamic": .98, "motion": .983}),
]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH_PIXELS = 16 * 480 * 832   # frames of one batch of the two per-frame metrics: 16 at 480p, one at 4K


# ---------------------------------------------------------------------------------------------------------------------
# Metrics. Each reads an iterable of frames, uint8 [3, H, W], once and holds a few: memory does not grow with length.


def check_volume(H, W, volumes, device):
    """Raise ValueError if a 4-level correlation pyramid at 1/8 is too small to look up, or too large for memory."""
    if min(H, W) < 128:
        raise ValueError(f"{W}x{H} frames: 128 px a side are needed, or the coarsest correlation level is one cell")
    need = volumes * (H * W / 64) ** 2 * 4 * (1 + 1 / 4 + 1 / 16 + 1 / 64)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    if need > 0.6 * total:
        raise ValueError(f"{W}x{H} frames: the correlations take {need / 2**30:.0f} GiB, the machine has "
                         f"{total / 2**30:.0f} GiB: score smaller videos (VBench does not resize them either)")


@torch.inference_mode()
def interpolate(amt, before, after):
    """AMT-S's frame between two frames, uint8 [3, H, W]: padded to sides of 16, cut to whole levels, as in VBench."""
    H, W = before.shape[1:]
    pair = torch.stack([before, after]).to(next(amt.parameters()).device).float() / 255
    pair, (left, _, top, _) = pad_to_cells(pair, 16)
    check_volume(*pair.shape[2:], 2, pair.device)
    x = amt(pair[:1], pair[1:])[0, :, top : top + H, left : left + W]
    return (x * 255).byte().cpu()


def motion_smoothness(amt, frames):
    """VBench's motion smoothness in [0, 1]: how well every odd frame is interpolated from its two even neighbours.

    A last odd frame has no right neighbour and does not count. Raises ValueError for fewer than 3 frames.
    """
    errors, count = [], 0
    for count, frame in enumerate(frames, 1):
        if count % 2 == 0:
            middle = frame
            continue
        if count > 1:
            errors.append((interpolate(amt, before, frame).int() - middle.int()).abs().double().mean().item())
        before = frame
    if not errors:
        raise ValueError(f"{count} frames: smoothness needs 3")
    return (255 - statistics.fmean(errors)) / 255


def sample_step(fps):
    """VBench looks at every k-th frame, about 8 a second; rounds half to even, as Python does."""
    return max(1, round(fps / 8))


def fast_pixels(flow):
    """Mean length of the fastest 5 % of a flow field [2, H, W], in pixels."""
    speed = flow.norm(dim=0).flatten()
    return speed.topk(int(0.05 * len(speed))).values.mean().item()


def is_dynamic(magnitudes, sampled, H, W):
    """VBench's decision from `fast_pixels` of each pair of `sampled` frames: enough pairs above a threshold."""
    moving = sum(m > 6.0 * min(H, W) / 256 for m in magnitudes)
    return len(magnitudes) > 0 and moving >= round(4 * sampled / 16)


@torch.inference_mode()
def dynamic_degree(raft, frames, fps, iters=20):
    """VBench's dynamic degree of one video, a bool, and the magnitudes it rests on (RAFT large, raft-things).

    Flow is taken and measured on the frames padded to sides of 8; magnitudes are in pixels per sampled pair.
    """
    device, magnitudes, before, sampled = next(raft.parameters()).device, [], None, 0
    for frame in itertools.islice(frames, 0, None, sample_step(fps)):
        H, W = frame.shape[1:]
        x = pad_to_cells(frame[None].to(device).float() / 127.5 - 1, 8)[0]                            # [1, 3, H', W']
        check_volume(*x.shape[2:], 1, device)
        if before is not None:
            magnitudes.append(fast_pixels(raft(before, x, iters)[0]))
        before, sampled = x, sampled + 1
    return is_dynamic(magnitudes, sampled, H, W), magnitudes


def batches(frames, device):
    """Stack frames of one size into float batches [N, 3, H, W] of 0..255 of about BATCH_PIXELS."""
    frames = iter(frames)
    for first in frames:
        more = itertools.islice(frames, max(0, BATCH_PIXELS // first[0].numel() - 1))
        yield torch.stack([first, *more]).to(device).float()


def clip_input(x):
    """VBench's CLIP input from x [N, 3, H, W] in 0..255: shorter side 224, bicubic, no antialias; centre crop."""
    short = min(x.shape[2:])
    x = F.interpolate(x, [int(224 * n / short) for n in x.shape[2:]], mode="bicubic", align_corners=False)
    top, left = (round((n - 224) / 2) for n in x.shape[2:])
    x = x[..., top : top + 224, left : left + 224] / 255
    return (x - x.new_tensor(CLIP_MEAN).view(3, 1, 1)) / x.new_tensor(CLIP_STD).view(3, 1, 1)


@torch.inference_mode()
def aesthetic_quality(clip, head, frames):
    """LAION's aesthetic score over 10, mean over frames: a linear head on CLIP ViT-L/14's normalised embedding."""
    scores = []
    for x in batches(frames, head.weight.device):
        embedding = clip(pixel_values=clip_input(x)).image_embeds
        scores += head(F.normalize(embedding, dim=1)).flatten().tolist()
    return statistics.fmean(scores) / 10


def longer_512(x):
    """VBench's preprocessing for MUSIQ, x [N, 3, H, W] in 0..255 -> [0, 1]: longer side at most 512, bilinear."""
    longer = max(x.shape[2:])
    if longer > 512:
        x = F.interpolate(x, [int(512 / longer * n) for n in x.shape[2:]], mode="bilinear", align_corners=False)
    return x / 255


@torch.inference_mode()
def imaging_quality(musiq, frames):
    """MUSIQ's (SPAQ) score over 100, mean over all frames."""
    device = next(musiq.parameters()).device
    scores = [score for x in batches(frames, device) for score in musiq(longer_512(x)).tolist()]
    return statistics.fmean(scores) / 100


def toy_truth(frames, prompt):
    """The toy world's own figures of one clip (toy/world.py `score`), and how far it strays from uniform motion."""
    from toy import world
    x = torch.stack(list(frames), dim=1)[None].float() / 127.5 - 1                              # [1, 3, T, H, W]
    out = world.score(x, [prompt])
    position = world.track(x)["position"][0].double()                                           # [T, 2]
    time = torch.arange(len(position), dtype=torch.float64)
    design = torch.stack([torch.ones_like(time), time], dim=1)
    stray = position - design @ torch.linalg.lstsq(design, position).solution
    out["position_error"] = stray.norm(dim=1).mean().item()
    return {f"toy_{name}": out[name] for name in TOY if not math.isnan(out[name])}


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def address(file, source):
    """Where a file is downloaded from: `source` is a hub repository or the address of a folder."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"{source if source.startswith('https://') else f'{hub}/{source}/resolve/main'}/{Path(file).name}"


def places(file, folder):
    """Where a weights file may lie: in the folder or above it, as train.py's RAFT does; RAFT also as princeton's."""
    names = [file, "raft-things.pth"] if file in FILES["dynamic"] else [file]
    return [base / name for base in (folder, folder.parent) for name in names]


def fetch(file, source, folder, download):
    """The path of a weights file, downloaded into the folder if it is nowhere; else ValueError naming its source."""
    found = [path for path in places(file, folder) if path.exists()]
    if found:
        return found[0]
    path, digest = folder / file, re.search(r"-([0-9a-f]{8})\.", file)
    if download:
        socket.setdefaulttimeout(15)  # a cluster's nodes may drop packets instead of refusing them
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address(file, source), path, digest and digest[1])  # aside, then renamed
            return path
        except Exception as error:  # offline, blocked, moved: for the caller all of them are a missing file
            print(f"{file}: no download ({error})")
    raise ValueError(f"no weights: {file}, get it from {address(file, source)} and put it into {folder}")


def load_aesthetic(config, weights, head):
    """CLIP's image tower and LAION's linear head, frozen."""
    from transformers import CLIPVisionModelWithProjection
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    try:
        clip = CLIPVisionModelWithProjection.from_pretrained(config.parent).eval().requires_grad_(False)
    except SafetensorError as error:
        raise ValueError(f"expected CLIP's weights in {config.parent}, which cannot be read ({error})") from None
    linear = load_strict(torch.nn.Linear(clip.config.projection_dim, 1, device="meta"), read_state_dict(head)[0], head)
    return clip, linear.requires_grad_(False)


def load_metric(metric, paths, device):
    """A function (frames, fps) -> dict of scores, holding the metric's network on the device."""
    if metric == "aesthetic":
        clip, head = (net.to(device) for net in load_aesthetic(*paths))
        return lambda frames, fps: {"aesthetic": aesthetic_quality(clip, head, frames)}
    if metric == "dynamic":
        raft = load_raft(paths[0]).to(device)

        def dynamic(frames, fps):
            decision, magnitudes = dynamic_degree(raft, frames, fps)
            return {"dynamic": float(decision), **({"flow": statistics.fmean(magnitudes)} if magnitudes else {})}
        return dynamic
    load, score = {"smoothness": (load_amt, motion_smoothness), "imaging": (load_musiq, imaging_quality)}[metric]
    net = load(paths[0]).to(device)
    return lambda frames, fps: {metric: score(net, frames)}


def load_metrics(names, folder, download, device):
    """{metric: (function, weights id)} of the metrics whose weights are there; prints the ones left out and why."""
    out = {}
    for name in names:
        try:
            paths = [fetch(file, source, folder, download) for file, source in FILES[name].items()]
            # The id is kept with every score: other weights, and the score is computed anew.
            out[name] = load_metric(name, paths, device), " ".join(f"{p.name}:{p.stat().st_size}" for p in paths)
        except (ValueError, OSError) as error:
            print(f"{COLUMNS[name]}: left out, {str(error).splitlines()[0]}")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def prompt_of(path):
    """(prompt, sample index) of VBench's file name {prompt}-{i}.mp4; a name without an index is sample 0."""
    found = re.fullmatch(r"(.*)-(\d+)", path.stem)
    return (found[1], int(found[2])) if found else (path.stem, 0)


def find_videos(folder, prompts):
    """Videos of a flat folder, sorted; only those of the given prompts, if any. ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"expected a folder of videos, got {folder}: no such folder")
    videos = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    videos = [p for p in videos if not p.name.endswith(".flow.mp4")]  # sample.py's pictures
    kept = [p for p in videos if not prompts or prompt_of(p)[0] in prompts]
    if not kept:
        other = f"{len(videos)} videos, none of the prompts in --prompts"
        what = other if videos else f"no file that ends in {', '.join(SUFFIXES)}"
        raise ValueError(f"expected videos named {{prompt}}-{{i}}.mp4 in {folder}, found {what}")
    return kept


def probe(path):
    """fps, frames, height, width of a video, decoded to its end; ValueError if damaged or without a frame rate."""
    with open_video(path) as (container, stream):
        first = next(container.demux(stream))  # of a bare H.264 stream, without time stamps, ffmpeg invents a rate
        if not stream.average_rate or first.pts is None:
            raise ValueError(f"{path}: states no frame rate, and the dynamic degree depends on it: remux it with one")
        fps = float(stream.average_rate)
    count, shape = 0, None
    for frame in read_frames(path):
        if shape not in (None, frame.shape):
            raise ValueError(f"{path}: its frames change size, {list(shape[1:])} to {list(frame.shape[1:])}")
        count, shape = count + 1, frame.shape
    if not count:
        raise ValueError(f"{path}: expected a video, it has no frames")
    return {"fps": fps, "frames": count, "height": shape[1], "width": shape[2]}


def read_log(path):
    """Rows of a jsonl by video name, the last of each winning; a line that a kill cut short is skipped."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["video"]] = row
    return rows


def write_line(path, row):
    """Append one line that is on the disk when this returns; a torn line before it is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def score_video(path, row, metrics):
    """Add to a video's row what is missing of the metrics; one that cannot be taken is skipped with its reason."""
    from toy import world
    for name, (score, weights) in metrics.items():
        if row["weights"].get(name) == weights:
            continue
        for known in row["weights"], row["scores"], row["skipped"]:
            known.pop(name, None)
        try:
            row["scores"].update(score(read_frames(path), row["fps"]))
            row["weights"][name] = weights
        except ValueError as error:  # such as too little memory: the next run tries again
            row["skipped"][name] = str(error)
    prompt, shape = prompt_of(path)[0], (row["height"], row["width"], row["frames"])
    if "toy" not in row["weights"] and prompt in world.PROMPTS and shape == (world.SIZE, world.SIZE, world.FRAMES):
        row["scores"].update(toy_truth(read_frames(path), prompt))
        row["weights"]["toy"] = ""


def score_folder(videos, metrics, log):
    """Rows of the videos, in order: what `log` has is taken from there, the rest is computed and appended to it."""
    known, rows = read_log(log), []
    for path in tqdm(videos, desc=f"{videos[0].parent.name}", disable=None):
        stamp = {"bytes": 0, "mtime": 0}
        if path.exists():  # not a link to nothing
            stamp = {"bytes": path.stat().st_size, "mtime": path.stat().st_mtime_ns}
        row = known.get(path.name, {})
        if {key: row.get(key) for key in stamp} != stamp:
            row = {"video": path.name, **stamp, "weights": {}, "scores": {}, "skipped": {}}
        before = json.dumps(row)
        if "error" not in row:
            try:
                if "fps" not in row:
                    row.update(probe(path))
                score_video(path, row, metrics)
            except ValueError as error:
                row["error"] = str(error)
                tqdm.write(f"left out: {error}")
        if json.dumps(row) != before:
            write_line(log, row)
        scores = row["scores"]
        if "smoothness" in scores and "dynamic" in scores:
            scores["motion"] = (scores["smoothness"] + scores["dynamic"]) / 2
        rows.append({**row, "path": path, "prompt": prompt_of(path)[0], "index": prompt_of(path)[1]})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def spread(values):
    """'16', or '8-16' of a list of numbers."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def mean_cell(rows, metric):
    """The mean over videos that have the metric, and how many if not all do."""
    values = [row["scores"][metric] for row in rows if metric in row["scores"]]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f}" + (f" (n={len(values)})" if len(values) < len(rows) else "")


def score_table(labels, folders, columns):
    """One row a folder: means of the columns over its readable videos, then what they are means of."""
    table = [["folder", *columns.values(), "videos", "prompts", "fps", "frames", "size", "left out"]]
    for label, rows in zip(labels, folders):
        good = [row for row in rows if "error" not in row]
        facts = [spread([row[key] for row in good]) if good else "-" for key in ("fps", "frames")]
        sizes = {f"{row['width']}x{row['height']}" for row in good}
        size = sizes.pop() if len(sizes) == 1 else f"{len(sizes)} sizes"
        table.append([label, *(mean_cell(good, metric) for metric in columns), str(len(good)),
                      str(len({row["prompt"] for row in good})), *facts, size, str(len(rows) - len(good))])
    return table


def paper_table():
    """PAPER as a table, with a dash for what the text does not state."""
    def cells(known):
        return [f"{known[metric]:.3f}" if metric in known else "-" for metric in COLUMNS]
    rows = [[f"{suite}: {model}", *cells(known)] for suite, model, known in PAPER]
    return [["reported in the paper", *COLUMNS.values()], *rows]


def paired(rows_a, rows_b, metric):
    """{prompt: differences b - a} over the samples (prompt, index) that both have."""
    a = {(row["prompt"], row["index"]): row["scores"][metric] for row in rows_a if metric in row["scores"]}
    out = collections.defaultdict(list)
    for row in rows_b:
        if metric in row["scores"] and (row["prompt"], row["index"]) in a:
            out[row["prompt"]].append(row["scores"][metric] - a[row["prompt"], row["index"]])
    return out


def bootstrap(groups, draws=10_000):
    """Mean of all values in lists, and its 95 % interval under resampling of the lists (one list goes together)."""
    sums, counts = np.array([sum(g) for g in groups]), np.array([len(g) for g in groups])
    picks = np.random.default_rng(0).integers(len(groups), size=(draws, len(groups)))
    low, high = np.quantile(sums[picks].sum(1) / counts[picks].sum(1), [0.025, 0.975])
    return sums.sum() / counts.sum(), low, high


def difference_cell(rows_a, rows_b, metric):
    groups = list(paired(rows_a, rows_b, metric).values())
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*bootstrap(groups)) if groups else "-"


def difference_table(labels, folders, columns):
    """Every folder minus the first on the same samples, with 95 % intervals; prompts are resampled, not videos."""
    table = [["minus " + labels[0], *columns.values(), "pairs", "prompts"]]
    for label, rows in zip(labels[1:], folders[1:]):
        counts = [paired(folders[0], rows, metric) for metric in columns]
        pairs, prompts = max((sum(map(len, groups.values())), len(groups)) for groups in counts)
        cells = [difference_cell(folders[0], rows, metric) for metric in columns]
        table.append([label, *cells, str(pairs), str(prompts)])
    return table


def toy_table(labels, folders, columns):
    """One row a figure: each folder's mean, then each folder minus the first."""
    table = [["figure", *labels, *(f"{label} minus {labels[0]}" for label in labels[1:])]]
    for metric, name in columns.items():
        means = [mean_cell([row for row in rows if "error" not in row], metric) for rows in folders]
        table.append([name, *means, *(difference_cell(folders[0], rows, metric) for rows in folders[1:])])
    return table


def show(title, table):
    """Print a table (rows of strings, the first the header), columns aligned."""
    first, *widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for name, *cells in table:
        print("  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths))]))


def tables(labels, folders):
    """[(title, table)] of all there is to say about the folders, and the columns {metric: name} that they have."""
    found = {metric for rows in folders for row in rows for metric in row["scores"]}
    shown = {metric: name for metric, name in COLUMNS.items() if metric in found}
    toy = {f"toy_{name}": text for name, text in TOY.items() if f"toy_{name}" in found}
    out = [("Measured here, mean over videos", score_table(labels, folders, shown))]
    if len(folders) > 1 and shown:
        title = "Difference, same prompts and seeds, with 95 % bootstrap intervals"
        out.append((title, difference_table(labels, folders, shown)))
    if toy:
        out.append(("Toy world, exact; differences on the same prompts and seeds", toy_table(labels, folders, toy)))
    flow = {"flow": "flow px"} if "flow" in found else {}
    return out + [("NOT measured here: figures stated in the paper's text", paper_table())], {**shown, **flow, **toy}


def skipped_lines(labels, folders):
    """One line per reason: files left out, and metrics that could not be taken of some files."""
    lines = []
    for label, rows in zip(labels, folders):
        lines += [f"left out of {label}: {row['error']}" for row in rows if "error" in row]
        lines += [f"{COLUMNS[metric]} of {label}/{row['video']}: {reason}"
                  for row in rows for metric, reason in row["skipped"].items()]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The human study


def pair_up(videos_a, videos_b):
    """[(prompt, index, path of A, path of B)] of the samples that both folders have; ValueError if there is none."""
    a, b = ({prompt_of(path): path for path in videos} for videos in (videos_a, videos_b))
    pairs = [(*key, a[key], b[key]) for key in sorted(a.keys() & b.keys())]
    if not pairs:
        first = f"{videos_a[0].name} and {videos_b[0].name}"
        raise ValueError(f"expected the same {{prompt}}-{{i}} names in both folders, got {first}, ...")
    return pairs


def read_answers(paths):
    """The answer files of one survey, one per person; ValueError for anything else, and for a person counted twice."""
    files = []
    for path in paths:
        try:
            file = json.loads(path.read_text())
            answers = [answer[name] for answer in file["answers"] for name in QUESTIONS]
            wrong = set(answers) - {"a", "b", "tie"}
            # What else a tally takes of it, so that a file without it is refused here.
            {(answer["prompt"], answer["index"]) for answer in file["answers"]}
            _, _, (_, _) = file["survey"], file["annotator"], file["folders"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = type(error).__name__
            raise ValueError(f"expected answers downloaded from a survey page, got {path} ({reason})") from None
        if wrong:
            raise ValueError(f"{path}: expected answers a, b or tie, got {min(wrong, key=str)!r}")
        for other, known in zip(paths, files):
            if known["survey"] != file["survey"]:
                raise ValueError(f"{path} and {other} come from different surveys: tally them apart")
            if known["annotator"] == file["annotator"]:
                raise ValueError(f"{path} and {other} are of one person: give the later file only")
        files.append(file)
    return files


def tally(files):
    """{question: {win, tie, lose: (share, low, high)}} of A against B; pairs are resampled with their answers."""
    out = {}
    for name in QUESTIONS:
        groups = collections.defaultdict(list)
        for file in files:
            for answer in file["answers"]:
                groups[answer["prompt"], answer["index"]].append(answer[name])
        out[name] = {outcome: bootstrap([[float(value == code) for value in values] for values in groups.values()])
                     for outcome, code in (("win", "a"), ("tie", "tie"), ("lose", "b"))}
    return out


def print_tally(paths):
    files = read_answers(paths)
    answers = sum(len(file["answers"]) for file in files)
    if not answers:
        raise ValueError(f"{len(files)} files without an answered pair: nothing to tally")
    pairs = {(answer["prompt"], answer["index"]) for file in files for answer in file["answers"]}
    table = [["question", "win", "tie", "lose"]]
    for name, shares in tally(files).items():
        table.append([name, *("{:.1%} [{:.1%}, {:.1%}]".format(*share) for share in shares.values())])
    a, b = files[0]["folders"]
    counts = f"{len(files)} people, {len(pairs)} pairs, {answers} judgements"
    show(f"{a} against {b}: {counts}; 95 % bootstrap intervals over pairs", table)
    stated = [["question", "win", "lose"], ["motion, MoGAN against Wan2.1 (50 steps)", "52 %", "38 %"],
              ["motion, MoGAN against DMD (3 steps)", "56 %", "29 %"]]
    show("NOT measured here: stated in the paper's abstract", stated)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def labels_of(folders):
    """Short distinct names: the last part of each path, or the paths as given where those collide."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def load_rafts(given, weights, device):
    """RAFTs for the flow pictures, in the order to try: the given one, else the dynamic degree's and the toy's."""
    large = [path for file in FILES["dynamic"] for path in places(file, weights) if path.exists()]
    toy = [path for path in [WEIGHTS["toy"] / "raft.safetensors"] if path.exists()]
    rafts = []
    for path in [given] if given else large[:1] + toy:
        rafts.append(load_raft(path).to(device))
        rafts[-1].source = str(path.resolve())  # part of a picture's name: other weights, another picture
        rafts[-1].max_size = math.inf if given or path not in toy else 128  # px; in real videos the toy's sees nothing
    return rafts


def log_of(out, folder):
    """The jsonl of a folder's scores. Not in the folder itself: VBench takes its first entry for a video."""
    return out / f"{folder.resolve().name}-{hashlib.md5(str(folder.resolve()).encode()).hexdigest()[:8]}.jsonl"


def evaluate(args):
    """Score the folders, print the tables, write the report; returns the rows of each folder."""
    folders, labels, device = args.folders, labels_of(args.folders), find_device(args.device)
    prompts = set(read_prompts(args.prompts)) if args.prompts else set()
    videos = [find_videos(folder, prompts) for folder in folders]  # bad input is told before anything is scored
    runs = {path: read_run(path) for path in args.run}
    metrics = load_metrics(args.metrics, args.weights, not args.no_download, device)
    rafts = load_rafts(args.raft, args.weights, device)  # after the metrics, whose download may bring one
    rows = [score_folder(paths, metrics, log_of(args.out, folder)) for paths, folder in zip(videos, folders)]
    found, columns = tables(labels, rows)
    for title, table in found:
        show(title, table)
    notes = skipped_lines(labels, rows)
    for folder, here in zip(folders, rows):
        missing = sorted(prompts - {row["prompt"] for row in here})
        notes += [f"{folder}: no video of {len(missing)} prompts, such as {missing[0]!r}"] if missing else []
    print("\n" + "\n".join(notes) if notes else "")
    names = "motion_smoothness dynamic_degree aesthetic_quality imaging_quality"
    print("The official VBench on the same files (for VBench's own prompts, --mode vbench_standard):")
    print(f'    vbench evaluate --videos_path "{folders[0]}" --mode custom_input --dimension "{names}"')
    path = write_report(args.out, labels, rows, found, notes, columns, rafts, args.flow_rows, runs, args.embed_mb)
    print(f"report: {path}")
    return rows


def parse(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"eval.py: {message} (eval.py --help lists the flags)")
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help="folders of {prompt}-{i}.mp4; the others are compared with the first")
    add("--prompts", help="score only the prompts in this file, one a line")
    add("--metrics", nargs="+", choices=list(FILES), default=list(FILES), help="default all")
    add("--weights", type=Path, default=FOLDER, help="folder of the metrics' weights, default %(default)s")
    add("--no_download", action="store_true", help="leave out a metric rather than download its weights")
    add("--out", type=Path, default=Path("runs/eval"), help="where scores and the report go, default %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--run", nargs="*", type=Path, default=[], help="run folders or jsonl files, for training curves")
    add("--raft", type=Path, help="RAFT of the flow pictures; default the dynamic degree's; to 128 px also the toy's")
    add("--flow_rows", type=int, default=50, help="rows of the report, largest differences first, that show the flow")
    add("--embed_mb", type=float, default=64, help="videos embedded in a page, in MB; the rest is linked")
    add("--survey", nargs=2, type=Path, metavar=("DIR_A", "DIR_B"), help="write the human study's page")
    add("--tally", nargs="+", type=Path, metavar="FILE", help="count the answers of the study")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.folders, args.survey, args.tally))) != 1:
        parser.error("expected one of: folders of videos, --survey DIR_A DIR_B, --tally FILE...")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        if args.tally:
            print_tally(args.tally)
        elif args.survey:
            prompts = set(read_prompts(args.prompts)) if args.prompts else set()
            pairs = pair_up(*(find_videos(folder, prompts) for folder in args.survey))
            path = write_survey(args.out, labels_of(args.survey), pairs, args.embed_mb)
            print(f"survey of {len(pairs)} pairs: {path}")
        else:
            evaluate(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval.py: {error}") from None


if __name__ == "__main__":
    main()
