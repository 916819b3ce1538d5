"""What the families share: attention, the feed-forward layer, the token embedding, dropout.

    x_BTD -> q, k, v -> q_BTNH, k_BSNH, v_BSNH -> attention(q, k, v, see, ...) -> o -> +

Plain single-device PyTorch. Local sizes are inferred (`view(B, T, -1, head_dim)`) and every matrix
is a module called as module(x), so a part of the heads, of the FFN or of the vocabulary works as
the whole does: tensor parallelism swaps the modules from outside.

Attention is a function handed in, `attention(q_BTNH, k_BSNH, v_BSNH, see, scale, dropout)`; who
sees whom is a value, `Visibility`, made once a forward and used by every layer.

Legend: B rows, T queries, S keys, N heads, H head_dim, D hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import ModelConfig, local_shape, tensors

Attention = Callable[[Tensor, Tensor, Tensor, "Visibility", float, float], Tensor]


# ---------------------------------------------------------------- who sees whom


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees: a mask, or a rule that needs none."""

    causal: bool
    """Without a mask: key s is seen by query t if s <= t (as many keys as queries)."""
    visible: Tensor | None = None
    """bool [B or 1, 1, T, S]; None: all, or what `causal` says."""
    _made: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def additive(self, like_BNTS: Tensor) -> Tensor | None:
        """0 where seen and -inf where not, in the scores' dtype; None where all is seen."""
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
) -> Visibility:
    """The visibility of the last `queries` of `keys` positions.

    A position sees its own document only (padding, -1, is a document too, so that no row of scores
    is empty), and with `causal` nothing behind itself.
    """
    visible = None
    if query_documents_BT is not None and key_documents_BS is not None:
        visible = query_documents_BT[:, None, :, None] == key_documents_BS[:, None, None, :]
    causal = causal and queries > 1
    if causal and (visible is not None or queries != keys):
        order = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        visible = order[None, None] if visible is None else visible & order
    return Visibility(causal and visible is None, visible)


# ---------------------------------------------------------------- attention


def attention_sdpa(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, see: Visibility, scale: float, dropout: float
) -> Tensor:
    """Attention by PyTorch's fused kernels: the fast path of a GPU."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSNH.transpose(1, 2),
        v_BSNH.transpose(1, 2),
        attn_mask=see.visible,
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
    scores_BNTS = (q_BTNH * scale).transpose(1, 2) @ k_BSNH.permute(0, 2, 3, 1)
    mask = see.additive(scores_BNTS)
    if mask is not None:
        scores_BNTS += mask  # in place: nobody else holds the scores, and a copy costs page faults
    probabilities_BNTS = drop(torch.softmax(scores_BNTS, dim=-1), dropout)
    return (probabilities_BNTS @ v_BSNH.transpose(1, 2)).transpose(1, 2)


def attention_by_device(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, see: Visibility, scale: float, dropout: float
) -> Tensor:
    """SDPA on a GPU, two matrix products on a CPU."""
    attend = attention_sdpa if q_BTNH.is_cuda else attention_matmul
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
        self._layers: list[tuple[Tensor, Tensor]] = []

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
        end = self.length + documents_BT.shape[1]
        if self.documents_BS is None:
            self.documents_BS = documents_BT.new_empty(documents_BT.shape[0], self.capacity)
        self.documents_BS[:, self.length : end] = documents_BT
        return self.documents_BS[:, :end]


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

    def forward(
        self, x_BTD: Tensor, see: Visibility, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """x_BTD -> what attention adds to it, before dropout."""
        B, T, _ = x_BTD.shape
        q_BTNH = self.q(x_BTD).view(B, T, -1, self.head_dim)
        k_BSNH = self.k(x_BTD).view(B, T, -1, self.head_dim)
        v_BSNH = self.v(x_BTD).view(B, T, -1, self.head_dim)
        if cache is not None:
            k_BSNH, v_BSNH = cache.extend(layer, k_BSNH, v_BSNH)
        dropout = self.dropout if self.training else 0.0
        out_BTNH = self.attention(q_BTNH, k_BSNH, v_BSNH, see, self.scale, dropout)
        return self.o(out_BTNH.reshape(B, T, -1))


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


class TokenEmbedding(nn.Module):
    """The token table in its two uses: ids -> rows, and hidden states -> logits (a tied head).

    One module, so that whoever gathers or splits a module's parameters (ZeRO-3, tensor parallelism)
    does so for both uses.
    """

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, x: Tensor, project: bool = False) -> Tensor:
        """ids [...] -> [..., D]; with `project`, hidden [..., D] -> [..., V]."""
        return F.linear(x, self.weight) if project else F.embedding(x, self.weight)


class Dropout(nn.Module):
    """Dropout that is cheap on a CPU."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """x with some of its elements zero and the rest scaled up, while training."""
        return drop(x, self.probability if self.training else 0.0)


def drop(x: Tensor, probability: float) -> Tensor:
    """Zero elements with a probability, scale the rest so that the mean stays.

    On a CPU from 16 random bits an element (so in steps of 1/65536), five times as fast as drawing
    Bernoulli numbers; elsewhere PyTorch's own.
    """
    if probability == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    dropped = round(probability * 65536)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = bits.ge_(dropped - 32768).to(x.dtype).mul_(65536 / (65536 - dropped))
    return x * keep


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation: GPT-2, CPM, mT5 (BERT and RoFormer use erf)."""
    return F.gelu(x, approximate="tanh")


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
