"""RoFormer: a masked-LM encoder that knows positions by turning queries and keys; v1 and v2; BERT.

    v1  tokens + segments -> LN -> dropout -> blocks -> hidden
        hidden -> dense -> GELU -> LN -> tied head + bias -> logits
    v2  tokens + segments -> dropout -> RMSNorm -> blocks -> dropout -> hidden
        hidden -> tied head -> logits
    labels  hidden of [CLS] -> (v1: dropout -> dense -> GELU, BERT: tanh -> dropout) -> classes
    block: self-attention -> dropout -> + -> norm -> FFN -> dropout -> + -> norm

v1 is BERT without its position table: LayerNorm, biases, erf GELU. With `positions` the table is
there, added to the other two, and nothing is turned: BERT itself, WoBERT, SimBERT. v2 has no bias,
ReLU, and an RMSNorm without a gain; its + is x + a F(x), where a rises from 0 to 1 over the first
steps of training: a post-norm network that starts as one without layers trains without trouble.
Sources: Su et al. 2021, RoFormer (kexue.fm/archives/8265); v2, kexue.fm/archives/8998; the ramp,
8620 and 8998; Devlin et al. 2019, BERT; WoBERT, kexue.fm/archives/7758. Tensors: configs/model.py.

Legend: B rows, T tokens, D hidden, N positions to predict, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import RoFormerConfig, axis_size
from pretrain.models.dropout import Dropout
from pretrain.models.layers import (
    Attention,
    FeedForward,
    SelfAttention,
    TokenEmbedding,
    Visibility,
    attention_by_device,
    gelu_erf,
    see,
)
from pretrain.models.longer import LearnedPositions, regions_of
from pretrain.models.norms import rms_norm
from pretrain.models.part import WHOLE
from pretrain.models.positions import Turn, same_positions, turn_of
from pretrain.models.words import masked


class PlainRMSNorm(nn.Module):
    """RMSNorm without a gain: nothing to learn."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return rms_norm(x, self.eps)


def _norm(config: RoFormerConfig) -> nn.Module:
    if config.version == 1:
        return nn.LayerNorm(config.hidden, eps=config.norm_eps)
    return PlainRMSNorm(config.norm_eps)


class Block(nn.Module):
    """self-attention -> dropout -> + -> norm -> FFN -> dropout -> + -> norm"""

    def __init__(self, config: RoFormerConfig, attention: Attention) -> None:
        super().__init__()
        scale = config.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
        v1 = config.version == 1
        self.self = SelfAttention(
            config.hidden,
            config.heads,
            config.head_dim,
            v1,
            scale,
            config.attention_dropout,
            attention,
        )
        self.self_norm = _norm(config)
        activation: Callable[[Tensor], Tensor] = gelu_erf if v1 else F.relu
        self.ffn = FeedForward(config.hidden, config.ffn, v1, activation)
        self.ffn_norm = _norm(config)
        self.dropout = Dropout(config.dropout)
        self.share = 1.0
        """What a sub-layer adds is multiplied by this."""

    def _add(self, x_BTD: Tensor, more_BTD: Tensor) -> Tensor:
        more_BTD = self.dropout(more_BTD)
        return x_BTD + (more_BTD if self.share == 1.0 else more_BTD * self.share)

    def self_sublayer(self, x_BTD: Tensor, see: Visibility, turn: Turn | None) -> Tensor:
        """norm(x + self-attention(x))"""
        return self.self_norm(self._add(x_BTD, self.self(x_BTD, see, turn=turn)))

    def ffn_sublayer(self, x_BTD: Tensor) -> Tensor:
        """norm(x + FFN(x))"""
        return self.ffn_norm(self._add(x_BTD, self.ffn(x_BTD)))

    def forward(self, x_BTD: Tensor, see: Visibility, turn: Turn | None) -> Tensor:
        """x_BTD -> x_BTD"""
        return self.ffn_sublayer(self.self_sublayer(x_BTD, see, turn))


class Embeddings(nn.Module):
    """The tables of tokens, segments and, where they are learned, positions; the norm behind."""

    def __init__(self, config: RoFormerConfig) -> None:
        super().__init__()
        self.tokens = TokenEmbedding(config.vocab, config.hidden)
        self.segments = nn.Embedding(config.segments, config.hidden)
        if config.positions is not None:
            rows = axis_size(config, "positions")
            self.positions = LearnedPositions(
                rows, config.hidden, config.position_table, config.positions
            )
        self.norm = _norm(config)


class Encoder(nn.Module):
    """The blocks."""

    def __init__(self, config: RoFormerConfig, attention: Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.layers))


class Head(nn.Module):
    """dense -> GELU -> LN -> the token table -> + bias"""

    def __init__(self, config: RoFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab))

    def forward(self, hidden_ND: Tensor, tokens: nn.Module) -> Tensor:
        """[..., D] -> [..., V]"""
        x_ND = self.norm(gelu_erf(self.dense(hidden_ND)))
        logits_NV: Tensor = tokens(x_ND, project=True, bias_V=self.bias)
        return logits_NV


class LabelHead(nn.Module):
    """What stands in the place of the head over words: the classes of a text, out of its [CLS].

    As transformers has it: RoFormer with GELU, BERT with its pooler's tanh. RoFormer v2 as
    published (clue/): one matrix.
    """

    def __init__(self, config: RoFormerConfig) -> None:
        super().__init__()
        self.dropout, self.learned = Dropout(config.dropout), config.positions is not None
        if config.version == 1:
            self.pooler = nn.Linear(config.hidden, config.hidden)
        self.classifier = nn.Linear(config.hidden, config.labels)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """[..., D] -> [..., labels]"""
        if hasattr(self, "pooler"):
            if self.learned:
                hidden_ND = self.dropout(torch.tanh(self.pooler(hidden_ND)))
            else:
                hidden_ND = self.dropout(gelu_erf(self.pooler(self.dropout(hidden_ND))))
        logits_NL: Tensor = self.classifier(hidden_ND)
        return logits_NL


class RoFormer(nn.Module):
    """The encoder; parameters are named as in configs/model.py and come from a State."""

    def __init__(self, config: RoFormerConfig, attention: Attention = attention_by_device) -> None:
        super().__init__()
        self.config = config
        self.first_word = 0
        self.embed = Embeddings(config)
        self.dropout = Dropout(config.dropout)
        self.encoder = Encoder(config, attention)
        self.part = WHOLE
        if config.labels:
            self.head: nn.Module = LabelHead(config)
        elif config.version == 1:
            self.head = Head(config)

    def set_progress(self, step: int) -> None:
        """Say which update is made (from 1), or was the last: decides the share that is added."""
        ramp = self.config.ramp_steps
        for block in self.modules():
            if isinstance(block, Block):
                block.share = min(1.0, step / ramp) if ramp else 1.0

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D]: a token sees all of its own document (None: the row is one).

        segments_BT: int64 below config.segments; None: all are of segment 0.
        """
        x_BTD = self._embedded(tokens_BT, positions_BT, document_ids_BT, segments_BT)
        T, config, rope = positions_BT.shape[1], self.config, self.config.rope
        documents = (document_ids_BT, document_ids_BT)
        log_n, least = config.log_n, config.log_n_least
        device = tokens_BT.device
        seen = see(T, T, False, *documents, device, log_n_base=log_n, log_n_least=least)
        turn = None
        if config.positions is None:
            numbers = (config.head_dim, config.rope_base, x_BTD.dtype)
            turn = turn_of(positions_BT, *numbers, rope, document_ids_BT, self.part)
            if rope is not None and rope.windowed:
                places = same_positions(positions_BT, document_ids_BT)
                seen = replace(seen, regions=regions_of(places, places, rope.window))
        for block in self.encoder.layers:
            x_BTD = block(x_BTD, seen, turn)
        # v2's head begins with dropout; here, because a head that works in turns is run again
        return x_BTD if config.version == 1 else self.dropout(x_BTD)

    def _embedded(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        segments_BT: Tensor | None,
    ) -> Tensor:
        if segments_BT is None:
            segments_BT = tokens_BT.new_zeros(1, 1)
        x_BTD = self.embed.tokens(tokens_BT) + self.embed.segments(segments_BT)
        if self.config.positions is not None:
            x_BTD = x_BTD + self.embed.positions(positions_BT, document_ids_BT, part=self.part)
        if self.config.version == 1:
            embedded: Tensor = self.dropout(self.embed.norm(x_BTD))
        else:
            embedded = self.embed.norm(self.dropout(x_BTD))
        return embedded

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V] (this rank's part of V, where it is cut).

        With labels: of hidden states of [CLS] -> logits [..., labels].
        """
        if self.config.labels:
            logits_NL: Tensor = self.head(hidden_ND)
            return logits_NL
        if self.config.version == 1:
            logits_NV = self.head(hidden_ND, self.embed.tokens)
        else:
            logits_NV = self.embed.tokens(hidden_ND, project=True)
        scale = self.config.logit_scale
        scaled_NV = logits_NV if scale == 1.0 else logits_NV * scale
        return masked(scaled_NV, self.config, self.first_word)
