"""Where the evidence's lurch arms start: a teacher and a student whose motion is wrong in time and in nothing else.

    python toy/lurch.py OUT     # a weights folder, 15 minutes on a core; a second run goes on

The shipped teacher is tuned on clips whose speed goes up and down by the share LURCH every four frames, and the shipped
student on that teacher, by DMD. What is to be repaired is known: see `wander` in world.track.

CHOICE: one pattern for all clips. Paths that lurch at random made a teacher that does (wander .99 px) and a student
that does not (.50, the shipped one .42): DMD seeks modes, and drops what is different in each.
"""
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from model import add_noise, load_dit, save_dit                                                    # noqa: E402
from toy.fit import fit                                                                            # noqa: E402
from toy.make_weights import DEVICE, WEIGHTS, context_table, latents, teacher_batch                # noqa: E402
from vae import load_vae                                                                           # noqa: E402

LURCH, CHUNKS, STEPS, DMD_CYCLES = .6, 8, 300, 60


def make(out: Path) -> None:
    """Write vae, raft, text, teacher and student into `out`, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    for name in "vae", "raft", "text":
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
        command = ["--preset", "toy", "--weights", out, "--generator", WEIGHTS / "student.safetensors", "--dmd_warmup",
                   DMD_CYCLES, "--cycles", 0, "--fake_warmup", 0, "--discriminator_warmup", 0, "--samples", 0,
                   "--batch", 16, "--micro_batch", 16, "--fake_updates", 3, "--lr_generator", 2e-4,
                   "--out", out / "run"]
        subprocess.run([sys.executable, REPO / "train.py", *map(str, command)], check=True)
        shutil.copyfile(out / "run" / "generator.safetensors", out / "student.part")
        (out / "student.part").rename(out / "student.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
