"""How a run lies on its devices: the `parallel` section of its page, and whom it can live on.

devices = tensor x sequence x (groups that read samples of their own)
ZeRO partitions over sequence x groups: all whose weights are alike
"""

from dataclasses import dataclass
from typing import Literal

from configs.model import ModelConfig, split_problems


@dataclass(frozen=True)
class Parallel:
    """How the model lies on the devices."""

    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 0 none, 1 optimizer, 2 and gradients, 3 and weights are partitioned."""
    tensor: int = 1
    """Devices that share each matrix."""
    sequence: int = 1
    """Devices that share each row: everyone holds a part of its tokens, in attention all of them
    for a part of the heads (DeepSpeed-Ulysses); for rows too long for one device (序列并行)."""
    overlap: bool | None = None
    """Gradients travel while the backward pass goes on; null: under ZeRO 3 only (通信重叠)."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        numbers = {"tensor": self.tensor, "sequence": self.sequence}
        return [f"{key}: is {n}, must be at least 1" for key, n in numbers.items() if n < 1]


def overlap_problems(parallel: Parallel, precision: str) -> list[str]:
    """Why gradients cannot travel during the backward pass: DeepSpeed's optimizers without ZeRO
    and, in bf16, of ZeRO 1 send them behind it."""
    zero = 1 if parallel.zero == 0 and precision != "fp32" else parallel.zero
    if not parallel.overlap or zero > 1 or (zero == 1 and precision != "bf16"):
        return []
    why = (
        f"is true, and ZeRO {parallel.zero} in {precision} sends gradients after the backward pass"
    )
    return [f"parallel.overlap: {why}; take parallel.zero=2 or leave it out (此级别不能重叠通信)"]


def problems_on(parallel: Parallel, world: int) -> list[str]:
    """Why a run cannot live on `world` processes."""
    key, by = "tensor", parallel.tensor
    if not world % by:
        key, by = "sequence", parallel.tensor * parallel.sequence
    if not world % by:
        return []
    product = "it" if by == getattr(parallel, key) else f"{by}, it times parallel.tensor"
    sentence = f"parallel.{key}: is {getattr(parallel, key)}, {world} processes cannot be divided "
    return [sentence + f"by {product} (进程数不能整除)"]


def layout_problems(parallel: Parallel, model: ModelConfig) -> list[str]:
    """Why a model cannot be laid out so; sentences that begin with the model's key."""
    if parallel.problems():
        return []  # the section says it
    if found := split_problems(model, parallel.tensor):
        return found
    share = parallel.tensor * parallel.sequence
    if not model.heads % share:
        return []
    by = f"parallel.sequence={parallel.sequence}"
    if parallel.tensor > 1:
        by = f"parallel.tensor={parallel.tensor} times {by}"
    sentence = f"heads: is {model.heads}, not divisible by {by}, and in attention a device has "
    near = f"whole heads; the nearest that is: {_nearest(model.heads, share)} (注意力头数不能整除)"
    return [sentence + near]


def row_problems(parallel: Parallel, seq_len: int, target_len: int | None) -> list[str]:
    """Why rows cannot be shared so; sentences that begin with the key of `data`."""
    found, of = [], max(1, parallel.sequence)
    for key, tokens in (("seq_len", seq_len), ("target_len", target_len)):
        if tokens is not None and tokens % of:
            sentence = (
                f"{key}: is {tokens}, not divisible by parallel.sequence={of}, whose devices "
            )
            near = f"share a row evenly; the nearest that is: {_nearest(tokens, of)} (行长不能整除)"
            found.append(sentence + near)
    return found


def _nearest(size: int, divisor: int) -> int:
    return max(1, round(size / divisor)) * divisor
