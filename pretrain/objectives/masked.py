"""Masked language modelling: predict what was hidden, from both sides.

    batch -> model -> hidden [B, T, D] -> the N hidden positions -> head -> token_losses -> (sum, N)

The whole head of the model (dense, activation, norm, tied table) sees the hidden positions only,
about one in seven. Where they are is known to the loader (`loss_at_N`); the arithmetic is the
causal objective's, only what the targets are differs.
"""

from pretrain.objectives.causal import Causal


class Masked(Causal):
    """Prediction of the tokens at the positions of `loss_mask_BT`, as they were before."""
