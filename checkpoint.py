"""A run's folder: checkpoints that a kill cannot damage, what a resume may change, exported networks and the log."""

import json
import math
import re
import shutil
import statistics
from collections import deque
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from cli import expect, print0, rank
from model import save_dit
from weights import REPO, header

# What a run must end as it began: the tensors of its checkpoints and the order of its phases depend on them.
FIXED = "preset", "dmd", "latent_gan", "ema", "taps", "fake_warmup", "dmd_warmup", "discriminator_warmup"


def checkpoints(out):
    """A run's checkpoints, oldest first; not those that are being written, or that somebody has renamed or copied."""
    return sorted(path for path in Path(out).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


def cycle_of(path):
    """How many cycles the run had done at a checkpoint."""
    return int(path.name.split("-")[1])


def begun_with(out):
    """The settings that a run in this folder had at its newest checkpoint; {} if there is none."""
    saved = checkpoints(out)
    return json.loads((saved[-1] / "config.json").read_text()) if saved else {}


def start_of(cfg, last):
    """The cycle to start at of `last` in all; it says what a resumed run changes of its settings.

    ValueError for what a run must end as it began, or if it has done more cycles than that.
    """
    saved, begun, changes = checkpoints(cfg.out), begun_with(cfg.out), []
    start = cycle_of(saved[-1]) if saved else 0
    for name, now in json.loads(as_json(cfg)).items():  # JSON has made lists of the run's tuples
        then = begun.get(name, now)
        expect(now == then or name not in FIXED, f"--{name} {then}, with which the run in {cfg.out} began", f"{now}: "
               "use another --out for other settings")
        if now != then and name != "out":
            changes.append(f"{name} {then} -> {now}")
    if changes:
        print0(f"changed since the last checkpoint: {', '.join(changes)}")
    expect(start <= last, f"--cycles {cfg.cycles + start - last} or more, which the run in {cfg.out} has done",
           cfg.cycles)
    return start


def is_finished(cfg, last):
    """Whether a run has nothing left to write: its generator is exported last."""
    return header(Path(cfg.out) / "generator.safetensors").get("cycle") == str(last)


def as_json(cfg):
    return json.dumps(asdict(cfg), ensure_ascii=False, indent=1)


def live_state(nets, optimizers, ema):
    """Every tensor a resume needs, by name, as views of the live (sharded) ones; loading fills them."""
    state = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    for name, optimizer in optimizers.items():
        for key, p in nets[name].named_parameters():
            slots = optimizer.state.get(p, {})  # none of what is frozen
            state.update({f"optimizer.{name}.{key}.{slot}": value for slot, value in slots.items()})
    return {**state, **{f"ema.{key}": value for key, value in ema.items()}}


def save(cfg, cycle, state):
    """Write aside, then rename: a kill at any moment leaves the previous checkpoint. Keeps the newest two."""
    path = Path(cfg.out) / f"checkpoint-{cycle:06d}"
    part = path.with_suffix(".part")
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(state, checkpoint_id=part)
    except CheckpointException as error:
        raise ValueError(f"{part} cannot be written: {str(error).splitlines()[-1]}") from None
    dist.barrier()
    if rank() == 0:
        (part / "config.json").write_text(as_json(cfg))
        part.rename(path)
        for old in checkpoints(cfg.out)[:-2]:
            shutil.rmtree(old)


def load(out, state):
    """Fill a run's live_state from its newest checkpoint, if there is one."""
    *before, path = checkpoints(out) or [None]
    if path is None:
        return
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        advice = f": if it is damaged, move it away to go on from {before[-1].name}" if before else ""
        raise ValueError(f"expected a whole checkpoint of these networks in {path}, got "
                         f"{str(error).splitlines()[-1]}{advice}") from None
    print0(f"resumed {path}")


def export(cfg, cycle, net, name, state=None):
    """Gather a DiT, or its averaged state, and write it under the official keys as <out>/<name>.safetensors.

    Of the generator a copy in bf16, NAME-CYCLE, stays at the first export after every cfg.keep_every cycles.
    """
    full = {}
    for key, value in (state or net.state_dict()).items():
        value = value.full_tensor()
        if rank() == 0:
            full[key] = value.cpu()
    if rank() == 0:
        head = REPO / ".git" / "HEAD"
        ref = head.read_text().split()[-1] if head.exists() else ""
        commit = (REPO / ".git" / ref).read_text().strip() if ref and (REPO / ".git" / ref).is_file() else ref
        sampler = json.dumps({"timesteps": cfg.timesteps, "shift": cfg.shift})
        kept = name == "generator" and cycle % max(1, cfg.keep_every) < cfg.save_every * bool(cfg.keep_every)
        for file, dtype in [(f"{name}-{cycle:06d}", torch.bfloat16)] * kept + [(name, torch.float32)]:
            path = Path(cfg.out) / f"{file}.safetensors"
            save_dit({key: value.to(dtype) for key, value in full.items()}, path.with_suffix(".part"), net.cfg,
                     preset=cfg.preset, cycle=cycle, commit=commit, sampler=sampler)
            path.with_suffix(".part").rename(path)


WATCHED = 20  # full cycles, whose median should lie in these ranges, and what to do where it does not
RANGES = {
    "gan_d": (0.1, 1.35, "the discriminator has won: more --lambda_r1 and --lambda_r2, or hacks/random_t_star.patch",
              "chance is 1.39: a --flow_scale nearer to the clips' speed, more --discriminator_warmup"),
    "balance": (0.3, 3.0, "one AdamW takes its step sizes from both objectives, so the flow GAN hardly counts: more "
                "--lambda_g", "one AdamW takes its step sizes from both, so DMD hardly counts: less --lambda_g")}


class Log:
    """A run's settings in config.json; a line a cycle on the screen and a JSON object in log.jsonl. Rank 0 writes.

    A full cycle's `balance` is norm_gan / norm_dmd. What leaves its range in RANGES is said.
    """

    def __init__(self, cfg, start):
        self.path = path = Path(cfg.out) / "log.jsonl"
        self.recent = {name: deque(maxlen=WATCHED) for name in RANGES}
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name("config.json").write_text(as_json(cfg))
        if rank() == 0 and path.exists():  # a killed run's cycles after its last checkpoint are logged again
            lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
            kept = "".join(line for line in lines if json.loads(line)["cycle"] < start)
            path.with_suffix(".part").write_text(kept)
            path.with_suffix(".part").rename(path)

    def write(self, values):
        if "norm_gan" in values and values.get("norm_dmd"):
            values["balance"] = values["norm_gan"] / values["norm_dmd"]
        for name, recent in self.recent.items() if "norm_gan" in values else ():
            low, high, below, above = RANGES[name]
            recent.append(values.get(name, high))
            middle = statistics.median(recent)
            if len(recent) == WATCHED and not low <= middle <= high:
                advice = below if middle < low else above
                print0(f"{name} is {middle:.3g} over {WATCHED} cycles, not {low} to {high}: {advice}")
                recent.clear()
        if torch.cuda.is_initialized():
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30  # of rank 0
            torch.cuda.reset_peak_memory_stats()
        if rank() == 0:
            odd = [key for key, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
            with self.path.open("a") as file:
                file.write(json.dumps({**values, **dict.fromkeys(odd)}) + "\n")  # JSON has no NaN
            text = [f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items() if k != "cycle"]
            print0(f"{values['cycle']:5d} " + " | ".join(text))
