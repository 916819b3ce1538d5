"""What the families share: attention, the feed-forward layer, the token embedding.

    x_BTD -> q, k, v -> q_BTNH, k_BSNH, v_BSNH -> attention(q, k, v, see, ...) -> o -> +

Plain single-device PyTorch. Local sizes are inferred (`view(B, T, -1, head_dim)`) and every matrix
is a module called as module(x), so a part of the heads, of the FFN or of the vocabulary works as
the whole does: tensor parallelism swaps the modules from outside.

Attention is a function handed in, `attention(q_BTNH, k_BSNH, v_BSNH, see, scale, dropout)`; who
sees whom, and with what bias, is a value, `Visibility`, made once a forward and used by every
layer of a stack.

Legend: B rows, T queries, S keys, N heads, H head_dim, D hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import ModelConfig, local_shape, tensors
from pretrain.models.dropout import drop
from pretrain.models.longer import Regions, windowed_scores
from pretrain.models.positions import Turn, log_n, turned

Attention = Callable[[Tensor, Tensor, Tensor, "Visibility", float, float], Tensor]


# ---------------------------------------------------------------- who sees whom


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees: a mask, or a rule that needs none."""

    causal: bool
    """Without a mask: key s is seen by query t if s <= t (as many keys as queries)."""
    visible: Tensor | None = None
    """bool [B or 1, 1, T, S]; None: all, or what `causal` says."""
    bias: Tensor | None = None
    """[B or 1, N, T, S], added to the scores; -inf where hidden, so that it is all of the mask."""
    stretch: Tensor | None = None
    """[B or 1, T, 1, 1], queries are multiplied by it (log-n scaling); None: 1."""
    regions: Regions | None = None
    """Which of three products is a score (ReRoPE); queries then hold three, keys two of them."""
    _made: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def stretched(self, q_BTNH: Tensor) -> Tensor:
        """Queries by log-n scaling."""
        return q_BTNH if self.stretch is None else q_BTNH * self.stretch.to(q_BTNH.dtype)

    def additive(self, like_BNTS: Tensor) -> Tensor | None:
        """The bias, 0 without one, and -inf where hidden; None where nothing is to be added."""
        if self.bias is not None:
            return self.bias
        if self.visible is None and not self.causal:
            return None
        if like_BNTS.dtype not in self._made:
            hidden = torch.full((), float("-inf"), dtype=like_BNTS.dtype, device=like_BNTS.device)
            visible = self.visible
            if visible is None:
                shape = like_BNTS.shape[-2:]
                visible = torch.ones(shape, dtype=torch.bool, device=like_BNTS.device).tril()
            self._made[like_BNTS.dtype] = torch.where(visible, torch.zeros_like(hidden), hidden)
        return self._made[like_BNTS.dtype]


def see(
    queries: int,
    keys: int,
    causal: bool,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
    device: torch.device | None = None,
    *,
    bias_BNTS: Tensor | None = None,
    log_n_base: int = 0,
    log_n_least: float = 0.0,
) -> Visibility:
    """The visibility of the last `queries` of `keys` positions of the same rows.

    A position sees its own document only (padding, -1, is a document too, so that no row of scores
    is empty), and with `causal` nothing behind itself. With `log_n_base` queries are stretched by
    the logarithm of the number of keys that they see, by log_n_least at least
    (models/positions.py); 0 leaves them.
    """
    visible = None
    if query_documents_BT is not None and key_documents_BS is not None:
        visible = query_documents_BT[:, None, :, None] == key_documents_BS[:, None, None, :]
    causal = causal and queries > 1
    if causal and (visible is not None or queries != keys or bias_BNTS is not None):
        order = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        visible = order[None, None] if visible is None else visible & order
    stretch = (log_n_base, log_n_least)
    return _seen(causal and visible is None, visible, queries, keys, device, bias_BNTS, *stretch)


def see_across(
    queries_BT: Tensor,
    keys_BS: Tensor,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
    *,
    bias_BNTS: Tensor | None = None,
    log_n_base: int = 0,
    log_n_least: float = 0.0,
) -> Visibility:
    """The visibility of a decoder's tokens over an encoder's: those of the same document.

    Document ids that are None mean that a row is document 0. A position that would see nothing,
    which padding may be, sees all: its softmax would have no value, and nobody reads it.
    """
    visible = None
    if query_documents_BT is not None or key_documents_BS is not None:
        of_queries = torch.zeros_like(queries_BT)
        of_keys = torch.zeros_like(keys_BS)
        of_queries = of_queries if query_documents_BT is None else query_documents_BT
        of_keys = of_keys if key_documents_BS is None else key_documents_BS
        visible = of_queries[:, None, :, None] == of_keys[:, None, None, :]
        visible = visible | ~visible.any(-1, keepdim=True)
    T, S = queries_BT.shape[1], keys_BS.shape[1]
    stretch = (log_n_base, log_n_least)
    return _seen(False, visible, T, S, keys_BS.device, bias_BNTS, *stretch)


def _seen(
    causal: bool,
    visible: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device | None,
    bias_BNTS: Tensor | None,
    log_n_base: int,
    log_n_least: float,
) -> Visibility:
    stretch = None
    if log_n_base:
        if visible is not None:
            counts = visible.sum(-1).transpose(1, 2)[..., None]
        elif causal:
            counts = torch.arange(1, queries + 1, device=device)[None, :, None, None]
        else:
            counts = torch.full((1, 1, 1, 1), keys, device=device)
        stretch = log_n(counts, log_n_base).clamp(min=log_n_least)
    if bias_BNTS is not None and visible is not None:
        # Once, here: recomputed layers use it as it is.
        bias_BNTS = bias_BNTS.masked_fill(~visible, float("-inf"))
    return Visibility(causal, visible, bias_BNTS, stretch)


# ---------------------------------------------------------------- attention


def attention_sdpa(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, see: Visibility, scale: float, dropout: float
) -> Tensor:
    """Attention by PyTorch's fused kernels: the fast path of a GPU."""
    # The bias of all layers, not a Boolean, of which each layer would make and keep its own.
    whole = see.visible is None and see.bias is None
    out_BNTH = F.scaled_dot_product_attention(
        see.stretched(q_BTNH).transpose(1, 2),
        k_BSNH.transpose(1, 2),
        v_BSNH.transpose(1, 2),
        attn_mask=None if whole else see.additive(q_BTNH),
        dropout_p=dropout,
        is_causal=see.causal,
        scale=scale,
    )
    return out_BNTH.transpose(1, 2)


def attention_matmul(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, see: Visibility, scale: float, dropout: float
) -> Tensor:
    """Attention as two batched matrix products: on a CPU its backward is faster than SDPA's.

    The softmax computes in fp32 inside whatever the dtype; dropout falls on the probabilities.
    """
    q_BTNH = see.stretched(q_BTNH)
    q_BTNH = q_BTNH if scale == 1.0 else q_BTNH * scale
    if see.regions is None:
        scores_BNTS = q_BTNH.transpose(1, 2) @ k_BSNH.permute(0, 2, 3, 1)
    else:
        scores_BNTS = windowed_scores(q_BTNH, k_BSNH, see.regions)
    mask = see.additive(scores_BNTS)
    if mask is not None:
        scores_BNTS += mask  # in place: nobody else holds the scores, and a copy costs page faults
    probabilities_BNTS = drop(torch.softmax(scores_BNTS, dim=-1), dropout)
    return (probabilities_BNTS @ v_BSNH.transpose(1, 2)).transpose(1, 2)


def attention_by_device(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, see: Visibility, scale: float, dropout: float
) -> Tensor:
    """SDPA on a GPU, matrix products on a CPU, and anywhere for ReRoPE's chosen scores."""
    attend = attention_sdpa if q_BTNH.is_cuda and see.regions is None else attention_matmul
    return attend(q_BTNH, k_BSNH, v_BSNH, see, scale, dropout)


class KeyValueCache:
    """The keys and values of the positions behind, in buffers of a fixed capacity.

    The buffers take their shape (local heads, dtype, device) from the first keys that arrive.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        """Positions held; the model moves it on at the end of a forward."""
        self.documents_BS: Tensor | None = None
        self.positions_BS: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._across: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, k_BTNH: Tensor, v_BTNH: Tensor) -> tuple[Tensor, Tensor]:
        """Put T positions behind those held; all keys and values [B, S, N, H], as views."""
        B, T, N, H = k_BTNH.shape
        if layer == len(self._layers):
            # Heads before positions in memory: one head's keys are one block to the products.
            room = k_BTNH.new_empty(2, B, N, self.capacity, H)
            self._layers.append((room[0].transpose(1, 2), room[1].transpose(1, 2)))
        k_BSNH, v_BSNH = self._layers[layer]
        end = self.length + T
        k_BSNH[:, self.length : end] = k_BTNH
        v_BSNH[:, self.length : end] = v_BTNH
        return k_BSNH[:, :end], v_BSNH[:, :end]

    def extend_documents(self, documents_BT: Tensor) -> Tensor:
        """Put T document ids behind those held; all of them [B, S]."""
        if self.documents_BS is None:
            self.documents_BS = documents_BT.new_empty(documents_BT.shape[0], self.capacity)
        return self._put(self.documents_BS, documents_BT)

    def extend_positions(self, positions_BT: Tensor) -> Tensor:
        """Put T positions behind those held; all of them [B, S]."""
        if self.positions_BS is None:
            self.positions_BS = positions_BT.new_empty(positions_BT.shape[0], self.capacity)
        return self._put(self.positions_BS, positions_BT)

    def across(
        self, layer: int, make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, N, H] of a layer's cross-attention; made at its first use."""
        if layer == len(self._across):
            k_BSNH, v_BSNH = (part.transpose(1, 2).contiguous() for part in make())
            self._across.append((k_BSNH.transpose(1, 2), v_BSNH.transpose(1, 2)))
        return self._across[layer]

    def _put(self, room_BS: Tensor, new_BT: Tensor) -> Tensor:
        end = self.length + new_BT.shape[1]
        room_BS[:, self.length : end] = new_BT
        return room_BS[:, :end]


class SelfAttention(nn.Module):
    """q, k, v -> attention -> o; q, k and v stay three tensors."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        bias: bool,
        scale: float,
        dropout: float,
        attention: Attention,
    ) -> None:
        super().__init__()
        self.q = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.k = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.v = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.o = nn.Linear(heads * head_dim, hidden, bias=bias)
        self.head_dim, self.scale, self.dropout = head_dim, scale, dropout
        self.attention = attention
        self.share = 1.0
        """Values are multiplied by this, and so is what comes out."""

    def forward(
        self,
        x_BTD: Tensor,
        see: Visibility,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        turn: Turn | None = None,
    ) -> Tensor:
        """x_BTD -> what attention adds to it, before dropout; `turn` is for rotary positions."""
        q_BTNH, k_BSNH, v_BSNH = self._heads(self.q(x_BTD)), *self.keys_values(x_BTD)
        if turn is not None:
            far = turn.far
            if far is None:
                q_BTNH, k_BSNH = turned(q_BTNH, turn), turned(k_BSNH, turn)
            else:
                q_BTNH = torch.cat([turned(q_BTNH, t) for t in (turn, far[0], far[1])], -1)
                k_BSNH = torch.cat([turned(k_BSNH, t) for t in (turn, far[2])], -1)
        if cache is not None:
            k_BSNH, v_BSNH = cache.extend(layer, k_BSNH, v_BSNH)
        return self._attend(q_BTNH, k_BSNH, v_BSNH, see)

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """What queries look at: k_BSNH, v_BSNH."""
        v_BSNH = self._heads(self.v(x_BSD))
        return self._heads(self.k(x_BSD)), v_BSNH if self.share == 1.0 else v_BSNH * self.share

    def _heads(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        return x_BTD.view(B, T, -1, self.head_dim)

    def _attend(self, q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, see: Visibility) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        out_BTNH = self.attention(q_BTNH, k_BSNH, v_BSNH, see, self.scale, dropout)
        return self.o(out_BTNH.flatten(2))


class CrossAttention(SelfAttention):
    """Queries of a decoder over what an encoder has made of its text."""

    def forward(  # type: ignore[override]
        self,
        x_BTD: Tensor,
        see: Visibility,
        memory_BSD: Tensor,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x_BTD and the encoder's hidden states -> what attention adds to x_BTD."""
        q_BTNH = self._heads(self.q(x_BTD))
        if cache is None:
            return self._attend(q_BTNH, *self.keys_values(memory_BSD), see)
        held = cache.across(layer, lambda: self.keys_values(memory_BSD))
        return self._attend(q_BTNH, *held, see)


# ---------------------------------------------------------------- the rest


class FeedForward(nn.Module):
    """up -> activation -> down."""

    def __init__(
        self, hidden: int, ffn: int, bias: bool, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn, bias=bias)
        self.down = nn.Linear(ffn, hidden, bias=bias)
        self.activation = activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> what the layer adds to it, before dropout."""
        return self.down(self.activation(self.up(x_BTD)))


class GatedFeedForward(nn.Module):
    """activation(gate) x up -> dropout -> down."""

    def __init__(
        self, hidden: int, ffn: int, activation: Callable[[Tensor], Tensor], dropout: float
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)
        self.activation, self.dropout = activation, dropout
        self.drop_within = drop
        self.share = 1.0
        """The product within is multiplied by this, and so is what comes out."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> what the layer adds to it, before dropout."""
        up_BTF = self.up(x_BTD)
        up_BTF = up_BTF if self.share == 1.0 else up_BTF * self.share
        inner_BTF = self.activation(self.gate(x_BTD)) * up_BTF
        return self.down(self.drop_within(inner_BTF, self.dropout if self.training else 0.0))


class TokenEmbedding(nn.Module):
    """The token table in its two uses: ids -> rows, and hidden states -> logits (a tied head).

    One module, so that whoever gathers or splits a module's parameters (ZeRO-3, tensor parallelism)
    does so for both uses.
    """

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, x: Tensor, project: bool = False, bias_V: Tensor | None = None) -> Tensor:
        """ids [...] -> [..., D]; with `project`, hidden [..., D] -> [..., V], plus a bias."""
        return F.linear(x, self.weight, bias_V) if project else F.embedding(x, self.weight)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation: GPT-2, CPM, mT5 (BERT and RoFormer use erf)."""
    return F.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    """GELU itself: BERT, RoFormer, and T5 PEGASUS as bert4keras trained it."""
    return F.gelu(x)


def check(model: nn.Module, config: ModelConfig, parallel: int = 1) -> None:
    """Assert that the model's parameters are those of the architecture's table, names and shapes.

    `parallel` is the number of tensor-parallel ranks that the model is cut over.
    """
    expected = {t.name: local_shape(config, t, parallel) for t in tensors(config)}
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [
        f"{name}: model {found.get(name)}, table {expected.get(name)}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    assert not wrong, "the model differs from its table: " + "; ".join(wrong[:20])
