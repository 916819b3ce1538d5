"""What a head can say: logits of masked words are overwritten, whatever their rows are.

Legend: V vocabulary (this rank's part of it, where it is cut).
"""

import torch
from torch import Tensor

from configs.grown import said
from configs.model import ModelConfig

MASKED = -1e4
"""A logit under which a word is never said: exp of it is 0 in every precision."""


def masked(logits_NV: Tensor, config: ModelConfig, first: int = 0) -> Tensor:
    """Logits [..., V], in place: those of the words from `words_said` on become MASKED.

    `first` is the word of the first column. No gradient passes where the softmax is 0 anyhow, and
    nobody is asked for a masked word (pretrain/corpora.py); so it is not recorded, and costs none
    of the memory that a recorded fill would.
    """
    if config.words_said is not None:
        with torch.no_grad():
            logits_NV[..., max(0, said(config) - first) :] = MASKED
    return logits_NV
