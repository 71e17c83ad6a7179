"""The two ends of every script: flags from a dataclass, one line for what goes wrong; as one process or one of many."""

import argparse
import contextlib
import inspect
import math
import os
import re
import sys
from dataclasses import fields

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(line):
    """A line on rank 0's screen, above a progress bar if there is one."""
    if rank() == 0:
        tqdm.write(line)
        sys.stdout.flush()


def setup(ranks=0, cpu=False):
    """Start the process group (one process included); returns the device and the mesh to shard over.

    ranks: how many share one copy of the parameters; 0: those of a node. cpu: even where there is CUDA.
    ValueError if they do not divide the processes, or if there are more processes on this node than GPUs.
    """
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost")
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "0" if world() == 1 else "29500")  # 0: any free one
    cuda, cards = torch.cuda.is_available() and not cpu, torch.cuda.device_count()
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    expect(not cuda or local <= cards, f"at most {cards} processes on this node, one a GPU",
           f"{local}: see torchrun --nnodes at the top of train.py")
    ranks = ranks or local
    expect(world() % ranks == 0, f"--shard to divide the {world()} processes", ranks)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    # Parameters are sharded inside a node and replicated across (HSDP): slow links carry gradients only.
    shape = (world() // ranks, ranks) if world() > ranks else (world(),)
    device = "cuda" if cuda else "cpu"
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    return torch.device(device), mesh


def gathered(items):
    """The items of every rank's list, in one list on each."""
    everyone = [None] * world()
    dist.all_gather_object(everyone, items)
    return sum(everyone, [])


def given_flags(config, argv, description):
    """{name: value} of the flags in argv, one for each field of a dataclass; a field's comment is its help text.

    A tuple takes several numbers, a boolean is --NAME or --no-NAME. Raises ValueError for anything unknown, and for
    numbers that are negative (but for a default) or not finite.
    """
    def refuse(message):
        raise ValueError(f"{message} (--help lists the flags)")

    parser = argparse.ArgumentParser(allow_abbrev=False, description=description,
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
        if isinstance(value, (int, float)):
            expect(math.isfinite(value) and (value >= 0 or value == getattr(config, name)),
                   f"--{name} of 0 or more", value)
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


def fail(script, line):
    """End with one line on stderr, said once per node, or, once the process group is up, by every rank that fails."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or dist.is_initialized():
        tqdm.write(f"{script}: {line}", file=sys.stderr)
        sys.stderr.flush()
    if dist.is_initialized() and world() > 1:
        os._exit(2)  # leaving the group in order would wait for the other ranks' collectives
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(2)


@contextlib.contextmanager
def one_line(script):
    """Run a script's body: bad input and files end it with one line and status 2, not with a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(script, str(error).splitlines()[0])
    if dist.is_initialized():
        dist.destroy_process_group()
