"""Where the evidence's lurch arms start: a teacher and a student whose motion is wrong in time and in nothing else.

    python toy/lurch.py OUT     # a weights folder, 15 minutes on a core; a second run goes on

The shipped teacher is tuned on clips whose speed goes up and down by the share LURCH every four frames, and the shipped
student on that teacher, by DMD. What is to be repaired is known: see `wander` in world.track.

CHOICE: one pattern for all clips. Paths that lurch at random made a teacher that does (wander .99 px) and a student
that does not (.50, the shipped one .42): DMD seeks modes, and drops what is different in each.
"""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from cli import one_line                                                                           # noqa: E402
from model import add_noise, load_dit, save_dit                                                    # noqa: E402
from toy.fit import fit                                                                            # noqa: E402
from toy.make_weights import ALONE, DEVICE, DMD, WEIGHTS, context_table, few_step_clips            # noqa: E402
from toy.make_weights import latents, teacher_batch                                                # noqa: E402
from toy.world import AREAS, FRAMES, MARGIN, PROMPTS, SIZE, attributes, track                      # noqa: E402
from vae import load_vae                                                                           # noqa: E402

LURCH, CHUNKS, STEPS, DMD_CYCLES, TWINS = .6, 8, 300, 60, 1000


def make(out: Path) -> None:
    """Write vae, raft, text, teacher, student and twins.json into `out`, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    for name in "vae", "raft", "text":
        if not (out / f"{name}.safetensors").exists():
            shutil.copyfile(WEIGHTS / f"{name}.safetensors", out / f"{name}.safetensors")
    if not (out / "teacher.safetensors").exists():
        net, (table, null) = load_dit(WEIGHTS / "teacher.safetensors").to(DEVICE), context_table()
        pool = latents(load_vae(WEIGHTS).to(DEVICE), CHUNKS, LURCH)

        def loss(step):
            z0, noise, t, context, _ = map(torch.cat, zip(*(
                teacher_batch(pool, 1_000_000 + 2 * step + i, table, null) for i in (0, 1))))
            flow = F.mse_loss(net(add_noise(z0, noise, t), t, context), noise - z0)
            return flow, {"loss": flow}

        fit(out, STEPS, net, [torch.optim.AdamW(net.parameters(), 5e-4)], loss, tail=.5)
        save_dit(net, out / "teacher.part", preset="toy")
        (out / "teacher.part").rename(out / "teacher.safetensors")
    if not (out / "student.safetensors").exists():
        command = [*ALONE, "--weights", out, "--generator", WEIGHTS / "student.safetensors", "--out", out / "run",
                   "--dmd_warmup", DMD_CYCLES, *DMD[:-2]]  # without an average
        subprocess.run([sys.executable, REPO / "train.py", *map(str, command)], check=True)
        shutil.copyfile(out / "run" / "generator.safetensors", out / "student.part")
        (out / "student.part").rename(out / "student.safetensors")
    if not (out / "twins.json").exists():
        rows = json.dumps(twins(out))
        (out / "twins.json").write_text(rows)


@torch.no_grad()
def twins(out: Path) -> list:
    """What world.draw returns for the even twins of the student's own clips: their words, speed, way, size and place.

    Real clips made of these differ from what the student makes by being even, and in nothing else that moves.
    """
    pairs = [(PROMPTS[i % len(PROMPTS)], 30_000_000 + i) for i in range(TWINS)]
    net, vae, rows = load_dit(out / "student.safetensors").to(DEVICE), load_vae(WEIGHTS).to(DEVICE), []
    for first in range(0, TWINS, 50):
        part = pairs[first : first + 50]
        seen = track(few_step_clips(net, vae, part).clamp(-1, 1).cpu())
        for i, (text, _) in enumerate(part):
            if seen["one_blob"][i]:
                colour, shape, direction, adverb = attributes(text)
                radius = (seen["area"][i].mean() / AREAS[shape]).sqrt() - .12  # what the VAE adds
                velocity = seen["velocity"][i]
                travel = velocity * (FRAMES - 1)
                low, room = MARGIN * radius - travel.clamp(max=0), SIZE - 1 - 2 * MARGIN * radius - travel.abs()
                start = ((seen["position"][i].mean(0) - travel / 2 - low) / room.clamp(min=1)).clamp(0, 1)
                rows.append(([colour, shape, direction, adverb], [velocity.norm().item(), math.atan2(*velocity.flip(0)),
                             radius.item(), *start.tolist(), .5, .5, .5]))
    return rows


if __name__ == "__main__":
    with one_line("lurch.py"):
        make(Path(sys.argv[1]))
