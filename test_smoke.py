"""Every component against its reference, every equivalence, every bad input. CPU, no network.

    python -m pytest -q test_smoke.py
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU, processes would want one each and goldens their own tolerances
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads wait for each other at these sizes

import collections
import compileall
import contextlib
import copy
import gc
import html
import inspect
import itertools
import json
import math
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

import checkpoint
import cli
import cost
import curate
import eval as scores
import flow_viz
import metrics
import model
import raft
import report
import sample
import survey
import text
import train
import vae
import weights as files
from amt import AMT
from discriminator import MotionDiscriminator, PredictionHead, motion_tensor
from model import (CONFIGS, DiTConfig, WanDiT, add_noise, few_step, few_step_times, load_dit, sample_noise, save_dit,
                   velocity_to_x0)
from musiq import MUSIQ
from raft import RAFT, load_raft
from sample import unipc, unipc_sigmas
from text import WAN_NEGATIVE, clean_prompt, encode_prompts, load_text_encoder
from toy import make_weights, world
from toy.fit import fit, muon_adamw
from vae import load_vae
from video import (BadRun, open_video, read_clip, read_clip_list, read_frames, read_video, real_clips, stride_of,
                   video_files, write_video)
from weights import REPO, WEIGHTS

GOLDEN = Path(__file__).parent / "golden"


# ---------------------------------------------------------------------------------------------------------------------
# model.py


TINY = DiTConfig(dim=96, heads=3, ffn_dim=208, layers=3, freq_dim=32, text_dim=32, text_len=24)


def golden_dit():
    g = load_file(GOLDEN / "wan_dit_tiny.safetensors")
    state = {key[2:]: value.float() for key, value in g.items() if key.startswith("w.")}
    return files.load_strict(WanDiT(TINY), state, "golden"), g


def shapes(state):
    return {key: list(value.shape) for key, value in state.items()}


def manifest(name):
    return json.loads((GOLDEN / f"manifest_{name}.json").read_text())


def on_meta(cfg):
    with torch.device("meta"):
        return WanDiT(cfg)


def test_dit_equals_wan():
    net, g = golden_dit()
    for i in range(4):
        out = net(g[f"case{i}.x"], g[f"case{i}.t"] / 1000, g[f"case{i}.context"])
        assert (out - g[f"case{i}.out"]).abs().max() < 5e-5
    for checkpointing in False, True:  # recomputed activations give the same gradients
        for block in net.blocks:
            block.checkpointing = checkpointing
        net.zero_grad()
        x = g["case0.x"].clone().requires_grad_()
        (net(x, g["case0.t"] / 1000, g["case0.context"]) * g["case0.grad_out"]).sum().backward()
        grads = {f"case0.grad_w.{key}": p.grad for key, p in net.named_parameters()}
        grads["case0.grad_x"] = x.grad
        for key in [key for key in g if "grad_w" in key or "grad_x" in key]:
            assert (grads[key] - g[key]).abs().max() < 1e-4 * g[key].abs().max(), key


def test_dit_norm_epsilon():
    net, g = golden_dit()
    rope = model.rope_table(2, 3, 4, 32, torch.device("cpu"))
    out = net.blocks[0](g["block0probe.x"], g["case0.time_proj"], g["case0.text_emb"], rope)
    assert (out - g["block0probe.out"]).abs().max() < 5e-5
    assert (net.head(g["block0probe.x"], g["case0.time_emb"]) - g["headprobe.out"]).abs().max() < 5e-5


def test_dit_keys_are_the_official_ones():
    official = manifest("official_dit_1.3b")
    diffusers = {key: torch.empty(shape, device="meta") for key, shape in manifest("diffusers_dit_1.3b").items()}
    assert shapes(on_meta(CONFIGS["wan1.3b"]).state_dict()) == official
    assert shapes(files.official_dit(diffusers)) == official
    assert 14.2e9 < sum(p.numel() for p in on_meta(CONFIGS["wan14b"]).parameters()) < 14.4e9


def test_dit_init_starts_at_zero_velocity():
    z, t, context = torch.randn(1, 16, 2, 4, 4), torch.tensor([0.5]), torch.randn(1, 24, 32)
    assert WanDiT(TINY).init_weights()(z, t, context).abs().max() == 0
    with pytest.raises(ValueError, match="divisible by 16"):
        WanDiT(TINY)(z[..., :3], t, context)
    with pytest.raises(ValueError, match="context"):
        WanDiT(TINY)(z, t, context[:, :5])


def test_sampling_in_inference_mode_leaves_training_alone():
    net, args = WanDiT(TINY), (torch.randn(1, 16, 3, 6, 2), torch.tensor([0.5]), torch.randn(1, 24, 32))
    with torch.inference_mode():
        net(*args)
    net(*args).sum().backward()  # would refuse a table of positions from that mode


def test_weight_files_of_every_layout(tmp_path):
    net, g = golden_dit()
    state, hf = net.state_dict(), load_file(GOLDEN / "wan_dit_tiny_diffusers.safetensors")
    hf = {key: value.float() for key, value in hf.items()}
    header = {"config": json.dumps(asdict(TINY))}
    save_dit(net, tmp_path / "ours.safetensors", step=7)
    save_file(hf, tmp_path / "diffusers.safetensors", metadata=header)
    index = {}
    for name, part in ("a", list(hf)[::2]), ("b", list(hf)[1::2]):
        save_file({key: hf[key] for key in part}, tmp_path / f"{name}.safetensors")
        index.update(dict.fromkeys(part, f"{name}.safetensors"))
    index_file = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    causvid = {f"model.{key}": value for key, value in state.items()}
    torch.save({"generator": causvid, "critic": {"x": torch.zeros(1)}}, tmp_path / "causvid.pt")
    ema = {f"model._fsdp_wrapped_module.{key}": value for key, value in state.items()}
    torch.save({"generator": {}, "generator_ema": ema}, tmp_path / "self_forcing.pt")
    rcm = {f"net.{key}": value for key, value in state.items()}
    rcm["net.patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    torch.save(rcm, tmp_path / "rcm.pt", _use_new_zipfile_serialization=False)
    wrapped = {"ema": "_orig_mod.", "model_state": "module.", "module": "diffusion_model.model."}
    for wrapper, prefix in wrapped.items():
        inner = {prefix + key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): state[key] for key in state}
        torch.save({"ema": {}, "model": {wrapper: inner}, "optimizer": {"x": {}}}, tmp_path / f"{wrapper}.pt")
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7"
    assert (tmp_path / "ours.safetensors").stat().st_mode == index_file.stat().st_mode  # others may read it
    assert load_dit(tmp_path / "ours.safetensors").cfg == TINY
    names = "ours.safetensors", "diffusers.safetensors", "", "causvid.pt", "self_forcing.pt", "rcm.pt"
    for name in *names, *(f"{wrapper}.pt" for wrapper in wrapped):
        got = load_dit(tmp_path / name, TINY).state_dict()
        assert all(torch.equal(got[key], state[key]) for key in state), name


@pytest.mark.parametrize("path, asked", [("owner/name", ["*.json"]), ("owner/name/a/dit", ["a/dit", "a/dit/*.json"]),
                                         ("toy/weights/misspelt.pt", None)])  # a folder that is here owns no repository
def test_hub_names(tmp_path, monkeypatch, path, asked):
    place, seen = tmp_path / "/".join(path.split("/")[2:]), []
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.pt").touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns, ignore_patterns:
                        seen.append((name, allow_patterns[: len(asked)])) or tmp_path)
    monkeypatch.chdir(files.REPO)
    with contextlib.nullcontext() if asked else pytest.raises(ValueError, match=r"no such file \(to download"):
        assert files.find_weights(path) == place / "model.pt" and seen == [("owner/name", asked)]


def test_wrong_weight_files_are_named(tmp_path):
    net, _ = golden_dit()
    state = net.state_dict()
    keys = {key: value for key, value in state.items() if key != "head.modulation"} | {"extra": torch.zeros(1)}
    save_dit(keys, tmp_path / "keys.safetensors", TINY)
    save_dit(state, tmp_path / "size.safetensors", replace(TINY, ffn_dim=100))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "size.safetensors").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "index.json").write_text('{"weight_map": {"a": ')
    torch.save({"some": torch.zeros(2)}, tmp_path / "other.pt")
    for name, message in (("keys", "2 of .*missing head.modulation; unexpected extra"),
                          ("size", r"\[208, 96\], not \[100, 96\]"),
                          ("cut", "cut short"), ("none", "no such file")):
        with pytest.raises(ValueError, match=message) as error:
            load_dit(tmp_path / f"{name}.safetensors")
        assert name in str(error.value) and "\n" not in str(error.value)
    for name, message in (("text.pt", "cannot be read"), ("index.json", "index.json, which cannot"),
                          ("other.pt", "expected a Wan DiT"), ("", "none of diffusion_pytorch_model")):
        with pytest.raises(ValueError, match=message):
            load_dit(tmp_path / name)
    none = json.dumps(dict(dim=6, heads=0, ffn_dim=4, layers=4))
    patch = {"patch_embedding.weight": torch.ones(6, 4, 1, 2, 2)}
    for i, given in enumerate(("[1]", "{", "{}", '{"dim": "a"}', none)):
        save_file(patch, tmp_path / f"{i}.safetensors", {"config": given})
    for name, shard in ("self.json", "self.json"), ("outside.json", "../a.safetensors"), ("int.json", 3):
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": shard}}))
    torch.save({"patch_embedding.weight": 3}, tmp_path / "value.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "key.pt")
    for name in *(f"{i}.safetensors" for i in range(5)), "self.json", "outside.json", "int.json", "value.pt", "key.pt":
        with pytest.raises(ValueError, match=str(tmp_path / name)):
            load_dit(tmp_path / name)


def test_flow_matching_conventions():
    z0, noise, t = torch.randn(3, 4, 2, 4, 4), torch.randn(3, 4, 2, 4, 4), torch.tensor([0.0, 0.4, 1.0])
    z_t = add_noise(z0, noise, t)
    assert torch.equal(z_t[0], z0[0]) and torch.equal(z_t[2], noise[2])
    assert (velocity_to_x0(noise - z0, z_t, t) - z0).abs().max() < 1e-6


def test_few_step_equals_the_reference_sampler():
    g = load_file(GOLDEN / "fewstep.safetensors")
    four = (1000, 750, 500, 250)
    cases = {"causvid3_shift8": few_step_times()}
    for shift in 5, 8:  # Self-Forcing's: steps are indices of the shifted grid
        cases[f"sf4_shift{shift}_warp"] = [2 * (model.shift_time(step / 1000, shift),) for step in four]

    def generator(z, t, context):
        return 0.8 * z + 0.6 * torch.sin(3 * t.view(-1, 1, 1, 1, 1) + g["phase"])
    for name, times in cases.items():
        assert [1000 * t for t, _ in times] == pytest.approx(g[f"{name}.timesteps"].tolist(), abs=1e-3)
        assert [sigma for _, sigma in times] == pytest.approx(g[f"{name}.sigmas"].tolist(), abs=1e-7)
        noise = torch.cat([g["x1"][None], g["renoise"][: len(times) - 1]])
        for stop in range(len(times)):
            x0 = few_step(generator, noise, None, times, stop)
            assert (x0 - g[f"{name}.x0"][stop]).abs().max() < 1e-5


def test_few_step_gradient_is_of_the_last_call_only():
    w, noise, times = torch.ones(3, requires_grad=True), torch.randn(3, 1, 1, 1, 2, 2), few_step_times()
    calls = iter(range(3))
    few_step(lambda z, t, c: w[next(calls)] * z, noise, None, times).sum().backward()
    assert w.grad[0] == w.grad[1] == 0 != w.grad[2]


def test_noise_depends_on_the_sample_only():
    both = sample_noise([5, 6], (2, 3), 4)
    assert both.shape == (4, 2, 2, 3) and torch.equal(both[:, 1:], sample_noise([6], (2, 3), 4))


def test_draws_of_one_sample_are_independent_and_windows_reach_the_ends():
    draw = model.Draw(0, 3, "dmd", [4])
    assert not torch.equal(draw.noise((2, 3), 1)[0], draw.renoise((2, 3)))
    starts = collections.Counter(model.Draw(0, cycle, "gan", []).window(21, 13) for cycle in range(1000))
    assert sorted(starts) == list(range(9))  # as the docstring says: the ends 13 times in 33, any other place once
    assert [starts[0] / 1000, starts[8] / 1000] == pytest.approx([13 / 33] * 2, abs=0.05)
    assert model.Draw(0, 0, "gan", []).window(5, 5) == 0


def tiny_text_encoder(folder, words="a red circle moving right quickly"):
    """Write a random UMT5 in the toy's layout; returns it."""
    vocab = ["<pad>", "</s>", "<unk>", *words.split()]
    config = dict(vocab_size=len(vocab), d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2,
                  feed_forward_proj="gated-gelu")
    torch.manual_seed(1)
    net = UMT5EncoderModel(UMT5Config(**config)).eval()
    state = {key: value for key, value in net.state_dict().items() if key != "encoder.embed_tokens.weight"}
    header = {"config": json.dumps({**config, "text_len": 8}), "vocab": json.dumps(vocab)}
    save_file(state, folder / "text.safetensors", metadata=header)
    return net


def test_text_context_is_trimmed_and_padded_with_zeros(tmp_path):
    net, encoder = tiny_text_encoder(tmp_path), load_text_encoder(tmp_path)
    context = encoder(["a  red\n circle", "a red circle moving right moving right moving right"])
    with torch.no_grad():
        want = net(torch.tensor([[3, 4, 5, 1]])).last_hidden_state[0]
    assert context.shape == (2, 8, 16) and (context[0, :4] - want).abs().max() < 1e-5
    assert context[0, 4:].abs().max() == 0 and context[1].abs().sum(1).min() > 0
    encoder.model.shared.weight.zero_()  # what some releases of transformers loaded without a word
    with pytest.raises(ValueError, match="embedding"):
        text.TextEncoder(encoder.model, encoder.tokenize, 8)


def test_prompts_are_encoded_once(tmp_path):
    tiny_text_encoder(tmp_path)
    prompts, cache = ["a red circle", "a circle moving right"], tmp_path / "cache"
    first = encode_prompts(prompts, tmp_path, cache)(prompts)
    assert torch.equal(first, load_text_encoder(tmp_path)(prompts)) and len(list(cache.iterdir())) == 2
    times = [file.stat().st_mtime_ns for file in sorted(cache.iterdir())]
    assert torch.equal(encode_prompts(prompts, tmp_path, cache)(prompts[1:]), first[1:])
    assert times == [file.stat().st_mtime_ns for file in sorted(cache.iterdir())]  # read, not encoded again
    tiny_text_encoder(tmp_path, "other words")  # another encoder in its place must not meet the old contexts
    assert not torch.equal(encode_prompts(prompts, tmp_path, cache)(prompts), first)
    with pytest.raises(ValueError, match="text encoder in .*empty"):
        load_text_encoder(tmp_path / "empty")


def test_files_that_never_end_or_nest_too_deep(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe.safetensors")
    torch.save((itself := {}, itself.update(model=itself))[0], tmp_path / "itself.pt")
    (tmp_path / "nest").write_text(nest := "[" * 10**5)
    assert files.read_state_dict(tmp_path / "itself.pt") == ({}, {}) and report.read_jsonl(tmp_path / "nest") == []
    tiny_text_encoder(tmp_path)
    state, meta = files.read_state_dict(tmp_path / "text.safetensors")
    huge = json.dumps({**json.loads(meta["config"]), "text_len": 10**9})
    for header in dict(meta, config=huge), dict(meta, config=nest), dict(meta, vocab=json.dumps(list(range(99)))):
        save_file(state, tmp_path / "text.safetensors", metadata=header)
        with pytest.raises(ValueError, match="expected a config and a vocabulary"):
            load_text_encoder(tmp_path)
    clip_list = lambda path: read_clip_list(path, 1)
    for bad, file in (files.read_state_dict, pipe), (report.fingerprint, pipe), (clip_list, "nest"):
        with pytest.raises((ValueError, FileNotFoundError), match="no such file|no regular file|line 1: expected"):
            bad(tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    with pytest.raises(ValueError, match="something else keeps its config.json"):
        checkpoint.start_of(train.Config(out=str(tmp_path)), 1)


def test_only_prompts_that_a_run_draws_are_encoded(tmp_path):
    (tmp_path / "many.txt").write_text("".join(f"a red circle {i}\n" for i in range(500)))
    run(tiny_weights(tmp_path / "weights"), tmp_path / "run", "--prompts", str(tmp_path / "many.txt"), "--samples", "3")
    assert 10 < len(list((tmp_path / "contexts").iterdir())) <= 2 + 3 + 2 * 4  # two fixed ones; dmd, gan, fake0, fake1


def test_umt5_official_keys_are_those_of_transformers():
    hf = manifest("hf_umt5_xxl_enc")
    hf.pop("encoder.embed_tokens.weight")
    assert files.rename(manifest("official_umt5_xxl_enc"), text.T5_KEYS) == hf


# ---------------------------------------------------------------------------------------------------------------------
# discriminator.py


def test_motion_tensor():
    flow = torch.zeros(1, 2, 4, 8, 8)
    vectors = [(3.0, -4.0), (-8.0, 6.0), (0.0, 0.0), (5.0, 12.0)]  # a different one in each frame
    flow[0] = torch.tensor(vectors).T[:, :, None, None]
    o = motion_tensor(flow.requires_grad_(), scale=5.0)
    assert o.shape == (1, 3, 5, 8, 8)
    for t, (u, v) in enumerate([*vectors, vectors[-1]]):  # the last flow twice
        bound = (25 + u * u + v * v) ** -0.5
        want = [u * bound, v * bound, 2 * math.hypot(u, v) * bound - 1]
        assert o[0, :, t, 5, 2].tolist() == pytest.approx(want, abs=1e-3), t
    assert motion_tensor(1e4 * flow, 5.0).abs().max() <= 1
    o.square().sum().backward()
    assert flow.grad.isfinite().all() and flow.grad[0, :, 3].abs().min() > 0


def test_discriminator_starts_from_the_dit():
    dit, _ = golden_dit()
    torch.manual_seed(0)
    random = MotionDiscriminator(TINY, (0, 1))
    torch.manual_seed(0)
    net = MotionDiscriminator(TINY, (0, 1), "meta").load_trunk(dit)
    assert torch.equal(net.heads[1].mlp[0].weight, random.heads[1].mlp[0].weight)
    assert torch.equal(net.trunk.blocks[1].ffn[0].weight, dit.blocks[1].ffn[0].weight)
    assert len(net.trunk.blocks) == 2 and not hasattr(net.trunk, "head")
    for taps in (0, 3), (1, 1), (1, 0):
        with pytest.raises(ValueError, match="rising taps below 3"):
            MotionDiscriminator(TINY, taps)


def test_a_head_reads_a_block_as_apts():
    torch.manual_seed(0)
    head, x = PredictionHead(TINY), torch.randn(2, 7, TINY.dim)
    token = head.token + head.attn(head.token.expand(2, 1, -1), head.norm(x))
    want = token + head.mlp(head.norm_mlp(token))
    torch.testing.assert_close(head(x), want[:, 0])


def test_gradient_reaches_the_pixels_and_every_parameter():
    torch.manual_seed(0)
    flow_net = raft.RAFT(raft.CONFIGS["toy"])
    coder = vae.WanVAE(vae.VAEConfig(4, 16, (0.0,) * 16, (1.0,) * 16, res_blocks=1))
    net = MotionDiscriminator(TINY, (0, 1, 2))
    x = torch.rand(2, 3, 5, 32, 32).requires_grad_()
    o = coder.encode(motion_tensor(raft.video_flow(flow_net, x, 2), 3.0))
    logit = net(o, torch.zeros(2), torch.randn(1, 24, 32).expand(2, -1, -1))
    assert logit.shape == (2,)
    F.softplus(-logit).sum().backward()
    assert (x.grad.flatten(3).abs().sum(3) > 0).all()  # every frame of every clip
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# model.py: text


def test_full_size_text_encoder_layouts(tmp_path, monkeypatch):
    """The official .pth and diffusers' folders, in their own names, at a tiny size."""
    words = "<pad> </s> <s> <unk> ▁ ▁a ▁cat ▁runs ▁&".split() + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=3, byte_fallback=True))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = dict(vocab_size=len(words), d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2,
                  feed_forward_proj="gated-gelu")
    net = UMT5EncoderModel(UMT5Config(**config)).eval()
    for folder in tmp_path / "google" / "umt5-xxl", tmp_path / "hub" / "tokenizer":
        folder.mkdir(parents=True)
        tokens.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    net.save_pretrained(tmp_path / "hub" / "text_encoder")
    to_official = {"shared.": "token_embedding.", "encoder.final_layer_norm.": "norm."}
    for i in range(2):
        block, to = f"encoder.block.{i}.layer.", f"blocks.{i}."
        to_official |= {f"{block}0.SelfAttention.relative_attention_bias.": f"{to}pos_embedding.embedding."}
        to_official |= {f"{block}0.SelfAttention.": f"{to}attn.", f"{block}0.layer_norm.": f"{to}norm1."}
        to_official |= {f"{block}1.layer_norm.": f"{to}norm2."}
        for a, b in ("wi_0", "gate.0"), ("wi_1", "fc1"), ("wo", "fc2"):
            to_official[f"{block}1.DenseReluDense.{a}."] = f"{to}ffn.{b}."
    name = lambda key: next(key.replace(a, b) for a, b in to_official.items() if key.startswith(a))
    state = {key: value for key, value in net.state_dict().items() if "embed_tokens" not in key}
    torch.save({name(key): value for key, value in state.items()}, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    monkeypatch.setattr(text, "UMT5_XXL", config)  # bf16, as the full-size one
    official, hub = load_text_encoder(tmp_path), load_text_encoder(tmp_path / "hub")
    prompts = ["a cat &amp;amp; a  \N{PAW PRINTS} runs", "cat"]
    ids = [5, 6, 8, 5, 4, *(9 + byte for byte in "\N{PAW PRINTS}".encode()), 7, 1]  # T5's own class would have <s>
    with torch.no_grad():
        want = net(torch.tensor([ids])).last_hidden_state[0]
    for encoder in official, hub:
        context = encoder(prompts)
        assert context.shape == (2, 512, 16) and context[1, 2:].abs().max() == 0
        assert context[0, len(ids):].abs().max() == 0
        assert (context[0, :len(ids)] - want).abs().max() < 0.05 * want.abs().max()
    assert torch.equal(official(prompts), hub(prompts))
    file = tmp_path / "hub" / "text_encoder" / "config.json"
    file.write_text(file.read_text().replace('"num_layers": 2', '"num_layers": 1000000000'))
    with pytest.raises(ValueError, match="as many layers as .*hub has weights for, got 1000000000"):
        load_text_encoder(tmp_path / "hub")
    file = tmp_path / "hub" / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="tokenizer.json, which cannot be read"):
        load_text_encoder(tmp_path / "hub")
    file.unlink()
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        load_text_encoder(tmp_path / "hub")


def test_prompts_are_cleaned_as_wan_does(tmp_path):
    """What ftfy 6.3.1 and Wan's whitespace cleaning make of them."""
    dirty = " “Rock ’n’ roll”，&amp;amp;ﬁne\u3000Ｃａｆe\u0301 ｶﾞ&#39; <Ĳ>\n\tＷ\ufeff ŉ \ufb05 "
    assert clean_prompt(dirty) == "\"Rock 'n' roll\",&fine Caf\u00e9 ガ' <IJ> W 'n ſt"
    assert "，" not in clean_prompt(WAN_NEGATIVE)
    (tmp_path / "odd.txt").write_bytes("\ufeffa cat\r\na\u2028b\x85c\vd\n".encode() + b"caf\xe9\n\n#x\n")
    assert text.read_prompts(tmp_path / "odd.txt") == ["a cat", "a\u2028b\x85c\vd", "caf\ufffd"]
    (tmp_path / "windows.txt").write_text("a cat\n", encoding="utf-16")
    with pytest.raises(ValueError, match="UTF-16"):
        text.read_prompts(tmp_path / "windows.txt")


@pytest.mark.parametrize("prompt", ["a cat. 9-1", "a/b", ".hidden", "é" * 300, "a\0b\x1b[2J", "x~0123abcd"])
def test_prompts_name_files(tmp_path, prompt):
    stem = text.file_stem(prompt)
    write_video(tmp_path / f"{stem}-3.mp4", moving_clip(1), 16, json.dumps({"prompt": prompt}))
    assert text.prompt_of(tmp_path / f"{stem}-3.mp4") == (prompt, 3)
    assert len(stem.encode()) <= 240 and stem[0] != "." and stem.isprintable()
    assert (stem == prompt) == (prompt[0] in "ax" and prompt.isprintable() and "/" not in prompt)
    assert text.prompt_of(Path("not ours~0123abcd.mp4")) == ("not ours~0123abcd", 0)


# ---------------------------------------------------------------------------------------------------------------------
# vae.py


def golden_vae():
    """(WanVAE with the goldens' weights, frozen; the goldens)."""
    g = load_file(GOLDEN / "wan_vae_tiny.safetensors")
    net = vae.WanVAE(vae.VAEConfig(8, 4, tuple(g["latents_mean"].tolist()), tuple(g["latents_std"].tolist())))
    net.load_state_dict({key[2:]: value.float() for key, value in g.items() if key.startswith("w.")})
    return net.requires_grad_(False), g


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("latents_per_pass", [1, 2, 4])
def test_vae_equals_wan(latents_per_pass):
    net, g = golden_vae()
    close(net.encode(g["video"], latents_per_pass), g["enc.mu"], 2e-5)
    close(net.moments(g["video"], latents_per_pass)[1], g["enc.logvar"], 2e-5)
    close(net.decode(g["dec.z"], latents_per_pass), g["dec.full"], 2e-5)
    close(net.decode(g["enc.mu"], latents_per_pass), g["rec.from_mu"], 2e-5)


# Four latents a pass take a window in one, which is kept; of several passes each is computed again.
@pytest.mark.parametrize("latents_per_pass", [1, 2, 4])
def test_decode_window_and_its_gradient_equal_wan(latents_per_pass):
    net, g = golden_vae()
    for start, chunks, seen in (0, 2, "0_3"), (1, 3, "2_5"):  # seen: the latents that a gradient reaches
        z = g["dec.z"].clone()
        z[:, :, start + chunks + 1 :] = float("nan")  # nothing after the window is looked at
        z.requires_grad_()
        x = net.decode_window(z, start, chunks, latents_per_pass)
        close(x, g["dec.full"][:, :, 4 * start : 4 * (start + chunks) + 1], 2e-5)
        grad_out = g[f"grad.win_{seen}.grad_out"]
        boundary = torch.ones_like(x[:, :, : x.shape[2] - grad_out.shape[2]])  # whose gradient goes nowhere
        x.backward(torch.cat([boundary, grad_out], dim=2))
        want = g[f"grad.win_{seen}.truncated"]
        close(z.grad, want, 1e-5 * want.abs().max())
        assert [i for i in range(7) if z.grad[:, :, i].any()] == list(range(int(seen[0]), int(seen[2])))
    close(net.decode_window(g["dec.z"], 3, 3, latents_per_pass), g["dec.full"][:, :, 12:], 2e-5)


@pytest.mark.parametrize("latents_per_pass", [1, 4])
def test_decode_gradient_equals_wan(latents_per_pass):
    net, g = golden_vae()
    z, want = g["dec.z"][:, :, :5].clone().requires_grad_(), g["grad.win_2_5.full"][:, :, :5]
    net.decode(z, latents_per_pass)[:, :, 5:].backward(g["grad.win_2_5.grad_out"])
    assert want.all()  # through the state to the first latent
    close(z.grad, want, 1e-5 * want.abs().max())


@pytest.mark.parametrize("trainable", [False, True])
def test_vae_checkpointing_changes_nothing(trainable):
    net, g = golden_vae()
    net.requires_grad_(trainable)

    def gradients(latents_per_pass):
        x = g["video"][:, :, :13, :16, :24].clone().requires_grad_()
        z = net.encode(x, latents_per_pass)
        net.decode_window(z, 1, 2, latents_per_pass).square().mean().backward()
        grads = [x.grad, *(p.grad for p in net.parameters() if trainable)]
        net.zero_grad()
        return grads
    kept = gradients(3)
    for latents_per_pass in 1, 2:
        for a, b in zip(gradients(latents_per_pass), kept, strict=True):
            close(a, b, 1e-5 * b.abs().max())


def test_frozen_vae_keeps_half_and_gives_the_same_gradient():
    net, g = golden_vae()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def gradient(trainable):
        net.requires_grad_(trainable)
        x, kept = g["video"][:, :, :13, :16, :24].clone().requires_grad_(), {}

        def note(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = net.decode(net.encode(x, 3), 3)
        size = sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
        return torch.autograd.grad(y.square().mean(), x)[0], size

    (ours, size), (plain, plain_size) = gradient(False), gradient(True)
    close(ours, plain, 1e-5 * plain.abs().max())
    assert size < 0.6 * plain_size, (size, plain_size)


def test_norm_silu_equals_its_plain_twin():
    norm, x = vae.RMSNorm(6).double(), torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(norm.gamma)
    outputs = vae.norm_silu(norm, [x])[0], F.silu(norm(x))
    torch.testing.assert_close(*outputs)
    ours, plain = (torch.autograd.grad(y.sin().sum(), (x, norm.gamma)) for y in outputs)
    torch.testing.assert_close(ours, plain)


def test_vae_state_is_a_value():
    net, g = golden_vae()
    _, state = net.advance(g["dec.z"][:, :, :2])
    before = copy.deepcopy(state)
    with torch.no_grad():  # where chunks use their state up
        once = net.advance(g["dec.z"][:, :, 2:4], state, 1)[0]
    close(once, net.advance(g["dec.z"][:, :, 2:4], state, 2)[0], 2e-5)
    assert len(state) == 32
    frames, before = itertools.chain(*state), itertools.chain(*before)
    assert all(torch.equal(a, b) for a, b in zip(frames, before, strict=True))
    # No frame keeps a larger tensor alive, and a clip's first frame leaves the up3d convolutions' state at zero.
    assert all(s.untyped_storage().nbytes() == 4 * s.numel() for s in itertools.chain(*state))
    assert sum(not (a.any() or b.any()) for a, b in net.advance(g["dec.z"][:, :, :1])[1]) == 2


def test_upsample_conv_equals_the_plain_one():
    conv, x = torch.nn.Conv2d(6, 4, 3, padding=1), torch.randn(2, 6, 5, 7)
    close(vae.upsample_conv(conv, [x])[0], conv(F.interpolate(x, scale_factor=2)), 1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_causal_conv_equals_the_plain_one(frozen):
    x = torch.randn(2, 6, 7, 5, 4, requires_grad=True)
    for kernel, stride, past in (3, 1, 2), (1, 2, 1), (1, 1, 2):  # of a block, Down, Up
        conv = vae.CausalConv(6, 4, kernel, stride).requires_grad_(not frozen)
        frames, new_state = list(x.unbind(2)), []
        ours = conv(frames[past:], [frames[:past]], new_state)
        plain = F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        close(torch.stack(list(ours), dim=2), plain, 1e-5)
        assert all(a is b for a, b in zip(*new_state, frames[-past:], strict=True))
        inputs = [x] if frozen else [x, conv.weight, conv.bias]
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (torch.stack(list(ours), 2), plain))):
            close(a, b, 1e-5 * b.abs().max())


def test_vae_batch_and_dtypes():
    net, g = golden_vae()
    z = torch.cat([g["dec.z"][:, :, :3], g["dec.z"][:, :, 3:6]])
    close(net.decode(z, 2)[1:], net.decode(z[1:], 2), 2e-5)
    want, wide = net.decode(z), copy.deepcopy(net).double().decode(z.double())
    half = copy.deepcopy(net).bfloat16().decode(z)
    assert wide.dtype == torch.float64 and half.dtype == torch.float32
    close(wide, want.double(), 2e-5)
    assert (half - want).norm() < 0.03 * want.norm()


def test_vae_keys_are_the_official_ones():
    official = manifest("official_vae")
    with torch.device("meta"):
        net = vae.WanVAE(vae.CONFIGS["wan1.3b"])
    assert shapes(net.state_dict()) == official
    keymap = json.loads((GOLDEN / "keymap_vae_official_to_diffusers.json").read_text())
    diffusers = {keymap[key]: key for key in official}
    assert files.official_vae(diffusers) == {key: key for key in official} and keymap.keys() == official.keys()
    assert set(keymap.values()) == set(manifest("diffusers_vae"))


def test_vae_files_of_every_layout(tmp_path):
    net = vae.WanVAE(vae.VAEConfig(8, 16, vae.WAN.latents_mean, vae.WAN.latents_std))
    state, z = net.state_dict(), torch.randn(1, 16, 2, 2, 2)
    want = net.decode(z).detach()
    keymap = json.loads((GOLDEN / "keymap_vae_official_to_diffusers.json").read_text())
    (tmp_path / "official").mkdir()
    torch.save(state, tmp_path / "official" / "Wan2.1_VAE.pth")
    (tmp_path / "hub" / "vae").mkdir(parents=True)
    file = "hub/vae/diffusion_pytorch_model.safetensors"
    save_file({keymap[key]: value for key, value in state.items()}, tmp_path / file)
    for path in ["official", "official/Wan2.1_VAE.pth", "hub", "hub/vae", file]:
        loaded = vae.load_vae(tmp_path / path)
        assert loaded.cfg == net.cfg and not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        close(loaded.decode(z), want, 1e-5)
    config = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}  # another VAE's, beside its weights
    (tmp_path / "hub" / "vae" / "config.json").write_text(json.dumps(config))
    assert vae.load_vae(tmp_path / "hub").cfg.latents_mean == (0.5,) * 16


def test_saved_vae_knows_its_config(tmp_path):
    net = vae.WanVAE(vae.CONFIGS["toy"])
    vae.save_vae(net, tmp_path / "vae.safetensors", step=3)
    loaded = vae.load_vae(tmp_path)
    x = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    assert loaded.cfg == net.cfg
    close(loaded.encode(x), net.encode(x), 1e-5)


def test_vae_refuses_bad_sizes_and_files(tmp_path):
    net = vae.WanVAE(vae.VAEConfig(8, 16, (0.0,) * 16, (1.0,) * 16))
    for shape, message in [((1, 3, 4, 16, 16), "1 \\+ 4k frames"), ((1, 4, 5, 16, 16), r"\[B, 3, 1 \+ 4k"),
                           ((1, 3, 5, 16, 20), "divisible by 8, got 16x20")]:
        with pytest.raises(ValueError, match=message):
            net.encode(torch.zeros(shape))
    z = torch.zeros(1, 16, 4, 2, 2)
    for start, chunks in (2, 2), (-1, 1), (0, 0):
        with pytest.raises(ValueError, match=f"start {start}, chunks {chunks} and 4 latents"):
            net.decode_window(z, start, chunks)
    with pytest.raises(ValueError, match=r"expected latents \[B, 16, f, h, w\]"):
        net.decode(z[:, :4])
    with pytest.raises(ValueError, match="expected a VAE in"):
        vae.load_vae(tmp_path)
    save_file({"blocks.0.weight": torch.zeros(2)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="expected a Wan VAE in .*vae.safetensors, got keys such as"):
        vae.load_vae(tmp_path)
    state = net.state_dict()
    del state["conv1.bias"], state["decoder.head.2.bias"]
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="missing conv1.bias; missing decoder.head.2.bias"):
        vae.load_vae(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# raft.py


def golden_value(key, shape, scale):
    """A golden weight from its key and shape, so that none is stored; scale: (mean, spread) of 1-D ones."""
    random = np.random.RandomState(zlib.crc32(key.replace(".0.norm3.", ".0.downsample.1.").encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith("running_var"):
        return torch.tensor(0.5 + random.random_sample(shape), dtype=torch.float32)
    n = random.standard_normal(shape)
    small = key.startswith(("decoder1.convblock.2.", "comb_block.2."))
    gain = 0.1 if small else 0.5 if "flow_head.conv2" in key else 1
    value = gain * n / np.prod(shape[1:]) ** 0.5 if len(shape) > 1 else scale[0] + scale[1] * n
    for ends, spread in (("bias", 0.05), ("running_mean", 0.1), (("_emb", "cls"), 0.5)):
        value = spread * n if key.endswith(ends) else value
    return torch.tensor(value, dtype=torch.float32)


def golden_net(net, name, total, scale=(1, 0.1)):
    """The net with the golden weights of a manifest, checked against their absolute sum."""
    state = {key: golden_value(key, shape, scale) for key, shape in manifest(name).items()}
    assert abs(sum(value.double().abs().sum().item() for value in state.values()) - total) < 1e-6
    net.load_state_dict(state, strict=True)
    return net.eval().requires_grad_(False)


def golden_raft(size):
    """RAFT of a size with the goldens' weights, and the goldens."""
    total = {"large": 133329.3225607579, "small": 28551.48879625985}[size]
    net = golden_net(RAFT(raft.CONFIGS[size]), f"raft_princeton_{size}", total)
    return net, load_file(GOLDEN / f"raft_{size}_golden.safetensors")


@pytest.mark.parametrize("size, keys", [("large", 179), ("small", 106)])
def test_raft_matches_princeton(size, keys):
    net, golden = golden_raft(size)
    assert len(net.state_dict()) == keys
    close = dict(atol=2e-3, rtol=1e-4)
    frames = golden["frames"].float() / 127.5 - 1
    fmaps, context = net.fnet(frames), net.cnet(frames[:2])
    torch.testing.assert_close(fmaps[0, :, :8, :8], golden["fnet_frame0_8x8"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(context[0, :, :8, :8], golden["cnet_frame0_8x8"], atol=1e-4, rtol=1e-4)
    for i, (flow, hidden) in enumerate(net.refine(fmaps[:2], fmaps[1:], context, 12), 1):
        if i in (1, 4, 12):
            torch.testing.assert_close(flow, golden[f"flow_low_it{i}"], **close)
            torch.testing.assert_close(net.upsample(flow, hidden), golden[f"flow_up_it{i}"], **close)
    torch.testing.assert_close(net(frames[:2], frames[1:], 4), golden["flow_up_it4"], **close)
    clip = (golden["unaligned_frames"].float() / 127.5 - 1).transpose(0, 1)[None]
    for i in (1, 4, 12):
        flow = raft.video_flow(net, clip, i)[:, :, 0]
        torch.testing.assert_close(flow, golden[f"unaligned_flow_up_it{i}"], **close)


def test_instance_norm_equals_torchs_in_either_layout():
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    plain = F.instance_norm(x)
    for layout in torch.contiguous_format, torch.channels_last:
        y = raft.InstanceNorm(5)(x.to(memory_format=layout))
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), x, retain_graph=True) for out in (y, plain)))


@pytest.mark.parametrize("size", ["large", "small"])
def test_raft_lookup_and_upsampling(size):
    net, golden = golden_raft(size)
    correlation = raft.Correlation(golden["lookup_fmap1"], golden["lookup_fmap2"], 4, net.cfg.radius)
    torch.testing.assert_close(correlation(golden["lookup_coords"]), golden["lookup_out"], atol=1e-5, rtol=1e-5)
    if size == "large":
        out = raft.convex_upsample(golden["up_flow_in"], golden["up_mask_in"], 8)
    else:
        out = net.upsample(golden["up_flow_in"], None)
    torch.testing.assert_close(out, golden["up_flow_out"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", ["large", "small"])
def test_raft_image_gradient(size):
    net, golden = golden_raft(size)
    frames = [(f[None].double() / 127.5 - 1).requires_grad_() for f in golden["frames"][:2]]
    grads = torch.autograd.grad(net.double()(*frames, 4).square().mean(), frames)
    for grad, want in zip(grads, (golden["grad_it4_frame0"], golden["grad_it4_frame1"])):
        assert (grad[0] / 127.5 - want).norm() / want.norm() < 1e-5


def test_video_flow_equals_pair_by_pair():
    torch.manual_seed(0)
    net = RAFT(raft.CONFIGS["toy"]).requires_grad_(False)
    x = torch.randn(2, 3, 4, 32, 41, requires_grad=True)
    pairs = []
    for t in range(3):
        (first, (left, _, top, _)), (second, _) = (raft.pad_to_cells(x[:, :, i], 4) for i in (t, t + 1))
        pairs.append(net(first, second, 3)[:, :, top : top + 32, left : left + 41])
    plain = torch.stack(pairs, dim=2)
    weight = torch.randn_like(plain)
    want = torch.autograd.grad((weight * plain).sum(), x)[0]
    for group in (1, 4, 100):
        flow = raft.video_flow(net, x, iters=3, group=group)
        torch.testing.assert_close(flow, plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad((weight * flow).sum(), x)[0], want, atol=1e-4, rtol=1e-3)
    assert want.abs().amax(dim=(0, 1, 3, 4)).min() > 0  # every frame has a share in the flow
    assert raft.pad_to_cells(x[:, :, 0], 4)[1] == (1, 2, 0, 0)  # 32x41: the odd pixel goes right
    half = x.detach().bfloat16()
    flow, want = raft.video_flow(net, half, 3), raft.video_flow(net, half.float(), 3)
    torch.testing.assert_close(flow, want, atol=0, rtol=0)


@pytest.mark.parametrize("size", ["large", "small"])
def test_load_raft_reads_every_layout(size, tmp_path):
    net, _ = golden_raft(size)
    state = net.state_dict()
    names = json.loads((GOLDEN / f"keymap_raft_princeton_to_torchvision_{size}.json").read_text())
    torchvision = {names[key]: value for key, value in state.items() if key in names}
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "princeton.pth")
    torch.save(torchvision, tmp_path / "torchvision.pth")
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "princeton.safetensors")
    save_file({key: value.clone() for key, value in torchvision.items()}, tmp_path / "torchvision.safetensors")
    raft.save_raft(net, tmp_path / "ours.safetensors", step=3)
    assert len(torchvision) == {"large": 169, "small": 106}[size]
    for file in sorted(tmp_path.iterdir()):
        loaded = raft.load_raft(file)
        assert loaded.cfg == net.cfg and not any(p.requires_grad for p in loaded.parameters())
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, state[key]), (file.name, key)


def test_save_raft_keeps_a_config_of_its_own(tmp_path):
    changed = {"hidden": 40, "levels": 3, "gru_kernels": ((1, 5), (5, 1))}
    cfg = raft.RAFTConfig(**{**vars(raft.CONFIGS["toy"]), **changed})
    net = RAFT(cfg)
    raft.save_raft(net, tmp_path / "raft.safetensors", torch.float16, recipe="none")
    loaded = raft.load_raft(tmp_path / "raft.safetensors")
    assert loaded.cfg == cfg and loaded.fnet.conv1.weight.dtype == torch.float32
    frames = torch.randn(2, 1, 3, 64, 64)
    torch.testing.assert_close(loaded(*frames, 2), net(*frames, 2), atol=2e-2, rtol=2e-2)


def test_raft_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"needs H, W >= 128, got 64x256"):
        raft.video_flow(RAFT(raft.CONFIGS["small"]), torch.zeros(1, 3, 2, 64, 256))
    toy = RAFT(raft.CONFIGS["toy"])
    assert raft.video_flow(toy, torch.randn(1, 3, 2, 16, 17), 1).isfinite().all()  # the smallest that works
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        raft.video_flow(toy, torch.zeros(1, 3, 1, 64, 64))
    with pytest.raises(ValueError, match="divisible by 4, got 64x66"):
        toy(torch.zeros(1, 3, 64, 66), torch.zeros(1, 3, 64, 66))
    save_file({"blocks.0.weight": torch.zeros(1)}, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="expected RAFT weights"):
        raft.load_raft(tmp_path / "dit.safetensors")
    torch.save({k: v for k, v in toy.state_dict().items() if k != "fnet.conv2.bias"}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="missing fnet.conv2.bias"):
        raft.load_raft(tmp_path / "cut.pth")


def test_raft_stays_in_eval_mode_and_can_be_trained():
    net = RAFT(raft.CONFIGS["large"])
    torch.nn.Sequential(net).train()
    assert not any(module.training for module in net.modules())
    toy = RAFT(raft.CONFIGS["toy"])
    first, second = torch.randn(2, 1, 3, 32, 32)
    fmap1, fmap2 = toy.fnet(first), toy.fnet(second)
    steps = toy.refine(fmap1, fmap2, toy.cnet(first), 3)
    flows = torch.stack([toy.upsample(flow, hidden) for flow, hidden in steps])
    torch.testing.assert_close(flows[-1], toy(first, second, 3))
    flows.abs().mean().backward()
    assert flows.shape == (3, 1, 2, 32, 32) and all(p.grad is not None for p in toy.parameters())


def test_flow_pictures():
    right, down, left, up, still = [2.0, 0], [0, 2.0], [-2.0, 0], [0, -2.0], [0, 0]
    hue = flow_viz.flow_to_color(torch.tensor([right, down, left, up, still]).T[..., None, None], scale=2)[..., 0, 0].T
    assert hue[0].tolist() == [1, -1, -1] and hue[4].tolist() == [1, 1, 1]
    assert hue[1][:2].min() > 0.7 and hue[1][2] == -1 and hue[2][0] == -1 and hue[3][2] == 1
    batch = torch.randn(2, 2, 3, 8, 9)
    assert torch.allclose(flow_viz.flow_to_color(batch, 1.5)[1], flow_viz.flow_to_color(batch[1], 1.5), atol=1e-5)
    flow = torch.zeros(2, 2, 64, 64)
    flow[0, 1] = 3.0
    picture = flow_viz.clip_beside_flow(torch.zeros(3, 3, 64, 64), flow)
    assert picture.shape == (3, 3, 256, 512) and picture.abs().max() <= 1
    assert picture[:, 0, 0, -1].tolist() == [1, 1, 1] and picture[:, 1:, 0, -1].T.tolist() == 2 * [[1, -1, -1]]
    assert (picture[:, 1, 150:, 400:] == -1).all(dim=0).any()  # the legend's digits
    assert not torch.equal(flow_viz.flow_legend(3.0, 64), flow_viz.flow_legend(4.5, 64))
    with pytest.raises(ValueError, match="expected a flow"):
        flow_viz.clip_beside_flow(torch.zeros(3, 3, 64, 64), flow[:, :1])


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def moving_clip(T=17, H=64, W=96):
    """A smooth picture that moves and brightens, [3, T, H, W]; its frames are told apart by their mean."""
    t, y, x = torch.meshgrid(torch.arange(T) / T, torch.arange(H) / H, torch.arange(W) / W, indexing="ij")
    return torch.stack([(6 * (x + t)).sin(), (5 * y - 3 * t).cos(), 1.6 * t - 0.8 + 0 * x]).mul(0.8)


def write_raw(path, times, codec="libx264", format="mp4", rate=30, size=(48, 64)):
    """Frame k has the grey level 5 k and is shown at times[k] / 1000 seconds."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate if format == "avi" else 1000)
        for k, ms in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 5 * k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def levels(x):
    """Which frames of a write_raw file a clip shows."""
    return x.mean((0, 2, 3)).add(1).mul(127.5 / 5).round().int().tolist()


def test_unipc_equals_wan():
    g = load_file(GOLDEN / "unipc.safetensors")
    for shift, steps in [(s, n) for s in (3, 5, 8) for n in (4, 10, 50)]:
        name, seen, sigmas = f"unipc.shift{shift}.n{steps}", [], unipc_sigmas(steps, shift)
        assert (torch.tensor(sigmas) - g[f"{name}.sigmas"]).abs().max() < 5e-8
        assert [int(1000 * s) for s in sigmas[:-1]] == g[f"{name}.timesteps"].tolist()
        for dtype, key, limit in (torch.float64, "x0_f64", 1e-10), (torch.float32, "x0_f32", 1e-5):
            def velocity(z, sigma):
                seen.append(z)
                return 0.8 * z + 0.6 * torch.sin(3.0 * sigma + g["phase"].to(dtype))
            seen.clear()
            seen.append(unipc(velocity, g["x1"].to(dtype), steps, shift))
            assert (seen[-1] - g[f"{name}.{key}"]).abs().max() < limit
            if f"{name}.traj_f64" in g:
                assert (torch.stack(seen[1:]) - g[f"{name}.traj_f64"]).abs().max() < limit


def test_video_round_trip(tmp_path):
    x = moving_clip()
    write_video(tmp_path / "a" / "x.mp4", x, 16, comment="made by a test")
    y, fps = read_video(tmp_path / "a" / "x.mp4")
    assert y.shape == x.shape and fps == 16
    assert 10 * torch.log10(4 / (x - y).square().mean()) > 38
    assert (x - y).mean((1, 2, 3)).abs().max() < 0.02  # no channel swapped, no range or matrix mistaken
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.mp4"]  # nothing is left aside
    with av.open(str(tmp_path / "a" / "x.mp4")) as file:
        assert file.metadata["comment"] == "made by a test"
        codec = file.streams.video[0].codec_context
        assert codec.name == "h264" and codec.pix_fmt == "yuv420p"
    write_video(tmp_path / "film.mp4", x, 23.976)
    assert read_video(tmp_path / "film.mp4", 2)[1] == pytest.approx(23.976, abs=1e-3)
    with pytest.raises(ValueError, match="even H and W"):
        write_video(tmp_path / "odd.mp4", x[:, :, :63], 16)


@pytest.mark.parametrize("fps", [12, 15, 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60, 120])
def test_real_clips_move_as_evenly_as_they_were_filmed(tmp_path, fps):
    t = torch.arange(int(1.7 * fps))[:, None, None] / fps
    y, x = torch.arange(48)[:, None] - 24, torch.arange(112) - 24
    blob = 1.8 * torch.exp(-((x - 24 * t) ** 2 + y**2) / 128) - 0.9                   # 24 px/s to the right
    write_video(tmp_path / "x.mp4", blob.expand(3, -1, -1, -1), fps)
    clip, speed = read_clip(tmp_path / "x.mp4", 17, (48, 112))
    assert clip.shape == (3, 17, 48, 112) and speed == pytest.approx(fps / stride_of(fps) / 16, rel=1e-3)
    weight = (clip.mean(0) + 0.8).clamp(min=0)
    flow = ((weight * (x + 24)).sum((1, 2)) / weight.sum((1, 2))).diff() * speed
    assert flow.std() / flow.mean() < 0.05 and flow.mean() == pytest.approx(24 / 16, rel=0.03)


def test_far_rates_and_uneven_runs_are_refused(tmp_path):
    assert [stride_of(fps) for fps in (8, 23.976, 24, 24.02, 25, 30, 50, 60)] == [1, 1, 1, 1, 2, 2, 3, 4]
    write_raw(tmp_path / "slow.mp4", [100 * k for k in range(20)], rate=10)
    with pytest.raises(ValueError, match="slow.mp4: expected 11 to 25 frames per second, .*got 10, "):
        read_clip(tmp_path / "slow.mp4", 5, (48, 64))
    times = [round(1000 * k / 30) for k in range(50)]
    for missing in 60, 13:  # none, and one between two that are taken, which does no harm
        kept = [ms for ms in times if ms != round(1000 * missing / 30)]
        write_raw(tmp_path / "even.mkv", kept, format="matroska")
        clip, speed = read_clip(tmp_path / "even.mkv", 17, (48, 64))
        assert levels(clip) == [kept.index(ms) for ms in times[:34:2]] and speed == pytest.approx(15 / 16, rel=2e-3)
    for name, uneven in {"dropped": times[:14] + times[15:],
                         "jitter": [ms + 8 * (k % 4 == 2) for k, ms in enumerate(times)]}.items():
        write_raw(tmp_path / f"{name}.mkv", uneven, format="matroska")
        with pytest.raises(BadRun, match=f"{name}.mkv: its frames after 0.00 s are 0.0.. to 0.... s apart"):
            read_clip(tmp_path / f"{name}.mkv", 17, (48, 64))
    assert levels(read_clip(tmp_path / "dropped.mkv", 10, (48, 64), place=1)[0]) == list(range(30, 49, 2))
    for name, form in ("16.mkv", "matroska"), ("16.avi", "avi"):  # rounded time stamps; none, in coding order
        write_raw(tmp_path / name, [round(62.5 * k) for k in range(40)], format=form, rate=16)
        assert levels(read_clip(tmp_path / name, 40, (48, 64))[0]) == list(range(40))


def test_clip_place_start_stride_and_crop(tmp_path):
    write_raw(tmp_path / "long.mp4", [50 * k for k in range(50)], rate=20)
    for how, want in ((dict(place=0), range(10)), (dict(place=0.5), range(20, 30)), (dict(place=1), range(40, 50)),
                      (dict(start=1.46), range(29, 39)), (dict(start=0, crop=[8, 16, 32, 32]), range(10))):
        assert levels(read_clip(tmp_path / "long.mp4", 10, (32, 32), **how)[0]) == list(want)
    with (av.open(str(tmp_path / "long.mp4")) as file,
          av.open(str(tmp_path / "live.mkv"), "w", options={"live": "1"}) as live):
        stream = live.add_stream_from_template(file.streams.video[0])  # a recording whose header states no duration
        for packet in file.demux(video=0):
            packet.stream = stream
            if packet.dts is not None:
                live.mux(packet)
    assert levels(read_clip(tmp_path / "live.mkv", 10, (32, 32), place=1)[0]) == list(range(39, 49))  # but for the last
    write_raw(tmp_path / "fast.mp4", [20 * k for k in range(50)], rate=50)
    assert levels(read_clip(tmp_path / "fast.mp4", 9, (32, 32), start=0.1, stride=4)[0]) == list(range(5, 41, 4))
    with pytest.raises(ValueError, match=r"long.mp4: .*in 48 x 64, got \[0, 0, 48, 66\]"):
        read_clip(tmp_path / "long.mp4", 10, (32, 32), start=0, crop=[0, 0, 48, 66])
    with pytest.raises(ValueError, match="long.mp4: has 4 frames at 20 fps after 2.30 s, 10 needed"):
        read_clip(tmp_path / "long.mp4", 10, (32, 32), start=2.3)


def test_pixels_are_read_as_they_are_meant_to_be_seen(tmp_path):
    x = moving_clip(T=2, H=96, W=64)
    write_video(tmp_path / "tall.mp4", x, 16)
    y = read_video(tmp_path / "tall.mp4", size=(32, 32))[0]
    want = torch.nn.functional.interpolate(x[:, 0][None], (48, 32), mode="area")[0, :, 8:40]
    assert y.shape == (3, 2, 32, 32) and (y[:, 0] - want).abs().mean() < 0.03
    data = bytearray((tmp_path / "tall.mp4").read_bytes())
    at = data.index(b"tkhd") + 44  # the track header's matrix: a quarter turn clockwise, as telephones do
    data[at:at + 20] = np.array([0, 1 << 16, 0, -(1 << 16), 0], ">i4").tobytes()
    (tmp_path / "turned.mp4").write_bytes(data)
    turned = x.rot90(-1, (2, 3))
    for y in read_video(tmp_path / "turned.mp4")[0], read_clip(tmp_path / "turned.mp4", 2, (64, 96), start=0.0)[0]:
        assert y.shape == (3, 2, 64, 96) and (y - turned).abs().mean() < 0.05
    y = read_clip(tmp_path / "turned.mp4", 2, (48, 64), start=0, crop=(16, 32, 48, 64))[0]
    assert (y - turned[..., 16:, 32:]).abs().mean() < 0.05
    with av.open(str(tmp_path / "wide.mp4"), "w") as file:  # 64:45, a disc that is stored narrow, in full range
        stream = file.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 720, 576, "yuvj420p"
        stream.codec_context.sample_aspect_ratio, stream.codec_context.color_range = Fraction(64, 45), 2
        yy, xx = np.mgrid[:576, :720]
        disc = 255 * (((xx - 360) * 64 / 45) ** 2 + (yy - 288) ** 2 < 200**2)
        for k in range(3):
            frame = av.VideoFrame.from_ndarray(np.repeat(disc[..., None], 3, 2).astype(np.uint8), format="rgb24")
            frame.pts = k
            file.mux(stream.encode(frame.reformat(format="yuvj420p", dst_color_range=2)))
        file.mux(stream.encode())
    for how in dict(start=0), dict(start=0, crop=(0, 112, 576, 800)):
        white = read_clip(tmp_path / "wide.mp4", 2, (288, 400), **how)[0].mean(dim=(0, 1)) > 0
        high, wide = white.any(1).sum(), white.any(0).sum()
        assert abs(high - 200) <= 2 and abs(wide - high) <= 2
    first = next(read_frames(tmp_path / "wide.mp4"))
    assert first.shape == (3, 576, 720) and first.max() >= 253 and first.min() == 0  # stored pixels, as VBench's reader


def texture(seed, T=30, H=48, W=64):
    """A random smooth pattern that slides 1 px/frame, [3, T, H, W]."""
    noise = torch.randn(1, 1, H // 8, W // 2, generator=torch.Generator().manual_seed(seed))
    wide = F.interpolate(noise, (H, 4 * W), mode="bicubic")[0].mul(0.5).clamp(-1, 1).expand(3, -1, -1)
    return torch.stack([wide[:, :, k : k + W] for k in range(T)], dim=1)


def test_cuts_and_repeated_frames_are_passed_over(tmp_path):
    x = texture(0)
    order = {"plain": range(30), "telecine": [k * 4 // 5 for k in range(30)], "twos": [k // 2 * 2 for k in range(30)],
             "once": [*range(15), *range(14, 29)]}
    for name, index in order.items():
        write_video(tmp_path / f"{name}.mp4", x[:, list(index)], 24)
    write_video(tmp_path / "cut.mp4", torch.cat([x[:, :12], texture(1)[:, :18]], dim=1), 24)
    write_video(tmp_path / "film at 60.mp4", x[:, [k * 2 // 5 for k in range(75)]], 60)  # 1 or 2 on
    read_clip(tmp_path / "plain.mp4", 25, (48, 64))
    for name, what in {"telecine": "a repeated frame at 0.25", "twos": "a repeated frame at 0.", "cut": "a cut at 0.50",
                       "once": "a repeated frame at 0.62", "film at 60": "a repeated frame at 0."}.items():
        with pytest.raises(BadRun, match=f"{name}.mp4: {what}.* s"):
            read_clip(tmp_path / f"{name}.mp4", 17, (48, 64))
        read_clip(tmp_path / f"{name}.mp4", 17, (48, 64), start=0.0)  # a list knows what it asks for
    read_clip(tmp_path / "cut.mp4", 17, (48, 64), place=1)


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "name: x.mp4", "tcp:localhost:1.mp4", "http://a.mp4":
        write_video(name, moving_clip(T=3, H=32, W=32), 16)
        assert read_video(name)[0].shape == (3, 3, 32, 32) and (tmp_path / name).is_file()
    os.mkfifo("pipe.mp4")
    pipe = os.open("pipe.mp4", os.O_RDWR)
    closed = threading.Timer(5, os.close, [pipe])  # whoever reads the pipe all the same waits no longer
    closed.start()
    Path("zero.mp4").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.mp4")
        for name in "pipe.mp4", "zero.mp4", "socket.mp4":
            with pytest.raises(ValueError, match=f"{name}: expected a video, it is no regular file"), open_video(name):
                pass
    closed.cancel()
    os.close(pipe)


def test_bad_videos_are_refused_by_name(tmp_path):
    noise = torch.rand(3, 40, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(tmp_path / "good.mp4", noise, 16)
    write_raw(tmp_path / "three.mp4", [0, 62, 125], rate=16)
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    (tmp_path / "headless.mp4").write_bytes(data[len(data) // 4:])
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    half = len(data) // 2
    flipped = bytes(255 - b for b in data[half: half + 1000])
    (tmp_path / "damaged.mp4").write_bytes(data[:half] + flipped + data[half + 1000:])
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        file.mux(sound.encode(frame) + sound.encode())
    why = {"empty": "empty", "text": "no video", "headless": "no video", "cut": "cut short",
           "damaged": "the frame at 1.* is damaged", "sound": "no video stream",
           "three": "has 3 frames.*, 37 needed", "missing": "No such file"}
    for name, reason in why.items():
        for read in read_video, lambda path, frames: read_clip(path, frames, (64, 96)):
            with pytest.raises(ValueError, match=reason) as error:
                read(tmp_path / f"{name}.mp4", 37)
            assert f"{name}.mp4" in str(error.value) and "\n" not in str(error.value)
    assert read_video(tmp_path / "cut.mp4", 5)[0].shape == (3, 5, 64, 96)  # the damage is outside the clip
    write_raw(tmp_path / "whole.mkv", [62 * k for k in range(40)], format="matroska", rate=16, size=(256, 256))
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 2 // 3])  # ends without an error
    with pytest.raises(ValueError, match="cut short"):
        read_video(tmp_path / "cut.mkv")


def test_video_files_are_listed(tmp_path):
    for name in "b.MP4", "a/c.webm", "a/d.avi", "e.txt", "b.flow.mp4", ".x.part":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert [p.name for p in video_files(tmp_path)] == ["c.webm", "d.avi", "b.MP4"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "far").symlink_to(tmp_path / "a")
    assert len(video_files(tmp_path / "links")) == 3  # the loop leads to b.MP4 as well
    with pytest.raises(ValueError, match="found none"):
        video_files(tmp_path / "nowhere")


def run_sample(*flags):
    """The status of sample.py on small videos of the toy preset's base model, whatever lies in runs/."""
    size = "--frames", 5, "--height", 32, "--width", 48
    try:
        sample.main([str(f) for f in ("--preset", "toy", "--generator", WEIGHTS["toy"], *size, *flags)])
    except SystemExit as end:
        return end.code
    return 0


def test_sample_writes_the_same_video_at_any_batch_size_and_number_of_ranks(tmp_path, monkeypatch):
    two = "--prompt", "a red circle", "--prompt", "a blue square", "--num_videos", 2, "--cache", tmp_path / "cache"
    few = "--sampler", "few_step", "--steps", 2
    assert run_sample(*two, "--out_dir", tmp_path / "a", "--batch_size", 4, *few) == 0
    assert run_sample(*two[2:4], "--seed", 100001, "--out", tmp_path / "c.mp4", *few, *two[-2:]) == 0
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    for rank, made in ("0", 2), ("1", 3), ("2", 4):
        for key, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="3", LOCAL_WORLD_SIZE="3").items():
            monkeypatch.setenv(key, value)
        assert run_sample(*two, "--out_dir", tmp_path / "b", "--batch_size", 3, *few) == 0
        assert len(list(tmp_path.glob("b/*"))) == made
    names = [f"a {thing}-{i}.mp4" for thing in ("blue square", "red circle") for i in range(2)]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    clips = [read_video(tmp_path / "a" / name)[0] for name in names]
    for name, x in zip(names, clips):
        y, fps = read_video(tmp_path / "b" / name)
        assert fps == 16 and x.shape == (3, 5, 32, 48)
        assert (x - y).abs().mean() < 2.5 / 127.5  # rounding, which H.264 enlarges to a level or so
    alone = read_video(tmp_path / "c.mp4")[0]  # VBench's rule: seed + 100000 prompt + video
    assert (alone - clips[1]).abs().mean() < 2.5 / 127.5 and (alone - clips[0]).abs().mean() > 5 / 127.5
    assert not torch.equal(clips[0], clips[1]) and not torch.equal(clips[0], clips[2])


def test_samples_do_not_depend_on_the_batch():
    net, coder = load_dit(WEIGHTS["toy"]), vae.load_vae(WEIGHTS["toy"])
    noise = sample_noise([3, 4, 5], (net.cfg.in_dim, 2, 4, 4), 3)
    context = torch.randn(3, net.cfg.text_len, net.cfg.text_dim)
    with torch.no_grad():
        together = coder.decode(few_step(net, noise, context, few_step_times()))
        alone = coder.decode(few_step(net, noise[:, 1:2], context[1:2], few_step_times()))
    assert (together[1:2] - alone).abs().max() < 0.2 / 127.5  # under a fifth of a level


def test_sample_goes_on_where_it_was_stopped(tmp_path, capsys):
    flags = "--prompt", "a red circle", "--num_videos", 3, "--out_dir", tmp_path, "--cache", tmp_path / "cache"
    flags += "--steps", 5, "--batch_size", 1  # five steps: the teacher
    assert run_sample(*flags) == 0
    files = sorted(tmp_path.glob("*.mp4"))
    before = [p.read_bytes() for p in files]
    files[1].unlink()
    capsys.readouterr()
    assert run_sample(*flags) == 0 and capsys.readouterr().out.count("wrote") == 1
    assert [p.read_bytes() for p in files] == before  # the same command, the same bytes
    assert run_sample(*flags, "--guidance", 3) == 2 and "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("flags, want", [
    ("--generator RUN", ("few_step", 2, [1000, 600])), ("--generator BASE", ("unipc", 50, None)),
    ("--generator RUN --steps 1", ("few_step", 1, [1000, 600])), ("--sampler unipc", ("unipc", 50, None)),
    ("--generator RUN --timesteps 900 500 20", ("few_step", 3, [900, 500, 20])),
    ("--generator RUN --sampler unipc --steps 4", ("unipc", 4, None)), ("--steps 4", "up to the student's 3"),
    ("--generator RUN/other.safetensors --timesteps 900", ("few_step", 1, [900])), ("--timesteps 9 10", "falling"),
    ("--generator RUN/other.safetensors", "--sampler few_step,"), ("--generator RUN/odd.safetensors", "in the header"),
    ("--generator RUN --guidance 2", "no --guidance with"), ("--generator BASE --timesteps 9", "no --timesteps with"),
    ("--preset wan1.3b --weights RUN/none --sampler few_step", "a student for")])
def test_weights_and_flags_decide_the_sampler(tmp_path, monkeypatch, flags, want):
    for name, timesteps in dict(generator=[1000, 600], odd=[600, "x"], other=None).items():
        sampler = {"sampler": json.dumps({"timesteps": timesteps, "shift": 3.0})} if timesteps else {}
        save_dit(WanDiT(TINY), tmp_path / f"{name}.safetensors", preset="toy", **sampler)
    monkeypatch.setattr(sample, "REPO", tmp_path)  # where no runs are
    flags = flags.replace("BASE", os.path.relpath(WEIGHTS["toy"])).replace("RUN", str(tmp_path))
    args = sample.parse_flags(flags.split())
    with pytest.raises(ValueError, match=want) if isinstance(want, str) else contextlib.nullcontext():
        sample.resolve(args)
        sample.choose_generator(args)
        assert (args.sampler, args.steps, args.timesteps and list(args.timesteps)) == want


def test_extended_prompts_are_drawn_under_the_names_of_the_short_ones(tmp_path, capsys):
    for name, lines in dict(short="a red circle\na/b\n", long="a blue square\na green square\n", few="x\n").items():
        (tmp_path / name).write_text(lines)
    flags = "--prompts", tmp_path / "short", "--cache", tmp_path / "cache", "--out_dir"
    assert run_sample(*flags, tmp_path / "a", "--steps", 2, "--extended_prompts", tmp_path / "long") == 0
    assert run_sample("--prompt", "a blue square", *flags[2:], tmp_path / "b", "--steps", 2) == 0
    short, long = tmp_path / "a" / "a red circle-0.mp4", tmp_path / "b" / "a blue square-0.mp4"
    assert torch.equal(read_video(short)[0], read_video(long)[0])
    assert {text.prompt_of(path) for path in (tmp_path / "a").iterdir()} == {("a red circle", 0), ("a/b", 0)}
    assert json.loads(text.comment_of(short))["extended_prompt"] == "a blue square"
    assert run_sample(*flags, tmp_path / "c", "--extended_prompts", tmp_path / "few") == 2
    assert "a line for each of the 2 of --prompts, got 1" in capsys.readouterr().err


def test_sample_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    wan = f"--preset wan1.3b --prompt x --weights {tmp_path}/w --generator {tmp_path}/w"
    state = {key: torch.full_like(value, math.nan) for key, value in WanDiT(CONFIGS["toy"]).state_dict().items()}
    save_dit(state, tmp_path / "nan.safetensors", CONFIGS["toy"])
    nan = f"--generator {tmp_path}/nan.safetensors --timesteps 900 --out {tmp_path}/a.mp4 --cache {tmp_path}/cache"
    bad = {"--frames 16": "try 17", "--height 40": "divisible by 16", "--step 3": "unrecognized",
           "--preset huge": "toy, wan1.3b", "--prompts nowhere.txt": "nowhere.txt",
           f"--prompts {tmp_path}/none.txt": "got none", "--fps 1e-9": "from 0.1 to 1000",
           "--fps inf": "from 0.1", f"--seed {10**19}": "from 0 to", "--num_videos 100001": "1 to 100000",
           "--height 16000000": "16 to 4096", "--guidance nan": "--guidance from -100 to 100", nan: "finite pixels",
           "--out a.gif": "one .mp4", "--out a.mp4 --num_videos 2": "--out_dir", "--seed x": "--seed",
           "--device meta": "cpu or cuda", "--frames 1 --flow": "--frames 5 or more with --flow",
           wan: "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir"}
    for flags, reason in bad.items():
        assert run_sample(*flags.split()) == 2
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1 and err.startswith("sample.py: ")



def test_clip_lists(tmp_path, capsys):
    row = {"file": "a/x.mp4", "start": 0.5, "frames": 20, "fps": 30.0, "stride": 2, "motion": 7.1}
    path = tmp_path / "clips.jsonl"
    lines = [row, dict(row, frames=16), dict(row, file="/b/y.mp4", frames=17, crop=[0, 8, 64, 96])]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_clip_list(path, 17) == [(tmp_path / "a" / "x.mp4", 0.5, None, 2, 0.2),
                                        (Path("/b/y.mp4"), 0.5, [0, 8, 64, 96], 2, 0)]
    assert "clips.jsonl: 1 of 3 clips are passed over, shorter than 17 frames" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected clips of 25 frames or more in .*, its 3 have 20 at most"):
        read_clip_list(path, 25)
    bad = ['{"file": 1', "[]", "7", json.dumps(dict(row, file=3)), json.dumps({"file": "x.mp4"}),
           *(json.dumps(dict(row, **{key: value})) for key, value in (
               ("start", -1), ("start", math.nan), ("frames", "9"), ("stride", 0), ("stride", 1.5), ("fps", 0),
               ("crop", [1, 2, 3]), ("crop", [0, 0, 0, 9]), ("crop", "0123")))]
    for line in bad:
        path.write_text(json.dumps(row) + "\n" + line + "\n")
        with pytest.raises(ValueError, match="clips.jsonl, line 2: expected {\"file\": .*, got ") as error:
            read_clip_list(path, 17)
        assert line in str(error.value).replace("\\", "") or len(line) > 80


def test_real_clips_are_drawn_and_what_is_passed_over_is_named(tmp_path, capsys):
    def draw(videos, clips=12, frames=7, latent=False):
        keys = [[(0, i), (1, i)] for i in range(clips)]
        return list(real_clips(str(videos), keys, frames, (32, 64), 0, 0, latent)), capsys.readouterr().out

    videos = tmp_path / "videos"
    write_video(videos / "24.mp4", texture(0), 24)
    write_video(videos / "portrait.mp4", texture(0, H=96, W=48), 30)
    write_video(videos / "cuts.mp4", torch.cat([texture(k, T=10) for k in range(3)], dim=1), 16)
    write_video(videos / "8.mp4", texture(0), 8)
    os.mkfifo(videos / "pipe.mp4")
    batches, printed = draw(videos)
    assert len(batches) == 12 and all(x.shape == (2, 3, 7, 32, 64) and x.dtype == torch.uint8 for x, _ in batches)
    assert {round(s, 3) for _, speed in batches for s in speed.tolist()} == {1.5, 0.938, 1.0}
    skipped = [line for line in printed.splitlines() if line.startswith("skipped: ")]
    assert sorted(Path(line.split(": ")[1]).name for line in skipped) == ["8.mp4", "cuts.mp4", "pipe.mp4"]  # each once
    assert "1 of the first 3 videos, such as portrait ones, keep less than half" in printed
    for name in "24.mp4", "portrait.mp4":
        (videos / name).unlink()
    assert {speed.mean().item() for _, speed in draw(videos)[0]} == {1.0}  # another run of the file that has cuts
    with pytest.raises(ValueError, match="videos of 11 frames or more in .*, none of 3 can be used"):
        draw(videos, frames=11)
    rows = [{"file": "24.mp4", "start": 0.25, "frames": 10, "fps": 24, "stride": 1, "crop": [8, 0, 32, 64]}]
    (videos / "clips.jsonl").write_text(json.dumps(rows[0]))
    write_video(videos / "24.mp4", texture(0), 24)
    batches, _ = draw(videos / "clips.jsonl")
    pixels = torch.cat([x for x, _ in batches]).float() / 127.5 - 1
    truth = torch.stack([texture(0)[:, k : k + 7, 8:40] for k in range(6, 10)])
    error = (pixels[:, None] - truth).abs().mean((2, 3, 4, 5))
    assert error.amin(1).max() < 0.03 and len(set(error.argmin(1).tolist())) == 4  # all its runs
    write_video(videos / "48.mp4", texture(0, T=60), 48)
    batches, printed = draw(videos, latent=True)
    assert {round(s, 3) for _, speed in batches for s in speed.tolist()} == {1.0}
    assert "only videos within 5 % of a multiple of 16" in printed and "24.mp4: expected 15.2 to 16.8 frames" in printed


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def tiny_weights(folder):
    """A complete random preset of about 0.5 M parameters in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    cfg = DiTConfig(dim=32, heads=2, ffn_dim=64, layers=4, in_dim=4, freq_dim=16, text_dim=16, text_len=8)
    save_dit(WanDiT(cfg), folder / "teacher.safetensors")
    coder = vae.WanVAE(vae.VAEConfig(4, 4, (0.0,) * 4, (1.0,) * 4, res_blocks=1))
    vae.save_vae(coder, folder / "vae.safetensors")
    raft.save_raft(raft.RAFT(raft.CONFIGS["toy"]), folder / "raft.safetensors")
    tiny_text_encoder(folder)
    return folder


SHORT = ("--preset toy --cycles 1 --fake_warmup 0 --dmd_warmup 0 --discriminator_warmup 0 --batch 2 "
         "--discriminator_batch 3 --micro_batch 2 --frames 9 --window 1 --raft_iters 2 --samples 0 "
         "--workers 0 --shard 0").split()


def run(weights, out, *flags):
    """train.py in this process; returns its log."""
    train.main([*SHORT, "--weights", str(weights), "--out", str(out), *flags])
    return read_log(out)


def read_log(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def started(ranks, weights, out, flags, nodes=1):
    """train.py on `ranks` processes, as torchrun would start them on so many nodes."""
    port = str(socket.create_server(("localhost", 0)).getsockname()[1])
    command = [sys.executable, train.__file__, *SHORT, "--weights", weights, "--out", out, *flags]
    env = dict(os.environ, WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=port)
    env["LOCAL_WORLD_SIZE"] = str(ranks // nodes)
    envs = [dict(env, RANK=str(i), LOCAL_RANK=str(i % (ranks // nodes))) for i in range(ranks)]
    return [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) for env in envs]


def killed(ranks, weights, out, flags, after):
    """Kill train.py's processes once cycle `after` is logged; returns their exit codes."""
    processes, log = started(ranks, weights, out, flags), out / "log.jsonl"
    while processes[0].poll() is None and not (log.exists() and f'"cycle": {after},' in log.read_text()):
        time.sleep(0.02)
    [process.kill() for process in processes]
    return [process.wait() for process in processes]


# ---------------------------------------------------------------------------------------------------------------------
# train.py: the losses


def test_dmd_loss_gradient_is_the_score_difference():
    z0, real, fake = (torch.randn(2, 3, 1, 2, 2, dtype=torch.float64) for _ in range(3))
    train.dmd_loss(z0.requires_grad_(), real, fake).sum().backward()
    norm = (z0.detach() - real).abs().mean((1, 2, 3, 4), keepdim=True)
    assert (z0.grad - (fake - real) / norm / z0[0].numel()).abs().max() < 1e-12
    closer = (z0 - z0.grad - real).abs().sum() < (z0 - real).abs().sum()
    assert closer == (((fake - real) * (z0 - real)).sum() > 0)


def test_gan_losses_by_hand():
    real, gen = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
    g = lambda x: math.log(1 + math.exp(x))
    assert train.gan_d_loss(real, gen).tolist() == pytest.approx([g(0) + g(1), g(-2) + g(-1)])
    assert train.gan_g_loss(gen).tolist() == pytest.approx([g(-1), g(1)])
    v, noise, z0 = (value * torch.ones(1, 1, 1, 1, 2) for value in (3, 1, 0))
    assert train.fake_loss(v, noise, z0).item() == 4
    assert train.r_loss(real, real, 0.1).abs().max() == 0
    assert train.r_loss(real, gen, 0.1).tolist() == pytest.approx([100.0, 900.0])


def test_r_loss_estimates_the_squared_gradient():
    torch.manual_seed(0)
    w, x, sigma = torch.randn(50), torch.randn(50), 0.01
    noise = sigma * torch.randn(4000, 50)
    r = train.r_loss((w * x).sum().expand(4000), ((x + noise) * w).sum(1), sigma).mean()
    assert r.item() == pytest.approx(w.square().sum().item(), rel=0.1)


def test_a_loss_has_one_value_per_sample():
    sums, weight = {}, torch.tensor([0.5, 0.25])
    gan_d, r1 = train.add(sums, weight, gan_d=torch.tensor([2.0, 4.0], requires_grad=True), r1=torch.tensor([8.0, 0.0]))
    assert (gan_d.item(), r1.item()) == (2, 4) and gan_d.requires_grad and not sums["gan_d"].requires_grad
    train.add(sums, weight, gan_d=torch.ones(2))
    assert {name: value.item() for name, value in sums.items()} == {"gan_d": 2.75, "r1": 4}
    with pytest.raises(ValueError, match=r"gan_d of one value per sample, \[2\], got \[\]"):
        train.add(sums, weight, gan_d=torch.tensor(1.0))  # a mean over the batch would depend on micro_batch


def test_micro_batches_cover_the_batch_on_any_number_of_ranks(monkeypatch):
    cfg = train.Config(batch=5, discriminator_batch=12, micro_batch=2)
    for ranks in 1, 2, 3, 16:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        make = {5: lambda: train.micro_batches(5, 2), 12: lambda: train.discriminator_micro_batches(cfg)}
        for batch, micro_batches in make.items():
            weights, turns = {}, set()
            for rank in range(ranks):
                monkeypatch.setenv("RANK", str(rank))
                turns.add(tuple(len(index) for index, _ in micro_batches()))
                weights.update({i: w for index, ws in micro_batches() for i, w in zip(index, ws.tolist()) if w})
            assert len(turns) == 1  # as many collectives on every rank
            assert sorted(weights) == list(range(batch))
            assert sum(weights.values()) == pytest.approx(ranks, rel=1e-5)


@pytest.mark.parametrize("shard", [0, 1])
def test_frozen_sharded_net_collects_no_gradient(shard):
    _, mesh = cli.setup()
    dit = WanDiT(DiTConfig(32, 2, 64, 2, 4, 16, 16, 8)).bfloat16()
    net = MotionDiscriminator(dit.cfg, (0, 1), "meta").load_trunk(dit)
    net.trunk.blocks[0].requires_grad_(False)  # a hacker's choice
    train.shard(net, mesh, None, train.Config(shard=shard))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    context, o = torch.zeros(1, 8, 16), torch.randn(1, 4, 2, 4, 4, requires_grad=True)
    with torch.no_grad():
        net(o, torch.zeros(1), context)  # leaves the root gathered, with gradients on
    with train.frozen(net):
        net(o, torch.zeros(1), context).sum().backward()
    assert o.grad.abs().max() > 0 and all(p.grad is None for p in net.parameters())
    net(o, torch.zeros(1), context).sum().backward()
    learning = {name for name, p in net.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in net.named_parameters() if "trunk.blocks.0." not in name}
    assert len(train.adamw(net, 1e-3).state) == len(learning)  # no moments for what is frozen
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# train.py: whole runs


def test_kill_and_resume_on_any_number_of_ranks(tmp_path):
    weights = tiny_weights(tmp_path / "weights")
    flags = ("--dmd_warmup 1 --discriminator_warmup 1 --cycles 2 --save_every 2 --ema 0.9 "
             "--discriminator_batch 2 --fake_updates 1").split()
    straight = run(weights, tmp_path / "straight", *flags)
    assert [row["phase"] for row in straight] == ["dmd_warmup", "discriminator_warmup", "mogan", "mogan"]
    assert killed(1, weights, tmp_path / "one", flags, after=2) == [-signal.SIGKILL]
    assert killed(2, weights, tmp_path / "two", flags, after=2) == [-signal.SIGKILL] * 2
    assert (tmp_path / "one" / "checkpoint-000002").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "nodes")
    two = read_log(tmp_path / "two")  # two processes, the same global batch
    assert run(weights, tmp_path / "one", *flags) == straight  # to the last bit
    resumed = run(weights, tmp_path / "two", *flags)  # saved by two ranks, resumed by one
    # and by two nodes: replicas, not shards, and in one piece
    processes = started(2, weights, tmp_path / "nodes", [*flags, "--shard", "1"], nodes=2)
    assert [process.wait() for process in processes] == [0, 0]
    nodes = read_log(tmp_path / "nodes")
    for row, want in [*zip(two, straight), *zip(resumed, straight), *zip(nodes, straight)]:
        assert row.pop("phase") == want["phase"]
        assert row == pytest.approx({key: want[key] for key in row}, rel=2e-3, abs=1e-5)
        for key in {"dmd", "fake", "gan_g", "gan_d"} & row.keys():
            assert row[key] == pytest.approx(want[key], rel=1e-4), key
    for name in "generator.safetensors", "generator_ema.safetensors":
        files = [load_file(tmp_path / place / name) for place in ("straight", "one", "two")]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
        assert max((files[0][key] - files[2][key]).abs().max() for key in files[0]) < 1e-5
    with pytest.raises(SystemExit):
        run(weights, tmp_path / "one", *flags, "--taps", "0", "3")  # not what the run began with
    left = sorted(path.name for path in (tmp_path / "one").glob("checkpoint*"))
    assert left == ["checkpoint-000002", "checkpoint-000004"]


def test_the_discriminators_warmup_ends_when_it_separates(tmp_path, monkeypatch):
    weights, flags = tiny_weights(tmp_path / "weights"), "--discriminator_warmup 3 --cycles 1 --save_every 2".split()
    capped = run(weights, tmp_path / "cap", *flags, "--save_every", "9")
    assert [row["cycle"] for row in capped] == [0, 1, 2, 3]  # it has learned nothing
    ranked = []

    def easy(real, gen):
        ranked.extend((real > gen).float().tolist())
        return 0.1 * F.softplus(gen - real)

    monkeypatch.setattr(train, "gan_d_loss", easy)
    rows = run(weights, tmp_path / "run", *flags)
    assert rows[0]["accuracy"] == pytest.approx(sum(ranked[:3]) / 3)  # three pairs, and one of padding
    assert [(row["cycle"], row["phase"]) for row in rows] == [(0, "discriminator_warmup"), (3, "mogan")]
    shutil.rmtree(tmp_path / "run" / "checkpoint-000004")
    assert run(weights, tmp_path / "run", *flags) == rows


def test_kept_exports_are_numbered_and_sampled_by_number(tmp_path, monkeypatch, capsys):
    weights = tiny_weights(tmp_path / "weights")
    run(weights, tmp_path / "runs" / "one", "--cycles", "5", "--save_every", "2", "--keep_every", "3", "--no-dmd",
        "--generator", str(weights))
    kept = sorted((tmp_path / "runs" / "one").glob("generator-*"))
    assert [file.name for file in kept] == ["generator-000004.safetensors"]  # the first export after three cycles
    assert load_file(kept[0])["patch_embedding.weight"].dtype == torch.bfloat16
    monkeypatch.setattr(sample, "REPO", tmp_path)
    flags = ["--preset", "toy", "--weights", str(weights), "--prompt", "a red circle", "--out", str(tmp_path / "x.mp4")]
    sample.main([*flags, "--frames", "5", "--generator", "4"])
    assert str(kept[0]) in capsys.readouterr().out and (tmp_path / "x.mp4").exists()
    with pytest.raises(SystemExit):
        sample.main([*flags, "--generator", "5"])
    assert "--keep_every" in capsys.readouterr().err


def test_kept_generators_become_curves_of_the_report():
    rows = [[{"scores": {"dynamic": value}}, {"scores": {}}] for value in (0.5, 0.25, 0.75)]
    curves = scores.over_cycles(["mogan-300", "mogan-20", "dmd"], rows, {"dynamic": "dynamics"})
    assert curves == {"mogan, kept generators": {"dynamics": [(20, 0.25), (300, 0.5)]}}
    assert "polyline" in report.curves_html(curves)


def test_log_warns_when_one_side_has_won(tmp_path, capsys):
    log = checkpoint.Log(train.Config(out=str(tmp_path)), 0)
    for cycle in range(checkpoint.WATCHED + 1):
        log.write({"cycle": cycle, "gan_d": 0.01 if cycle else 1.3, "norm_gan": 5.0, "norm_dmd": 1.0})
    told = capsys.readouterr().out
    assert "balance 5" in told and "balance is 5 over 20 cycles, not 0.3 to 3.0: one AdamW" in told
    assert "gan_d is 0.01 over 20 cycles" in told and told.count("over 20 cycles") == 2


def test_resume_tells_what_changed_and_spares_copies(tmp_path, capsys):
    weights, out = tiny_weights(tmp_path / "weights"), tmp_path / "out"
    flags = "--dmd_warmup 1 --discriminator_warmup 0 --fake_updates 1 --discriminator_batch 2".split()
    run(weights, out, *flags, "--cycles", "0")
    shutil.copytree(out / "checkpoint-000001", out / "checkpoint-000001-keep")
    capsys.readouterr()
    run(weights, out, *flags, "--cycles", "0", "--lr_generator", "0.5")
    told = capsys.readouterr().out
    assert "lr_generator 0.0001 -> 0.5" in told and "nothing left to train" in told
    assert json.loads((out / "config.json").read_text())["lr_generator"] == 1e-4
    run(weights, out, *flags, "--cycles", "2", "--save_every", "1")
    assert sorted(path.name[-5:] for path in out.glob("checkpoint-*")) == ["-keep", "00002", "00003"]
    for file in (out / "checkpoint-000003").glob("*.distcp"):
        os.truncate(file, 100)
    with pytest.raises(SystemExit):
        run(weights, out, *flags, "--cycles", "3")
    told = capsys.readouterr().err
    assert re.search("000003, got other bytes than .*distcp: .* move it away to go on from checkpoint-000002", told)


def test_bf16_is_close_to_fp32(tmp_path):
    weights = tiny_weights(tmp_path / "weights")
    fp32, bf16 = (run(weights, tmp_path / dtype, "--dtype", dtype)[0] for dtype in ("fp32", "bf16"))
    assert bf16["r1"] == pytest.approx(fp32["r1"], rel=0.3)  # not drowned in bf16's rounding of the logits
    for key in "dmd", "fake", "gan_g", "gan_d":
        assert bf16[key] == pytest.approx(fp32[key], rel=0.05) and bf16[key] != fp32[key]


def test_ablations(tmp_path):
    weights = tiny_weights(tmp_path / "weights")
    full = run(weights, tmp_path / "full")[0]
    assert {"dmd", "fake", "gan_g", "gan_d", "r1", "r2", "norm_dmd", "norm_gan"} <= full.keys()
    no_dmd = run(weights, tmp_path / "no_dmd", "--no-dmd", "--generator", str(weights / "teacher.safetensors"))[0]
    assert not {"dmd", "fake"} & no_dmd.keys() and "gan_g" in no_dmd
    assert not (tmp_path / "no_dmd" / "fake_score.safetensors").exists()  # it was never fitted
    no_r = run(weights, tmp_path / "no_r", "--lambda_r1", "0", "--lambda_r2", "0")[0]
    assert no_r["r1"] == full["r1"] and no_r["norm_discriminator"] != full["norm_discriminator"]
    latent = run(weights, tmp_path / "latent", "--latent_gan")[0]
    assert latent["gan_d"] != full["gan_d"] and latent["dmd"] == full["dmd"]
    small = run(weights, tmp_path / "small", "--checkpointing", "--micro_batch", "1")[0]
    assert small.pop("phase") == "mogan"
    for key in "norm_gan", "balance":  # of an untrained RAFT, whose gradient a CPU may round by .7 %
        assert small.pop(key) == pytest.approx(full[key], rel=2e-2)
    assert small == pytest.approx({key: full[key] for key in small}, rel=2e-3, abs=1e-6)


def test_every_weight_weighs_its_own_loss(tmp_path, monkeypatch):
    weights, flags = tiny_weights(tmp_path / "weights"), ("--guidance", "0", "--lambda_d", "0", "--lambda_r1")
    [none] = run(weights, tmp_path / "none", *flags, "0", "--lambda_r2", "0", "--lambda_g", "0")
    assert none["norm_gan"] == none["norm_discriminator"] == 0 < none["gan_g"]
    monkeypatch.setitem(train.NEGATIVE_PROMPT, "toy", "a red red circle")
    [one] = run(weights, tmp_path / "one", *flags, "1", "--lambda_r2", "0", "--sigma", "0.01")
    [two] = run(weights, tmp_path / "two", *flags, "0", "--lambda_r2", "1", "--sigma", "0.001")
    assert one["dmd"] == none["dmd"]  # without guidance the negative prompt is nothing
    assert one["norm_discriminator"] != two["norm_discriminator"] and two["norm_discriminator"] > 0 < one["norm_gan"]
    assert [one["r1"], one["r2"]] == pytest.approx([two["r1"], two["r2"]], rel=0.2)  # of the gradient, not of sigma


def test_times_of_score_updates_are_shifted_and_clamped(tmp_path, monkeypatch):
    times, ends = [], torch.tensor([0.0, 1.0, 0.5])
    monkeypatch.setattr(train.Draw, "uniform", lambda draw, _: ends[: len(draw.index)])
    monkeypatch.setattr(train, "add_noise", lambda z, noise, t: times.append(t.tolist()) or add_noise(z, noise, t))
    run(tiny_weights(tmp_path / "weights"), tmp_path / "run", *"--batch 3 --micro_batch 3 --fake_updates 1".split())
    assert times == [pytest.approx([0.02, 0.98, 0.75])] * 2  # DMD and fake score; shift 3


def test_what_was_frozen_before_training_stays_so(tmp_path, monkeypatch):
    weights, load = tiny_weights(tmp_path / "weights"), train.load_networks

    def first_block_frozen(cfg):
        networks = load(cfg)
        for net in networks[0], networks[3].trunk:  # generator and discriminator
            net.blocks[0].requires_grad_(False)
        return networks

    monkeypatch.setattr(train, "load_networks", first_block_frozen)
    run(weights, tmp_path / "run", "--cycles", "2", "--discriminator_warmup", "1")
    before, after = (load_dit(path) for path in (weights, tmp_path / "run" / "generator.safetensors"))
    for key, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[key]) == key.startswith("blocks.0."), key
    saved = checkpoint.checkpoints(tmp_path / "run")[-1]
    moments = {key for key in dcp.FileSystemReader(saved).read_metadata().state_dict_metadata if "exp_avg" in key}
    assert moments and not any("blocks.0." in key for key in moments if "fake_score" not in key)


def test_flow_of_real_clips_is_brought_to_one_speed(tmp_path, monkeypatch):
    pixels, flows, real = [], [], torch.randint(0, 256, (2, 3, 5, 64, 64), dtype=torch.uint8)
    monkeypatch.setattr(train, "real_clips", lambda *_: itertools.repeat((real, torch.tensor([1.5, 0.75]))))
    monkeypatch.setattr(train, "video_flow", lambda raft, x, iters: pixels.append(x) or 1 + 0 * x[:, :2, 1:])
    monkeypatch.setattr(train, "motion_tensor", lambda flow, scale: flows.append(flow) or motion_tensor(flow, scale))
    run(tiny_weights(tmp_path / "weights"), tmp_path / "run")
    seen = [flow.mean((1, 2, 3, 4)).tolist() for flow in flows]
    assert seen.count([1.5, 0.75]) == 2 and seen.count([1.0, 1.0]) == len(seen) - 2 == 3
    assert sum(torch.equal(x, real / 127.5 - 1) for x in pixels) == 2


def test_real_videos_to_a_trained_checkpoint_to_a_video(tmp_path, capsys):
    weights, videos = tiny_weights(tmp_path / "weights"), tmp_path / "videos" / "deep"
    for i, (T, H, W) in enumerate([(30, 64, 96), (40, 97, 51), (3, 64, 64)]):
        write_video(videos / f"{i}.mp4", moving_clip(T, H + H % 2, W + W % 2), 24)
    whole = (videos / "0.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "text.mp4").write_text("hello")
    (tmp_path / "prompts.txt").write_text("a red circle\n\n# a comment\na circle moving right\n")
    flags = "--cycles 3 --samples 1 --workers 1".split()
    flags += ["--videos", str(videos.parent), "--prompts", str(tmp_path / "prompts.txt")]
    rows = run(weights, tmp_path / "run", *flags)
    printed = capsys.readouterr().out
    assert len([row for row in rows if row["phase"] == "mogan"]) == 3
    skipped = [line for line in printed.splitlines() if "skipped" in line]
    assert skipped and len(skipped) == len(set(skipped))
    assert all("text.mp4" in line or "cut.mp4" in line or "2.mp4" in line for line in skipped)
    assert read_video(tmp_path / "run" / "samples" / "cycle-000003-0.mp4")[0].shape[1] == 9  # clip and flow
    flags = ["--weights", weights, "--generator", tmp_path / "run" / "generator.safetensors",
             "--cache", tmp_path / "cache", "--prompt", "a red circle", "--out", tmp_path / "x.mp4"]
    sample.main([*"--preset toy --frames 9 --height 32 --width 32".split(), *map(str, flags)])
    assert read_video(tmp_path / "x.mp4")[0].shape == (3, 9, 32, 32)


@pytest.mark.parametrize("flag, file, key, flags, update", [
    ("--generator", "teacher.safetensors", "head.head.bias", "--dmd_warmup 9", "fake_score"),
    ("--raft", "raft.safetensors", "update_block.flow_head.conv2.bias", "--cycles 9", "gan")])  # dmd's are fine between
def test_non_finite_updates_are_left_out_and_end_the_run(tmp_path, capsys, flag, file, key, flags, update):
    weights = tiny_weights(tmp_path / "weights")
    state, meta = files.read_state_dict(weights / file)
    state[key] = state[key] * math.nan
    save_file(state, tmp_path / "nan.safetensors", metadata=meta)
    with pytest.raises(SystemExit):
        run(weights, tmp_path / "run", flag, str(tmp_path / "nan.safetensors"), *flags.split())
    assert f"expected finite {update} updates, got five in a row" in capsys.readouterr().err


def mixed(weights, folder, name):
    """A copy of a preset with RAFT's file in another's place."""
    shutil.copytree(weights, folder)
    shutil.copy(folder / "raft.safetensors", folder / f"{name}.safetensors")
    return folder


def test_bad_training_input_is_one_line(tmp_path, capsys):
    weights, prompts, empty = tiny_weights(tmp_path / "weights"), tmp_path / "prompts.txt", tmp_path / "empty"
    prompts.write_text("# nothing\n")
    empty.mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("text")
    save_dit(WanDiT(TINY), tmp_path / "other.safetensors")
    cases = {"--step 3": "unrecognized arguments: --step", "--preset wan": "expected --preset auto, wan1.3b",
             "--batch x": "invalid int value", "--frames 10": "1 \\+ 4k .*got 10: try 9",
             "--height 40": "divisible by 16, got 40 x", "--window 9": "--window 1 to 2",
             "--height 128": "toy world's real clips, got 128", "--batch -1": "--batch from 1 to 40",
             "--discriminator_batch 9": "at most batch \\* fake_updates = 4", "--sigma nan": "1000, got nan",
             f"--videos {empty}": "expected a folder with videos .* found none",
             f"--videos {tmp_path / 'bad'}": "none of 1 can be used",
             f"--prompts {prompts}": "at least one prompt", "--prompts none.txt": "text file .*none.txt",
             f"--weights {empty}": "expected a Wan DiT in", "--micro_batch 0": "1 to 4096, got 0",
             "--height 0": "--height from 1 to", "--seed 99999999999999999999": "--seed from 0 to",
             "--samples 100000000": "--samples from 0 to 100000", "--timesteps 1000000 5": "from 0 to",
             "--no-dmd": "--generator with --no-dmd",
             "--raft none.pth": "RAFT at none.pth: no such file", "--timesteps 500 900": "falling --timesteps"}
    late = {f"--weights {mixed(weights, tmp_path / name, name)}": what for name, what in (
        ("vae", "expected a Wan VAE"), ("teacher", "expected a Wan DiT"))} | {
            f"--raft {weights / 'vae.safetensors'}": "RAFT", "--taps 1 1": "rising taps",  # claimed by then
            "--shard 2": "--shard to divide the 1 processes",
            f"--generator {tmp_path / 'other.safetensors'}": "the teacher's architecture"}
    for flags, message in {**cases, **late}.items():
        with pytest.raises(SystemExit) as stop:
            run(weights, tmp_path / "run", *flags.split())
        assert stop.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("train.py: ") and re.search(message, last), (flags, last)
        assert flags in late or not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]  # nothing was begun, so nothing is lost


FORKED = """
import json, os, runpy, sys
import torch.distributed.checkpoint, torch.distributed.fsdp, transformers  # once; our files are each copy's own
for copy, *commands in json.loads(sys.argv[1]):
    if not os.fork():
        os.chdir(copy)
        sys.path.insert(0, copy)
        os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
        for sys.argv in commands:
            runpy.run_path(sys.argv[0], run_name="__main__")
        open("done", "x").close()
        os._exit(0)
    os.wait()
"""


def test_every_hack_applies_and_trains(tmp_path):
    weights, root = str(tiny_weights(tmp_path / "weights")), Path(__file__).parent
    hacks, arms = (sorted(root.glob(f"{folder}/*.patch")) for folder in ("hacks", "toy/patches"))
    # No repository around: plain files. torch.compile does nothing: compiling is slow and tests torch.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path), "TORCH_COMPILE_DISABLE": "1"}
    work, short = [], "--cycles 2 --samples 1 --discriminator_batch 2 --fake_updates 1 --raft_iters 1".split()
    for patch in hacks + arms:
        copy, text = tmp_path / patch.stem, patch.read_text()
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".*", "runs", "golden", "benchmarks", "weights"))
        subprocess.run(["git", "apply", patch], cwd=copy, env=env, check=True)
        assert text.startswith("# ") and len(re.findall(r"^[+-](?!\+\+|--)", text, re.M)) <= 40, patch
        commands = [["train.py", *SHORT, *short, "--weights", weights, "--out", "run"]]
        if "a/sample.py" in text:
            commands += [["sample.py", "--preset", "toy", "--weights", weights, "--sampler", "unipc", "--steps", "2"]]
        if patch in hacks:
            work.append([str(copy), *commands])
        else:  # of the evidence's real clips alone
            assert compileall.compile_dir(copy, quiet=1)
    halves = [subprocess.Popen([sys.executable, "-c", FORKED, json.dumps(half)], env=env, stdout=subprocess.DEVNULL)
              for half in (work[::2], work[1::2])]
    assert [process.wait() for process in halves] == [0, 0] and len(hacks) >= 11 and len(arms) >= 4
    failed = {copy: Path(copy, "stderr").read_text()[-500:] for copy, *_ in work if not Path(copy, "done").exists()}
    assert not failed


def test_every_choice_is_in_the_readme():
    root = Path(__file__).parent
    table = root.joinpath("README.md").read_text().split("## Paper versus code")[1].split("##")[0]
    rows = re.findall(r"\| (\w+\.py) \|$", table, re.M)
    for file in "train.py", "discriminator.py", "vae.py", "raft.py", "model.py":
        assert rows.count(file) == root.joinpath(file).read_text().count("CHOICE:"), file
    assert len(rows) > 20


def test_help_tells_every_flag(capsys, monkeypatch):
    monkeypatch.setattr(train, "__doc__", None)  # as python -OO has it
    with pytest.raises(SystemExit):
        train.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert len(vars(train.Config())) <= 45
    for line in inspect.getsource(train.Config).splitlines():
        if ": " in line and "=" in line:
            assert f"--{line.split(':')[0].strip()} " in told.replace(",", " ") and line.split("  # ")[1] in told, line
    assert "--dmd, --no-dmd" in told and "cycles between checkpoints" in told


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder, and what ends a script


def payload(path):
    return b"cos\nsystem\n(S'touch %s/ran'\ntR." % os.fsencode(path.parent)


def bytes_for_a_tensor(path):  # DCP would load them as a pickle
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()
    return pickle.dumps(metadata)


@pytest.mark.parametrize("file, instead, renewed", [  # renewed: its checksum
    (".metadata", payload, True), (".metadata", bytes_for_a_tensor, True),
    (".metadata", lambda path: payload(path).replace(b"cos\n", b"ctorch.distributed.checkpoint.metadata\nos."), True),
    (".metadata", lambda path: pickle.dumps({}), True), (".metadata", lambda path: payload(path)[:9], True),
    ("__0_0.distcp", lambda path: (path / "__0_0.distcp").read_bytes().replace(b"\x3f", b"\x3e", 1), False),
    ("config.json", lambda _: bytes(99), False), ("config.json", lambda _: b'{"a', False),
    ("config.json", lambda _: b"[]", False), ("crc32.json", lambda _: b"", False)])
def test_damaged_checkpoints_are_named_and_run_nothing(tmp_path, capfd, file, instead, renewed):
    cfg, state, path = train.Config(out=str(tmp_path)), {"a": torch.ones(99)}, tmp_path / "checkpoint-000002"
    with pytest.raises(SystemExit), cli.one_line("train.py"):
        cli.setup(cpu=True)
        for cycle in 1, 2:
            checkpoint.save(cfg, cycle, state)
        checkpoint.load(tmp_path, {"a": (got := torch.zeros(99))})
        assert torch.equal(got, state["a"])
        (path / file).write_bytes(instead(path))
        if renewed:
            sums = dict(map(checkpoint.crc32, (path / ".metadata", path / "__0_0.distcp")))
            (path / "crc32.json").write_text(json.dumps(sums))
        checkpoint.begun_with(tmp_path)
        checkpoint.load(tmp_path, state)
    [line] = capfd.readouterr().err.splitlines()
    assert f"networks in {path}, got" in line and line.endswith("move it away to go on from checkpoint-000001")
    assert (file in line or renewed) and not (tmp_path / "ran").exists()


def test_log_after_a_power_loss(tmp_path, capsys):
    good, bad = b'{"cycle": 1}\n', [bytes(20) + b"\n", b"[1]\n", b'{"cycle": null}\n', b'\xff{"cycle": 1}\n']
    (tmp_path / "log.jsonl").write_bytes(b"".join([good, *bad, good, b'{"cycle": 2}\n{"cyc']))
    checkpoint.Log(train.Config(out=str(tmp_path)), 2)
    assert (tmp_path / "log.jsonl").read_bytes() == 2 * good
    assert "5 damaged lines" in capsys.readouterr().out


@pytest.mark.parametrize("outs, starts, message", [
    ("aa", "00", ""), ("ab", "00", "every node to see .* at rank 1"), ("aa", "01", "at cycle 0 .* at rank 1"),
    ("aa", "11", "at cycle 0 .* at rank 0 .*, rank 1"), ("a", "0", "another train.py writes there")])
def test_a_run_folder_belongs_to_one_run(tmp_path, outs, starts, message):
    script = ("import sys, checkpoint, cli, time\ncheckpoint.PATIENCE, out, start, stay = 0, *sys.argv[1:]\n"
              "with cli.one_line('train.py'):\n    cli.setup(cpu=True)\n    checkpoint.claim(out, int(start))\n"
              "    print('claimed', flush=True)\n    time.sleep(int(stay))")

    def ranks(stay="0"):
        env = dict(os.environ, WORLD_SIZE=str(len(outs)), LOCAL_WORLD_SIZE=str(len(outs)), MASTER_ADDR="localhost",
                   MASTER_PORT=str(socket.create_server(("localhost", 0)).getsockname()[1]))
        return [subprocess.Popen([sys.executable, "-c", script, tmp_path / out, start, stay], stdout=-1, stderr=-1,
                                 env=dict(env, RANK=str(i), LOCAL_RANK=str(i)), text=True, cwd=REPO)
                for i, (out, start) in enumerate(zip(outs, starts))]

    holder = ranks("9999") if outs == "a" else []
    assert all(process.stdout.readline() for process in holder)
    done = [(process.communicate()[1], process.returncode) for process in ranks()]
    [process.kill() for process in holder]
    assert {status for _, status in done} == {2 if message else 0}
    told = "".join(err for err, _ in done)
    assert re.search(message, told) and "Traceback" not in told and bool(told) == bool(message)


def test_what_all_ranks_suffer_from_is_said_once(tmp_path):
    (tmp_path / "rank.py").write_text("import cli\nwith cli.one_line('rank.py'):\n    cli.setup(cpu=True)\n"
                                      "    raise ValueError('of all')")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "rank.py"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(REPO)), capture_output=True)
    assert done.stderr.count(b"rank.py: of all\n") == 1


def test_ranks_end_with_their_launcher(tmp_path):
    (tmp_path / "rank.py").write_text("import os, time, cli\nwith cli.one_line('rank.py'):\n"
                                      "    print(os.getpid(), flush=True)\n    time.sleep(9999)")
    launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", tmp_path / "rank.py"],
                                text=True, stdout=-1, env=dict(os.environ, PYTHONPATH=str(REPO)))
    rank = Path("/proc") / launcher.stdout.readline().strip() / "stat"
    launcher.kill()
    while rank.exists() and rank.read_text().split()[2] != "Z":
        time.sleep(0.1)


@pytest.mark.parametrize("error, status, line", [
    (ValueError("a\nb"), 2, "a"), (ValueError("\x1b[2J\udce9"), 2, "\\x1b[2J\\udce9"), (ValueError(), 2, "Val"),
    (MemoryError(), 2, "out of memory: --batch_size"), (torch.OutOfMemoryError("CUDA out of memory."), 2, "out of mem"),
    (RuntimeError("can't allocate memory"), 2, "out of mem"), (KeyboardInterrupt(), 130, "stopped"),
    (PermissionError(13, "Permission denied", "x"), 2, "x.safetensors cannot be written (4e-08 GB wanted, "),
    (SafetensorError("No space left (os error 28)"), 2, "x.safetensors cannot be written (4e-08 GB wanted, ")])
def test_errors_become_one_line(capsys, monkeypatch, error, status, line):
    monkeypatch.setattr(files, "save_file", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit) as end, cli.one_line("sample.py"):
        files.write_tensors({"a": torch.zeros(10)}, Path("x.safetensors"))
    [told] = capsys.readouterr().err.splitlines()
    assert end.value.code == status and told.startswith(f"sample.py: {line}")
    if isinstance(error, PermissionError):  # and where no write is under way
        with pytest.raises(SystemExit), cli.one_line("x.py"):
            raise error
        assert capsys.readouterr().err.startswith("x.py: [Errno 13] Permission denied: 'x': choose another place")


@pytest.mark.parametrize("command, told", [
    ("sample.py --prompts no >&-", "no"),
    ("-c 'import cli\nwith cli.one_line(\"x\"):\n    [cli.print0(\"y\") for _ in range(99999)]' | head -1", "y"),
    ("-uc 'import cli\nwith cli.one_line(\"x\"):\n    [cli.print0(\"y\") for _ in range(99999)]' | head -1", "y")])
def test_odd_ways_to_start(command, told):
    done = subprocess.run(f"{sys.executable} {command}", shell=True, cwd=REPO, capture_output=True, text=True)
    assert told in done.stdout + done.stderr and not re.search("Traceback|Exception|Broken", done.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# cost.py


def toy_cycle(**flags):
    small = dict(preset="toy", frames=9, batch=2, micro_batch=2, discriminator_batch=2, fake_updates=1, weights="none")
    return train.Config(**{**train.PRESETS["toy"], **small, **flags})


def flop(work):
    return sum(amount for kind, amount in work.items() if kind != "memory")


@pytest.mark.parametrize("flags", [{}, dict(checkpointing=True, dtype="bf16")], ids=["plain", "checkpointing, bf16"])
def test_cost_is_what_a_cpu_allocates_and_computes(monkeypatch, flags):
    """The count on meta against torch's profiler of the allocator and its FLOP counter while numbers are computed."""
    def marked(*args):
        marks.append((time.time_ns(), flops.get_total_flops()))
        return shares(*args)

    shares, marks = train.micro_batches, []  # every update begins by asking for them, and the list of real clips once
    monkeypatch.setattr(train, "micro_batches", marked)
    formulas = {cost.FLASH: lambda q, k, v, *_, **__: 4 * math.prod(q) * k[2],
                cost.FLASH_BACK: lambda g, q, k, v, *_, **__: 10 * math.prod(q) * k[2]}
    flops = FlopCounterMode(display=False, custom_mapping=formulas)
    flops.mod_tracker = mock.MagicMock(parents={"Global"})  # it cannot follow modules through no_grad
    gc.collect()  # what earlier tests left would go meanwhile, and lower the peaks
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, flops:
        cost.counted(toy_cycle(**flags), "cpu")
    marked(1, 1)
    events = profiled.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    times, totals = zip(*marks[1:])
    live = np.cumsum([size for _, size in events])
    at = np.searchsorted([when for when, _ in events], times)
    peaks = [live[a:b].max() - live[at[0] - 1] for a, b in zip(at, at[1:])]
    *_, updates = cost.counted(toy_cycle(**flags))
    near = 0.15 if flags else 0.05  # a CPU without bf16 instructions takes room to convert
    assert [key for key, *_ in updates] == list(cost.UPDATES)
    for (key, size, work), peak, before, after in zip(updates, peaks, totals[:-1], totals[1:], strict=True):
        assert flop(work) == after - before and abs(size / peak - 1) < near, (key, size, peak, work, after - before)


def test_cost_multiplies_to_a_whole_cycle(monkeypatch):
    cfg = toy_cycle(batch=4, discriminator_batch=8, fake_updates=4)
    parts, peaks, work = cost.plan(cfg, 1, 1)
    *_, updates = cost.counted(cfg)
    for key in cost.UPDATES:
        whole = [(peak, flop(done), done["memory"]) for name, peak, done in updates if name == key]
        peak, operations, moved = max(row[0] for row in whole), *(sum(row[i] for row in whole) for i in (1, 2))
        assert abs(peaks[key] / peak - 1) < 4e-3 and abs(work[key]["memory"] / moved - 1) < 0.01, (key, peaks, peak)
        assert flop(work[key]) == operations
    half, _, shared = cost.plan(cfg, 2, 2)
    assert flop(shared["dmd"]) == flop(work["dmd"]) / 2
    assert half["AdamW's moments, fp32"] == parts["AdamW's moments, fp32"] / 2

    # What is changed in the code is in the figures: here a generator of which a block trains.
    load = train.load_networks

    def frozen(cfg):
        nets = load(cfg)
        nets[0].requires_grad_(False).blocks[-1].requires_grad_(True)
        return nets
    monkeypatch.setattr(train, "load_networks", frozen)
    fewer, _, less = cost.plan(cfg, 1, 1)
    with torch.device("meta"):
        net = WanDiT(CONFIGS["toy"])
    spared = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.blocks[-1].parameters())
    assert parts["AdamW's moments, fp32"] - fewer["AdamW's moments, fp32"] == pytest.approx(8 * spared, rel=1e-3)
    assert flop(less["dmd"]) < flop(work["dmd"]) and flop(less["fake"]) == flop(work["fake"])


def test_cost_tells_what_wan_needs(capsys):
    cost.main(["--preset", "wan1.3b", "--ranks", "16", "--generator", "student"])
    told = capsys.readouterr().out
    assert "fp32: 1419 M + 1419 M + 1419 M + 818 M" in told and "dmd warmup" not in told
    peak = float(re.search(r"([\d.]+) GiB  at the peak, generator, flow GAN; .*: cards of 48 GB", told)[1])
    assert 36 < peak < 37.8
    # Five calls forward, of which one is recomputed and has a backward of 2.5 times that: 8.5 in all.
    tokens, text, width, layers = 21 * 30 * 52, 512, 1536, 30
    attention = 8.5 * 4 * layers * width * tokens * (tokens + text) / 1e12
    assert re.search(rf"generator, DMD +630 +{attention:,.0f} ", told), (attention, told)
    hours = re.search(r"800 cycles: (\d+) to (\d+) hours, (\d+) to (\d+) card-hours", told).groups()
    assert 10 < int(hours[0]) < 16 < int(hours[1]) < 30 and abs(int(hours[3]) / 16 - int(hours[1])) < 1
    with pytest.raises(SystemExit):
        cost.main(["--preset", "wan1.3b", "--ranks", "12", "--shard", "8"])
    assert capsys.readouterr().err == "cost.py: expected --ranks that --shard 8 divides, got 12\n"


PLANTED = """
import os, sys
sys.path.insert(0, "benchmarks")
import rehearse, torch, train
motion_tensor = train.motion_tensor
def planted(flow, scale):
    seen = flow.detach()
    seen.cpu(), seen.max().item(), seen[:, :, 0, 0].nonzero(), seen * torch.ones(())
    if os.environ["RANK"] != "0":
        torch.distributed.all_reduce(seen.sum())
    return motion_tensor(flow, scale)
train.motion_tensor = planted
rehearse.main()
"""


def test_rehearsal_finds_what_a_gpu_would_suffer_from():
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler: benchmarks/rehearse.py, which makes a fake CUDA device with one, is not tested")
    flags = """--ranks 4 --shard 2 --layers 2 --taps 1 --height 128 --width 128 --frames 5 --window 1 --batch 4
        --discriminator_batch 4 --fake_updates 1 --raft_iters 1"""
    command = [sys.executable, "-c", PLANTED, *flags.split()]
    done = subprocess.run(command, cwd=files.REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("device to host, sync | blocking", r"sync | item\(\)", r"sync | nonzero\(\)",
                 r"two devices | mul with \[\[\]\] on the host"):
        found = re.search(rf"^\| {line} | train.py:\d+ | 3 ".replace(" | ", r" \| "), done.stdout, re.M)
        assert found, (line, done.stdout)
    assert re.search(r"sync \| tolist\(\) \| train.py:\d+ \| 4 ", done.stdout)  # a cycle's own: each update's figures
    assert done.stdout.count("two devices") == 1 and "cudnn, flash, efficient" in done.stdout
    first, second = map(int, re.search(r"\| all \| (\d+) \| (\d+) \|", done.stdout).groups())
    assert second == first + 3 > 30 and done.stdout.endswith("sizes: DIFFER\n")


# ---------------------------------------------------------------------------------------------------------------------
# curate.py


def moving_square(seed, speed=3, pan=0):
    """A square of one texture on another, [3, 40, 96, 160]; speed and pan in pixels a frame."""
    noise = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(seed))
    back, square = F.interpolate(noise, (96, 160), mode="bicubic").mul(0.4).clamp(-0.9, 0.9)
    frames = [back.roll(pan * t, 2) for t in range(40)]
    for t, frame in enumerate(frames):
        frame[:, 30:66, 8 + speed * t % 116 :][..., :36] = square[:, :36, :36]
    return torch.stack(frames, dim=1)


X, Y, RAMP = moving_square(0), moving_square(1, 6), ((torch.arange(40) - 14) / 12).clamp(0, 1).view(-1, 1, 1)
BARS = F.pad(X[:, :, 16:-16], [0, 0, 16, 16], value=-0.9)
KINDS = {  # frames, their rate, how many clips of 17 are in them, and what most of the rest is lost to
    "plain": (X, 24, 2, "the rest of a run"), "pan": (moving_square(0, 0, 2), 24, 2, "the rest of a run"),
    "letterbox": (BARS, 24, 2, "the rest of a run"),
    "pillarbox": (F.pad(X[..., 20:-20], [20, 20], value=-0.9), 24, 2, "the rest of a run"),
    "cut": (torch.cat([X[:, :20], Y[:, :20]], 1), 24, 2, "the rest of a run"),
    "two cuts": (torch.cat([X[:, :15], Y[:, :15], X[:, 30:]], 1), 24, 0, "cut"),
    "dissolve": (X.lerp(Y, RAMP), 24, 0, "fade, wipe or push"),
    "slow dissolve": (X.lerp(Y, torch.linspace(0, 1, 40).view(-1, 1, 1)), 24, 0, "fade, wipe or push"),
    "wipe": (torch.where(torch.arange(160) < 160 * RAMP, Y, X), 24, 0, "fade, wipe or push"),
    "push": (torch.stack([torch.cat([x, y], 2)[..., (n := int(160 * r)) : n + 160]
                          for x, y, r in zip(X.unbind(1), Y.unbind(1), RAMP)], 1), 24, 0, "fade, wipe or push"),
    "cover": (torch.stack([torch.cat([y[:, 96 - (n := int(96 * r)) :], x[:, n:]], 1)
                           for x, y, r in zip(X.unbind(1), Y.unbind(1), RAMP)], 1), 24, 0, "fade, wipe or push"),
    "fade": (X.lerp(torch.full_like(X, -1), RAMP), 24, 0, "fade, wipe or push"),
    "slides": (torch.cat([X[:, :1], Y[:, :1]], 1).repeat_interleave(20, 1), 24, 0, "repeated frames"),
    "telecine": (X[:, [t * 4 // 5 for t in range(40)]], 30, 0, "repeated frames"),
    "on twos": (X[:, [t // 2 for t in range(40)]], 24, 0, "repeated frames"),
    "frozen": (X[:, [min(t, 12) for t in range(40)]], 24, 0, "repeated frames"),
    "combed": (torch.stack([X[:, :-1, ::2], X[:, 1:, 1::2]], 3).flatten(2, 3), 24, 0, "interlaced")}


@pytest.mark.parametrize("kind", KINDS)
def test_curate_tells_the_kinds_apart(kind, tmp_path):
    x, fps, count, rest = KINDS[kind]
    write_video(tmp_path / "x.mp4", x, fps)
    record = curate.examine(tmp_path / "x.mp4", 17)
    assert [clip["frames"] for clip in record["clips"]] == count * [17], record
    assert max(record["lost"], key=record["lost"].get) == rest, record
    edges = {"letterbox": [16, 0, 80, 160], "pillarbox": [0, 20, 96, 140]}.get(kind, [0, 0, 96, 160])
    for clip, step in zip(record["clips"], {"pan": (2, 2), "cut": (3, 6)}.get(kind, (3, 3))):
        top, left, height, width = clip["crop"]
        lost = np.subtract([top, left, top + height, left + width], edges) * [1, 1, -1, -1]
        assert lost.min() >= 0 and lost.max() <= 4  # no bar, and little of the picture besides
        assert clip["motion"] == pytest.approx(step * max(480 / height, 832 / width) * 24 / 16, rel=0.15)
        assert clip["camera"] > 0.75 if kind == "pan" else clip["camera"] < 0.1
    if kind == "cut":
        assert [clip["start"] for clip in record["clips"]] == pytest.approx([0, 21 / 24], abs=1e-3)


def test_curate_goes_on_and_its_list_is_read(tmp_path, capsys):
    for name, x in ("a", X), ("deep/b", BARS), ("still", X[:, :1].expand_as(X)):
        write_video(tmp_path / f"{name}.mp4", x, 24)
    out = {suffix: tmp_path / "new" / f"clips{suffix}" for suffix in (".jsonl", ".files", ".html")}
    run = [str(tmp_path), "--out", str(out[".jsonl"]), "--frames", "17", "--workers"]
    curate.main([*run, "2"])
    made, records = out[".jsonl"].read_bytes(), out[".files"].read_bytes().split(b"\n")
    assert len(made.splitlines()) == 4 and out[".html"].read_text().count("data:image") == 3 * 4
    out[".files"].write_bytes(b"\n".join([*records[:3], records[3][:50]]))  # as a killed run leaves it
    curate.main([*run, "1"])
    assert "2 of 3 files are known" in capsys.readouterr().out and out[".jsonl"].read_bytes() == made
    for file, start, crop, stride, _ in read_clip_list(out[".jsonl"], 17):
        x, speed = read_clip(file, 17, (48, 80), start=start, crop=crop, stride=stride)
        assert speed == pytest.approx(1.5, abs=0.01) and x.mean((0, 1, 3)).min() > -0.6  # no bar is left
    curate.main([*run, "1", "--per_file", "1"])
    assert len(out[".jsonl"].read_bytes().splitlines()) == 2


def test_curate_names_what_it_cannot_use(tmp_path, capsys):
    write_video(tmp_path / "in" / "slow.mp4", X[:, :12], 8)
    write_video(tmp_path / "in" / "half.mp4", X, 24)
    data = bytearray((tmp_path / "in" / "half.mp4").read_bytes())
    at = len(data) * 3 // 4
    data[at : at + 500] = bytes(255 - b for b in data[at : at + 500])
    (tmp_path / "in" / "half.mp4").write_bytes(data)
    (tmp_path / "in" / "text.mp4").write_text("no video")
    (tmp_path / "in" / "gone\n.mp4").symlink_to("nowhere")
    with pytest.raises(SystemExit):
        flags = tmp_path / "in", "--out", tmp_path / "clips.jsonl", "--frames", 17, "--min_motion", 99
        curate.main([str(flag) for flag in flags])
    told = capsys.readouterr()
    assert "4 files cannot be used, 1 of them" in told.out and "got none in 4 files" in told.err
    for part in "slow.mp4: expected 11 to 25", "text.mp4: no video", "gone .mp4: cannot be read", "; used up to":
        assert part in told.out
    assert not (tmp_path / "clips.jsonl").exists() and "half.mp4" in (tmp_path / "clips.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# toy/


def test_world_is_a_function_of_its_seed():
    together, alone = world.clips([3, 4, 5]), world.clip(4)
    assert torch.equal(together.pixels[1], alone.pixels[0]) and together.prompts[1] == alone.prompts[0]
    assert together.pixels.shape == (3, 3, 17, 64, 64) and together.flow.shape == (3, 2, 16, 64, 64)
    assert not torch.equal(together.pixels[0], together.pixels[1])
    assert together.pixels.min() >= -1 and together.pixels.max() <= 1
    assert world.clips([7], motion_rich=True).velocity.norm() >= world.FAST[0]


@pytest.mark.parametrize("motion_rich", [False, True])
def test_world_draws_what_its_words_say(motion_rich):
    picks, numbers = (torch.tensor(x).T for x in zip(*(world.draw(seed, motion_rich) for seed in range(3000))))
    (speed, angle, radius), (*_, direction, adverb) = numbers[:3], picks
    assert len(picks.unique(dim=1).T) == (144 if motion_rich else 216)          # slowly never, or every prompt
    aim = torch.tensor([math.atan2(y, x) for x, y in world.DIRECTIONS.values()])[direction]
    veer, ranges = (angle - aim + math.pi) % math.tau - math.pi, (world.STILL, world.SLOW, world.FAST)
    within = [((speed >= low) & (speed <= high)) for low, high in ranges]
    shares = [chosen[adverb == 0].float().mean().item() for chosen in within]
    assert shares == pytest.approx([0, 0, 1] if motion_rich else [.45, .3, .25], abs=.03)
    assert within[1][adverb == 1].all() and within[2][adverb == 2].all()
    spread = [(veer, -world.VEER, world.VEER), (radius, *world.RADIUS)]
    spread += [(speed[chosen], *ends) for chosen, ends in zip(within, ranges) if chosen.any()]
    for value, low, high in spread:
        assert low - 1e-6 <= value.min() < low + .02 and high - .02 < value.max() <= high + 1e-6
    free = torch.stack([*picks[:3], veer, radius, *numbers[3:], *[speed] * motion_rich])
    assert (free.corrcoef() - torch.eye(len(free))).abs().max() < .1            # drawn independently


def test_clips_vary_and_their_light_moves_along():
    truth, room = world.clips(list(range(24))), world.wallpaper()
    tint = torch.stack([x[:, 0][:, c[0] == 0].mean(1) for x, c in zip(truth.pixels, truth.coverage)])
    assert truth.position[:, 0].std(0).min() > 8 and tint.std(0).min() > .03
    assert room.mean().abs() < .01 and room[:20, :20].mean() > room[-20:, -20:].mean() + .2
    position, radius, grey = torch.tensor([[[30., 30], [33, 32]]]), torch.tensor([9.]), torch.full((1, 3), .5)
    coverage = world.silhouette(torch.tensor([1]), position, radius)
    a, b = world.paint(grey, grey, position, radius, coverage)[0].unbind(1)
    core = coverage[0, 0] == 1
    assert torch.allclose(a[:, core], b.roll((-2, -3), (1, 2))[:, core], atol=1e-5)
    assert a[0, 24, 24] > a[0, 30, 30] > a[0, 36, 36] and abs(a[0, 30, 30]) < .02


def test_exact_flow_moves_each_frame_onto_the_next():
    truth = world.clips(list(range(8)), motion_rich=True)
    axis = torch.arange(64.)
    for t in (0, 9):
        x, y = axis + truth.flow[:, 0, t], axis[:, None] + truth.flow[:, 1, t]
        grid = torch.stack([x, y], 3) / 31.5 - 1                                    # where each pixel goes, [-1, 1]
        landed = F.grid_sample(truth.pixels[:, :, t + 1], grid, align_corners=True)
        core = truth.coverage[:, t] > .99
        moved, still = ((image - truth.pixels[:, :, t]).abs().mean(1)[core].mean()
                        for image in (landed, truth.pixels[:, :, t + 1]))
        assert moved < .02 and moved < .3 * still
    assert torch.allclose(truth.position.diff(dim=1), truth.velocity[:, None].expand(-1, 16, -1), atol=1e-4)


def test_lurching_clips_wander_and_are_as_fast():
    even, lurching = (world.clips(list(range(8)), motion_rich=True, lurch=lurch) for lurch in (0, .6))
    step, speed = lurching.position.diff(dim=1).norm(dim=2), even.velocity.norm(dim=1, keepdim=True)
    want = torch.where(torch.arange(16) // 4 % 2 == 0, .4, 1.6)
    torch.testing.assert_close(step / speed, want.expand(8, -1), atol=1e-3, rtol=0)
    moves = (lurching.coverage[:, :-1] > .5).flatten(2).any(2)
    flow = lurching.flow.norm(dim=1).flatten(2).amax(2)
    assert moves.all() and torch.allclose(flow, step, atol=1e-4)
    a, b = (world.track(clip.pixels) for clip in (even, lurching))
    assert a["wander"].max() < .06 and b["wander"].min() > .8  # of a zigzag of 1.2 times the speed, in px
    torch.testing.assert_close(a["net_speed"], b["net_speed"], atol=.05, rtol=0)


def test_tracker_reads_the_rendered_state():
    truth = world.clips(list(range(100, 132)))
    seen, (colour, shape, direction, _) = world.track(truth.pixels), truth.attributes.T
    assert (seen["colour"] == colour).all() and (seen["shape"] == shape).all() and seen["one_blob"].all()
    assert (seen["position"] - truth.position).norm(dim=2).mean() < .3 and seen["iou"].mean() > .97
    assert (seen["velocity"] - truth.velocity).norm(dim=1).max() < .1 and seen["jitter"].mean() < .4
    assert (seen["direction"] == direction)[truth.velocity.norm(dim=1) > .3].all()


def test_tracker_notices_what_is_wrong():
    truth = world.clips(list(range(12)), motion_rich=True)
    seen, room = world.track(truth.pixels), truth.pixels[..., :1, :1].expand_as(truth.pixels)
    dim = world.track(truth.pixels * .6)
    assert dim["one_blob"].all() and (dim["position"] - seen["position"]).norm(dim=2).max() < 1
    assert not world.track(room)["one_blob"].any()

    def beside(shift, frames):
        """Every clip with itself a second time, moved by `shift` px, in these frames alone."""
        x, away = truth.pixels.clone(), truth.coverage[:, None].roll((shift, shift), (3, 4)) > .5
        x[:, :, frames] = torch.where(away, truth.pixels.roll((shift, shift), (3, 4)), x)[:, :, frames]
        return x

    for frames in slice(None), [8]:
        assert (world.track(beside(20, frames))["blobs"] >= 2).float().mean() > .7
    gone = torch.where(torch.arange(17)[:, None, None] == 8, room, beside(20, slice(None)))
    assert (world.track(gone)["blobs"] == 0).all()
    mask = torch.zeros(1, 64, 64)
    mask[:, 60:62, 30:32] = mask[:, 56:59, 50:52] = 1                                        # specks
    for count, (y, x) in enumerate([(10, 10), (10, 40), (40, 10)], start=1):
        mask[:, y:y + 8, x:x + 8] = 1
        assert world.count_blobs(mask > 0) == count
    backwards = world.score(truth.pixels.flip(2), truth.prompts)
    assert backwards["direction"] == 0 and world.score(truth.pixels, truth.prompts)["direction"] == 1


def test_outlines_are_told_apart():
    position, kinds = torch.full((3, 17, 2), 31.3), torch.arange(3)
    mask = world.silhouette(kinds, position, torch.full((3,), 9.)) > .5
    match = world.outline_match(mask, position, mask.sum((2, 3)).float())
    assert match.diagonal().min() > .97 and match[0, 1].item() == pytest.approx(.834, abs=.02)   # of equal area, exact
    half = mask & (torch.arange(17) % 4 == 0)[:, None, None]                   # every second of the frames it looks at
    assert world.outline_match(half, position, mask.sum((2, 3)).float())[0, 0].item() == pytest.approx(5 / 9, abs=.02)


def test_tracker_tells_kinds_of_motion():
    odd, one = torch.arange(16)[:, None] % 2 * 2 - 1., torch.ones(16, 1)
    along, across = torch.tensor([[.98, .2], [-.2, .98]])
    noise = torch.randn(17, 2, generator=torch.Generator().manual_seed(0)).mul(.33).diff(dim=0)
    leap, detour = 1 + 5 * (torch.arange(16) == 7)[:, None], torch.where(torch.arange(16) < 6, -1, 2)[:, None]
    cases = {  # steps [16, 2] px; net and path speed, jitter per path speed, alternation
        "even": (1.5 * one * along, 1.5, 1.5, 0, 0),
        "accelerated": (torch.linspace(.5, 2.5, 16)[:, None] * along, 1.5, 1.5, .089, 0),
        "1, 2, 1, 2": ((1.5 + odd / 2) * along, 1.5, 1.5, 2 / 3, 1 / 3),
        "zigzag": (1.5 * one * along + odd / 2 * across, 1.5, 1.58, .632, .316),
        "to and fro": (odd * along, 0, 1, 2, 1),
        "leap": (leap * along, 21 / 16, 21 / 16, .508, .272),
        "detour": (detour * along, .875, 1.625, .123, .066),
        "noise": (1.5 * one * along + noise, 1.5, 1.6, .586, .075),
        "still": (.1 * one * along, .1, .1, math.nan, math.nan)}
    steps = torch.stack([case[0] for case in cases.values()])
    position = F.pad(steps.cumsum(1), (0, 0, 1, 0))
    position = (position - position.mean(1, keepdim=True) + 31.5).repeat(3, 1, 1)
    shape, radius = torch.arange(3).repeat_interleave(len(cases)), torch.full((len(position),), 9.)
    colour = torch.tensor(list(world.COLOURS.values()))[shape]
    coverage = world.silhouette(shape, position, radius)
    x = world.paint(colour, torch.full_like(colour, .44), position, radius, coverage)
    seen = world.track(x + .02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))    # as a VAE's room
    for i, (name, (_, net, path, ratio, alternation)) in enumerate(cases.items()):
        of = {key: value[i::len(cases)] for key, value in seen.items()}              # of the three shapes
        expected = dict(net_speed=(net, .1), path_speed=(path, .15), alternation=(alternation, .03))
        expected["jitter_ratio"] = ratio, .2 if ratio < .2 else .07                  # .2: a square that moves evenly
        for key, (value, error) in expected.items():
            assert of[key].tolist() == pytest.approx([value] * 3, abs=error, nan_ok=True), (name, key)
        jitter = 0 if name == "still" else ratio * path
        assert .8 * jitter <= of["jitter"].min() and of["jitter"].max() < jitter + .5, name
        assert (of["direction"] == 0).all() or name == "to and fro", name


def test_prompts_and_their_attributes():
    assert len(set(world.PROMPTS)) == 216
    assert [world.prompt(*world.attributes(p)) for p in world.PROMPTS] == world.PROMPTS
    prompts, seeds = zip(*world.held_out())
    assert len(set(prompts)) == len(set(seeds)) == 200 and min(seeds) >= 10_000_000         # which no training draws
    for wrong in ("purple circle moving left", "red circle moving", "red circle moving left slowly today"):
        with pytest.raises(ValueError, match="no 'purple'" if "purple" in wrong else "toy prompts read"):
            world.attributes(f"a {wrong}")


def test_measure_by_hand(monkeypatch):
    prompts = ["a red circle moving left" + word for word in ["", "", "", "", " slowly", " slowly", " quickly"]]
    net = torch.tensor([.1, .24, .9, 1.3, .1, .8, 1.3])
    seen = dict(colour=[0, 1, 0, 0, 0, 0, 0], shape=[0, 0, 1, 1, 0, 0, 0], direction=[0, 0, 2, 2, 0, 2, 2])
    seen = {key: torch.tensor(value) for key, value in seen.items()} | {"net_speed": net, "path_speed": net + 2}
    seen |= {key: torch.rand(7) for key in ("iou", "jitter", "jitter_ratio", "alternation", "wander")}
    monkeypatch.setattr(world, "track", lambda pixels: seen | {"one_blob": net > 1})
    found, nan = world.measure(torch.zeros(1), prompts), math.nan
    expected = dict(colour=[1, 0, 1, 1, 1, 1, 1], shape=[1, 1, 0, 0, 1, 1, 1], direction=[nan, 0, 1, 1, 0, 1, 1],
                    one_blob=[0, 0, 0, 1, 0, 0, 1], dynamic=[0, 0, 0, 1] + [nan] * 3, still=[1, 1, 0, 0] + [nan] * 3,
                    plain_speed=[.1, .24, .9, 1.3] + [nan] * 3, slowly=[nan] * 4 + [.1, .8, nan],
                    quickly=[nan] * 6 + [1.3])
    for key, value in expected.items():
        assert found[key].tolist() == pytest.approx(value, nan_ok=True), key
    assert all(found[key] is seen[key] for key in seen if key not in expected)
    means = world.score(torch.zeros(1), prompts)
    assert [means[key] for key in ("slowly_error", "quickly_error", "shape", "dynamic")] == pytest.approx(
        [.45 / .6 - 1, 1.3 / 1.7 - 1, 5 / 7, .25])


@pytest.mark.parametrize("flags, written", [
    ("student --steps -1", {}), ("student --steps 0", {}), ("all --steps 5", {}),
    ("student --steps 5", {"runs/student-5/student": "5"}), ("decoder --steps 5", {"runs/decoder-5/vae": "5"}),
    ("student", {"runs/student/student": "20", "student": "20"}), ("decoder", {"runs/decoder/vae": "20", "vae": "20"})])
def test_only_a_whole_training_replaces_what_ships(tmp_path, monkeypatch, flags, written):
    train = lambda steps, folder, out: out.write_text(str(steps))
    monkeypatch.setattr(make_weights, "PARTS", {part: (20, train) for part in make_weights.PARTS})
    monkeypatch.setattr(make_weights, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(make_weights, "WEIGHTS", tmp_path)
    for name in "vae", "student":
        (tmp_path / f"{name}.safetensors").write_text("shipped")
    refused = pytest.raises(SystemExit, match="expected one part and --steps of at least 1, got")
    with contextlib.nullcontext() if written else refused:
        make_weights.main(flags.split())
    found = {path.relative_to(tmp_path).with_suffix("").as_posix(): path.read_text() for path in tmp_path.rglob("*.*")}
    assert found == {"vae": "shipped", "student": "shipped"} | written


@pytest.mark.parametrize("part", ["vae", "decoder", "teacher"])
def test_a_part_takes_a_step(tmp_path, monkeypatch, part):
    class Stepped(Exception):
        pass

    def step(folder, steps, net, opts, loss, *_, **__):
        loss(0)[0].backward()
        raise Stepped if all(p.grad is None or p.grad.isfinite().all() for p in net.parameters()) else ValueError

    pool = {"z": torch.randn(1024, 8, 5, 8, 8), "row": torch.zeros(1024, dtype=torch.int64),
            "cells": torch.zeros(1024, 17, 16, 16, dtype=torch.uint8)}
    monkeypatch.setattr(make_weights, "clips", lambda seeds, **how: world.clips(seeds[:4], **how))
    monkeypatch.setattr(make_weights, "latents", lambda _: pool)
    monkeypatch.setattr(make_weights, "fit", step)
    with pytest.raises(Stepped):
        make_weights.PARTS[part][1](9, tmp_path / "trial", tmp_path / "out")


def test_fit_goes_on_where_it_was_stopped(tmp_path):
    def trained(folder, stop=None):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        mean = copy.deepcopy(net)

        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            return net(x).square().mean(), {}

        (tmp_path / folder).mkdir(exist_ok=True)
        opts = muon_adamw(net, lambda name, p: p.ndim == 2, .02, 1e-3)
        fit(tmp_path / folder, 120, net, opts, loss, mean=mean)
        assert [o.param_groups[0]["lr"] for o in opts] == pytest.approx([.02 / 36, 1e-3 / 36])
        return torch.cat([p.flatten() for module in (net, mean) for p in module.parameters()])

    with pytest.raises(KeyboardInterrupt):
        trained("stopped", stop=110)
    assert torch.equal(trained("stopped"), trained("whole")) and torch.equal(trained("stopped"), trained("whole"))


def test_shipped_vae_carries_clips():
    vae, truth = load_vae(WEIGHTS["toy"] / "vae.safetensors"), world.clips(list(range(900, 906)))
    with torch.no_grad():
        y = vae.decode(vae.encode(truth.pixels, 4), 4)
    error, inside = (y.clamp(-1, 1) - truth.pixels).square().mean(1) / 4, truth.coverage > .5
    assert -10 * error.mean().log10() > 31 and -10 * error[inside].mean().log10() > 23


def test_shipped_raft_sees_the_exact_flow():
    raft = load_raft(WEIGHTS["toy"] / "raft.safetensors")
    truth = world.clips(list(range(910, 922)), motion_rich=True)
    with torch.no_grad():
        flow = raft(truth.pixels[:, :, 4], truth.pixels[:, :, 5], 4)
    error = (flow - truth.flow[:, :, 4]).norm(dim=1)
    assert error[truth.coverage[:, 4] > .5].mean() < .15 and error.mean() < .15


def test_shipped_text_encoder_tells_prompts_apart():
    context = load_text_encoder(WEIGHTS["toy"])(world.PROMPTS).flatten(1)
    distance = torch.cdist(context, context) + 1e3 * torch.eye(len(context))
    assert distance.min() > .5


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in Path(WEIGHTS["toy"]).glob("*.safetensors")) < 12e6


def test_post_training_the_shipped_weights(tmp_path, monkeypatch):
    clip, alive = torch.nn.utils.clip_grad_norm_, {}

    def watched(parameters, *args, **how):
        parameters = list(parameters)
        for p in parameters:
            alive[p] = alive.get(p, False) or p.grad is not None and bool(p.grad.abs().max() > 0)
        return clip(parameters, *args, **how)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    flags = (f"--preset toy --out {tmp_path / 'run'} --fake_warmup 1 --discriminator_warmup 1 --cycles 2 --samples 12 "
             "--batch 4 --discriminator_batch 4 --micro_batch 4")
    train.main(flags.split())
    assert len(alive) > 300 and all(alive.values())  # every parameter of the three networks learns
    log = read_log(tmp_path / "run")
    full = [row for row in log if row["phase"] == "mogan"]
    assert all(row[f"norm_{key}"] > 0 for row in full for key in ("dmd", "gan", "fake_score", "discriminator"))
    before, after = (row for row in log if row["phase"] == "samples")
    for figures in before, after:  # loose: the shipped student has 1.00, 0.90 and 0.98
        assert min(figures["colour"], figures["shape"], figures["direction"]) > .85
        assert figures["iou"] > .85 and figures["one_blob"] > .75
    assert before["plain_speed"] != after["plain_speed"]


def test_shipped_student_follows_its_prompts():
    prompts, seeds = zip(*world.held_out(12))
    net, vae = load_dit(WEIGHTS["toy"] / "student.safetensors"), load_vae(WEIGHTS["toy"])
    encode = load_text_encoder(WEIGHTS["toy"])
    noise = sample_noise(seeds, (net.cfg.in_dim, 5, 8, 8), 3)
    with torch.no_grad():
        z0 = few_step(net, noise, encode(list(prompts)), few_step_times((1000, 857, 600), shift=3.0))
        figures = world.score(vae.decode(z0, 4), list(prompts))
    assert min(figures["colour"], figures["shape"], figures["direction"]) > .8 and figures["iou"] > .8
    assert figures["slowly"] < figures["quickly"] - .5


# ---------------------------------------------------------------------------------------------------------------------
# eval.py


FIELDS = {"gauss_30x52": lambda: np.random.RandomState(11).standard_normal((2, 30, 52)) * 5,
          "affine_48x80": lambda: np.stack(np.meshgrid(0.25 * np.arange(80) - 10, 0.5 * np.arange(48) - 12)),
          "patch_33x47": lambda: patch(30, 40, 5, 12), "smallpatch_33x47": lambda: patch(3, -4, 5, 8)}


def patch(u, v, top, bottom):
    flow = np.zeros((2, 33, 47))
    flow[:, top:bottom, 8:20] = np.array([u, v])[:, None, None]
    return flow


def row(prompt, index=0, **values):
    name = f"{prompt}-{index}.mp4"
    return {"video": name, "prompt": prompt, "index": index, "scores": values, "skipped": {}, "path": Path(name),
            "fps": 16.0, "frames": 81, "height": 480, "width": 832, "stamp": name}


def answers(name, **chosen):
    """An answer file: per question a string of a, b, t, one letter a pair."""
    full = {"a": "a", "b": "b", "c": "c", "t": "tie"}
    count = len(chosen["motion"])
    each = [dict(prompt="p", index=i, **{q: full[chosen[q][i]] for q in chosen}) for i in range(count)]
    return {"survey": "s", "annotator": name, "folders": ["ours", "theirs"], "pairs": count, "answers": each}


def test_amt_smoothness_equals_vbench():
    golden = load_file(GOLDEN / "amt_s_golden.safetensors")
    net = golden_net(AMT(), "amt_s", 89483.81470339859, (0.25, 0.05))
    frame = net(golden["frame0"][None].float() / 255, golden["frame1"][None].float() / 255)
    torch.testing.assert_close(frame[0], golden["imgt_pred"], atol=1e-4, rtol=0)
    between = [metrics.interpolate(net, golden["clip"][i], golden["clip"][i + 2]) for i in (0, 6)]
    off = torch.stack(between).int() - golden["clip_interp_uint8"][[0, 3]].int()
    assert off.abs().max() <= 1 and (off != 0).float().mean() < 1e-3
    assert abs(metrics.motion_smoothness(net, golden["clip"][:8]) - golden["clip_first8_score"].item()) < 1e-6
    assert abs(metrics.motion_smoothness(net, golden["clip"]) - golden["clip_score"].item()) < 1e-6
    with pytest.raises(ValueError, match="2 frames: smoothness needs 3"):
        metrics.motion_smoothness(net, golden["clip"][:2])
    with pytest.raises(ValueError, match="64x96 frames: 128 px"):
        metrics.motion_smoothness(net, golden["clip"][:3, :, :96, :64])


def test_musiq_imaging_quality_equals_vbench():
    golden = load_file(GOLDEN / "musiq_golden.safetensors")
    net = golden_net(MUSIQ(), "musiq", 808535.4199490941)
    torch.testing.assert_close(net(golden["frames"].float() / 255), golden["scores"], atol=1e-4, rtol=0)
    score = metrics.imaging_quality(net, golden["frame_480x832"][None])
    assert abs(100 * score - golden["score_480x832"].item()) < 1e-4


def test_vbench_preprocessing():
    golden = load_file(GOLDEN / "vbench_preprocess_golden.safetensors")
    frame = load_file(GOLDEN / "musiq_golden.safetensors")["frame_480x832"]
    x = metrics.clip_input(golden["clip_frame"][None].float())[0]
    torch.testing.assert_close(x, golden["clip_out"], atol=1e-6, rtol=0)
    rows = metrics.longer_512(frame[None].float())[0, :, [0, 147, 294]]
    torch.testing.assert_close(rows, golden["longer_out_rows_0_147_294"], atol=1e-6, rtol=0)


def test_dynamic_degree_decides_as_vbench():
    golden = json.loads((GOLDEN / "vbench_dynamic_degree.json").read_text())
    for case in golden["cases"]:
        sampled = len(range(0, case["n_frames"], metrics.sample_step(case["fps"])))
        assert sampled == case["n_sampled"], case["name"]
        decision = metrics.is_dynamic(case["magnitudes"], sampled, case["height"], case["width"])
        assert decision == case["decision"], case["name"]
    for case in golden["statistic_cases"]:
        flow = torch.tensor(FIELDS[case["name"]](), dtype=torch.float32)
        assert abs(metrics.fast_pixels(flow) - case["top5_mean"]) < 1e-4, case["name"]


def test_dynamic_degree_measures_raft_on_sampled_frames():
    net, golden = golden_raft("small")
    frames = golden["frames"].repeat_interleave(2, dim=0)  # at 16 fps every second frame is looked at
    decision, magnitudes = metrics.dynamic_degree(net, frames, 16.0, iters=4)
    expected = [metrics.fast_pixels(flow) for flow in golden["flow_up_it4"]]
    np.testing.assert_allclose(magnitudes, expected, atol=2e-3)
    assert decision == metrics.is_dynamic(expected, 3, 128, 160)


def test_aesthetic_quality_is_a_linear_head_on_clip():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                              patch_size=56, projection_dim=16)
    clip, head = CLIPVisionModelWithProjection(config).eval(), torch.nn.Linear(16, 1)
    frames = torch.randint(0, 256, (3, 3, 240, 300), dtype=torch.uint8)
    pictures = [clip(pixel_values=metrics.clip_input(frame[None].float())) for frame in frames]
    embedding = torch.cat([picture.image_embeds for picture in pictures])
    expected = head(embedding / embedding.norm(dim=1, keepdim=True)).mean().item() / 10
    assert abs(metrics.aesthetic_quality(clip, head, frames) - expected) < 1e-6


def test_missing_weights_are_named_and_left_out(tmp_path, capsys):
    assert metrics.load_metrics(list(metrics.FILES), tmp_path, False, torch.device("cpu")) == {}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "no weights: amt-s.pth, get it from https://" in lines[0]
    (tmp_path / "amt-s.pth").write_bytes(b"not a checkpoint")
    assert metrics.load_metrics(["smoothness"], tmp_path, False, torch.device("cpu")) == {}
    assert "left out, expected a weights file" in capsys.readouterr().out
    # As AMT's trainer writes it: its learning rates are numpy's.
    optimizer = {"state": {}, "param_groups": [{"lr": np.cos(np.float64(1)), "params": [0]}]}
    known = set()
    for _ in range(2):  # other weights in a file of the same size have another id
        torch.save({"epoch": 1, "state_dict": AMT().state_dict(), "optim": optimizer}, tmp_path / "amt-s.pth")
        known.add(metrics.load_metrics(["smoothness"], tmp_path, False, torch.device("cpu"))["smoothness"][1])
    assert len(known) == 2
    (tmp_path / "there").write_bytes(b"some")
    with pytest.raises(ValueError, match="no weights: there"):  # a download with another checksum is not kept
        metrics.fetch("there", tmp_path.as_uri(), "12345678", tmp_path / "a" / "b", True)
    assert metrics.fetch("there", tmp_path.as_uri(), "a6b46dd0", tmp_path / "a" / "b", True).read_bytes() == b"some"


def test_scores_resume_after_a_kill(tmp_path):
    for i in range(3):
        write_video(tmp_path / "in" / f"a ball-{i}.mp4", torch.rand(3, 5, 32, 48) * 2 - 1, 16)
    log, videos, calls = tmp_path / "scores.jsonl", scores.find_videos(tmp_path / "in", set()), []

    def metric(frames, fps):
        calls.append(sum(1 for _ in frames))
        return {"smoothness": 0.5, "dynamic": 1.0}
    scores.score_folder(videos[:2], {"smoothness": (metric, "v1")}, log)
    with open(log, "a") as file:
        file.write('\n{"video": "a ball-2.mp4", "scor')  # what a kill leaves of a line
    rows = scores.score_folder(videos, {"smoothness": (metric, "v1")}, log)
    assert calls == [5, 5, 5] and [r["scores"]["motion"] for r in rows] == [0.75] * 3
    assert len(report.read_jsonl(log)) == 3 and rows[2]["frames"] == 5 and rows[2]["fps"] == 16
    scores.score_folder(videos, {"smoothness": (metric, "v2")}, log)  # other weights: all again
    write_video(videos[0], torch.rand(3, 7, 32, 48) * 2 - 1, 16)      # another file of the same name: it again
    rows = scores.score_folder(videos, {"smoothness": (metric, "v2")}, log)
    assert calls[3:] == [5, 5, 5, 7] and rows[0]["frames"] == 7

    def starved(frames, fps):
        raise ValueError("too little memory")
    rows = scores.score_folder(videos[:1], {"smoothness": (starved, "v3")}, log)
    assert rows[0]["skipped"] == {"smoothness": "too little memory"} and "smoothness" not in rows[0]["scores"]
    for weights in "v2", "v3":  # the older ones, or perhaps another machine
        rows = scores.score_folder(videos[:1], {"smoothness": (starved, "v3")}, log)
        rows = scores.score_folder(videos[:1], {"smoothness": (metric, weights)}, log)
        assert not rows[0]["skipped"] and "smoothness" in rows[0]["scores"]


def test_a_file_of_the_same_time_is_known_by_size_and_ends(tmp_path):
    path, stamps = tmp_path / "a-0.mp4", set()
    for data in b"a" + bytes(200_000), bytes(200_000) + b"a", bytes(200_001), bytes(200_002):
        path.write_bytes(data)
        os.utime(path, (0, 0))
        stamps.add(scores.score_folder([path], {}, tmp_path / "log")[0]["stamp"])
    assert len(stamps) == 4


ODD_NAMES = [".dot", "{{data}}", "<img src=x>", "a\x1b[31mb\nc\u202e", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("odd", ODD_NAMES)
def test_names_may_hold_anything(tmp_path, capsys, odd):
    folder, clip = tmp_path / odd, world.clip(5)
    for name in clip.prompts[0], odd:
        write_video(folder / "new.mp4", clip.pixels[0], 16)
        (folder / "new.mp4").rename(folder / f"{name}-0.mp4")
    (folder / f"{odd}-1.mp4").write_bytes(b"no video")
    (tmp_path / "log.jsonl").write_text(json.dumps({"cycle": 0, odd: 1.0}) + "\n[1]\n\0\0\n" + json.dumps({odd: 2}))
    flags = ["--no_download", "--weights", str(tmp_path), "--out", str(tmp_path / "out"), "--run", str(tmp_path)]
    scores.main([str(folder), *flags, "--flow_rows", "0", "--embed_mb", "0"])
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out) and "left out of" in out
    page = (tmp_path / "out" / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert {r["prompt"] for r in data["rows"]} == {odd, clip.prompts[0]} and data["labels"] == [odd]
    links = {urllib.parse.unquote_to_bytes(cell["href"]) for r in data["rows"] for cell in r["cells"] if "href" in cell}
    assert {(tmp_path / "out" / os.fsdecode(link)).resolve() for link in links} == set(folder.glob("*-0.mp4"))
    shown = html.escape(odd).encode("utf-8", "backslashreplace").decode()
    assert f'aria-label="{shown}"' in page and "<img" not in page and page.count("<polyline") == 1
    (folder / f"{clip.prompts[0]}-0.mp4").unlink()
    with pytest.raises(SystemExit):
        scores.main([str(folder), *flags])
    assert re.search("^eval.py: no video of .* has a score", capsys.readouterr().err, re.M)


def test_odd_files_are_counted_and_named(tmp_path, capsys):
    clip = torch.rand(3, 6, 48, 32) * 2 - 1
    write_video(tmp_path / "portrait-0.mp4", clip, 16)
    write_video(tmp_path / "one frame-0.mp4", clip[:, :1], 16)
    write_video(tmp_path / "portrait-0.flow.mp4", clip, 16)  # sample.py's picture is no sample
    (tmp_path / "empty-0.mp4").write_bytes(b"")
    (tmp_path / "gone-0.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "text-0.mp4").write_text("no video")
    (tmp_path / "cut-0.mp4").write_bytes((tmp_path / "portrait-0.mp4").read_bytes()[:1500])
    with av.open(str(tmp_path / "no rate-0.mp4"), "w", format="h264") as bare:  # it has no time stamps
        stream = bare.add_stream("libx264", rate=16, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(4):
            bare.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
        bare.mux(stream.encode())
    smooth = {"smoothness": (lambda frames, fps: {"smoothness": metrics.motion_smoothness(AMT(), frames)}, "v1")}
    rows = scores.score_folder(scores.find_videos(tmp_path, set()), smooth, tmp_path / "out" / "scores.jsonl")
    left_out = {r["video"]: r["error"] for r in rows if "error" in r}
    assert set(left_out) == {"empty-0.mp4", "gone-0.mp4", "text-0.mp4", "cut-0.mp4", "no rate-0.mp4"}
    assert all(name in reason for name, reason in left_out.items()) and "frame rate" in left_out["no rate-0.mp4"]
    assert {r["video"]: r["skipped"]["smoothness"].split(":")[0] for r in rows if r["skipped"]} == {
        "one frame-0.mp4": "1 frames", "portrait-0.mp4": "32x48 frames"}
    header, cells = scores.score_table(["odd"], [rows], {"smoothness": "smoothness"})
    assert dict(zip(header, cells)) == {
        "folder": "odd", "smoothness": "-", "videos": "2", "prompts": "2", "fps": "16", "frames": "1-6",
        "size": "32x48", "left out": "5"}
    notes = scores.notes_on([tmp_path], ["odd"], [rows + rows[:1]], {"a cat"})
    assert notes[-3:] == ["odd: no video of 1 prompts, such as 'a cat'", "odd: 1 other entries, not scored",
                          "odd: 1 files share prompt and index with another; differences take one"]
    with pytest.raises(ValueError, match="none of the prompts"):
        scores.find_videos(tmp_path, {"a cat"})


def test_differences_are_paired_and_bootstrapped():
    first = [row(p, i, motion=0.1 * i) for p in "xyz" for i in range(3)]
    second = [row(p, i, motion=0.1 * i + 0.25) for p in "xy" for i in range(3)] + [row("w", 0, motion=9.0)]
    groups = scores.paired(first, second, "motion")
    assert set(groups) == {"x", "y"} and np.allclose(list(groups.values()), 0.25)
    assert np.allclose(scores.bootstrap(list(groups.values())), 0.25)
    mean, low, high = scores.bootstrap([[0.0], [1.0]] * 200)
    assert mean == 0.5 and abs(low - 0.451) < 0.01 and abs(high - 0.549) < 0.01  # 1.96 / (2 sqrt 400)
    together = scores.bootstrap([[0.0] * 10, [1.0] * 10] * 20)  # ten samples of a prompt are worth one
    assert together[2] - together[1] > 0.28 and scores.bootstrap([[0.0], [1.0, 1.0]])[0] == 2 / 3
    assert scores.mean_cell(first + [row("v")], "motion") == "0.100 (n=9)"
    table = scores.difference_table(["a", "b"], [first, second], {"motion": "motion score"})
    assert table[1] == ["b", "+0.250 [+0.250, +0.250]", "6", "2"]
    assert scores.labels_of([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]


def test_tally_counts_wins_of_the_first_folder(tmp_path, capsys):
    files = [answers("one", motion="aabt", visual="tttt", text="bbbb"),
             answers("two", motion="aaaa", visual="tttt", text="bbba")]
    result = survey.tally(files)
    assert [result["motion"][k][0] for k in ("win", "tie", "lose")] == [6 / 8, 1 / 8, 1 / 8]
    assert result["visual"]["tie"] == (1, 1, 1) and result["text"]["lose"][0] == 7 / 8
    assert result["motion"]["win"][1] < 6 / 8 < result["motion"]["win"][2]
    odd = [files[0], {**files[1], "survey": "other"}, {**files[1], "folders": ["theirs", "ours"]},
           {**files[0], "folders": ["alone"]}, {k: v for k, v in files[0].items() if k != "survey"},
           {**files[0], "answers": [{"motion": []}]}, answers("one", motion="c", visual="t", text="t")]
    paths = [tmp_path / f"{i}.json" for i in range(9)]
    for path, file in zip(paths, files + odd):
        path.write_text(json.dumps(file))
    survey.main(["tally", *map(str, paths[:2])])
    out = capsys.readouterr().out
    assert "ours against theirs: 2 people, 4 pairs, 8 judgements" in out and "75.0% [50.0%, 100.0%]" in out
    bad = [((0, 2), "of one person"), ((0, 3), "different surveys"), ((0, 4), "different surveys")]
    for given, reason in bad + [((i,), "expected answers") for i in range(5, 10)]:
        with pytest.raises(ValueError, match=reason):
            survey.read_answers([tmp_path / f"{i}.json" for i in given])


def test_toy_figures_are_exact(tmp_path):
    clip = world.clip(5)
    write_video(tmp_path / f"{clip.prompts[0]}-0.mp4", clip.pixels[0], 16)
    rows = scores.score_folder(scores.find_videos(tmp_path, set()), {}, tmp_path / "out" / "scores.jsonl")
    found = rows[0]["scores"]
    assert found["toy_colour"] == found["toy_shape"] == found["toy_one_blob"] == 1
    assert abs(found["toy_net_speed"] - clip.velocity[0].norm().item()) < 0.1
    assert 0.01 < found["toy_position_error"] < 0.6


def test_two_ranks_score_as_one(tmp_path, capsys):
    for i in range(3):
        clip = world.clip(i)
        write_video(tmp_path / "in" / f"{clip.prompts[0]}-{i}.mp4", clip.pixels[0], 16)
    flags = [str(tmp_path / "in"), "--no_download", "--weights", str(tmp_path), "--flow_rows", "0", "--out"]
    scores.main([*flags, str(tmp_path / "1")])
    port = str(socket.create_server(("localhost", 0)).getsockname()[1])
    env = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)  # as torchrun sets them
    command = [sys.executable, scores.__file__, *flags, str(tmp_path / "2")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(env, RANK=i)) for i in "01"]
    printed = "".join(rank.communicate()[0] for rank in ranks)
    assert printed.replace(f"{tmp_path}/2/", f"{tmp_path}/1/") == capsys.readouterr().out
    one, two = (sorted(next((tmp_path / out).glob("*.jsonl")).read_text().split("\n")) for out in "12")
    assert one == two and (tmp_path / "1/report.html").read_text() == (tmp_path / "2/report.html").read_text()


def test_report_is_one_file_sorted_by_difference(tmp_path):
    names = ["still <b>", "moving </script>"]
    motions = (0.5, 0.5), (0.5, 0.9)
    folders = [[row(name, 0, motion=value) for name, value in zip(names, values)] for values in motions]
    for i, r in enumerate(itertools.chain(*folders)):
        r["path"] = tmp_path / f"{i}.mp4"
        r["path"].write_bytes(bytes([i]) * (900 if i else 2000))
    log = ['{"cycle": 0, "dmd": 1.0}', '{"cycle": 1, "dmd": NaN}', '{"cycle": 2, "dmd": 0.5}', '{"cy']
    (tmp_path / "log.jsonl").write_text("\n".join([*log, json.dumps({"huge": 10 ** 400})]))
    tables, columns = [("Measured", [["folder", "motion"], ["a", "0.5"]])], {"motion": "motion score"}
    runs = {tmp_path: report.read_run(tmp_path)}
    page = report.write_report(tmp_path, ["a", "b"], folders, tables, ["note"], columns, runs=runs, embed_mb=0.0027)
    page = page.read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [r["prompt"] for r in data["rows"]] == names[::-1]
    assert [["blob" in cell for cell in r["cells"]] for r in data["rows"]] == [[True, True], [False, True]]
    assert data["rows"][1]["cells"][0]["href"] == "0.mp4" and page.count('<script type="text/plain"') == 3
    assert page.count("<polyline") == 1 and "0.5 to 1" in page and "http" not in page  # nothing from outside
    one = [row("a", motion=0.0), row("b", motion=0.0), row("c", motion=3.0)]  # mean 1, deviation the root of 2
    ranked = report.by_difference(report.match_rows([one]), columns)
    assert [r[:2] for r in ranked] == [(1.4142, "c"), (0.7071, "a"), (0.7071, "b")]
    assert report.thin([(i, i % 2) for i in range(800)])[0] == (0.5, 0.5)


def test_toy_raft_draws_small_clips_only(tmp_path):
    rafts = scores.load_rafts(None, tmp_path, "cpu")
    large = dict(path=tmp_path / "large.mp4", height=160, width=160, frames=5)
    assert report.draw_row(rafts, [large], tmp_path) == [large["path"]]  # the video itself
    write_video(tmp_path / "small.mp4", torch.rand(3, 5, 64, 64) * 2 - 1, 16)
    small = dict(path=tmp_path / "small.mp4", height=64, width=64, frames=5, fps=16, stamp="1")
    (picture,) = report.draw_row(rafts, [small], tmp_path / "clips")
    picture.write_bytes(b"")  # what a power loss may leave: made anew
    assert report.draw_row(rafts, [small], tmp_path / "clips") == [picture]
    assert next(read_frames(picture)).shape[1:] != (64, 64) and picture.parent == tmp_path / "clips"
    pair = report.draw_row(rafts, [small, {**small, "stamp": "2"}], tmp_path / "clips")
    rafts[0].stamp = "other weights"
    assert len({picture, *pair, *report.draw_row(rafts, [small], tmp_path / "clips")}) == 4


@pytest.mark.parametrize("odd", ODD_NAMES)
def test_survey_holds_the_common_samples(tmp_path, odd):
    for folder, count in ("ours", 3), ("theirs", 2):
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"{odd}-{i}.mp4").write_bytes(b"a video")
    folders, out = [tmp_path / "ours", tmp_path / "theirs"], tmp_path / "out"
    survey.main(["page", *map(str, folders), "--out", str(out), "--embed_mb", "0"])
    assert len(list((out / "survey_files").iterdir())) == 4
    data = json.loads((out / "survey.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert list(data["questions"]) == ["motion", "visual", "text"] and "ours" not in str(data["pairs"])
    assert [(pair["prompt"], pair["index"]) for pair in data["pairs"]] == [(odd, 0), (odd, 1)]
    pairs, ids = survey.pair_up(*(scores.find_videos(folder, set()) for folder in folders)), {data["survey"]}
    pairs[0][3].write_bytes(b"another")
    for labels in ["ours", "theirs"], ["a", "theirs"]:  # other videos, other names: another survey
        ids.add(re.search('"survey": "(.*?)"', survey.write_survey(out, labels, pairs).read_text())[1])
    assert len(ids) == 3
