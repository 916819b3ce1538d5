"""T5 PEGASUS: mT5.1.1 with Chinese words, an encoder and a decoder, 95 M and 275 M parameters.

    encoder tokens -> embedding -> dropout -> encoder blocks -> final norm -> dropout -> memory
    tokens ---------> embedding -> dropout -> decoder blocks -> final norm -> dropout -> hidden
                                                  ^ memory          hidden x scale -> head -> logits
    encoder block: norm -> self-attention -> dropout -> + -> norm -> gated FFN -> dropout -> +
    decoder block: the same with norm -> cross-attention -> dropout -> + in between

RMSNorm, no bias in any matrix, no scaling of attention scores, one table of relative position bias
to a stack, shared by its layers. The token embedding serves both stacks; the head is its own.

The published weights were trained by bert4keras, which departs from mT5 in three places, each an
option of the config: GELU by erf, the decoder's position bias added to cross-attention too, the
head's input scaled by hidden ** -0.5. Sources: Su, kexue.fm/archives/8209; Xue et al. 2021 (mT5);
Shazeer 2020 (GLU variants). Its tensors: configs/model.py.

In fp16, which ends at 65,504, T5's residual stream and feed-forward outputs overflow (they reach
1e5 and more; transformers #9295). keep_in_range() makes the stream a 64th of what it is: every
norm reads it as the same, because RMSNorm divides by its length, and the function stays, exactly.

Legend: B rows, T decoder tokens, S encoder tokens, D hidden, N positions to predict, V vocabulary.
"""

from typing import Any

from torch import Tensor, nn

from configs.model import T5PegasusConfig
from pretrain.models.dropout import Dropout
from pretrain.models.layers import (
    Attention,
    CrossAttention,
    GatedFeedForward,
    KeyValueCache,
    SelfAttention,
    TokenEmbedding,
    Visibility,
    attention_by_device,
    gelu_erf,
    gelu_tanh,
    see,
    see_across,
)
from pretrain.models.norms import RMSNorm
from pretrain.models.part import WHOLE
from pretrain.models.positions import RelativeBias, same_positions, shared_positions
from pretrain.models.words import masked

SHARE_IN_FP16 = 2.0**-6
"""Of the stream: 4e6 is in range then, and 0.004 has all of its digits. A power of two rounds
nothing."""


class EncoderBlock(nn.Module):
    """norm -> self-attention -> dropout -> + -> norm -> gated FFN -> dropout -> +"""

    def __init__(self, config: T5PegasusConfig, layer: int, attention: Attention) -> None:
        super().__init__()
        self.layer = layer
        self.self_norm = RMSNorm(config.hidden, config.norm_eps)
        self.self = SelfAttention(*_attention_sizes(config), attention)
        self.ffn_norm = RMSNorm(config.hidden, config.norm_eps)
        activation = gelu_erf if config.activation == "gelu_erf" else gelu_tanh
        self.ffn = GatedFeedForward(config.hidden, config.ffn, activation, config.dropout)
        self.dropout = Dropout(config.dropout)

    def self_sublayer(
        self, x_BTD: Tensor, see: Visibility, cache: KeyValueCache | None = None
    ) -> Tensor:
        """x + self-attention(norm(x))"""
        return x_BTD + self.dropout(self.self(self.self_norm(x_BTD), see, cache, self.layer))

    def ffn_sublayer(self, x_BTD: Tensor) -> Tensor:
        """x + FFN(norm(x))"""
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))

    def forward(self, x_BTD: Tensor, see: Visibility) -> Tensor:
        """x_BTD -> x_BTD"""
        return self.ffn_sublayer(self.self_sublayer(x_BTD, see))


class DecoderBlock(EncoderBlock):
    """norm -> self-attention -> + -> norm -> cross-attention -> + -> norm -> gated FFN -> +"""

    def __init__(self, config: T5PegasusConfig, layer: int, attention: Attention) -> None:
        super().__init__(config, layer, attention)
        self.cross_norm = RMSNorm(config.hidden, config.norm_eps)
        self.cross = CrossAttention(*_attention_sizes(config), attention)

    def cross_sublayer(
        self,
        x_BTD: Tensor,
        see: Visibility,
        memory_BSD: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x + cross-attention(norm(x), memory)"""
        x = self.cross(self.cross_norm(x_BTD), see, memory_BSD, cache, self.layer)
        return x_BTD + self.dropout(x)

    def forward(  # type: ignore[override]
        self,
        x_BTD: Tensor,
        see: Visibility,
        see_across: Visibility,
        memory_BSD: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x_BTD and the encoder's memory -> x_BTD"""
        x_BTD = self.self_sublayer(x_BTD, see, cache)
        return self.ffn_sublayer(self.cross_sublayer(x_BTD, see_across, memory_BSD, cache))


class Embeddings(nn.Module):
    """The table of tokens that both stacks read."""

    def __init__(self, config: T5PegasusConfig) -> None:
        super().__init__()
        self.tokens = TokenEmbedding(config.vocab, config.hidden)


class Stack(nn.Module):
    """The position bias, the blocks, and the norm behind them."""

    def __init__(
        self, config: T5PegasusConfig, block: type[EncoderBlock], attention: Attention
    ) -> None:
        super().__init__()
        self.position_bias = RelativeBias(
            config.buckets,
            config.heads,
            config.max_distance,
            two_sided=block is EncoderBlock,
            spans=config.bucket_spans,
        )
        self.layers = nn.ModuleList(block(config, i, attention) for i in range(config.layers))
        self.final_norm = RMSNorm(config.hidden, config.norm_eps)


class T5Pegasus(nn.Module):
    """The model; parameters are named as in configs/model.py and come from a State."""

    def __init__(self, config: T5PegasusConfig, attention: Attention = attention_by_device) -> None:
        super().__init__()
        self.config = config
        self.first_word = 0
        self.embed = Embeddings(config)
        self.dropout = Dropout(config.dropout)
        self.encoder = Stack(config, EncoderBlock, attention)
        self.decoder = Stack(config, DecoderBlock, attention)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.part = WHOLE
        self.share = 1.0
        """Of the stream that is computed, see keep_in_range()."""

    def keep_in_range(self, share: float = SHARE_IN_FP16) -> None:
        """Compute with `share` of the residual streams; what comes out of the model stays.

        Embeddings and what every sub-layer adds are multiplied, the latter before the products that
        would overflow; eps of the norms by its square.
        """
        self.share = share
        for module in self.modules():
            if isinstance(module, SelfAttention | GatedFeedForward):
                module.share = share
            elif isinstance(module, RMSNorm):
                module.eps = self.config.norm_eps * share**2

    def _embedded(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed.tokens(tokens_BT)
        embedded: Tensor = self.dropout(x_BTD if self.share == 1.0 else x_BTD * self.share)
        return embedded

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        encoder_tokens_BS: Tensor,
        encoder_positions_BS: Tensor,
        encoder_document_ids_BS: Tensor | None,
    ) -> Tensor:
        """The decoder's hidden states [B, T, D].

        A token of the decoder sees itself and what is before it in its own document, and the
        encoder's tokens of the same document (ids None: a row is one document, number 0).
        """
        memory_BSD = self.encode(encoder_tokens_BS, encoder_positions_BS, encoder_document_ids_BS)
        return self.decode(
            tokens_BT,
            positions_BT,
            document_ids_BT,
            memory_BSD,
            encoder_positions_BS,
            encoder_document_ids_BS,
        )

    def encode(
        self, tokens_BS: Tensor, positions_BS: Tensor, document_ids_BS: Tensor | None = None
    ) -> Tensor:
        """The encoder's hidden states [B, S, D]: a token sees all of its own document."""
        x_BSD = self._embedded(tokens_BS)
        S, stretch = positions_BS.shape[1], log_n_of(self.config)
        places = shared_positions(positions_BS, document_ids_BS)
        bias_BNSS = self.encoder.position_bias(places, places, self.part)
        documents = (document_ids_BS, document_ids_BS)
        seen = see(S, S, False, *documents, tokens_BS.device, bias_BNTS=bias_BNSS, **stretch)
        for block in self.encoder.layers:
            x_BSD = block(x_BSD, seen)
        return self.dropout(self.encoder.final_norm(x_BSD))

    def decode(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        memory_BSD: Tensor,
        encoder_positions_BS: Tensor,
        encoder_document_ids_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The decoder's hidden states [B, T, D] over the encoder's.

        With a cache the tokens continue those that it holds, in their documents and positions; the
        encoder's keys and values are then computed once.
        """
        x_BTD = self._embedded(tokens_BT)
        T = positions_BT.shape[1]
        past, keys_BS, key_positions_BS = 0, document_ids_BT, positions_BT
        if cache is not None:
            past, key_positions_BS = cache.length, cache.extend_positions(positions_BT)
            if document_ids_BT is not None:
                keys_BS = cache.extend_documents(document_ids_BT)
        queries, keys = positions_BT, key_positions_BS
        if cache is None:
            queries = keys = shared_positions(positions_BT, document_ids_BT)
        table, stretch = self.decoder.position_bias, log_n_of(self.config)
        documents = (document_ids_BT, keys_BS)
        seen = see(
            T,
            past + T,
            True,
            *documents,
            tokens_BT.device,
            bias_BNTS=table(queries, keys, self.part),
            **stretch,
        )
        bias_BNTS = None
        if self.config.cross_position_bias:
            bias_BNTS = table(
                same_positions(positions_BT, document_ids_BT),
                same_positions(encoder_positions_BS, encoder_document_ids_BS),
                self.part,
            )
        across = see_across(
            positions_BT,
            encoder_positions_BS,
            document_ids_BT,
            encoder_document_ids_BS,
            bias_BNTS=bias_BNTS,
            **stretch,
        )
        for block in self.decoder.layers:
            x_BTD = block(x_BTD, seen, across, memory_BSD, cache)
        if cache is not None:
            cache.length += T
        return self.dropout(self.decoder.final_norm(x_BTD))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V] (this rank's part of V, where it is cut)."""
        scale = self.config.logit_scale
        scale = self.config.hidden**-0.5 if scale is None else scale
        logits_NV: Tensor = self.head(hidden_ND if scale == 1.0 else hidden_ND * scale)
        return masked(logits_NV, self.config, self.first_word)


def log_n_of(config: T5PegasusConfig) -> dict[str, Any]:
    """The arguments of see() for log-n scaling."""
    return {"log_n_base": config.log_n, "log_n_least": config.log_n_least}


def _attention_sizes(
    config: T5PegasusConfig,
) -> tuple[int, int, int, bool, float, float]:
    scale = config.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
    return config.hidden, config.heads, config.head_dim, False, scale, config.attention_dropout
