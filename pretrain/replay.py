"""The proof after a load: what stands in the engine is what was saved, and computes the same.

    save: sums of all logical tensors (checkpoint/sums.py); a micro-batch, its loss -> verify.json
    load: the same sums of what the engine holds now; the same micro-batch, the same loss

The sums find a master or a moment that did not arrive; the loss finds weights of the forward pass
that were not made of the masters. The micro-batch is of measured rows, the same on any layout.
"""

import hashlib
import json
from typing import Any

from configs.load import to_dict
from pretrain import checkpoint
from pretrain.corpora import Corpora
from pretrain.engine import Engine
from pretrain.parallel import Mesh
from pretrain.state import State

ROWS = 2
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Relative: layouts sum in another order, and bf16 has 8 bits."""


def recorded(engine: Engine, corpora: Corpora, mesh: Mesh) -> dict[str, Any]:
    """The micro-batch and its loss, as kept beside a checkpoint; every rank calls this."""
    return {
        "rows": ROWS,
        "of": _of(engine, corpora),
        "precision": engine.precision,
        "loss": _loss(engine, corpora, mesh),
    }


def check(engine: Engine, state: State, corpora: Corpora, mesh: Mesh) -> str:
    """Compare an engine that has loaded a state with what was recorded; every rank calls this.

    Returns what was found, in words for the log. Raises CheckpointError if a tensor's sum or the
    loss is another one.
    """
    sums = state.verify.get("sums", {})
    wrong = checkpoint.differing(sums, engine.pieces())
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise checkpoint.CheckpointError(
            f"after the load {', '.join(wrong[:3])}{more} stand in the engine with other sums than "
            "were saved: the load is wrong, nothing was trained on it; please report this "
            "(加载后校验失败)"
        )
    told = f"{len(sums)} tensors verified"
    was = state.verify.get("replay") or {}
    if was.get("rows") != ROWS or was.get("of") != _of(engine, corpora):
        return told
    loss = _loss(engine, corpora, mesh)
    allowed = max(TOLERANCE[was["precision"]], TOLERANCE[engine.precision])
    if not abs(loss - was["loss"]) <= allowed * abs(was["loss"]):
        raise checkpoint.CheckpointError(
            f"after the load the recorded micro-batch has the loss {loss:.6f}, it had "
            f"{was['loss']:.6f} when the checkpoint was saved; at most {allowed:.0e} of it may "
            "differ: the load is wrong, nothing was trained on it (加载后重放损失不一致)"
        )
    return f"{told}, replayed loss {loss:.6f} (was {was['loss']:.6f})"


def _loss(engine: Engine, corpora: Corpora, mesh: Mesh) -> float:
    rows = corpora.validation(ROWS, mesh.reader, mesh.readers, ROWS)
    loss_sum, count = engine.evaluate(list(rows))
    return float(loss_sum) / max(int(count), 1)


def _of(engine: Engine, corpora: Corpora) -> str:
    """What the loss is a function of, besides the weights."""
    of = [to_dict(engine.config), corpora.record]
    return hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=8).hexdigest()
