"""The two ends of every script: flags from a dataclass, one line for what goes wrong; as one process or one of many."""

import argparse
import contextlib
import ctypes
import inspect
import json
import os
import re
import select
import shutil
import signal
import sys
from dataclasses import fields
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from tqdm import tqdm

LESS_MEMORY = {  # what to change where it ran out
    "train.py": "more ranks, --micro_batch 1, fewer --frames and a shorter --window (cost.py counts what a rank takes)",
    "sample.py": "--batch_size 1, fewer --frames, --text_device cpu",
    "curate.py": "fewer --workers",
}


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def printable(text):
    """Text from file names or data for a terminal: what would steer it, and bytes that are not UTF-8, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(line):
    """A line on the screen, above a progress bar if there is one."""
    tqdm.write(printable(line))
    sys.stdout.flush()


def print0(line):
    """`say` on rank 0 alone."""
    if rank() == 0:
        say(line)


def setup(ranks=0, cpu=False):
    """Start the process group (one process included); returns the device and the mesh to shard over.

    ranks: how many share one copy of the parameters; 0: those of a node. cpu: even where there is CUDA.
    ValueError if they do not divide the processes, or if there are more processes on this node than GPUs.
    """
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost")
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "0" if world() == 1 else "29500")  # 0: any free one
    # Updates differ in the sizes that they ask for: fixed segments would fragment. Read when CUDA first allocates.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cuda, cards = torch.cuda.is_available() and not cpu, torch.cuda.device_count()
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    expect(not cuda or local <= cards, f"at most {cards} processes on this node, one a GPU",
           f"{local}: see torchrun --nnodes at the top of train.py")
    ranks = ranks or local
    expect(world() % ranks == 0, f"--shard to divide the {world()} processes", ranks)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Rank 0 writes an export, 57 GB for 14B, while the others wait in their next collective: NCCL allows 10 minutes.
    patience = timedelta(hours=1)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    # Parameters are sharded inside a node and replicated across (HSDP): slow links carry gradients only.
    shape = (world() // ranks, ranks) if world() > ranks else (world(),)
    device = "cuda" if cuda else "cpu"
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    for group in mesh.get_all_groups():  # two dimensions have groups of their own, which take the default
        _set_pg_timeout(patience, group)
    return torch.device(device), mesh


def gathered(items):
    """The items of every rank's list, in one list on each."""
    everyone = [None] * world()
    dist.all_gather_object(everyone, items)
    return sum(everyone, [])


def given_flags(config, argv, doc, ranges):
    """{name: value} of the flags in argv, one for each field of a dataclass; a field's comment is its help text.

    A tuple takes several numbers, a boolean is --NAME or --no-NAME. Raises ValueError for anything unknown, and for
    numbers outside {name: (least, most)}, else (0, 100000), but for a default.
    """
    def refuse(message):
        raise ValueError(f"{message} (--help lists the flags)")

    parser = argparse.ArgumentParser(allow_abbrev=False, description=(doc or "").split("\n")[0],  # None: python -OO
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, width=120))
    parser.error = refuse  # argparse would print its usage around the one line
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(config), re.M))
    for field in fields(config):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        if field.type is tuple:
            kind = dict(type=int, nargs="+")
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        low, high = ranges.get(name, (0, 10**5))
        for number in value if isinstance(value, list) else [value] * isinstance(value, (int, float)):
            expect(low <= number <= high or number == getattr(config, name), f"--{name} from {low} to {high}", number)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}


def chosen_preset(name, presets):
    """The preset of that name; for "auto" wan1.3b where CUDA is available, else toy, and it says which."""
    if name == "auto":
        name, why = ("wan1.3b", "CUDA") if torch.cuda.is_available() else ("toy", "no CUDA")
        print0(f"preset {name} ({why} here; --preset {' or '.join(presets)} to choose)")
    expect(name in presets, f"--preset auto, {', '.join(presets)}", name)
    return name


def expect(ok, what, got):
    """Raise ValueError unless ok: what was expected, and what to do, against what came."""
    if not ok:
        raise ValueError(f"expected {what}, got {got}")


def from_json(text):
    """json.loads; ValueError also for what is nested deeper than it can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("expected JSON, got too deep a nest of it") from None


def gb(size):
    return f"{size / 1e9:.3g} GB"


@contextlib.contextmanager
def writing(path, size=0):
    """Write a file or folder of so many bytes, 0: few; ValueError, with the room there, if that does not work."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        wanted = f"{gb(size)} wanted, " * (size > 0)
        raise ValueError(f"{path} cannot be written ({wanted}{gb(shutil.disk_usage(path.parent).free)} free there): "
                         f"{type(error).__name__}: {error}") from None


def fail(script, line, status=2):
    """End with one line on stderr, said once per node, or, once the process group is up, by the first that fails so."""
    says = os.environ.get("LOCAL_RANK", "0") == "0"
    if line and dist.is_initialized():  # torchrun keeps the store that ranks count in; without it each says its own
        says = not dist.is_torchelastic_launched() or dist.distributed_c10d._get_default_store().add(line, 1) == 1
    if line and says:
        tqdm.write(f"{script}: {printable(line)}", file=sys.stderr)
        sys.stderr.flush()
    if dist.is_initialized() and world() > 1:
        os._exit(status)  # leaving the group in order would wait for the other ranks' collectives
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def stdout_is_closed():
    """Whether nobody reads what is printed, as after `| head`; then what is yet unprinted goes nowhere."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    pipe = select.poll()
    pipe.register(1, 0)
    if any(event & select.POLLERR for _, event in pipe.poll(0)):  # PYTHONUNBUFFERED leaves nothing for a flush to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True


@contextlib.contextmanager
def one_line(script):
    """Run a script's body: what goes wrong outside of it ends it with one line and status 2, not with a traceback.

    That is bad input and files, no room on a disk or in memory; Ctrl-C (status 130) and a closed stdout (141).
    """
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # `>&-`
    if dist.is_torchelastic_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a rank ends with torchrun, however that ends
    try:
        yield
    except KeyboardInterrupt:
        fail(script, "stopped: what is written is kept, the same command goes on from there" * (rank() == 0), 130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            fail(script, "", 141)
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", line):
            fail(script, f"out of memory: {LESS_MEMORY.get(script, 'close other programs')} ({line[:200]})")
        if isinstance(error, PermissionError):
            line += ": choose another place (--out, of sample.py also --cache), or run as its owner"
        if sys.flags.optimize > 1 and "docstring" in line:  # transformers reads its own
            line += ": run it without -OO"
        if isinstance(error, RuntimeError):
            raise
        fail(script, line)
    if stdout_is_closed():
        fail(script, "", 141)
    if dist.is_initialized():
        dist.destroy_process_group()
