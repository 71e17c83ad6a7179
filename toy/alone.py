"""The discriminator alone: how soon can it tell real from generated motion, and from windows of which length?

    python toy/alone.py fast           # what it is taught on: fast clips against the student's; some minutes on a core
    python toy/alone.py own            # the world's own clips against the student's
    python toy/alone.py twins LURCH    # lurch.py's folder: what its student makes against their even twins

It learns from the cached motion of 360 pairs of clips, in batches of 12 of each, as in training with R1 and R2, and
ranks those of 120 others: AUC (`gan_d`; chance .50, 1.39) after so many updates.
"""
import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from cli import one_line                                                                           # noqa: E402
from discriminator import PROMPT, MotionDiscriminator, motion_tensor                               # noqa: E402
from model import load_dit                                                                         # noqa: E402
from raft import load_raft, video_flow                                                             # noqa: E402
from text import load_text_encoder                                                                 # noqa: E402
from toy import world                                                                              # noqa: E402
from toy.make_weights import WEIGHTS, few_step_clips                                               # noqa: E402
from train import MAX_GRAD_NORM, PRESETS, WEIGHT_DECAY, BETAS, gan_d_loss, r_loss                  # noqa: E402
from vae import load_vae                                                                           # noqa: E402

PAIRS, HELD_OUT, UPDATES, TOY = 480, 120, (20, 60, 120, 240), PRESETS["toy"]


@torch.no_grad()
def motion(kind: str, folder: Path) -> dict[int, tuple[list, list]]:
    """{window in latents: real and generated motion latents at each of its starts}, [PAIRS, C, f, h, w] each."""
    vae, raft = load_vae(WEIGHTS), load_raft(WEIGHTS / "raft.safetensors")
    student = load_dit(folder / "student.safetensors")
    if kind == "twins":
        rows = json.loads((folder / "twins.json").read_text())
        world.draw = lambda seed, motion_rich: rows[seed % len(rows)]
    real, generated = [], []
    for first in range(0, PAIRS, 20):
        seeds = range(first, first + 20)
        x = world.clips(list(seeds), motion_rich=kind == "fast").pixels
        if kind == "twins":  # the VAE's blur is no cue
            x = vae.decode(vae.encode(x, 4), 4)
        pairs = [(world.PROMPTS[7 * i % len(world.PROMPTS)], 40_000_000 + i) for i in seeds]
        for flows, y in (real, x), (generated, few_step_clips(student, vae, pairs)):
            flows.append(video_flow(raft, y.clamp(-1, 1), TOY["raft_iters"]))
    real, generated = torch.cat(real), torch.cat(generated)

    def encoded(flows, start, window):
        cut = flows[:, :, 4 * start : 4 * (start + window)]
        return torch.cat([vae.encode(motion_tensor(part, TOY["flow_scale"]), 3) for part in cut.split(20)])
    return {window: tuple([encoded(flows, start, window) for start in range(5 - window)]
                          for flows in (real, generated)) for window in (2, 4)}


def learn(seen: tuple[list, list], teacher, context: torch.Tensor) -> str:
    """Train a discriminator; its AUC and gan_d on the held-out pairs after UPDATES, mean over the window's starts."""
    torch.manual_seed(0)
    rng, out, learned = torch.Generator().manual_seed(0), [], PAIRS - HELD_OUT
    net = MotionDiscriminator(teacher.cfg, TOY["taps"]).load_trunk(copy.deepcopy(teacher)).requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), TOY["lr_discriminator"], BETAS, weight_decay=WEIGHT_DECAY)
    logits = lambda x: net(x, torch.zeros(len(x)), context.expand(len(x), -1, -1))
    for update in range(1, UPDATES[-1] + 1):
        start = torch.randint(len(seen[0]), (1,), generator=rng).item()
        x = torch.cat([side[start][torch.randint(learned, (12,), generator=rng)] for side in seen])
        noised = x + TOY["sigma"] * torch.randn(x.shape, generator=rng)
        real, gen, noised_real, noised_gen = logits(torch.cat([x, noised])).chunk(4)
        r = r_loss(real, noised_real, TOY["sigma"]) + r_loss(gen, noised_gen, TOY["sigma"])
        (.5 * gan_d_loss(real, gen) + .3 * r).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if update in UPDATES:
            with torch.no_grad():
                both = [[logits(x[learned:]) for x in pair] for pair in zip(*seen)]
            auc = sum((real[:, None] > gen).float().mean() for real, gen in both) / len(both)
            loss = sum((F.softplus(-real) + F.softplus(gen)).mean() for real, gen in both) / len(both)
            out.append(f"{update}: {auc:.2f} ({loss:.2f})")
    return ", ".join(out)


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else WEIGHTS)
    torch.set_num_threads(1)
    teacher, context = load_dit(folder / "teacher.safetensors"), load_text_encoder(WEIGHTS)([PROMPT])
    for window, seen in motion(kind, folder).items():
        print(f"{kind}, {1 + 4 * window} frames, AUC (gan_d) by update: {learn(seen, teacher, context)}", flush=True)


if __name__ == "__main__":
    with one_line("alone.py"):
        main()
