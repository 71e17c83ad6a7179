"""How make_weights.py trains: Muon and AdamW, one schedule, and a loop that goes on from its last checkpoint."""
import json
import os
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import AdamW, Optimizer


def orthogonalise(g: Tensor) -> Tensor:
    """The semi-orthogonal matrix nearest to g [r, c], about, by five Newton-Schulz steps (Jordan et al.)."""
    x = g.T if len(g) > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(g) > g.shape[1] else x


class Muon(Optimizer):
    """Momentum whose updates are orthogonalised, for parameters that are read as matrices [len(p), rest]."""

    def __init__(self, params: list[Tensor], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, .05)
            update = orthogonalise(p.grad.lerp(m, .95).flatten(1))
            update = update * (max(1, update.shape[0] / update.shape[1]) ** .5 * lr)
            p.mul_(1 - lr * .01).sub_(update.view_as(p))


def muon_adamw(net: nn.Module, is_matrix, muon_lr: float, adamw_lr: float) -> list[Optimizer]:
    """Muon for the parameters that is_matrix(name, p) chooses, AdamW for the rest.

    CHOICE: Muon, because the VAE's kernels and the DiT's matrices reached the same loss in about half of AdamW's steps.
    """
    matrices, rest = [], []
    for name, p in net.named_parameters():
        (matrices if is_matrix(name, p) else rest).append(p)
    return [Muon(matrices, muon_lr), AdamW(rest, adamw_lr, betas=(.9, .98))]


def schedule(step: int, steps: int, warm: int = 50, tail: float = .3) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero over the last `tail` of the steps."""
    return min(1., (step + 1) / warm, max(.01, (steps - step) / (tail * steps)))


def log(folder: Path, **values) -> None:
    """One line of numbers to the screen and to `folder`/log.jsonl."""
    values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")
    print(folder.name, " ".join(f"{k} {v}" for k, v in values.items()), flush=True)


def fit(folder: Path, steps: int, net: nn.Module, optimizers: list[Optimizer], loss, quality=dict,
        mean: nn.Module | None = None, warm: int = 50, tail: float = .3) -> float:
    """Train `net`, or go on from the checkpoint in `folder`.  -> the minutes that all steps took

    loss(step) -> (scalar, {name: scalar} to log); quality() -> {name: float} at every checkpoint; mean: a copy of `net`
    that becomes the average of its recent weights. The gradient's norm is kept to 1.
    """
    path, kept = folder / "checkpoint.pt", [net, *optimizers] + [mean] * (mean is not None)
    first, spent, states = torch.load(path) if path.exists() else (0, 0., [])
    for part, state in zip(kept, states):
        part.load_state_dict(state)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)             # not None: images leave the temporal convolutions untouched
    began = time.time() - spent
    for step in range(first, steps):
        total, figures = loss(step)
        total.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.).item()
        for optimizer in optimizers:
            group = optimizer.param_groups[0]
            group["lr"] = group.setdefault("peak", group["lr"]) * schedule(step, steps, warm, tail)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if mean is not None:
            for average, p in zip(mean.parameters(), net.parameters()):
                average.data.lerp_(p.data, 1 - min(.999, (step + 1) / (step + 20)))
        if step % 20 == 0:
            figures = {name: value.item() for name, value in figures.items()}
            log(folder, step=step, **figures, norm=norm, seconds=time.time() - began)
        if step % 100 == 99 or step == steps - 1:
            log(folder, step=step + 1, **quality(), seconds=time.time() - began)
            spent = time.time() - began
            with open(path.with_suffix(".part"), "wb") as file:
                torch.save((step + 1, spent, [part.state_dict() for part in kept]), file)
                os.fsync(file.fileno())
            os.replace(path.with_suffix(".part"), path)
    return spent / 60
