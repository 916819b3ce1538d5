"""What a model is trained to do; an objective turns a batch into (sum of losses, their count)."""

from typing import Any

from configs.objectives import SEQ2SEQ, Labels, Masked


def build(section: Any) -> Any:
    """The objective that a run's `objective` section names."""
    if isinstance(section, SEQ2SEQ):
        from pretrain.objectives.seq2seq import Seq2Seq

        return Seq2Seq()
    if isinstance(section, Masked):
        from pretrain.objectives import masked

        return masked.Masked()
    if isinstance(section, Labels):
        from pretrain.objectives import labels

        return labels.Labels()
    from pretrain.objectives.causal import Causal

    return Causal()
