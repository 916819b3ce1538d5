"""What a model is trained to do; an objective turns a batch into (sum of losses, their count)."""

from typing import Any


def build(section: Any) -> Any:
    """The objective that a run's `objective` section names."""
    from pretrain.objectives.causal import Causal

    return {"causal": Causal}[section.name]()
