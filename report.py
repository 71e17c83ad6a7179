"""eval.py's page, report.html: its tables, training curves, and every clip with its scores beside its flow.

A single file that opens from disk. Videos are embedded up to a budget and linked beyond it; either way the browser
decodes only those in sight. Markup, style and script are in report_template.html.
"""

import base64
import contextlib
import hashlib
import html
import itertools
import json
import math
import os
import re
import statistics
import urllib.parse
from pathlib import Path

import torch
from tqdm import tqdm

from cli import from_json, writing
from flow_viz import clip_beside_flow, common_scale
from raft import video_flow
from video import is_made, read_frames, write_video
from weights import REPO

PICTURE_SIDE = 416      # px, longer side of the clips in flow pictures
PICTURE_FRAMES = 161    # a picture shows at most this many frames: its memory must not grow with the video
PICTURE_ITERS = 12      # of RAFT
CURVE_POINTS = 400      # a curve is thinned to about this many


def fingerprint(path, end=2**16):
    """Size and hash of both ends of a file: tells it from another of its name without reading it whole."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise FileNotFoundError(f"{path}: no regular file")
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(end)
        file.seek(max(0, size - end))
        return f"{size} {hashlib.md5(head + file.read()).hexdigest()[:16]}"


def read_jsonl(path, *keys):
    """The objects of a jsonl file that have these keys, none if it is not there; skips what a kill left of a line."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(from_json(line))
    return [row for row in rows if isinstance(row, dict) and row.keys() >= set(keys)]


def fill(template, **parts):
    """A template of this folder with each {{name}} replaced, in one pass: parts are HTML and may hold such marks."""
    page = (REPO / template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page)


def write_page(path, page):
    """Write aside and rename: a page is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with writing(path, len(page)):
        part.write_text(page, encoding="utf-8", errors="backslashreplace")  # bytes of a name that are not UTF-8
        part.replace(path)
    return path


def as_json(value):
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def as_base64(path):
    return base64.b64encode(Path(path).read_bytes()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Clips beside their flow


def preview_size(H, W):
    """(height, width), even, of at most PICTURE_SIDE px and the video's shape."""
    scale = min(1, PICTURE_SIDE / max(H, W))
    return tuple(2 * max(1, round(n * scale / 2)) for n in (H, W))


@torch.no_grad()
def clip_and_flow(raft, row):
    """A video's frames [3, T, h, w] at picture size, their flow [2, T-1, h, w] in pixels of the video per frame."""
    size = preview_size(row["height"], row["width"])
    frames = itertools.islice(read_frames(row["path"], size=size), PICTURE_FRAMES)
    x = torch.stack(list(frames), dim=1).float() / 127.5 - 1
    device = next(raft.parameters()).device
    flow = video_flow(raft, x[None].to(device), PICTURE_ITERS)[0].cpu()
    return x, flow * row["height"] / size[0]


def draw_row(rafts, cells, folder):
    """Write each cell's clip beside its flow, all on one scale; the paths, in order.

    rafts: of eval.py's load_rafts; the first that takes clips of these sizes draws them; if none does, the paths are
    the videos' own. A picture's name is made of all that it depends on, so that a second report finds it.
    """
    sides = [side for cell in cells for side in preview_size(cell["height"], cell["width"])]
    moving = all(cell["frames"] > 1 for cell in cells)
    fits = (net for net in rafts if net.cfg.min_size <= min(sides) and max(sides) <= net.max_size)
    raft = next(fits, None) if moving else None
    if raft is None:
        return [cell["path"] for cell in cells]
    stamps = [cell["stamp"] for cell in cells]
    keys = ["\n".join([stamp, raft.stamp, *stamps]) for stamp in stamps]
    names = [hashlib.md5(key.encode()).hexdigest()[:16] + ".mp4" for key in keys]
    if not all(is_made(folder / name) for name in names):
        pictures = [clip_and_flow(raft, cell) for cell in cells]
        scale = common_scale([flow for _, flow in pictures])  # in a row one colour means one speed
        for cell, name, (x, flow) in zip(cells, names, pictures):
            write_video(folder / name, clip_beside_flow(x, flow, scale), cell["fps"])
    return [folder / name for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Training curves


def read_run(path):
    """{name: [(cycle, value)]} of the finite numbers in a run's jsonl; `path`: the file, or the folder of log.jsonl."""
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"expected a run's jsonl, got {path}: no such file")
    curves = {}
    for i, row in enumerate(read_jsonl(path)):
        row = {name: value for name, value in row.items() if type(value) in (int, float) and abs(value) < 1e300}
        cycle = row.pop("cycle", i)
        for name, value in row.items():
            curves.setdefault(name, []).append((cycle, value))
    return curves


def thin(points):
    """Means of runs of neighbouring points, about CURVE_POINTS in all."""
    size = math.ceil(len(points) / CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(map(statistics.fmean, zip(*group))) for group in groups]


def svg(title, curves, width=320, height=150):
    """One small chart; curves: per run a list of (x, y), drawn in the runs' colours."""
    xs, ys = zip(*itertools.chain(*curves))
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))

    def line(run, points):
        xs = [8 + (width - 16) * (x - x0) / (x1 - x0 or 1) for x, _ in thin(points)]
        ys = [height - 22 - (height - 56) * (y - y0) / (y1 - y0 or 1) for _, y in thin(points)]
        return f'<polyline class="run{run % 6}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))}"/>'
    lines = "".join(line(run, points) for run, points in enumerate(curves) if points)
    texts = [(8, 14, "start", "name", title), (width - 8, 14, "end", "", f"{y0:.4g} to {y1:.4g}"),
             (8, height - 6, "start", "", f"{x0:g}"), (width - 8, height - 6, "end", "", f"{x1:g}")]
    marks = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{html.escape(text)}</text>'
                    for x, y, anchor, kind, text in texts)
    axis = f'<line x1="8" x2="{width - 8}" y1="{height - 22}" y2="{height - 22}"/>'
    label = f'viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}"'
    return f"<svg {label}>{axis}{lines}{marks}</svg>"


def curves_html(runs):
    """Charts of every number of {path: read_run(path)}, one chart a name, one colour a run; nothing without runs."""
    if not runs:
        return ""
    names = list(dict.fromkeys(itertools.chain(*runs.values())))
    charts = "".join(svg(name, [run.get(name, []) for run in runs.values()]) for name in names)
    key = "".join(f'<span class="key run{i % 6}">{html.escape(str(path))}</span>' for i, path in enumerate(runs))
    return f'<section><h2>Training</h2><p>{key}</p><div class="charts">{charts}</div></section>'


# ---------------------------------------------------------------------------------------------------------------------
# report.html


def table_html(title, table):
    """A titled table; the block of the paper's figures is set apart."""
    head, *rows = [[html.escape(cell) for cell in cells] for cells in table]
    body = "".join(f"<tr><th>{cells[0]}</th>{''.join(f'<td>{c}</td>' for c in cells[1:])}</tr>" for cells in rows)
    apart = ' class="apart"' if title.startswith("NOT") else ""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<section{apart}><h2>{html.escape(title)}</h2><div class="wide">{table}</div></section>'


def match_rows(folders):
    """[(prompt, index, one row or None per folder)] of every sample that any folder has."""
    maps = [{(row["prompt"], row["index"]): row for row in rows} for rows in folders]
    keys = sorted(set().union(*maps))
    return [(*key, [rows.get(key) for rows in maps]) for key in keys]


def by_difference(matched, columns):
    """Matched rows with their difference, largest first: ranges across folders over all metrics, in deviations.

    With one folder, the distances from its means.
    """
    cells = [cell["scores"] for _, _, row in matched for cell in row if cell]
    spreads = {}
    for metric in columns:
        values = [scores[metric] for scores in cells if metric in scores]
        if len(values) > 1 and statistics.pstdev(values) > 0:
            spreads[metric] = statistics.fmean(values), statistics.pstdev(values)

    def difference(item):
        total = 0.0
        for metric, (mean, deviation) in spreads.items():
            values = [cell["scores"][metric] for cell in item[2] if cell and metric in cell["scores"]]
            values = values + [mean] if len(item[2]) == 1 else values
            total += (max(values) - min(values)) / deviation if values else 0
        return total
    scored = sorted(((difference(item), item) for item in matched), key=lambda pair: -pair[0])
    return [(round(d, 4), *item) for d, item in scored]


def shown_scores(cell, columns):
    return {name: round(cell["scores"][metric], 4) for metric, name in columns.items() if metric in cell["scores"]}


def write_report(out, labels, folders, tables, notes, columns, rafts=(), flow_rows=50, runs=None, embed_mb=64.0):
    """Write out/report.html.

    folders: scored rows of eval.py; columns: {metric: name}; rafts: see draw_row; runs: see curves_html.
    """
    ranked = by_difference(match_rows(folders), columns)
    budget, blobs, rows = embed_mb * 1e6, [], []
    for i, (difference, prompt, index, cells) in enumerate(tqdm(ranked, desc="report", disable=None)):
        good = [cell for cell in cells if cell and "error" not in cell]
        media = draw_row(rafts if i < flow_rows else (), good, out / "clips") if good else []
        shown, media = [], iter(media)
        for cell in cells:
            if cell is None or "error" in cell:
                shown.append({"none": cell["error"] if cell else "no video"})
                continue
            path = next(media)
            shown.append({"scores": shown_scores(cell, columns), "why": list(cell["skipped"].values())})
            if path.stat().st_size <= budget:
                budget -= path.stat().st_size
                shown[-1]["blob"] = len(blobs)
                blobs.append(f'<script type="text/plain" id="v{len(blobs)}">{as_base64(path)}</script>')
            else:
                shown[-1]["href"] = urllib.parse.quote(os.fsencode(os.path.relpath(path, out)))
        rows.append({"prompt": prompt, "index": index, "difference": difference, "cells": shown})
    data = {"labels": labels, "columns": list(columns.values()), "rows": rows}
    title, items = html.escape(", ".join(labels)), "".join(f"<li>{html.escape(line)}</li>" for line in notes)
    notes = f"<details><summary>Notes ({len(notes)})</summary><ul>{items}</ul></details>" if notes else ""
    return write_page(out / "report.html", fill(
        "report_template.html", title=title, tables="".join(table_html(*table) for table in tables), notes=notes,
        curves=curves_html(runs), blobs="\n".join(blobs), data=as_json(data)))
