"""CPM: the GPT-2 decoder of CPM-1, 109 M to 2.6 B parameters.

    tokens + positions -> dropout -> blocks -> final LN -> hidden -> tied head x scale -> logits
    block: LN -> self-attention -> dropout -> + -> LN -> FFN (tanh GELU) -> dropout -> +

Learned positions, biases everywhere, dropout on embeddings, attention probabilities and what each
sub-layer adds. Sources: Zhang et al. 2020, "CPM: A Large-scale Generative Chinese Pre-trained
Language Model"; Radford et al. 2019 (GPT-2). Its tensors: configs/model.py.

Legend: B rows, T tokens, D hidden, N positions to predict, V vocabulary.
"""

from torch import Tensor, nn

from configs.model import CPMConfig, axis_size
from pretrain.models.dropout import Dropout
from pretrain.models.layers import (
    Attention,
    FeedForward,
    KeyValueCache,
    SelfAttention,
    TokenEmbedding,
    Visibility,
    attention_by_device,
    gelu_tanh,
    see,
)
from pretrain.models.longer import LearnedPositions
from pretrain.models.part import WHOLE
from pretrain.models.words import masked


class Block(nn.Module):
    """LN -> self-attention -> dropout -> + -> LN -> FFN -> dropout -> +"""

    def __init__(self, config: CPMConfig, layer: int, attention: Attention) -> None:
        super().__init__()
        scale = config.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
        self.layer = layer
        self.self_norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.self = SelfAttention(
            config.hidden,
            config.heads,
            config.head_dim,
            True,
            scale,
            config.attention_dropout,
            attention,
        )
        self.ffn_norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.ffn = FeedForward(config.hidden, config.ffn, True, gelu_tanh)
        self.dropout = Dropout(config.dropout)

    def self_sublayer(
        self, x_BTD: Tensor, see: Visibility, cache: KeyValueCache | None = None
    ) -> Tensor:
        """x + self-attention(LN(x))"""
        return x_BTD + self.dropout(self.self(self.self_norm(x_BTD), see, cache, self.layer))

    def ffn_sublayer(self, x_BTD: Tensor) -> Tensor:
        """x + FFN(LN(x))"""
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))

    def forward(self, x_BTD: Tensor, see: Visibility, cache: KeyValueCache | None = None) -> Tensor:
        """x_BTD -> x_BTD"""
        return self.ffn_sublayer(self.self_sublayer(x_BTD, see, cache))


class Embeddings(nn.Module):
    """The tables of tokens and positions."""

    def __init__(self, config: CPMConfig) -> None:
        super().__init__()
        self.tokens = TokenEmbedding(config.vocab, config.hidden)
        rows = axis_size(config, "positions")
        self.positions = LearnedPositions(
            rows, config.hidden, config.position_table, config.positions
        )


class Decoder(nn.Module):
    """The blocks and the norm behind them."""

    def __init__(self, config: CPMConfig, attention: Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, i, attention) for i in range(config.layers))
        self.final_norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)


class CPM(nn.Module):
    """The language model; parameters are named as in configs/model.py and come from a State."""

    def __init__(self, config: CPMConfig, attention: Attention = attention_by_device) -> None:
        super().__init__()
        self.config = config
        self.first_word = 0
        self.embed = Embeddings(config)
        self.dropout = Dropout(config.dropout)
        self.decoder = Decoder(config, attention)
        self.part = WHOLE

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] behind the final norm.

        A token sees itself and what is before it in its own document (None: a row is one document).
        With a cache the tokens continue those that it holds, whose document ids it holds too.
        Where a rank holds a part of the rows (models/part.py) tokens and hidden states are of that
        part, positions and document ids of whole rows; so in every family.
        """
        place_BTD = self.embed.positions(positions_BT, document_ids_BT, self.part)
        x_BTD = self.dropout(self.embed.tokens(tokens_BT) + place_BTD)
        T = positions_BT.shape[1]
        past, keys_BS = 0, document_ids_BT
        if cache is not None:
            past = cache.length
            if document_ids_BT is not None:
                keys_BS = cache.extend_documents(document_ids_BT)
        documents = (document_ids_BT, keys_BS)
        log_n, least = self.config.log_n, self.config.log_n_least
        device = tokens_BT.device
        seen = see(T, past + T, True, *documents, device, log_n_base=log_n, log_n_least=least)
        for block in self.decoder.layers:
            x_BTD = block(x_BTD, seen, cache)
        if cache is not None:
            cache.length += T
        return self.decoder.final_norm(x_BTD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V] (this rank's part of V, where it is cut)."""
        logits_NV = self.embed.tokens(hidden_ND, project=True)
        scale = self.config.logit_scale
        scaled_NV = logits_NV if scale == 1.0 else logits_NV * scale
        return masked(scaled_NV, self.config, self.first_word)
