"""Weight files: read any public layout, write safetensors, load strictly.

A network's attributes carry the official checkpoint's key names, so that a file in official keys loads without a
converter; other layouts are renamed here. Nothing in this file knows a network's class.
"""

import functools
import json
import os
import re
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import from_json, writing

REPO = Path(__file__).resolve().parent
WEIGHTS = {  # the folder of each preset; the full-size ones are the hub repositories' own layout
    "toy": REPO / "toy" / "weights",
    "wan1.3b": REPO / "weights" / "Wan2.1-T2V-1.3B",
    "wan14b": REPO / "weights" / "Wan2.1-T2V-14B",
}


def find_weights(path, what="weights"):
    """The weights file behind a path: a file, a folder (official, diffusers, ours), a hub 'owner/name[/inside]'."""
    path = Path(path)
    hub, inside = "/".join(path.parts[:2]), "/".join(path.parts[2:])
    local = path.exists() or inside and Path(path.parts[0]).exists()  # a misspelt file of ours, no repository
    if not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)+", str(path)):
        from huggingface_hub import snapshot_download
        kinds, other = ["*.json", "*.safetensors", "*.pt", "*.pth"], ["*vae*", "*VAE*", "text_encoder*", "*t5*"]
        if inside:
            kinds, other = [inside, *(f"{inside}/{kind}" for kind in kinds)], None
        try:
            path = Path(snapshot_download(hub, allow_patterns=kinds, ignore_patterns=other)) / inside
        except Exception as error:  # offline, misspelt, gated: to the caller each is a missing file
            raise ValueError(f"expected {what} at {path}: no such file, and the hub gave none "
                             f"({type(error).__name__})") from None
    if path.is_dir():
        names = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
                 "model.safetensors", "model.safetensors.index.json", "generator.safetensors",
                 "teacher.safetensors", "model.pt"]
        found = [p / n for p in (path, path / "transformer") for n in names if (p / n).is_file()]
        if not found:
            raise ValueError(f"expected {what} in {path}: none of {', '.join(names[:2])}, ... is there")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"expected {what} at {path}: no such file (to download: README, 'Full size')")
    return path


# AMT's file has its optimizer beside the weights; learning rates are numpy scalars there, which torch.load refuses
# unless they are allowed, under the names of numpy 1 and 2.
NUMPY_SCALAR = [np.dtype, type(np.dtype(float)),
                *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


# What training checkpoints keep the generator under, EMA first; one may hold another.
WRAPPERS = "generator_ema", "ema", "generator", "model", "model_state", "module", "state_dict", "params"


def read_state_dict(path, entry=None):
    """Tensors and string metadata of a .safetensors, an index.json of shards, or a .pt/.pth (no other objects).

    entry: the network to read from a training checkpoint (CausVid, Self-Forcing); default its generator, EMA first.
    Raises ValueError, naming the file, when it is missing, truncated or not a weights file.
    """
    path = find_weights(path)
    state, meta, shards = {}, {}, []
    path.open("rb").close()  # the libraries below call a file that may not be read cut short or missing
    try:
        if path.suffix == ".json":
            shards = sorted(set(from_json(path.read_text())["weight_map"].values()))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        else:
            mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 (RAFT's) are plain streams
            with torch.serialization.safe_globals(NUMPY_SCALAR):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise ValueError(f"expected a weights file, got {path}, which cannot be read "
                         f"({type(error).__name__}): it may be cut short, or hold more than tensors") from None
    for shard in shards:
        if Path(str(shard)).name != shard or shard.endswith(".json"):
            raise ValueError(f"expected names of weights files beside it in {path}, got {shard!r}")
        state.update(read_state_dict(path.parent / shard)[0])
    if not isinstance(state, dict):
        raise ValueError(f"expected tensors by name in {path}, got a {type(state).__name__}")
    outer, found = state, None
    for _ in WRAPPERS:  # no deeper: a dict may hold itself
        inner = {name: value for name, value in state.items() if isinstance(value, dict) and value}
        found = next((name for name in (entry, *WRAPPERS) if name in inner), found)
        if found not in inner:
            break
        state = inner[found]
        if found == entry:
            break
    dicts = [str(name) for name, value in outer.items() if isinstance(value, dict)]
    if entry and entry != found and dicts:
        raise ValueError(f"expected {entry!r} in {path}, got {', '.join(dicts)}")
    return {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}, meta


def header(path):
    """String metadata of a .safetensors file, or of the one in a folder; {} without a path or where there is none."""
    with suppress(TypeError, ValueError, FileNotFoundError, SafetensorError):
        path = find_weights(path)
        path.open("rb").close()  # the library calls a file that may not be read missing
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    return {}


def write_tensors(state, path, metadata=None):
    """Write a .safetensors that others may read as any new file: the library's are for their owner alone."""
    with writing(path, sum(value.nbytes for value in state.values())):
        save_file(state, path, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(path, 0o666 & ~umask)


def save_weights(state, config, path, metadata):
    """Write tensors to a .safetensors whose header holds the config, as JSON, and the metadata, as strings."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    meta = {"config": json.dumps(asdict(config)), **{key: str(value) for key, value in metadata.items()}}
    write_tensors(state, path, {"format": "pt", **meta})


def stated_config(kind, meta, source):
    """The config, a dataclass of this kind, in a header that save_weights wrote; ValueError for anything else there."""
    def as_tuple(value):
        return tuple(map(as_tuple, value)) if isinstance(value, list) else value
    try:
        config = kind(**{name: as_tuple(value) for name, value in from_json(meta["config"]).items()})
        values = [(getattr(config, field.name), field.type) for field in fields(kind)]
        if all(isinstance(v, expected) and (expected is tuple or 0 <= v < 2**14) for v, expected in values):
            return config
    except (ValueError, TypeError, AttributeError):
        pass
    raise ValueError(f"expected a {kind.__name__} in the header of {source}, got {meta['config'][:80]}")


def on_meta(kind, config, source):
    """A network of this kind without values yet; ValueError if a file's config makes none."""
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # of sizes of 0
            return kind(config)
    except Exception as error:
        raise ValueError(f"expected a config of which a network can be made in {source}, got {str(config)[:200]} "
                         f"({type(error).__name__})") from None


def load_strict(module, state, source):
    """Load state strictly into a module, on meta or not; ValueError names the first wrong keys."""
    want = {key: value.shape for key, value in module.state_dict().items()}
    wrong = [f"missing {key}" for key in want.keys() - state.keys()]
    wrong += [f"unexpected {key}" for key in state.keys() - want.keys()]
    wrong += [f"{key} is {list(state[key].shape)}, not {list(want[key])}"
              for key in want.keys() & state.keys() if state[key].shape != want[key]]
    if wrong:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {len(wrong)} of {len(want)} keys "
                         f"differ ({'; '.join(sorted(wrong)[:3])}{'; ...' if len(wrong) > 3 else ''})")
    module.load_state_dict(state, assign=True)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: other names for the official keys


def rename(state, rules):
    """A state dict with every (pattern, replacement) applied to its keys, in order."""
    def renamed(key):
        return functools.reduce(lambda key, rule: re.sub(*rule, key), rules, key)
    return {renamed(key): value for key, value in state.items()}


PREFIXES = [  # of FSDP1, checkpointing and torch.compile, anywhere; of ComfyUI, CausVid, rCM and DDP, in front
    (r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", ""),
    (r"^((model|diffusion_model|net|module)\.)+", ""),
]
DIT_FROM_DIFFUSERS = [  # applied in order; diffusers' norm2 is the official norm3
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."), (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"), (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."), (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."), (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
]


def official_dit(state):
    """A DiT state dict of any public layout under the official keys."""
    state = rename(state, PREFIXES)
    if "condition_embedder.time_proj.weight" in state:
        state = rename(state, DIT_FROM_DIFFUSERS)
    patch = state.get("patch_embedding.weight")
    if patch is not None and patch.ndim == 2:  # rCM stores the same numbers as a linear layer
        state["patch_embedding.weight"] = patch.view(len(patch), -1, 1, 2, 2)
    return state


VAE_FROM_DIFFUSERS = [  # applied in order: the residual blocks' conv1 goes before conv_in becomes conv1
    *((rf"((?:blocks|resnets)\.\d+)\.{name}\.", rf"\1.residual.{i}.")
      for name, i in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6))),
    (r"\.conv_shortcut\.", ".shortcut."), (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."), (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"^encoder\.down_blocks\.", "encoder.downsamples."),
]


def official_vae(state):
    """A VAE state dict of the official or the diffusers layout under the official keys."""
    # diffusers nests the decoder's levels, of three blocks and an upsampler each
    nested = r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\."
    flat = lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2] or 3)}."
    return rename(state, [*VAE_FROM_DIFFUSERS, (nested, flat)]) if "quant_conv.weight" in state else state


RAFT_TO_PRINCETON = [  # torchvision's names, and the prefix that princeton's DataParallel left in its files
    (r"^module\.", ""), (r"^feature_encoder\.", "fnet."), (r"^context_encoder\.", "cnet."),
    (r"\.convnormrelu\.0\.", ".conv1."), (r"\.convnormrelu\.1\.", ".norm1."),
    (r"^([fc]net)\.conv\.", r"\1.conv2."),
    (r"\.convnormrelu(\d)\.0\.", r".conv\1."), (r"\.convnormrelu(\d)\.1\.", r".norm\1."),
    (r"\.motion_encoder\.conv\.0\.", ".encoder.conv."),
    (r"\.motion_encoder\.conv([cf])[a-z]+(\d)\.0\.", r".encoder.conv\1\2."),
    (r"\.recurrent_block\.convgru(\d)\.conv([zrq])\.", r".gru.conv\2\1."),
    (r"^mask_predictor\.convrelu\.0\.", "update_block.mask.0."),
    (r"^mask_predictor\.conv\.", "update_block.mask.2."),
]


def princeton_raft(state):
    """A RAFT state dict of either public layout under princeton's keys."""
    state = rename(state, RAFT_TO_PRINCETON)
    if "update_block.gru.convz2.weight" not in state:  # a single GRU carries no number
        state = rename(state, [(r"\.gru\.conv([zrq])1\.", r".gru.conv\1.")])
    for key in list(state):  # one norm under two names: files hold either or both
        for name, alias in (".0.downsample.1.", ".0.norm3."), (".0.norm3.", ".0.downsample.1."):
            state.setdefault(key.replace(name, alias), state[key])
    return state
