"""T5 PEGASUS survives fp16: with a residual stream and feed-forward outputs of 1e5 and more, where
fp16 ends at 65,504, losses and gradients are finite and those of fp32, and without the cure none.

fp16 has 11 bits: 5e-4 a rounding. Through 2 + 2 blocks a few of them add up; 2 % of the norm of
all gradients together, 1 % of a loss, leave room and are far from what is not finite. On a CPU,
in fp16's own kernels; a GPU was not at hand.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import to_dict
from pretrain import proof
from pretrain.models.layers import GatedFeedForward
from pretrain.models.t5_pegasus import EncoderBlock, T5Pegasus
from pretrain.state import State
from tests import family_jobs as jobs
from tests.worlds import World

CONFIG = jobs.FAMILIES["t5_pegasus"]
BATCH = jobs.rows(jobs.np.arange(4), "t5_pegasus")
LOSS_SCALE = 2.0**8


def model_of(dtype: torch.dtype) -> T5Pegasus:
    """Weights whose feed-forward layers and stream reach 1e5, the same in every precision."""
    model = T5Pegasus(CONFIG)  # type: ignore[arg-type]
    model.load_state_dict({name: e.read().half() for name, e in jobs.loud(CONFIG).items()})
    return model.to(dtype)


def one_step(model: T5Pegasus) -> tuple[float, list[Tensor]]:
    """Loss and gradients, the loss scaled and the gradients scaled back."""

    def losses(logits: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits(hidden).float(), targets, reduction="none")

    loss_sum, count = jobs.Predict().loss(model, BATCH, losses)
    loss = loss_sum / count
    (loss * LOSS_SCALE).backward()
    loss = loss.detach()
    return float(loss), [p.grad.float() / LOSS_SCALE for p in model.parameters()]


def largest(model: T5Pegasus) -> dict[str, float]:
    """The largest value of the stream and of a feed-forward layer's output in a forward pass."""
    found = {"stream": 0.0, "feed-forward": 0.0}

    def look(what: str) -> Any:
        def hook(module: Any, given: Any, out: Tensor) -> None:
            found[what] = max(found[what], float(out.detach().abs().max()))

        return hook

    for module in model.modules():
        if isinstance(module, EncoderBlock | GatedFeedForward):
            name = "stream" if isinstance(module, EncoderBlock) else "feed-forward"
            module.register_forward_hook(look(name))
    one_step(model)
    return found


def test_the_activations_reach_1e5() -> None:
    found = largest(model_of(torch.float32))
    assert found["stream"] > 1e5 and found["feed-forward"] > 1e5


def test_the_cure_changes_no_bit_in_fp32() -> None:
    plain, kept = model_of(torch.float32), model_of(torch.float32)
    kept.keep_in_range()
    (loss, gradients), (same, again) = one_step(plain), one_step(kept)
    assert loss == pytest.approx(same, rel=1e-7)
    for a, b in zip(gradients, again, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()  # eps x 2^-12 rounds, nothing else does
    assert largest(kept)["stream"] == pytest.approx(largest(plain)["stream"] / 64, rel=1e-6)


def test_fp16_is_finite_and_follows_fp32() -> None:
    loss, gradients = one_step(model_of(torch.float32))
    model = model_of(torch.float16)
    model.keep_in_range()
    half, found = one_step(model)
    assert half == pytest.approx(loss, rel=1e-2)
    apart = sum(float((a - b).square().sum()) for a, b in zip(gradients, found, strict=True))
    whole = sum(float(a.square().sum()) for a in gradients)
    assert (apart / whole) ** 0.5 < 0.02
    # Negative control: without the cure there is no loss.
    lost, broken = one_step(model_of(torch.float16))
    assert not torch.isfinite(torch.tensor(lost))
    assert not all(torch.isfinite(g).all() for g in broken)


def test_a_proof_in_fp16_computes_as_a_run_does() -> None:
    """Without the cure its logits were no numbers, and neither was proof.json JSON."""
    weights = {f"weights/{name}": e for name, e in jobs.loud(CONFIG).items()}
    state = State(weights, {"model": to_dict(CONFIG)})
    tokens_BT = torch.arange(12).view(2, 6)
    half = proof.logits(state, tokens_BT, torch.float16).float()
    whole = proof.logits(state, tokens_BT, torch.float32)
    assert (half - whole).abs().max() < 2e-2 * whole.std()


def test_what_is_no_number_is_null_in_a_proof(tmp_path: Path) -> None:
    path = proof.write_proof(tmp_path, {"batch": {"fp16": {"before": float("nan"), "after": 1.0}}})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["batch"]["fp16"] == {
        "before": None,
        "after": 1.0,
    }


def test_a_run_in_fp16_learns_as_in_fp32(world2: World) -> None:
    """Six updates of the engine with DeepSpeed's loss scaling, ZeRO 1 on two processes."""
    found = {p: world2.run(jobs.loud_run, precision=p, steps=6)[0] for p in ("fp32", "fp16")}
    assert found["fp16"] == pytest.approx(found["fp32"], rel=1e-2)
    assert found["fp32"][-1] < 0.95 * found["fp32"][0]
    # Negative control: without the cure no loss scale is small enough.
    assert world2.run(jobs.loud_run, precision="fp16", steps=6, cured=False)[0] == []
