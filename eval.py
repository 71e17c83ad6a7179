"""Score folders of video files by the paper's metrics, and make what they find visible.

    python eval.py runs/dmd/samples runs/mogan/samples           tables, paired differences, runs/eval/report.html
    python eval.py samples --prompts FILE --run runs/wan1.3b     only these prompts; training curves in the report
    python eval.py mogan-100 mogan-200 mogan-300                 of kept generators: the report has their curves
    torchrun --nproc_per_node 8 eval.py runs/dmd/samples         the videos shared among eight cards, or CPU processes

Files are named {prompt}-{i}.mp4, as sample.py --out_dir names them. The metrics are VBench's (metrics.py); the motion
score is the mean of smoothness and dynamics. A metric whose weights are neither in weights/eval nor to be downloaded is
left out with a message. Files that are damaged or state no frame rate are named, counted and left out; the exit status
is not 0 if a folder has no score at all. Clips of the toy world get its exact figures too.

Prompts: VBench's are in github.com/Vchitect/VBench, prompts/prompts_per_dimension: subject_consistency.txt (72) for
smoothness and dynamics, overall_consistency.txt (93) for the two qualities; score each list by itself with --prompts.
VideoJAM-Bench's 128 prompts are not public. The official VBench on the same files: vbench evaluate --videos_path DIR
--mode custom_input --dimension motion_smoothness (VBench's own prompts: --mode vbench_standard).

The same command again continues a killed run: each video's scores are one line of a jsonl file, written when known.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import fail, one_line, printable, rank, say, world
from metrics import FILES, FOLDER, find_file, load_metrics
from raft import load_raft
from report import fingerprint, read_jsonl, read_run, write_report
from sample import find_device
from text import prompt_of, read_prompts
from video import SUFFIXES, open_video, read_frames
from weights import WEIGHTS

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
PAPER = [  # what the text (Sec. 6.1) of arXiv 2511.21592v1 states of Table 1; the rest stands in the table alone,
    # as do FlowMo's figures
    ("VBench", "Wan2.1-T2V-1.3B, 50 steps", {"dynamic": .83}),
    ("VBench", "DMD, 3 steps", {"smoothness": .988, "dynamic": .73, "motion": .859}),
    ("VBench", "MoGAN, 3 steps", {"smoothness": .986, "dynamic": .96, "motion": .973}),
    ("VBench, project page", "Wan2.1-T2V-1.3B, 50 steps", {"motion": .915}),  # revised there since
    ("VBench, project page", "MoGAN, 3 steps", {"motion": .960}),
    ("VideoJAM-Bench", "DMD, 3 steps (sic)", {"dynamic": .81, "motion": .830}),  # this would take a smoothness of .850
    ("VideoJAM-Bench", "MoGAN, 3 steps", {"dynamic": .98, "motion": .983}),
]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def find_videos(folder, prompts):
    """Videos of a flat folder, sorted; only those of the given prompts, if any. ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"expected a folder of videos, got {folder}: no such folder")
    videos = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
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


def write_line(path, row):
    """Append one line that is on the disk when this returns. It begins with the line break, which closes a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(b"\n" + json.dumps(row).encode())
        file.flush()
        os.fsync(file.fileno())


def toy_truth(frames, prompt):
    """The toy world's own figures of one clip (toy/world.py `score`), and how far it strays from uniform motion."""
    from toy import world
    x = torch.stack(list(frames), dim=1)[None].float() / 127.5 - 1                              # [1, 3, T, H, W]
    out = world.score(x, [prompt])
    position = world.track(x)["position"][0].double()                                           # [T, 2]
    time = torch.arange(len(position), dtype=torch.float64)[:, None]
    time, position = time - time.mean(), position - position.mean(0)
    stray = position - time * (time * position).sum(0) / (time * time).sum()  # off the line of least squares
    out["position_error"] = stray.norm(dim=1).mean().item()
    return {f"toy_{name}": out[name] for name in TOY if not math.isnan(out[name])}


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


def score_folder(videos, metrics, log, bar=True):
    """Rows of the videos, in order: what `log` has is taken from there, the rest is computed and appended to it."""
    whole = read_jsonl(log, "video", "stamp", "weights", "scores", "skipped")
    known, rows = {str(row["video"]): row for row in whole}, []  # of a video's lines the last
    for path in tqdm(videos, desc=printable(log.stem), disable=None if bar else True):
        try:
            stamp = f"{fingerprint(path)} {path.stat().st_mtime_ns}"
        except OSError:  # a link to nothing, or no permission: probe says which
            stamp = ""
        row = known.get(path.name, {})
        if row.get("stamp") != stamp:
            row = {"video": path.name, "stamp": stamp, "weights": {}, "scores": {}, "skipped": {}}
        before = json.dumps(row)
        if "error" not in row:
            try:
                if "fps" not in row:
                    row.update(probe(path))
                score_video(path, row, metrics)
            except ValueError as error:
                row["error"] = str(error)
                say(f"left out: {error}")
        if json.dumps(row) != before:
            write_line(log, row)
        scores = row["scores"]
        if "smoothness" in scores and "dynamic" in scores:
            scores["motion"] = (scores["smoothness"] + scores["dynamic"]) / 2
        prompt, index = prompt_of(path)
        rows.append({**row, "path": path, "prompt": prompt, "index": index})
    return rows


def score_folders(videos, load, logs):
    """Rows of each folder's videos, shared among torchrun's ranks; None on all but the first. load() -> metrics.

    Each rank scores every n-th video. Then the first goes over all of them as if it were alone, and finds in the logs
    what the others have written.
    """
    if world() > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=9))  # shares may end hours apart
    if rank() > 0:
        dist.barrier()  # the first rank downloads what is missing
    metrics = load()
    if world() > 1:
        if rank() == 0:
            dist.barrier()
        for paths, log in zip(videos, logs):
            score_folder(paths[rank() :: world()], metrics, log, bar=rank() == 0)
        dist.barrier()
        dist.destroy_process_group()
    if rank() == 0:
        return [score_folder(paths, metrics, log, bar=world() == 1) for paths, log in zip(videos, logs)]


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
    table = [[printable(cell) for cell in cells] for cells in table]
    first, *widths = [max(map(len, column)) for column in zip(*table)]
    print("\n" + printable(title))
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


def notes_on(folders, labels, rows, prompts):
    """Lines on what the tables do not tell: files left out or not scored, metrics not taken, prompts without video."""
    notes = []
    for folder, label, here in zip(folders, labels, rows):
        notes += [f"left out of {label}: {row['error']}" for row in here if "error" in row]
        notes += [f"{COLUMNS[metric]} of {label}/{row['video']}: {reason}"
                  for row in here for metric, reason in row["skipped"].items()]
        missing, others = sorted(prompts - {row["prompt"] for row in here}), len(os.listdir(folder)) - len(here)
        twice = len(here) - len({(row["prompt"], row["index"]) for row in here})
        notes += [f"{label}: no video of {len(missing)} prompts, such as {missing[0]!r}"] if missing else []
        notes += [f"{label}: {others} other entries, not scored"] if others else []
        notes += [f"{label}: {twice} files share prompt and index with another; differences take one"] if twice else []
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def labels_of(folders):
    """Short distinct names: the last part of each path, or the paths as given where those collide."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def over_cycles(labels, folders, columns):
    """Curves {run: {figure: [(cycle, mean)]}} of folders NAME-CYCLE: videos of generators that train.py kept."""
    curves = collections.defaultdict(lambda: collections.defaultdict(list))
    for label, rows in zip(labels, folders):
        name, cycle = re.fullmatch(r"(?s)(.*?)(?:-(\d+))?", label).groups()
        for metric, column in columns.items() if cycle else ():
            if values := [row["scores"][metric] for row in rows if metric in row["scores"]]:
                curves[f"{name}, kept generators"][column].append((int(cycle), statistics.fmean(values)))
    curves = {name: {column: sorted(points) for column, points in figures.items() if len(points) > 1}
              for name, figures in curves.items()}
    return {name: figures for name, figures in curves.items() if figures}


def load_rafts(given, weights, device):
    """RAFTs for the flow pictures, in the order to try: the given one, else the dynamic degree's and the toy's."""
    large, toy = find_file(FILES["dynamic"][0][0], weights), WEIGHTS["toy"] / "raft.safetensors"
    rafts = []
    for path in [given] if given else [path for path in (large, toy) if path and path.exists()]:
        rafts.append(load_raft(path).to(device))
        rafts[-1].stamp = fingerprint(path)  # part of a picture's name: other weights, another picture
        rafts[-1].max_size = math.inf if given or path != toy else 128  # px; in real videos the toy's sees nothing
    return rafts


def log_of(out, folder):
    """The jsonl of a folder's scores. Not in the folder itself: VBench takes its first entry for a video."""
    folder = folder.resolve()
    return out / f"{folder.name}-{hashlib.md5(os.fsencode(folder)).hexdigest()[:8]}.jsonl"


def evaluate(args):
    """Score the folders, print the tables, write the report; ValueError at the end if a folder has no score at all."""
    if torch.cuda.is_available():  # what --device cuda means
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    folders, labels, device = args.folders, labels_of(args.folders), find_device(args.device)
    prompts = set(read_prompts(args.prompts)) if args.prompts else set()
    videos = [find_videos(folder, prompts) for folder in folders]  # bad input is told before anything is scored
    runs = {path: read_run(path) for path in args.run}
    if args.raft:
        load_raft(args.raft)  # refused here rather than after all is scored
    rows = score_folders(videos, lambda: load_metrics(args.metrics, args.weights, not args.no_download, device),
                         [log_of(args.out, folder) for folder in folders])
    if rows is None:
        return
    found, columns = tables(labels, rows)
    for title, table in found:
        show(title, table)
    notes = notes_on(folders, labels, rows, prompts)
    print("", *map(printable, notes), sep="\n")
    rafts = load_rafts(args.raft, args.weights, device)  # after the metrics, whose download may bring one
    runs |= over_cycles(labels, rows, columns)
    path = write_report(args.out, labels, rows, found, notes, columns, rafts, args.flow_rows, runs, args.embed_mb)
    say(f"report: {path}")
    empty = [label for label, here in zip(labels, rows) if not any(row["scores"] for row in here)]
    if empty:
        raise ValueError(f"no video of {printable(', '.join(empty))} has a score, for the reasons above")


def parse(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.error = lambda message: fail("eval.py", f"{message} (--help lists the flags)")
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="folders of {prompt}-{i}.mp4; the others are compared with the first")
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
    return parser.parse_args(argv)


def main(argv=None):
    with one_line("eval.py"):
        args = parse(argv)
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank() else sys.stdout):  # the first rank speaks
            evaluate(args)


if __name__ == "__main__":
    main()
