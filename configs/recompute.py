"""What is kept of a forward pass for the backward, and what is computed again.

The `recompute` section of a run's page; `recompute: full` is short for `recompute: {how: full}`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Recompute:
    """What is computed again; a word alone is `how` (重计算)."""

    SHORT: ClassVar[str] = "how"

    how: Literal["none", "full", "sublayer", "budget"] = "none"
    """none: all is kept; full: a block keeps its input only; sublayer: each sub-layer its input;
    budget: as few sub-layers and blocks as keep activations within budget_gib (选择性重计算)."""
    budget_gib: float | None = None
    """For budget: GiB that a micro-batch may keep on a device, logits left out, as `plan` counts
    (显存预算)."""
    offload: bool = False
    """The inputs that are kept lie in host memory until the backward pass (激活卸载到内存)."""

    def problems(self) -> list[str]:
        """A budget without a number, a number without a budget, nothing to offload."""
        found = []
        if self.how == "budget" and (self.budget_gib is None or self.budget_gib <= 0):
            found.append(f"budget_gib: is {self.budget_gib}, must be above 0 for how: budget")
        if self.how != "budget" and self.budget_gib is not None:
            found.append(
                f"budget_gib: is {self.budget_gib}, and how is {self.how}; set how: budget "
                "(预算只用于 budget)"
            )
        if self.offload and self.how == "none":
            found.append(
                "offload: moves the inputs of what is computed again, and how is none; set how to "
                "full, sublayer or budget (没有可卸载的激活)"
            )
        return found
