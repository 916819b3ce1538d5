"""Cross-entropy of the hidden states of one device, without fp32 logits of [tokens, vocabulary].

    chunk = 0: hidden -> logits in the model's dtype, kept -> losses; the softmax is taken in fp32 a
               few rows at a time, forward and again backward, and the gradient is written over the
               logits: one matrix of [N, V], in the model's dtype, is all that there ever is.
    chunk = n: n rows at a time through the head, nothing kept, the head recomputed backward: the
               peak no longer grows with N, for one more product of the head.

Legend: N positions, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.transient import SOFTMAX_AT_ONCE

LogitsFn = Callable[[Tensor], Tensor]


class _CrossEntropy(torch.autograd.Function):
    """logits [N, V], targets [N] -> losses [N]; the logits become their own gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        exact = torch.promote_types(logits_NV.dtype, torch.float32)
        normaliser_N = torch.empty(logits_NV.shape[0], dtype=exact, device=logits_NV.device)
        for rows in _slices(logits_NV):
            torch.logsumexp(logits_NV[rows].to(exact), dim=1, out=normaliser_N[rows])
        picked_N = logits_NV.gather(1, targets_N[:, None])[:, 0].to(exact)
        ctx.save_for_backward(logits_NV, targets_N, normaliser_N)
        return normaliser_N - picked_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_N,) = gradients
        logits_NV, targets_N, normaliser_N = ctx.saved_tensors
        gradient_NV = logits_NV.detach()
        for rows in _slices(logits_NV):
            part = gradient_NV[rows].to(normaliser_N.dtype, copy=True)
            part.sub_(normaliser_N[rows, None]).exp_()
            ones = part.new_full((1, 1), -1.0).expand(part.shape[0], 1)
            part.scatter_add_(1, targets_N[rows, None], ones)
            gradient_NV[rows] = part.mul_(gradient_N[rows, None])
        return gradient_NV, None


def _slices(logits_NV: Tensor) -> list[slice]:
    number, vocab = logits_NV.shape
    step = max(1, SOFTMAX_AT_ONCE.get(logits_NV.device.type, 1 << 26) // vocab)
    return [slice(at, at + step) for at in range(0, number, step)]


def token_losses_plain(
    logits_fn: LogitsFn, hidden_ND: Tensor, targets_N: Tensor, chunk: int = 0
) -> Tensor:
    """-log p(target) at each position [N], in fp32 (float64 for a float64 model).

    `logits_fn` must return logits that nobody else uses: their memory becomes their gradient.
    With `chunk`, `logits_fn` is called once a chunk, forward and again backward.
    """

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return _CrossEntropy.apply(logits_fn(hidden), targets)  # type: ignore[no-any-return]

    if not chunk:
        return losses(hidden_ND, targets_N)
    pieces = zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([losses(hidden, targets) for hidden, targets in pieces])
    return torch.cat(
        [
            checkpoint(losses, hidden, targets, use_reentrant=False, preserve_rng_state=False)
            for hidden, targets in pieces
        ]
    )
