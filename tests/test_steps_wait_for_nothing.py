"""A step asks the device for no value, DeepSpeed's own part included, where it can be told not to:
ZeRO 2, and ZeRO 0 and 1 in fp32. Elsewhere it asks once, for its norm (docs/optimizers.md).

Counted on a CPU, as reads of a tensor's value; on a GPU each of them waits for it.
"""

import pytest

from tests import zero_jobs as jobs
from tests.worlds import World

WAITS = {("fp32", 0): 0, ("fp32", 1): 0, ("fp32", 2): 0, ("fp32", 3): 1, ("bf16", 1): 1}
WAITS |= {("bf16", 2): 0, ("bf16", 3): 1}
LONG = {("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 3)}


@pytest.mark.parametrize(
    ("precision", "zero"),
    [pytest.param(*at, marks=[pytest.mark.slow] if at in LONG else []) for at in WAITS],
)
def test_a_step_asks_for_no_value(world2: World, precision: str, zero: int) -> None:
    asked = world2.run(jobs.waits_of_a_step, zero=zero, precision=precision)
    assert asked == [WAITS[precision, zero]] * 2


def test_the_count_sees_what_deepspeed_asks(world2: World) -> None:
    """Control: the same step where DeepSpeed judges the gradient, as by default."""
    assert min(world2.run(jobs.waits_of_a_step, zero=2, precision="bf16", quiet=False)) >= 1
