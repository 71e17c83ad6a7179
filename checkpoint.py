"""A run's folder: checkpoints that a kill cannot damage, what a resume may change, exported networks and the log."""

import errno
import fcntl
import json
import math
import os
import pickle
import re
import shutil
import socket
import statistics
import subprocess
import time
import zlib
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from cli import expect, from_json, gathered, gb, print0, rank, world, writing
from model import save_dit
from weights import REPO, header

PATIENCE = 60  # seconds; for so long a node may remember that a file was not there

# What a run must end as it began: the tensors of its checkpoints and the order of its phases depend on them.
FIXED = "preset", "dmd", "latent_gan", "ema", "taps", "fake_warmup", "dmd_warmup", "discriminator_warmup"


def checkpoints(out):
    """A run's checkpoints, oldest first; not those that are being written, or that somebody has renamed or copied."""
    return sorted(path for path in Path(out).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


def cycle_of(path):
    """How many cycles the run had done at a checkpoint."""
    return int(path.name.split("-")[1])


def newest(out):
    """A run's newest checkpoint, or None, and the cycles it had done by then."""
    path = next(reversed(checkpoints(out)), None)
    return path, cycle_of(path) if path else 0


def damaged(path, what):
    """ValueError for a checkpoint that is not what a save leaves, and what can be done about it."""
    before = [other.name for other in checkpoints(path.parent) if other.name < path.name]
    return ValueError(f"expected a whole checkpoint of these networks in {path}, got {what}: if it is damaged, move it "
                      f"away to {f'go on from {before[-1]}' if before else 'begin anew'}")


def read_json(path):
    """The object in a checkpoint's file; ValueError if a power loss or a hand has left something else."""
    try:
        value = from_json(path.read_bytes().decode(errors="surrogateescape"))
    except (ValueError, FileNotFoundError, NotADirectoryError):
        value = None
    if not isinstance(value, dict):
        raise damaged(path.parent, f"no settings or checksums in its {path.name}")
    return value


def begun_with(out):
    """The settings that a run in this folder had at its newest checkpoint; {} if there is none."""
    path, _ = newest(out)
    return read_json(path / "config.json") if path else {}


def start_of(cfg, last):
    """The cycle to start at of `last` in all; it says what a resumed run changes of its settings.

    ValueError for what a run must end as it began, if it has done more cycles than that, or in another's folder.
    """
    try:
        settings = from_json((Path(cfg.out) / "config.json").read_bytes())
    except (ValueError, OSError):
        settings = None  # none, or what a power loss has left
    expect(not isinstance(settings, dict) or "preset" in settings, "an --out of the run's own",
           f"{cfg.out}, in which something else keeps its config.json")
    (_, start), begun, changes = newest(cfg.out), begun_with(cfg.out), []
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


def claim(out, start):
    """Make a run's folder that of these ranks alone until they end, and see that all look at the same one.

    ValueError if another train.py writes there, or if a rank has another folder there, or another cycle to start at.
    """
    path, problem = Path(out) / "lock", ""
    me = f"process {os.getpid()} of {socket.gethostname()} since {time.strftime('%F %T')}"
    if rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # never closed: locked until this process ends
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked workers inherit
            except (BlockingIOError, PermissionError):
                problem = f"{out}: another train.py writes there ({os.read(lock, 200).decode(errors='replace')})"
            except OSError:
                pass  # storage without locks
            if not problem:
                os.truncate(lock, 0)
                os.write(lock, me.encode())
                os.fsync(lock)
                for part in path.parent.glob("checkpoint-*.part"):  # of a save that was killed
                    shutil.rmtree(part)
        except OSError as error:
            problem = str(error)
    told = [(problem, me, newest(out)[1])]
    dist.broadcast_object_list(told)
    problem, me, begin = told[0]
    expect(not problem, "a run folder to write to, for this run alone", problem)
    seen = rank() == 0  # to read it there and close it would unlock it
    for _ in range(1 + PATIENCE):
        with suppress(OSError):
            seen = seen or path.read_text(errors="replace") == me
        time.sleep(not seen)
    wrong = gathered([] if seen and start == begin else [f"rank {rank()} on {socket.gethostname()}"])
    expect(not wrong, f"every node to see the {out} of rank 0, at cycle {begin} (--out on storage that they share)",
           f"another at {', '.join(wrong)}")


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


def sync(path):
    """Put a file, or the names in a folder, on the disk."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    except OSError as error:
        if error.errno != errno.EINVAL:  # storage that cannot sync folders
            raise
    finally:
        os.close(place)


def publish(part, path):
    """Give a file or folder its name once it is on the disk: under that name it is whole, after a power loss too."""
    sync(part)
    part.replace(path)
    sync(path.parent)


def put(path, text):
    """Write a small text file, whole or not at all."""
    with writing(path):
        path.with_suffix(".part").write_text(text, "utf-8", "surrogateescape")  # paths in it need not be UTF-8
        publish(path.with_suffix(".part"), path)


def crc32(path):
    """(name, checksum) of a file, None where it cannot be read; 2 GB/s a core, and each rank has its share."""
    value = 0
    with suppress(OSError), open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
        return path.name, value
    return path.name, None


def size_of(state):
    """Bytes of a checkpoint, over all ranks."""
    return sum(value.numel() * value.element_size() for value in state.values())


def has_room(out, size):
    free = shutil.disk_usage(out).free
    expect(free > size, f"{gb(size)} free in {out} for a checkpoint", gb(free))
    return free


@contextmanager
def plainly():
    """Raise what went wrong on a rank, not DCP's account of it, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class Reader(dcp.FileSystemReader):
    """DCP's, whose .metadata is a pickle: it may name what a checkpoint of tensors needs, so no code of its runs."""

    class Unpickler(pickle.Unpickler):
        NAMES = {  # without BytesStorageMetadata: bytes would be unpickled in their turn
            *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                "StorageMeta", "_MEM_FORMAT_ENCODING")),
            "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size",
            "torch.float32", "torch.bfloat16", "torch.float16", "pathlib.PosixPath", "pathlib._local.PosixPath"}

        def find_class(self, module, name):
            if f"{module}.{name}" not in self.NAMES:
                raise pickle.UnpicklingError(f"{module}.{name} in its .metadata, which no checkpoint needs")
            return super().find_class(module, name)

    def read_metadata(self, rank=None, **kwargs):
        with open(self._get_metadata_path(rank), "rb") as file:
            return self.Unpickler(file).load()


def save(cfg, cycle, state):
    """Write aside, then rename: a kill at any moment leaves the previous checkpoint. Keeps the newest two."""
    path, size = Path(cfg.out) / f"checkpoint-{cycle:06d}", size_of(state)
    part = path.with_suffix(".part")
    has_room(cfg.out, size)
    dist.barrier()
    with writing(part, size), plainly():
        dcp.save(state, checkpoint_id=part)
    mine = [*part.glob(f"__{rank()}_*"), *[part / ".metadata"] * (rank() == 0)]
    sums = dict(gathered([crc32(file) for file in mine]))
    if rank() == 0:
        put(part / "crc32.json", json.dumps(sums))
        put(part / "config.json", as_json(cfg))
        publish(part, path)
        for old in checkpoints(cfg.out)[:-2]:
            shutil.rmtree(old)


def load(out, state):
    """Fill a run's live_state from its newest checkpoint, if there is one; see that the next one will fit."""
    path, _ = newest(out)
    size = size_of(state)
    missing = (3 - len(checkpoints(out))) * size - has_room(out, size)
    if missing > 0:
        print0(f"{out}: free another {gb(missing)} for three checkpoints of {gb(size)}, two kept and one being written")
    if not path:
        return
    written, files = read_json(path / "crc32.json"), sorted([*path.glob("*.distcp"), path / ".metadata"])
    found = dict(gathered([crc32(file) for file in files[rank() :: world()]]))
    wrong = [name for name in sorted(written | found) if written.get(name) != found.get(name)]
    if wrong:
        raise damaged(path, f"other bytes than were written in {wrong[0]}")
    try:
        reader = Reader(path)
        expect(isinstance(reader.read_metadata(), dcp.Metadata), "DCP's .metadata", "another")  # DCP would log a stack
        with plainly():
            dcp.load(state, storage_reader=reader)
    except Exception as error:
        raise damaged(path, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
    print0(f"resumed {path}")


def export(cfg, cycle, net, name, state=None):
    """Gather a DiT, or its averaged state, and write it under the official keys as <out>/<name>.safetensors.

    Of the generator a copy in bf16, NAME-CYCLE, stays at the first export after every cfg.keep_every cycles.
    """
    full, commit = {}, ""
    for key, value in (state or net.state_dict()).items():
        value = value.full_tensor()
        if rank() == 0:
            full[key] = value.cpu()
    if rank() == 0:
        with suppress(OSError, subprocess.CalledProcessError):  # no git here: no commit
            head = ["git", "rev-parse", "HEAD"]
            commit = subprocess.check_output(head, cwd=REPO, stderr=subprocess.DEVNULL, text=True).strip()
        sampler = json.dumps({"timesteps": cfg.timesteps, "shift": cfg.shift})
        stated = {} if name == "fake_score" else {"sampler": sampler}
        kept = name == "generator" and cycle % max(1, cfg.keep_every) < cfg.save_every * bool(cfg.keep_every)
        for file, dtype in [(f"{name}-{cycle:06d}", torch.bfloat16)] * kept + [(name, torch.float32)]:
            path = Path(cfg.out) / f"{file}.safetensors"
            save_dit({key: value.to(dtype) for key, value in full.items()}, path.with_suffix(".part"), net.cfg,
                     preset=cfg.preset, cycle=cycle, commit=commit, **stated)
            publish(path.with_suffix(".part"), path)


WATCHED = 20  # full cycles, whose median should lie in these ranges, and what to do where it does not
RANGES = {
    "gan_d": (0.1, 1.35, "the discriminator has won: more --lambda_r1 and --lambda_r2, or hacks/random_t_star.patch",
              "chance is 1.39: more --discriminator_batch, --discriminator_warmup, --flow_scale near the clips' speed"),
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
            put(path.with_name("config.json"), as_json(cfg))
        if rank() == 0 and path.exists():  # a killed run's cycles after its last checkpoint are logged again
            kept, lost = [], 0
            for line in path.read_bytes().split(b"\n"):
                try:
                    if from_json(line)["cycle"] < start:
                        kept.append(line.decode() + "\n")
                except (ValueError, TypeError, LookupError):
                    lost += len(line) > 0
            if lost:
                print0(f"left out of {path}: {lost} damaged lines, as a kill or a power loss leaves them")
            put(path, "".join(kept))

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
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps({**values, **dict.fromkeys(odd)}) + "\n")  # JSON has no NaN
                file.flush()
                os.fsync(file.fileno())  # a resume does not log again what a checkpoint has passed
            text = [f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items() if k != "cycle"]
            print0(f"{values['cycle']:5d} " + " | ".join(text))
