"""Each update rule equals a plain reading of it, whichever rank holds which part of a tensor.

20 steps of a float64 reference, one process, whole tensors (tests/plain_optimizers.py), against
fp32 under ZeRO 0 to 3 and tensor parallelism. Tolerances: losses to 1e-6 of them, ten roundings of
fp32 (1.6e-7 measured); the weights together to 1e-6 of their norm (4e-7). A key's bias is left out:
its gradient is nothing but rounding, which Adam's family makes steps of full length.
"""

from typing import Any

import pytest
from torch import Tensor

from configs.optimizers import Optimizer
from tests import zero_jobs as jobs
from tests.plain_optimizers import reference
from tests.worlds import World

SECTIONS: dict[str, dict[str, Any]] = {
    "lamb": {"name": "lamb", "lr": 2e-2, "weight_decay": 0.01},
    "lamb as in RoFormer v2": {
        "name": "lamb", "lr": 2e-2, "bias_correction": False, "decay": "all", "beta2": 0.999,
    },
    "lamb, norms and biases apart": {"name": "lamb", "lr": 5e-3, "adapt": "decayed"},
    "rms_adamw": {"name": "rms_adamw", "lr": 2e-2},
    "adafactor": {"name": "adafactor", "lr": 2e-2, "beta1": 0.0, "weight_decay": 0.01},
    "adafactor as T5": {
        "name": "adafactor", "lr": 0.5, "beta1": 0.0, "relative_step": True, "weight_decay": 0.0,
    },
    "muon": {"name": "muon"},
    "muon, spectral": {"name": "muon", "lr": 1e-2, "muon_scale": "spectral"},
}  # fmt: skip
LAYOUTS = {
    "plain": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2, "micro": 2},
    "zero3": {"zero": 3},
    "tensor": {"zero": 1, "tensor": 2},
}
STEPS = dict.fromkeys(SECTIONS, 20) | {"adafactor as T5": 6}
"""T5's rates move a quarter of a tensor at once: roundings grow tenfold in two steps."""
_references: dict[str, tuple[list[float], dict[str, Tensor]]] = {}


def expected(which: str) -> tuple[list[float], dict[str, Tensor]]:
    """The reference's losses and weights, computed once."""
    if which not in _references:
        section = Optimizer(**({"lr": jobs.LR} | SECTIONS[which]))
        _references[which] = reference(section, STEPS[which])
    return _references[which]


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|difference| / |weights| over all tensors together; key biases left out."""
    kept = {name: weight for name, weight in wanted.items() if not name.endswith("k.bias")}
    far = sum(float((found[f"weights/{n}"].double() - w).square().sum()) for n, w in kept.items())
    return float((far / sum(float(w.square().sum()) for w in kept.values())) ** 0.5)


def after(world: World, which: str, **layout: Any) -> tuple[list[float], dict[str, Tensor], Any]:
    """Losses, whole state and progress after a run."""
    ranks = world.run(jobs.train, **({"steps": STEPS[which]} | SECTIONS[which] | layout))
    whole = jobs.gathered(jobs.TINY, [rank["pieces"] for rank in ranks], ranks[0]["entries"])
    return ranks[0]["losses"], whole, ranks[0]["progress"]


CASES = [("lamb", layout) for layout in LAYOUTS] + [
    ("lamb as in RoFormer v2", "zero2"),
    ("lamb, norms and biases apart", "zero3"),
    ("rms_adamw", "zero1"),
    ("adafactor", "zero1"),
    ("adafactor", "zero3"),
    ("adafactor", "tensor"),
    ("adafactor as T5", "zero2"),
    ("muon", "plain"),
    ("muon", "zero1"),
    ("muon", "zero3"),
    ("muon", "tensor"),
    ("muon, spectral", "zero2"),
]


@pytest.mark.parametrize(("which", "layout"), CASES)
def test_a_run_equals_the_plain_reading(world2: World, which: str, layout: str) -> None:
    losses, weights = expected(which)
    found, whole, _ = after(world2, which, **LAYOUTS[layout])
    assert found == pytest.approx(losses, rel=1e-6)
    assert apart(whole, weights) < 1e-6


@pytest.mark.parametrize("zero", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 3))])
def test_muon_equals_the_plain_reading_where_matrices_are_cut_twice(
    world4: World, zero: int
) -> None:
    """Tensor 2 x data 2: rows and columns on two ranks, each part on one or two of the others."""
    losses, weights = expected("muon")
    found, whole, _ = after(world4, "muon", zero=zero, tensor=2)
    assert found == pytest.approx(losses, rel=1e-6)
    assert apart(whole, weights) < 1e-6


def test_the_comparison_sees_columns_taken_for_rows(world2: World) -> None:
    """Control: the parts of a matrix that is cut by columns are put together as rows."""
    losses, _ = expected("muon")
    ranks = world2.run(jobs.all_cut_by_rows, steps=20, zero=1, tensor=2, **SECTIONS["muon"])
    assert max(abs(a / b - 1) for a, b in zip(ranks[0]["losses"], losses, strict=True)) > 1e-4


@pytest.mark.parametrize("which", ["lamb", "adafactor", "muon"])
def test_a_run_goes_on_on_other_devices(world1: World, world2: World, which: str) -> None:
    """Ten steps under ZeRO 2 on two processes, six under ZeRO 3 on one, four on two again."""
    losses, weights = expected(which)
    first, whole, progress = after(world2, which, zero=2, steps=10)
    second, whole, progress = after(
        world1, which, zero=3, steps=6, first=10, state=(whole, progress)
    )
    third, whole, _ = after(
        world2, which, steps=4, first=16, state=(whole, progress), zero=1, tensor=2
    )
    assert first + second + third == pytest.approx(losses, rel=1e-6)
    assert apart(whole, weights) < 1e-6


def test_the_comparison_sees_norms_of_parts(world2: World) -> None:
    """Control: trust ratios by what each rank holds, as an optimizer unaware of ZeRO has them."""
    losses, _ = expected("lamb")
    ranks = world2.run(jobs.unaware, steps=20, zero=3, **SECTIONS["lamb"])
    assert max(abs(a / b - 1) for a, b in zip(ranks[0]["losses"], losses, strict=True)) > 1e-4


@pytest.mark.parametrize(("which", "most"), [("lamb", 2), ("adafactor", 3)])
def test_an_update_sends_few_messages_and_asks_once(world2: World, which: str, most: int) -> None:
    """Gradient norms, sums by row and column, both norms of a ratio. One value is asked for:
    whether the gradient is sound, as these rules cannot mask what they do."""
    for messages, waits in world2.run(jobs.messages_of_an_update, zero=2, **SECTIONS[which]):
        assert (messages, waits) == (most, 1)
