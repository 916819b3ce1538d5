"""Proof that a state extended to longer rows computes, at the lengths it knew, what it did.

    rows of 64 tokens, one of all that is promised --> before, after: float64, float32 --> proof
    one row of the new length                      --> after: finite?

What a method promises is said in configs/extended.py: a dynamic method, or an added row, leaves
every row alone that the model could read; another frequency for all lengths promises nothing, and
then the difference is told and nothing is demanded but that the tensors are those computed.
Tolerances as in proof.py.
"""

import time
from pathlib import Path
from typing import Any

import torch

from configs.extended import Extend, promise
from configs.grown import said
from configs.load import from_dict
from configs.model import ModelConfig, longest_row
from pretrain import proof
from pretrain.growth import model_config
from pretrain.growth.positions import extend
from pretrain.state import State

LONGEST = 2048
"""Probes are cut at this: attention over a row costs its square."""


def prove(before: State, after: State, tokenizer: Path | None) -> dict[str, Any]:
    """Compare a state with what extend() made of it; plain data, its verdict under `kept`.

    `promised` is the length up to which rows must give the same logits; 0: none, the difference is
    told only.
    """
    started, line = time.monotonic(), after.record["extensions"][-1]
    now, to, seq_len = model_config(before), model_config(after), line["seq_len"]
    how = from_dict(Extend, line["how"])
    exact = extend(before, to, how, seq_len, line["seed"], rounded=False)
    odd = _odd(exact, after)
    promised = promise(now, to, seq_len)
    read = promised or longest_row(now) or seq_len
    rows = [(proof.PROBE_ROWS, min(proof.PROBE_TOKENS, read))]
    if promised > rows[0][1]:
        rows.append((1, min(promised, LONGEST)))
    compared: list[dict[str, Any]] = []
    for count, length in rows:
        tokens_BT = rows_of(tokenizer, now, count, length)
        compared.append({"tokens": length, **_compared(before, exact, after, tokens_BT)})
    within = all(part[d]["within"] for part in compared for d in ("float64", "float32"))
    long_BT = rows_of(tokenizer, now, 1, min(seq_len, LONGEST))
    logits_BTV = proof.logits(after, long_BT, torch.float32)
    finite = bool(logits_BTV.isfinite().all())
    kept = odd is None and finite and (within or not promised)
    wrong = next((p for p in compared if not p["float64"]["within"]), None)
    at = None
    if promised and wrong is not None:
        tokens_BT = rows_of(tokenizer, now, 1, wrong["tokens"])
        at = proof.differs_at(before, after, tokens_BT)
    return {
        "kept": kept,
        "promised": promised,
        "lengths": compared,
        "not_as_computed": odd,
        "at_the_new_length": {"tokens": long_BT.shape[1], "finite": finite},
        "differs_at": at,
        "method": line["method"],
        "seq_len": seq_len,
        "from": before.record["model"],
        "to": after.record["model"],
        "torch": torch.__version__,
        "elapsed_s": round(time.monotonic() - started, 2),
    }


def rows_of(tokenizer: Path | None, config: ModelConfig, rows: int, length: int) -> torch.Tensor:
    """Probes [rows, length]: those of proof.py, again and again."""
    flat = proof.probes(tokenizer, config).flatten()
    return flat.repeat(rows * length // len(flat) + 1)[: rows * length].view(rows, length)


def _compared(
    before: State, exact: State, after: State, tokens_BT: torch.Tensor
) -> dict[str, dict[str, Any]]:
    vocab = said(model_config(before))  # logits of masked words would make the deviation their own

    def logits(state: State, dtype: torch.dtype) -> torch.Tensor:
        return proof.logits(state, tokens_BT, dtype)[..., :vocab]

    exact_BTV, rounded_BTV = (logits(before, dtype) for dtype in (torch.float64, torch.float32))
    own_error, std = _distance(rounded_BTV, exact_BTV), float(exact_BTV.std())
    far = _distance(logits(exact, torch.float64), exact_BTV)
    far_in_float32 = _distance(logits(after, torch.float32), rounded_BTV)
    return {
        "float64": _verdict(far, proof.FLOAT64_TOLERANCE * std, std),
        "float32": _verdict(far_in_float32, proof.FLOAT32_TOLERANCE * own_error, std),
    }


def _odd(exact: State, after: State) -> str | None:
    """The first weight of `after` that is not the rounding of what was computed."""
    for name in exact.names():
        written = after.read(f"weights/{name}")
        if not torch.equal(exact.read(f"weights/{name}").to(written.dtype), written):
            return name
    return None


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference; a NaN anywhere is a NaN."""
    return float((one.double() - other.double()).abs().max())


def _verdict(difference: float, tolerance: float, std: float) -> dict[str, Any]:
    within = difference <= tolerance  # a NaN is not
    return {"max_difference": difference, "tolerance": tolerance, "std": std, "within": within}


def sentence(found: dict[str, Any]) -> str:
    """The verdict in one line."""
    far = max(part["float64"]["max_difference"] for part in found["lengths"])
    what = f"extended to {found['seq_len']} tokens by {found['method']}"
    if not found["kept"]:
        return f"{what}: NOT AS PROMISED, at {found['not_as_computed'] or found['differs_at']}"
    if not found["promised"]:
        return f"{what}: no length keeps its logits (they differ by {far:.1e}), as the method says"
    return f"{what}: unchanged up to {found['promised']} tokens, {far:.1e} in float64"
