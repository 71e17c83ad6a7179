"""VBench's motion smoothness, dynamic degree, aesthetic and imaging quality of a video, and their weights.

They equal those of VBench (Vchitect/VBench 45e14ec) on the same file: `golden/` holds its numbers, the tests compare.
All run in fp32, where VBench on a GPU runs CLIP in fp16. Decoding through PyAV gives the same bytes as OpenCV 5.0 and
decord 0.6 on H.264 files (BT.601, BT.709, full range, 4:4:4).
"""

import itertools
import os
import socket
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from amt import load_amt
from cli import say
from musiq import load_musiq
from raft import load_raft, pad_to_cells
from report import fingerprint
from weights import REPO, load_strict, read_state_dict

FOLDER = REPO / "weights" / "eval"
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
CLIP = f"{HUB}/openai/clip-vit-large-patch14/resolve/main"
LAION = "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main"
FILES = {  # metric: its files in FOLDER, where each is downloaded from, and how its SHA-256 begins
    # AMT-S, CC BY-NC 4.0; nobody states a checksum
    "smoothness": [("amt-s.pth", f"{HUB}/lalala125/AMT/resolve/main", None)],
    # RAFT, BSD-3; princeton's raft-things.pth will do
    "dynamic": [("raft_large_C_T_V1-22a6c225.pth", "https://download.pytorch.org/models", "22a6c225")],
    # CLIP, and LAION's linear head, both MIT
    "aesthetic": [("clip-vit-large-patch14/config.json", CLIP, "8a09b467"),
                  ("clip-vit-large-patch14/model.safetensors", CLIP, "a2bf730a"),
                  ("sa_0_4_vit_l_14_linear.pth", LAION, "2cd4e60f")],
    # MUSIQ, a port for non-commercial use
    "imaging": [("musiq_spaq_ckpt-358bb6af.pth", f"{HUB}/chaofengc/IQA-PyTorch-Weights/resolve/main", "358bb6af")],
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH_PIXELS = 16 * 480 * 832   # frames of one batch of the two per-frame metrics: 16 at 480p, one at 4K


# ---------------------------------------------------------------------------------------------------------------------
# Metrics. Each reads an iterable of frames, uint8 [3, H, W], once and holds a few: memory does not grow with length.


def check_volume(H, W, volumes, device):
    """Raise ValueError if a 4-level correlation pyramid at 1/8 is too small to look up, or too large for memory."""
    if min(H, W) < 128:
        raise ValueError(f"{W}x{H} frames: 128 px a side are needed, or the coarsest correlation level is one cell")
    need = volumes * (H * W / 64) ** 2 * 4 * (1 + 1 / 4 + 1 / 16 + 1 / 64)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    if need > 0.6 * total:
        raise ValueError(f"{W}x{H} frames: the correlations take {need / 2**30:.0f} GiB, the machine has "
                         f"{total / 2**30:.0f} GiB: score smaller videos (VBench does not resize them either)")


@torch.inference_mode()
def interpolate(amt, before, after):
    """AMT-S's frame between two frames, uint8 [3, H, W]: padded to sides of 16, cut to whole levels, as in VBench."""
    H, W = before.shape[1:]
    pair = torch.stack([before, after]).to(next(amt.parameters()).device).float() / 255
    pair, (left, _, top, _) = pad_to_cells(pair, 16)
    check_volume(*pair.shape[2:], 2, pair.device)
    x = amt(pair[:1], pair[1:])[0, :, top : top + H, left : left + W]
    return (x * 255).byte().cpu()


def motion_smoothness(amt, frames):
    """VBench's motion smoothness in [0, 1]: how well every odd frame is interpolated from its two even neighbours.

    A last odd frame has no right neighbour and does not count. Raises ValueError for fewer than 3 frames.
    """
    errors, count, before = [], 0, None
    for count, frame in enumerate(frames, 1):
        if count % 2 == 0:
            middle = frame
            continue
        if count > 1:
            errors.append((interpolate(amt, before, frame).int() - middle.int()).abs().double().mean().item())
        before = frame
    if not errors:
        raise ValueError(f"{count} frames: smoothness needs 3")
    return (255 - statistics.fmean(errors)) / 255


def sample_step(fps):
    """VBench looks at every k-th frame, about 8 a second; rounds half to even, as Python does."""
    return max(1, round(fps / 8))


def fast_pixels(flow):
    """Mean length of the fastest 5 % of a flow field [2, H, W], in pixels."""
    speed = flow.norm(dim=0).flatten()
    return speed.topk(int(0.05 * len(speed))).values.mean().item()


def is_dynamic(magnitudes, sampled, H, W):
    """VBench's decision from `fast_pixels` of each pair of `sampled` frames: enough pairs above a threshold."""
    moving = sum(m > 6.0 * min(H, W) / 256 for m in magnitudes)
    return len(magnitudes) > 0 and moving >= round(4 * sampled / 16)


@torch.inference_mode()
def dynamic_degree(raft, frames, fps, iters=20):
    """VBench's dynamic degree of one video, a bool, and the magnitudes it rests on (RAFT large, raft-things).

    Flow is taken and measured on the frames padded to sides of 8; magnitudes are in pixels per sampled pair.
    """
    device, magnitudes, before, sampled = next(raft.parameters()).device, [], None, 0
    for frame in itertools.islice(frames, 0, None, sample_step(fps)):
        H, W = frame.shape[1:]
        x = pad_to_cells(frame[None].to(device).float() / 127.5 - 1, 8)[0]                            # [1, 3, H', W']
        check_volume(*x.shape[2:], 1, device)
        if before is not None:
            magnitudes.append(fast_pixels(raft(before, x, iters)[0]))
        before, sampled = x, sampled + 1
    return is_dynamic(magnitudes, sampled, H, W), magnitudes


def batches(frames, device):
    """Stack frames of one size into float batches [N, 3, H, W] of 0..255 of about BATCH_PIXELS."""
    frames = iter(frames)
    for first in frames:
        more = itertools.islice(frames, max(0, BATCH_PIXELS // first[0].numel() - 1))
        yield torch.stack([first, *more]).to(device).float()


def clip_input(x):
    """VBench's CLIP input from x [N, 3, H, W] in 0..255: shorter side 224, bicubic, no antialias; centre crop."""
    short = min(x.shape[2:])
    x = F.interpolate(x, [int(224 * n / short) for n in x.shape[2:]], mode="bicubic", align_corners=False)
    top, left = (round((n - 224) / 2) for n in x.shape[2:])
    x = x[..., top : top + 224, left : left + 224] / 255
    return (x - x.new_tensor(CLIP_MEAN).view(3, 1, 1)) / x.new_tensor(CLIP_STD).view(3, 1, 1)


@torch.inference_mode()
def aesthetic_quality(clip, head, frames):
    """LAION's aesthetic score over 10, mean over frames: a linear head on CLIP ViT-L/14's normalised embedding."""
    scores = []
    for x in batches(frames, head.weight.device):
        embedding = clip(pixel_values=clip_input(x)).image_embeds
        scores += head(F.normalize(embedding, dim=1)).flatten().tolist()
    return statistics.fmean(scores) / 10


def longer_512(x):
    """VBench's preprocessing for MUSIQ, x [N, 3, H, W] in 0..255 -> [0, 1]: longer side at most 512, bilinear."""
    longer = max(x.shape[2:])
    if longer > 512:
        x = F.interpolate(x, [int(512 / longer * n) for n in x.shape[2:]], mode="bilinear", align_corners=False)
    return x / 255


@torch.inference_mode()
def imaging_quality(musiq, frames):
    """MUSIQ's (SPAQ) score over 100, mean over all frames."""
    device = next(musiq.parameters()).device
    scores = [score for x in batches(frames, device) for score in musiq(longer_512(x)).tolist()]
    return statistics.fmean(scores) / 100


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def find_file(file, folder):
    """Where a weights file lies: in the folder or above it, as train.py's RAFT does, also as princeton's; else None."""
    names = [file, "raft-things.pth"] if file == FILES["dynamic"][0][0] else [file]
    return next((path for base in (folder, folder.parent) for name in names if (path := base / name).exists()), None)


def fetch(file, source, digest, folder, download):
    """The path of a weights file, downloaded into the folder if it is nowhere; else ValueError naming its source."""
    if found := find_file(file, folder):
        return found
    path, address = folder / file, f"{source}/{Path(file).name}"
    if download:
        socket.setdefaulttimeout(15)  # a cluster's nodes may drop packets instead of refusing them
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, path, digest)  # aside, checked, then renamed
            return path
        except Exception as error:  # offline, blocked, moved: for the caller all of them are a missing file
            say(f"{file}: no download ({error})")
    raise ValueError(f"no weights: {file}, get it from {address} and put it into {folder}")


def load_aesthetic(config, weights, head):
    """CLIP's image tower and LAION's linear head, frozen."""
    from transformers import CLIPVisionModelWithProjection
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    try:
        clip = CLIPVisionModelWithProjection.from_pretrained(config.parent).eval().requires_grad_(False)
    except SafetensorError as error:
        raise ValueError(f"expected CLIP's weights in {config.parent}, which cannot be read ({error})") from None
    linear = load_strict(torch.nn.Linear(clip.config.projection_dim, 1, device="meta"), read_state_dict(head)[0], head)
    return clip, linear.requires_grad_(False)


def load_metric(metric, paths, device):
    """A function (frames, fps) -> dict of scores, holding the metric's network on the device."""
    if metric == "aesthetic":
        clip, head = (net.to(device) for net in load_aesthetic(*paths))
        return lambda frames, fps: {"aesthetic": aesthetic_quality(clip, head, frames)}
    if metric == "dynamic":
        raft = load_raft(paths[0]).to(device)

        def dynamic(frames, fps):
            decision, magnitudes = dynamic_degree(raft, frames, fps)
            return {"dynamic": float(decision), **({"flow": statistics.fmean(magnitudes)} if magnitudes else {})}
        return dynamic
    load, score = {"smoothness": (load_amt, motion_smoothness), "imaging": (load_musiq, imaging_quality)}[metric]
    net = load(paths[0]).to(device)
    return lambda frames, fps: {metric: score(net, frames)}


def load_metrics(names, folder, download, device):
    """{metric: (function, weights id)} of the metrics whose weights are there; prints the ones left out and why."""
    out = {}
    for name in names:
        try:
            paths = [fetch(*file, folder, download) for file in FILES[name]]
            # The id is kept with every score: other weights, and the score is computed anew.
            out[name] = load_metric(name, paths, device), " ".join(f"{p.name}: {fingerprint(p)}" for p in paths)
        except (ValueError, OSError) as error:
            say(f"{name}: left out, {str(error).splitlines()[0]}")
    return out
