"""Prompts: in files, as names of videos, cleaned as Wan does, encoded by UMT5 or the toy's encoder, kept on disk."""

import contextlib
import functools
import hashlib
import html
import os
import re
import time
import unicodedata
import uuid
from pathlib import Path

import torch
import torch.nn.functional as F

from cli import expect, from_json, print0
from video import open_video
from weights import find_weights, load_strict, on_meta, read_state_dict, rename, write_tensors

# Wan's own negative prompt (Wan-Video/Wan2.1, shared_config.py); DMD teachers were guided with it.
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT = {"toy": "", "wan1.3b": WAN_NEGATIVE, "wan14b": WAN_NEGATIVE}


def read_prompts(path):
    """The lines of a text file less blanks and # comments, or the toy world's for ""; ValueError if there are none.

    Only \\n, or \\r\\n, ends a line. What is not UTF-8 is told, read as U+FFFD, and stops no other line.
    """
    if not path:
        from toy.world import PROMPTS
        return PROMPTS
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"expected a text file with one prompt a line, got {path} ({type(error).__name__})") from None
    expect(b"\0" not in data, "a UTF-8 file with one prompt a line", f"{path}, with zero bytes in it (UTF-16?)")
    lines = [line.strip() for line in data.decode(errors="replace").split("\n")]
    odd = [i for i, line in enumerate(lines, 1) if "\ufffd" in line]
    if odd:
        print0(f"{path}: {len(odd)} lines are not UTF-8, such as line {odd[0]}: {lines[odd[0] - 1][:60]!r}")
    prompts = [line for line in lines if line and not line.startswith("#")]
    expect(prompts, f"at least one prompt in {path}", "none")
    return prompts


CUT = re.compile(r"~[0-9a-f]{8}$")


def file_stem(prompt):
    """The prompt, after which VBench names files; of one that no file can be named after a part, ~ and its hash."""
    plain = re.sub(r"^\.|[/\0-\x1f\x7f-\x9f]", "_", prompt)
    if plain == prompt and len(prompt.encode()) <= 240:
        return prompt
    return plain.encode()[:200].decode(errors="ignore") + "~" + hashlib.sha256(prompt.encode()).hexdigest()[:8]


def prompt_of(path):
    """(prompt, i) of a video named {prompt}-{i}, else (its name, 0); a cut prompt stands whole in the comment."""
    found = re.fullmatch(r"(.*)-(\d+)", path.stem, re.DOTALL)
    prompt, index = (found[1], int(found[2])) if found else (path.stem, 0)
    if CUT.search(prompt):
        with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
            prompt = str(from_json(comment_of(path))["prompt"])
    return prompt, index


def comment_of(path):
    with open_video(path) as (container, _):
        return container.metadata.get("comment", "")


T5_KEYS = [  # official UMT5 encoder file -> transformers
    (r"^token_embedding\.", "shared."), (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
     r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
]
UMT5_XXL = dict(vocab_size=256384, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24,
                feed_forward_proj="gated-gelu")

FULL_WIDTH = 0x3000, *range(0xFF01, 0xFFF0)
LIGATURES = 0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)
CONTROLS = *range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)
PLAIN = {code: unicodedata.normalize("NFKC", chr(code)) for code in FULL_WIDTH + LIGATURES}  # for str.translate
PLAIN |= dict.fromkeys(CONTROLS, "") | {0x149: "'n", 0xFB05: "ſt"}
PLAIN |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')


def clean_prompt(prompt):
    """Wan's cleaning: plain quotes, widths and letters, no HTML entities, single spaces.

    CHOICE: this is what ftfy, with which Wan begins, does to sound text; wrongly decoded text is left as it is.
    """
    prompt = unicodedata.normalize("NFC", html.unescape(html.unescape(prompt)).translate(PLAIN))
    return " ".join(prompt.split())


def pad_context(rows, text_len):
    """[len, text_dim] -> [text_len, text_dim]: zero rows at the end, as in Wan, not what UMT5 makes of padding."""
    return F.pad(rows[:text_len], (0, 0, 0, text_len - len(rows[:text_len])))


class TextEncoder:
    """list[str] -> context [B, text_len, text_dim] fp32: UMT5 on each prompt's own tokens, zero-padded."""

    def __init__(self, model, tokenize, text_len):
        # transformers 5.0 to 5.2 leave these files' embedding at zero, which would silently drop the prompt.
        embedding = model.encoder.embed_tokens.weight
        if embedding.data_ptr() != model.shared.weight.data_ptr() or not embedding.any():
            raise ValueError("the UMT5 embedding is not tied to its table or is zero: upgrade transformers")
        self.model, self.tokenize, self.text_len = model.eval().requires_grad_(False), tokenize, text_len

    @torch.no_grad()
    def rows(self, prompt):
        """[len, text_dim] of one prompt, its true tokens only."""
        ids = self.tokenize(clean_prompt(prompt))
        ids = ids if len(ids) <= self.text_len else ids[: self.text_len - 1] + ids[-1:]  # the end of text stays
        ids = torch.tensor([ids], device=self.model.shared.weight.device)
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].float()

    def __call__(self, prompts):
        return torch.stack([pad_context(self.rows(prompt), self.text_len) for prompt in prompts])


def words_to_ids(prompt, vocab):
    """Word-level tokens of the toy world: lower-case words, 2 for an unknown one, then 1 for the end."""
    return [vocab.get(word, 2) for word in re.findall(r"\w+", prompt.lower())] + [1]


def load_tokenizer(folder):
    """str -> ids as tokenizer.json has it: transformers 5 builds T5's anew, with other ids for unknown characters."""
    from tokenizers import Tokenizer
    file = find_weights(Path(folder) / "tokenizer.json", "UMT5's tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library's own is nothing more special
        raise ValueError(f"expected UMT5's tokenizer at {file}, which cannot be read ({error})") from None
    tokenizer.no_padding(), tokenizer.no_truncation()
    return lambda prompt: tokenizer.encode(prompt).ids


def object_in(path):
    """The JSON object in a file; ValueError for anything else there."""
    try:
        return dict(from_json(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"expected a JSON object in {path}") from None


def load_text_encoder(path, device="cpu"):
    """The text encoder of a preset's folder: the toy's, Wan's official file, or diffusers' `text_encoder/`.

    The full-size one runs on `device` in bf16, as Wan's does. Raises ValueError naming the missing files.
    """
    from transformers import UMT5Config, UMT5EncoderModel
    path = Path(path)
    toy, official = path / "text.safetensors", path / "models_t5_umt5-xxl-enc-bf16.pth"
    if toy.exists():
        state, meta = read_state_dict(toy)
        try:
            config, words = from_json(meta["config"]), from_json(meta["vocab"])
            vocab, text_len = {word: i for i, word in enumerate(words)}, config.pop("text_len")
            if not 0 < text_len < 2**16 or len(vocab) > config["vocab_size"]:
                raise ValueError
        except (KeyError, ValueError, TypeError, AttributeError):
            raise ValueError(f"expected a config and a vocabulary, as JSON, in the header of {toy}") from None
        tokenize = functools.partial(words_to_ids, vocab=vocab)
    elif official.exists():
        state, config, text_len = rename(read_state_dict(official)[0], T5_KEYS), UMT5_XXL, 512
        tokenize = load_tokenizer(path / "google" / "umt5-xxl")
    elif (path / "text_encoder" / "config.json").exists():
        state = read_state_dict(path / "text_encoder")[0]
        config, text_len = object_in(path / "text_encoder" / "config.json"), 512
        tokenize = load_tokenizer(path / "tokenizer")
    else:
        raise ValueError(f"expected a text encoder in {path}, found none of text.safetensors, {official.name}, "
                         "text_encoder/")
    depth = config.get("num_layers")
    expect(depth in range(len(state)), f"a text encoder of as many layers as {path} has weights for", depth)
    model = on_meta(lambda config: UMT5EncoderModel(UMT5Config(**config)), config, path)
    dtype = torch.bfloat16 if model.config.d_model == UMT5_XXL["d_model"] else torch.float32
    for key in state:  # one at a time: the official file is bf16, and stays the only copy, mapped from the disk
        state[key] = state[key].to(dtype)
    state["encoder.embed_tokens.weight"] = state.get("shared.weight", torch.empty(0))
    load_strict(model, state, path)
    model.encoder.embed_tokens = model.shared
    return TextEncoder(model.to(device), tokenize, text_len)


def encode_prompts(prompts, path, cache, device="cpu"):
    """Encode every prompt once into `cache`, one file per prompt and encoder; return their reader.

    The reader maps list[str] -> context [B, text_len, text_dim] as a TextEncoder does, without holding one
    (UMT5-XXL takes 11 GB): it is loaded only if a prompt is missing, and by one process a node, for which the
    others wait. Files appear whole, so that several processes may share the folder.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    kinds = "text.safetensors", "models_t5*.pth", "text_encoder/*", "google/umt5-xxl/tokenizer.json", "tokenizer/*.json"
    files = [file for kind in kinds for file in sorted(Path(path).glob(kind))]
    weights = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]

    def file_of(prompt):
        key = hashlib.sha256("\n".join([clean_prompt(prompt), *weights]).encode()).hexdigest()[:32]
        return cache / f"{key}.safetensors"

    encoder = None
    for prompt in dict.fromkeys(prompts):
        while os.environ.get("LOCAL_RANK", "0") != "0" and not file_of(prompt).exists():
            time.sleep(0.2)
        if not file_of(prompt).exists():
            encoder = encoder or load_text_encoder(path, device)
            rows = encoder.rows(prompt).to(encoder.model.dtype).cpu().contiguous()
            part = file_of(prompt).with_suffix(f".{uuid.uuid4().hex}.part")
            write_tensors({"rows": rows}, part, {"prompt": prompt, "text_len": str(encoder.text_len)})
            part.rename(file_of(prompt))

    def read(batch):
        out = []
        for prompt in batch:
            state, meta = read_state_dict(file_of(prompt))
            expect("rows" in state and "text_len" in meta, f"a prompt's context in {file_of(prompt)}", "other "
                   "tensors: delete it, it is made again")
            out.append(pad_context(state["rows"].float(), int(meta["text_len"])))
        return torch.stack(out)
    return read
