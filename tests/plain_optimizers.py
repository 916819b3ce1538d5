"""Update rules read plainly off their papers: one process, float64, one whole tensor at a time.

What pretrain/optimizers/ computes on partitions must equal these; they share no code with it.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.model import CPMConfig, tensors
from configs.optimizers import Optimizer
from pretrain.models.cpm import CPM
from pretrain.objectives.losses import token_losses_plain
from pretrain.state import fresh
from tests import zero_jobs as jobs

Step = Callable[[str, Tensor, Tensor, dict[str, Any], float, int, float], None]
"""(name, weight, gradient, its state, lr, number of the step from 1, decay)."""


def adam_direction(
    g: Tensor, state: dict[str, Any], step: int, section: Optimizer, corrected: bool = True
) -> Tensor:
    """m / (sqrt(v) + eps)."""
    m = state["m"] = section.beta1 * state.get("m", 0 * g) + (1 - section.beta1) * g
    v = state["v"] = section.beta2 * state.get("v", 0 * g) + (1 - section.beta2) * g * g
    if corrected:
        m, v = m / (1 - section.beta1**step), v / (1 - section.beta2**step)
    return m / (v.sqrt() + section.eps)


def adamw(section: Optimizer) -> Step:
    """Loshchilov and Hutter."""

    def step(name: str, w: Tensor, g: Tensor, state: Any, lr: float, t: int, wd: float) -> None:
        w.mul_(1 - lr * wd).sub_(lr * adam_direction(g, state, t, section))

    return step


def lamb(section: Optimizer) -> Step:
    """You et al.; bert4keras' form without the correction."""

    def step(name: str, w: Tensor, g: Tensor, state: Any, lr: float, t: int, wd: float) -> None:
        u = adam_direction(g, state, t, section, section.bias_correction) + wd * w
        norm, length = float(w.norm()), float(u.norm())
        left_out = section.adapt == "decayed" and wd == 0
        ratio = 1.0 if norm == 0 or length == 0 or left_out else norm / length
        w.sub_(lr * ratio * u)

    return step


def rms_adamw(section: Optimizer) -> Step:
    """nanoT5's, with the root of the corrected second moment."""

    def step(name: str, w: Tensor, g: Tensor, state: Any, lr: float, t: int, wd: float) -> None:
        size = max(section.rms_floor, float(w.norm()) / math.sqrt(w.numel()))
        direction = adam_direction(g, state, t, section)
        w.mul_(1 - lr * wd).sub_(lr * size * direction)

    return step


def adafactor(section: Optimizer) -> Step:
    """torch.optim.Adafactor, which tells rate and floor as we do; its eps1 is squared."""

    def step(name: str, w: Tensor, g: Tensor, state: Any, lr: float, t: int, wd: float) -> None:
        if "torch" not in state:
            made = {"eps": (1e-15, section.rms_floor), "weight_decay": wd}
            state["torch"] = torch.optim.Adafactor([w], lr=lr, **made)
        rule = state["torch"]
        # its rate is min(lr, 1 / sqrt(step)); without relative_step lr stands alone
        rule.param_groups[0]["lr"] = lr
        assert section.relative_step or lr <= t**-0.5
        w.grad = g
        rule.step()
        w.grad = None

    return step


def muon(section: Optimizer) -> Step:
    """torch.optim.Muon with its iteration in float64, and AdamW for what is no layer's matrix."""
    rest = adamw(section)

    def step(name: str, w: Tensor, g: Tensor, state: Any, lr: float, t: int, wd: float) -> None:
        if ".layers." not in name or w.dim() != 2:
            rest(name, w, g, state, lr, t, wd)
            return
        mu = section.momentum
        state["b"] = mu * state.get("b", 0 * g) + (1 - mu) * g
        x = mu * state["b"] + (1 - mu) * g
        x = x / x.norm()
        for _ in range(5):  # of a wide or a tall matrix alike: the polynomial is odd
            y = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * y + 2.0315 * y @ y)
        length = {
            "rms": 0.2 * math.sqrt(max(w.shape)),
            "spectral": math.sqrt(w.shape[0] / w.shape[1]),
        }
        w.mul_(1 - lr * wd).sub_(lr * length[section.muon_scale] * x)

    return step


STEPS: dict[str, Callable[[Optimizer], Step]] = {
    "adamw": adamw,
    "lamb": lamb,
    "rms_adamw": rms_adamw,
    "adafactor": adafactor,
    "muon": muon,
}


def reference(
    section: Optimizer, steps: int, config: CPMConfig = jobs.TINY
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps of the tests' tiny model, and the weights after them."""
    model = CPM(config).double()
    state = fresh(config, 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state.read(f"weights/{name}"))
    decays = {
        t.name: section.weight_decay * (t.decay or section.decay == "all") for t in tensors(config)
    }
    step_of, kept = STEPS[section.name](section), {n: {} for n, _ in model.named_parameters()}
    losses = []
    for step in range(steps):
        batch = jobs.rows(np.arange(step * jobs.SAMPLES, (step + 1) * jobs.SAMPLES), config)
        hidden = model(batch.tokens_BT, batch.positions_BT, None).flatten(0, 1)[batch.loss_at_N]
        targets = batch.targets_BT.flatten()[batch.loss_at_N]
        loss = token_losses_plain(model.logits, hidden, targets).sum() / len(batch.loss_at_N)
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
        lr = section.lr * min(1.0, (step + 1) / 5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad * min(1.0, section.clip_norm / (norm + 1e-6))
                step_of(name, p, g, kept[name], lr, step + 1, decays[name])
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}
