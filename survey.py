"""The paper's human study (Sec. 6.3): two folders of videos side by side, blind, as one HTML page; then the count.

    python survey.py page runs/mogan/samples runs/dmd/samples    writes runs/survey/survey.html: give it to people
    python survey.py tally answers-*.json                        win / tie / lose of the first folder, with intervals

The page opens from disk and asks about the samples {prompt}-{i}.mp4 that both folders have. Sides and order are drawn
in the browser, and videos too large to embed are copied under names that do not tell their folder. Each person
downloads one file of answers, in which the folders are A and B. Markup, style and script: survey_template.html.
"""

import argparse
import collections
import hashlib
import json
import os
import shutil
from pathlib import Path

from cli import fail, from_json, one_line, say
from eval import bootstrap, find_videos, labels_of, show
from report import as_base64, as_json, fill, fingerprint, write_page
from text import prompt_of, read_prompts

QUESTIONS = {  # the criteria of Sec. 6.3; CHOICE: the wording, which the paper shows only in a picture
    "motion": "Which video moves better: smooth, lively, physically plausible?",
    "visual": "Which video looks better: sharp, clean, free of artefacts?",
    "text": "Which video fits the text better?",
}
PAPER = [["question", "win", "lose"], ["motion, MoGAN against Wan2.1 (50 steps)", "52 %", "38 %"],
         ["motion, MoGAN against DMD (3 steps)", "56 %", "29 %"]]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def pair_up(videos_a, videos_b):
    """[(prompt, index, path of A, path of B)] of the samples that both folders have; ValueError if there is none."""
    a, b = ({prompt_of(path): path for path in videos} for videos in (videos_a, videos_b))
    pairs = [(*key, a[key], b[key]) for key in sorted(a.keys() & b.keys())]
    if not pairs:
        first = f"{videos_a[0].name} and {videos_b[0].name}"
        raise ValueError(f"expected the same {{prompt}}-{{i}} names in both folders, got {first}, ...")
    return pairs


def write_survey(out, labels, pairs, embed_mb=64.0):
    """Write out/survey.html, the study of two folders; pairs as of `pair_up`."""
    stamp = json.dumps([labels, [(prompt, index, fingerprint(a), fingerprint(b)) for prompt, index, a, b in pairs]])
    survey = hashlib.md5(stamp.encode()).hexdigest()[:12]  # other videos, another survey
    budget, blobs, items = embed_mb * 1e6, [], []
    for prompt, index, *paths in pairs:
        item = {"prompt": prompt, "index": index}
        for side, path in zip("ab", paths):
            if path.stat().st_size <= budget:
                budget -= path.stat().st_size
                item[side] = {"blob": len(blobs)}
                blobs.append(f'<script type="text/plain" id="v{len(blobs)}">{as_base64(path)}</script>')
            else:
                name = hashlib.md5(os.fsencode(f"{survey} {path}")).hexdigest()[:16] + path.suffix
                (out / "survey_files").mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / "survey_files" / name)
                item[side] = {"href": f"survey_files/{name}"}
        items.append(item)
    data = {"survey": survey, "folders": labels, "questions": QUESTIONS, "pairs": items}
    return write_page(out / "survey.html", fill("survey_template.html", blobs="\n".join(blobs), data=as_json(data)))


# ---------------------------------------------------------------------------------------------------------------------
# The answers


def read_answers(paths):
    """The answer files of one survey, one per person; ValueError for anything else, and for a person counted twice."""
    files = []
    for path in paths:
        try:
            file = from_json(path.read_text())
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
            if [known["survey"], known["folders"]] != [file["survey"], file["folders"]]:
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
    show("NOT measured here: stated in the paper's abstract", PAPER)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.error = lambda message: fail("survey.py", f"{message} (--help shows both commands)")
    add = parser.add_argument
    add("command", choices=["page", "tally"])
    add("paths", nargs="+", type=Path, help="page: the two folders, A and B; tally: the files of answers")
    add("--prompts", help="page: ask only about the prompts in this file, one a line")
    add("--out", type=Path, default=Path("runs/survey"), help="page: folder that it goes to, default %(default)s")
    add("--embed_mb", type=float, default=64, help="page: videos embedded in it, in MB; the rest lies beside it")
    with one_line("survey.py"):
        args = parser.parse_args(argv)
        if args.command == "tally":
            return print_tally(args.paths)
        if len(args.paths) != 2:
            raise ValueError(f"expected two folders, got {len(args.paths)}")
        prompts = set(read_prompts(args.prompts)) if args.prompts else set()
        pairs = pair_up(*(find_videos(folder, prompts) for folder in args.paths))
        path = write_survey(args.out, labels_of(args.paths), pairs, args.embed_mb)
        say(f"survey of {len(pairs)} pairs: {path}")


if __name__ == "__main__":
    main()
