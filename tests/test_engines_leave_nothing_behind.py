"""Promise: the memory of an engine is there for the next one, and gradients go where plan has them.

Bytes are those of every tensor that Python knows of, each storage once.
"""

import pytest

from tests import engine_jobs
from tests.worlds import World


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_engine_leaves_its_place_to_the_next(world2: World, zero: int, precision: str) -> None:
    """At a stage border (a growth) or a rewind: weights, masters and gradients of the one before
    would stand beside the new engine's, as DeepSpeed's objects hold each other in rings."""
    for during, left in world2.run(
        engine_jobs.left_after_destroying, zero=zero, precision=precision
    ):
        assert during > 100_000 and left < 1000


@pytest.mark.parametrize("zero", [1, 2])
def test_no_gradient_in_bf16_outlives_its_backward(world2: World, zero: int) -> None:
    """They go into fp32 sums, which `plan` counts; kept as well they would be 2 bytes a parameter
    that it does not."""
    for seen in world2.run(
        engine_jobs.gradients_between_micro_batches, zero=zero, precision="bf16"
    ):
        assert len(seen) == 4 and not any(seen)
