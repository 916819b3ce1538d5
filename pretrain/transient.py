"""What is on a device for a moment only, and how much of it at a time. No torch.

    hidden --head--> logits --fp32--> softmax    LOGITS_AT_ONCE, SOFTMAX_AT_ONCE --> logits_bytes()
    gradients --bucket--> other ranks            BUCKET --> bucket_values(), message_bytes()

The trainer obeys these numbers and the plan counts by them, so they stand in one place.
"""

from math import ceil

from pretrain.costs import WIDTH

LOGITS_AT_ONCE = {"cpu": 2**26, "cuda": 2**30}
"""Local logits that exist at a time; more are made in turns, and again in the backward pass.

A second turn has the head multiply all tokens once more: 6 % of CPM Small's FLOPs, 0.9 % of CPM
Large's. On a GPU a whole turn takes 2 GiB in bf16 (6 where the vocabulary is cut, whose loss makes
an fp32 copy); a quarter of it would save at most 1.5 (4.5) and have micro-batches of 9,000 to
36,000 tokens of CPM pay those FLOPs. Weighed by counting; measured on no GPU."""
SOFTMAX_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}
"""fp32 elements of the softmax alive at a time: a cache's worth on a CPU, 256 MB on a GPU."""
BUCKET = {"cpu": 2 * 10**7, "cuda": 2 * 10**8}
"""Gradient values to a message."""


def turns(logits: float, device: str = "cuda") -> int:
    """In how many turns so many local logits are made."""
    return max(1, ceil(logits / LOGITS_AT_ONCE["cpu" if device == "cpu" else "cuda"]))


def logits_bytes(logits: float, precision: str, tensor: int = 1, device: str = "cuda") -> float:
    """The most bytes that a micro-batch's `logits` on one of `tensor` devices take, with what their
    loss makes of them, forward or backward."""
    width, at_once = WIDTH[precision], logits / turns(logits, device)
    if tensor > 1:  # Megatron's loss: an fp32 copy, in place from there on
        return at_once * (width if width == 4 else width + 4)
    part = SOFTMAX_AT_ONCE[device]  # objectives/losses.py: the gradient is written over the logits
    if width == 4:  # backward a part of the softmax is made while the last one is still there
        return at_once * width + 4.0 * min(2 * part, at_once)
    return at_once * width + 8.0 * min(part, at_once)  # forward a part in fp32 and its exponentials


def bucket_values(sizes: list[int], zero: int, device: str = "cuda") -> int:
    """Gradient values to a message, of tensors of these local sizes under a ZeRO stage."""
    most = BUCKET.get(device, BUCKET["cuda"])
    return min(most, max(sizes) if zero == 3 else sum(sizes))


def message_bytes(sizes: list[int], zero: int, overlap: bool | None) -> float:
    """Bytes of the buffers in which gradients travel, float32.

    Two of them take turns where gradients travel during the backward pass, as under ZeRO 3 where
    `overlap` is None; without it ZeRO 3 still has, beside its buffer, the copy that it sends.
    """
    return 4.0 * bucket_values(sizes, zero) * (2 if overlap or zero == 3 else 1)
