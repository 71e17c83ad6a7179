"""The evidence: every arm of the toy world's tables, trained, measured against truth and compared in pairs.

    python toy/evidence.py run mogan dmd --seeds 0 1 2    # train and measure arms by name; resumes, skips what is done
    python toy/evidence.py run all                        # every arm below
    python toy/evidence.py table                          # the tables, from toy/evidence.json
    python toy/evidence.py picture                        # toy/pictures/motion.png (pip install matplotlib)

All arms start from the shipped student and one fake score fitted to it (lurch_*: from lurch.py's), and differ from
`mogan`, the preset as it stands, by the flags and patches in ARMS only; a patched arm trains in a copy of the
repository. They are judged on the 200 held-out pairs of prompt and noise, the same for every arm. A run is one process,
so that two arms fit on two cores: --jobs, by default 2.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

from cli import from_json, one_line  # noqa: E402
from flow_viz import flow_legend, flow_to_color  # noqa: E402
from model import load_dit  # noqa: E402
from raft import load_raft, video_flow  # noqa: E402
from toy import lurch  # noqa: E402
from toy.make_weights import DEVICE, GUIDANCE, few_step_clips, sample_clips  # noqa: E402
from toy.world import clips, draw, held_out, measure, prompt  # noqa: E402
from vae import load_vae  # noqa: E402

WEIGHTS, RUNS, RESULTS = REPO / "toy" / "weights", REPO / "runs" / "evidence", REPO / "toy" / "evidence.json"
LURCH, PATCHES = RUNS / "lurch", REPO / "toy" / "patches"
START = "--dmd_warmup 0 --discriminator_warmup 0 --cycles 0 --fake_warmup 50"
FIXED = ("renders", "vae", "teacher", "student", "lurch_teacher", "lurch_student")  # nothing to train
LEARNS = "--discriminator_warmup 300 --discriminator_batch 24"  # from all rollouts, for as long as it takes
ARMS = {
    "mogan": "",
    "dmd": "--dmd_warmup 120 --discriminator_warmup 0 --cycles 0",  # as many generator updates as mogan's 2 x 60
    # a motion GAN, or a bonus for speed? At half the length
    "mogan_30": "--cycles 30",
    "speed_reward": "--cycles 30 --discriminator_warmup 0 --lambda_g .7 speed_reward.patch",
    "speed_weak": "--cycles 30 --discriminator_warmup 0 --lambda_g .3 speed_reward.patch",
    "speed_weaker": "--cycles 30 --discriminator_warmup 0 --lambda_g .2 speed_reward.patch",
    "speed_weaker_90": "--cycles 90 --discriminator_warmup 0 --lambda_g .2 speed_reward.patch",
    "mogan_90": "--cycles 90",
    "named": f"--cycles 30 {LEARNS} named.patch",
    "caption": f"--cycles 30 {LEARNS} named.patch caption.patch",
    "caption_90": f"--cycles 90 {LEARNS} named.patch caption.patch",
    "matched": "--cycles 30 matched.patch",
    # files of 24 fps: read at native frames, and as the frame on show every 1/16 s
    "native": "--cycles 30 native.patch",
    "stutter": "--cycles 30 stutter.patch",
    # does it repair what DMD keeps?
    "lurch_dmd": "--dmd_warmup 60 --discriminator_warmup 0 --cycles 0",
    "lurch_mogan": "--cycles 30 matched.patch",
    "lurch_learned": "--cycles 30 --discriminator_warmup 120 matched.patch real_roundtrip.patch",
    "lurch_twins": f"--cycles 30 {LEARNS} --window 4 twins.patch real_roundtrip.patch",
    "lurch_caption": f"--cycles 30 {LEARNS} --window 4 named.patch real_roundtrip.patch caption.patch",
    "lurch_caption_90": f"--cycles 90 {LEARNS} --window 4 named.patch real_roundtrip.patch caption.patch",
    # the balance of the two objectives, and their order
    "weak": "--cycles 30 --lambda_g .05",
    "strong": "--cycles 30 --lambda_g 5",
    "two": "--cycles 30 two_optimizers.patch",
    "gan_first": "--cycles 30 gan_first.patch",
    "carried": "--dmd_warmup 30 --cycles 30",  # the generator's moments of DMD alone; reset: without
    "reset": "--dmd_warmup 30 --cycles 30 reset_moments.patch",
}
EARLIER = {  # before windows reached the ends and the discriminator warmed up, whole, until it separates
    "before": "",
    "no_dmd": "--no-dmd",
    "no_r": "--lambda_r1 0 --lambda_r2 0",
    "latent_gan": "--latent_gan",
    # open choices: the stronger penalty and the VAE's blur on real clips in full, the rest at half the length
    "r_strong": "--lambda_r1 3 --lambda_r2 3",
    "roundtrip": "real_roundtrip.patch",
    "before_30": "--cycles 30",
    "r_printed": "--cycles 30 --lambda_r1 .00075 --lambda_r2 .00075",  # Eq. 6-7 as printed
    "t_random": "--cycles 30 random_t_star.patch",
    "algorithm": "--cycles 30 order.patch",
    "first_window": "--cycles 30 first_window.patch",
    "scale_1": "--cycles 30 --flow_scale 1",
    "scale_9": "--cycles 30 --flow_scale 9",
    "two_optimizers": "--cycles 30 two_optimizers.patch",
    "ema": "--cycles 30 --ema 0.9",  # judged by its averaged generator
}
# Their warm-up was 10 cycles of the heads alone; today's trains the trunk too: a rerun gives other figures.
ARMS |= {name: f"--discriminator_warmup 10 {flags}" for name, flags in EARLIER.items()}
COLUMNS = {  # figures of world.measure, and how the tables call them; NAME_fast: see stack
    "dynamic": "moving", "slowly": "slowly", "path_speed": "speed", "wander_fast": "wander, fast",
    "jitter_ratio": "jitter / speed", "iou_fast": "IoU, fast", "iou": "IoU", "one_blob": "one blob", "shape": "shape"}
FIGURES = [*(key for key in COLUMNS if not key.endswith("_fast")), "net_speed", "wander", "jitter", "alternation",
           "plain_speed", "quickly", "colour", "direction"]
CONTROLS = {"student": ("teacher", "mogan_30", "native", "speed_reward", "speed_weak", "speed_weaker", "matched",
                        "named", "caption", "caption_90"),
            "speed_reward": ("mogan_30", "native"), "speed_weak": ("mogan_30", "native", "caption", "caption_90"),
            "speed_weaker": ("caption", "speed_weaker_90"), "speed_weaker_90": ("caption_90",),
            "native": ("stutter",), "named": ("caption",), "caption": ("caption_90",),
            "lurch_student": ("lurch_twins", "lurch_caption", "lurch_caption_90"),
            "lurch_dmd": ("lurch_student", "lurch_mogan", "lurch_learned", "lurch_twins", "lurch_caption",
                          "lurch_caption_90"), "lurch_caption": ("lurch_caption_90",), "carried": ("reset",),
            "mogan_30": ("native", "weak", "strong", "two", "gan_first"),
            "dmd": ("before", "no_dmd", "no_r", "latent_gan"), "before": ("r_strong", "roundtrip"),
            "before_30": ("r_printed", "t_random", "algorithm", "first_window", "scale_1", "scale_9", "two_optimizers",
                          "ema")}
LOGGED = ("gan_d", "accuracy", "r1", "r2", "norm_gan", "norm_dmd")


def patched(name, patches):
    """A copy of the repository under runs/ with these patches applied; the repository itself where there are none."""
    if not patches:
        return REPO
    copy = RUNS / f"{name}-code"
    shutil.rmtree(copy, ignore_errors=True)
    left = ".*", "runs", "golden", "benchmarks", "hacks", "weights", "data", "samples"
    shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(*left))
    for patch in patches:
        file = next(folder / patch for folder in (REPO / "hacks", PATCHES) if (folder / patch).exists())
        subprocess.run(["git", "apply", "-C1", file], cwd=copy, check=True,
                       env={**os.environ, "GIT_CEILING_DIRECTORIES": str(RUNS)})
    return copy


def train(name, flags, seed):
    """Run train.py, patched where the flags name a patch, or go on with it, in runs/evidence/NAME."""
    out, flags = RUNS / name, flags.split()
    out.mkdir(parents=True, exist_ok=True)
    patches = [flag for flag in flags if flag.endswith(".patch")]
    command = [sys.executable, patched(name, patches) / "train.py", "--preset", "toy", "--weights", WEIGHTS, "--out",
               out, "--samples", "0", "--seed", str(seed), "--workers", "1", *(f for f in flags if f not in patches)]
    with open(out / "train.log", "a") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), stdout=log, stderr=log, env=env)
    if done.returncode:
        sys.exit(f"evidence.py: train.py failed on {name}, see {out / 'train.log'}")


def read_results():
    try:
        results = from_json(RESULTS.read_text()) if RESULTS.exists() else {}
    except ValueError:
        results = None
    if not isinstance(results, dict) or not all(isinstance(row, dict) for row in results.values()):
        sys.exit(f"evidence.py: expected figures by arm in {RESULTS}, got something else: move it away")
    return results


def renders(prompts):
    """One rendered clip of each prompt, from the first seeds that give these prompts."""
    numbers, waiting, chosen = itertools.count(20_000_000), list(enumerate(prompts)), {}
    while waiting:
        seed = next(numbers)
        words = prompt(*draw(seed, False)[0])
        match = next((i for i, p in waiting if p == words), None)
        if match is not None:
            chosen[match] = seed
            waiting = [(i, p) for i, p in waiting if i != match]
    return clips([chosen[i] for i in range(len(prompts))]).pixels


@torch.no_grad()
def pixels_of(name, seed, pairs):
    """The clips of an arm [B, 3, T, H, W] for pairs of prompt and noise seed."""
    vae = load_vae(WEIGHTS)
    if name in ("renders", "vae"):
        x = renders([text for text, _ in pairs])
        return x if name == "renders" else torch.cat([vae.decode(vae.encode(part, 4), 4) for part in x.split(20)])
    run, file = RUNS / f"{name}-{seed}", "generator_ema" if name == "ema" else "generator"
    if name in FIXED:
        run, file = LURCH if name.startswith("lurch") else WEIGHTS, name.removeprefix("lurch_")
    net, vae = load_dit(run / f"{file}.safetensors").to(DEVICE), vae.to(DEVICE)
    x = sample_clips(net, vae, pairs, 50, GUIDANCE, 3.0) if file == "teacher" else few_step_clips(net, vae, pairs)
    return x.clamp(-1, 1).cpu()


def run(arms, seeds, jobs):
    pairs = held_out(200)
    todo = [(arm, seed) for seed in seeds for arm in arms if arm not in FIXED or seed == 0]
    known = read_results()
    done = [(arm, seed) for arm, seed in todo if f"{arm}-{seed}" in known]
    for arm, seed in done:
        print(f"{arm}-{seed}: already in {RESULTS.relative_to(REPO)}")
    todo = [pair for pair in todo if pair not in done]
    score = RUNS / "start" / "fake_score.safetensors"
    if any(arm not in FIXED for arm, _ in todo) and not score.exists():
        train("start", START, 0)
    if any(arm.startswith("lurch") for arm, _ in todo):
        lurch.make(LURCH)
    measuring = Lock()  # trainings are processes of their own; what follows them takes turns

    def one(arm, seed):
        if arm not in FIXED:
            lurches = f"--weights {LURCH} --fake_score {LURCH / 'run' / 'fake_score.safetensors'}"
            start = lurches if arm.startswith("lurch") else f"--fake_score {score}"
            train(f"{arm}-{seed}", f"{start} {ARMS[arm]}", seed)
        with measuring:
            keep(arm, seed)

    def keep(arm, seed):
        figures = measure(pixels_of(arm, seed, pairs), [text for text, _ in pairs])
        row = {key: [round(v, 4) for v in value.tolist()] for key, value in figures.items()}
        if arm not in FIXED:  # what the discriminator made of it, over the last ten cycles
            lines = (RUNS / f"{arm}-{seed}" / "log.jsonl").read_text().splitlines()[-11:]
            log = {key: [r[key] for r in map(json.loads, lines) if key in r] for key in LOGGED}
            row["log"] = {key: round(sum(values) / len(values), 5) for key, values in log.items() if values}
        results = {**read_results(), f"{arm}-{seed}": row}  # another process may have added its arms
        text = json.dumps(results, sort_keys=True).replace("NaN", "null").replace('}, "', '},\n"')
        part = RESULTS.with_suffix(".part")
        part.write_text(text + "\n")
        part.rename(RESULTS)  # a kill leaves the old ones
        print(f"{arm}-{seed}", {key: round(value.nanmean().item(), 3) for key, value in figures.items()}, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: one(*pair), todo))


def stack(results, arm):
    """An arm's figures by name, [seeds, 200], NaN where a figure does not apply; None without results.

    Figures that were not taken when an arm ran are NaN. NAME_fast is NAME over the clips that move more than 1.2
    px/frame, the slowest that "quickly" asks for: the VAE blurs fast shapes, rendered ones too, so that only clips of
    equal speed compare fairly.
    """
    rows = [row for name, row in sorted(results.items()) if name.rsplit("-", 1)[0] == arm]
    if rows:
        x = {key: np.array([row.get(key, [math.nan] * 200) for row in rows], dtype=float) for key in FIGURES}
        fast = x["net_speed"] > 1.2
        return x | {f"{key}_fast": np.where(fast, x[key], np.nan) for key in ("wander", "iou")}


def bootstrap(a, b, rounds=2000):
    """Mean of a minus mean of b, each [seeds, 200], and its 95 % interval: prompts are drawn in pairs, seeds apart."""
    rng, differences = np.random.default_rng(0), []
    for _ in range(rounds):
        prompts = rng.integers(a.shape[1], size=a.shape[1])
        means = [np.nanmean(x[rng.integers(len(x), size=len(x))][:, prompts]) for x in (a, b)]
        differences.append(means[0] - means[1])
    return np.nanmean(a) - np.nanmean(b), *np.percentile(differences, (2.5, 97.5))


def cell(x):
    """The mean of figures, for a table; a dash where none was taken."""
    return "–" if np.isnan(x).all() else f"{np.nanmean(x):.3f}"


def table():
    """The means of every arm; its differences from its control in CONTROLS; what the last ten cycles logged."""
    results = read_results()
    head = lambda *cells: "\n| " + " | ".join(cells) + " |\n|---" + "|---:" * (len(cells) - 1) + "|"
    print(head("arm", "seeds", *COLUMNS.values()))
    for arm in (*FIXED, *ARMS):
        if x := stack(results, arm):
            print(f"| {arm} | {len(x['iou'])} | " + " | ".join(cell(x[key]) for key in COLUMNS) + " |")
    for against, arms in CONTROLS.items():
        print(head(f"minus {against}", *COLUMNS.values()))
        base = stack(results, against)
        for arm in arms:
            if base and (x := stack(results, arm)):
                cells = ["–" if np.isnan(x[key]).all() or np.isnan(base[key]).all() else
                         "%+.3f [%+.3f, %+.3f]" % bootstrap(x[key], base[key]) for key in COLUMNS]
                print(f"| {arm} | " + " | ".join(cells) + " |")
    print(head("arm, mean over the last ten cycles", *LOGGED))
    for arm in ARMS:
        logs = [row["log"] for name, row in results.items() if name.rsplit("-", 1)[0] == arm]
        cells = [cell(np.array([log.get(key, math.nan) for log in logs])) for key in LOGGED]
        if set(cells) != {"–"}:
            print(f"| {arm} | " + " | ".join(cells) + " |")


@torch.no_grad()
def picture():
    """Teacher, student and MoGAN on the same prompts and seeds: three frames of each clip, its flow under them."""
    import matplotlib.pyplot as plt
    prompts = ["a red circle moving right", "a green triangle moving left", "a blue square moving up"]
    rows = {"teacher": "Teacher\n50 steps", "student": "DMD student\n3 steps", "mogan_30": "MoGAN\n3 steps"}
    raft, columns = load_raft(WEIGHTS / "raft.safetensors"), [(i, t) for i in range(3) for t in (0, 8, 15)]
    figure, axes = plt.subplots(6, 9, figsize=(10, 6.6), gridspec_kw=dict(
        left=.125, right=.995, top=.955, bottom=.01, hspace=.03, wspace=.03))
    image = lambda x: (x.permute(1, 2, 0) + 1).clamp(0, 2) / 2
    for row, (arm, label) in enumerate(rows.items()):
        x = pixels_of(arm, 0, list(zip(prompts, (0, 1, 2))))
        color = flow_to_color(video_flow(raft, x, 4), 2.5)                        # [3, 3, T-1, H, W]
        for (i, t), above, below in zip(columns, axes[2 * row], axes[2 * row + 1]):
            above.imshow(image(x[i, :, t]), interpolation="bicubic")
            below.imshow(image(color[i, :, t]))
        axes[2 * row, 0].text(-.08, 0, label, ha="right", va="center", transform=axes[2 * row, 0].transAxes)
    for (i, t), axis in zip(columns, axes[0]):
        axis.set_title(f'"{prompts[i]}"' if t == 8 else "", fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    legend = figure.add_axes([.005, .005, .08, .12])
    legend.imshow(image(flow_legend(2.5, 64)))
    legend.axis("off")
    figure.savefig(REPO / "toy" / "pictures" / "motion.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("run", "table", "picture"))
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"all, or of {', '.join((*FIXED, *ARMS))}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    arms = [*FIXED, *ARMS] if args.arms == ["all"] else args.arms
    unknown = [arm for arm in arms if arm not in ARMS and arm not in FIXED]
    if unknown or args.command == "run" and not arms:
        got = ", ".join(unknown) or "none"
        sys.exit(f"evidence.py: expected arms, all or of {', '.join((*FIXED, *ARMS))}, got {got}")
    if args.command == "picture" and not (RUNS / "mogan_30-0" / "generator.safetensors").exists():
        sys.exit(f"evidence.py: expected a generator in {RUNS / 'mogan_30-0'}: `run mogan_30 --seeds 0` makes it, if "
                 f"{RESULTS.relative_to(REPO)} is moved away before")
    torch.set_num_threads(1)
    if args.command == "run":
        run(arms, args.seeds, args.jobs)
    else:
        table() if args.command == "table" else picture()


if __name__ == "__main__":
    with one_line("evidence.py"):
        main()
