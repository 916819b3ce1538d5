"""Proof that a changed state computes the same function: probes through both, outputs compared.

    fixed Chinese sentences --> model(before) --> logits, streams --> compared in float64
                            --> model(after)  --> logits, streams --> and float32 -> proof.json
    if they differ: the first place where the residual stream differs names the layer at fault

A state is brought to its model one module at a time (by_module.py), so that the proof of a model of
any size needs the memory of its largest matrix and of its activations.

A growth may need numbers that float32 does not hold (the root of 3/2, a mean). So three things are
shown: the growth, computed once more without rounding, keeps the logits in float64; what was
written is its rounding to float32, value by value; and the written model keeps them in float32.

Tolerances: float64, 1e-12 x the standard deviation of the logits (rounding of another summation
order reaches 1e-14), and behind post-norms what new ones change by their eps (proof_places.py);
float32, 3 x the error that the model before has against its own float64 logits.
"""

import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from configs.grown import PRESERVING, Growing, said
from configs.load import to_dict
from pretrain.by_module import distance, model_of, run
from pretrain.growth import grow, model_config, told
from pretrain.mixing import Mixture
from pretrain.objectives.losses import token_losses_plain
from pretrain.probes import PROBE_ROWS as PROBE_ROWS
from pretrain.probes import PROBE_TOKENS as PROBE_TOKENS
from pretrain.probes import SENTENCES as SENTENCES
from pretrain.probes import ProofError as ProofError
from pretrain.probes import Recorded
from pretrain.probes import probes as probes
from pretrain.probes import recorded as recorded
from pretrain.probes import write_proof as write_proof
from pretrain.proof_places import FLOAT64_TOLERANCE, of_norm_eps
from pretrain.proof_places import differs_at as differs_at
from pretrain.state import State

FLOAT32_TOLERANCE = 3.0
HEAD_ROWS = 512
"""Positions of a batch whose logits are held at a time."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prove(
    before: State,
    after: State,
    tokens_BT: torch.Tensor,
    *,
    batch: Recorded | str | None = None,
    precision: str = "fp32",
    pieces: Mixture | None = None,
) -> dict[str, Any]:
    """Compare the outputs of two states on probes; dropout off.

    tokens_BT: int64 token ids. Returns plain data: the largest absolute difference of logits in
    float64 (of the growth without rounding) and float32 (as written) with their tolerances (in
    float64 with the part of it that is `of_norm_eps`), the standard deviation of the logits, the
    first tensor that is `not_as_computed`, the loss (nats a token, next token, float64) before and
    after, `kept` (the verdict), and if it is False `differs_at`, the first place where the residual
    stream differs. Of a larger vocabulary the old words' logits are compared, and where the new
    ones are masked (`words_said`) every probability is kept too; `old_words_fall_by` is what the
    new ones take of log p (nats, the largest).

    `method` is how the state grew; one that does not mean to keep the function (`means_to_keep`)
    is told by how much it `moved`, in deviations of the logits. With a `batch` its loss before and
    after, float64 and `precision`, or the words why there is none; with bf16 or fp16 the logits in
    it, beside the small model's own rounding.
    """
    started = time.monotonic()
    vocab = said(model_config(before))  # what is masked is no logit of the model's
    exact_BTV = logits(before, tokens_BT, torch.float64)[..., :vocab]
    rounded_BTV = logits(before, tokens_BT, torch.float32)[..., :vocab]
    unrounded, odd = _unrounded(before, after, pieces)
    grown_BTV = logits(unrounded, tokens_BT, torch.float64)
    written_BTV = logits(after, tokens_BT, torch.float32)[..., :vocab]
    std, far = float(exact_BTV.std()), distance(grown_BTV[..., :vocab], exact_BTV)
    of_eps = of_norm_eps(model_config(before), model_config(after)) * float(exact_BTV.abs().max())
    allowed = FLOAT32_TOLERANCE * distance(rounded_BTV, exact_BTV)
    in_float64 = _verdict(far, FLOAT64_TOLERANCE * std + of_eps, std) | {"of_norm_eps": of_eps}
    in_float32 = _verdict(distance(written_BTV, rounded_BTV), allowed, std)
    found = {"float64": in_float64, "float32": in_float32}
    kept = all(part["within"] for part in found.values()) and odd is None
    wrong = after if found["float64"]["within"] else unrounded  # the more telling one
    how = [told(line) for line in _lines(before, after)] or [Growing()]
    means = how[0].method in PRESERVING
    moved = float((grown_BTV[..., :vocab] - exact_BTV).std()) / std
    return {
        "kept": kept,
        "means_to_keep": means,
        "method": how[0].method,
        "moved": moved,
        **found,
        "not_as_computed": odd,
        "loss": {"before": _loss(exact_BTV, tokens_BT), "after": _loss(grown_BTV, tokens_BT)},
        "old_words_fall_by": float((grown_BTV.logsumexp(-1) - exact_BTV.logsumexp(-1)).max()),
        "batch": _of_batch(before, after, batch, precision),
        "precision": _rounding(before, after, tokens_BT, precision),
        "probes": {"rows": tokens_BT.shape[0], "tokens": tokens_BT.shape[1]},
        "differs_at": None if kept or not means else differs_at(before, wrong, tokens_BT),
        "from": to_dict(model_config(before)),
        "to": to_dict(model_config(after)),
        "torch": torch.__version__,
        "elapsed_s": round(time.monotonic() - started, 2),
    }


def holds(proof: dict[str, Any]) -> bool:
    """Whether nothing speaks against training on: the function kept, or never meant to be and what
    was written is what was computed."""
    written = proof["not_as_computed"] is None and math.isfinite(proof["moved"])
    return bool(proof["kept"] or (not proof["means_to_keep"] and written))


def _of_batch(
    before: State, after: State, batch: Recorded | str | None, precision: str
) -> dict[str, Any] | None:
    """The loss (nats, mean of what counts) of a batch of data, before and after."""
    if not isinstance(batch, Recorded):
        return {"none": batch} if batch else None
    found: dict[str, Any] = dict(batch.about)
    for name, dtype in {"float64": torch.float64, precision: DTYPES[precision]}.items():
        found[name] = {
            "before": batch_loss(before, batch, dtype),
            "after": batch_loss(after, batch, dtype),
        }
    return found


def batch_loss(state: State, recorded: Recorded, dtype: torch.dtype) -> float:
    """The mean loss of a recorded batch, nats, dropout off."""
    with model_of(state, dtype) as model:
        losses = functools.partial(token_losses_plain, chunk=HEAD_ROWS)
        total, count = recorded.objective.loss(model, recorded.batch, losses)
        return float(total) / max(int(count), 1)


def _rounding(
    before: State, after: State, tokens_BT: torch.Tensor, precision: str
) -> dict[str, Any] | None:
    """How logits in bf16 or fp16 differ by the growth, beside the small model's own rounding.

    That of another summation order: the same rows one by one instead of together.
    """
    if precision == "fp32":
        return None
    vocab = said(model_config(before))
    old = logits(before, tokens_BT, DTYPES[precision]).double()[..., :vocab]
    new = logits(after, tokens_BT, DTYPES[precision]).double()[..., :vocab]
    rows = [logits(before, row[None], DTYPES[precision])[..., :vocab] for row in tokens_BT]
    alone = torch.cat(rows)
    return {
        "name": precision,
        "max_difference": distance(new, old),
        "median_difference": float((new - old).abs().median()),
        "own_rounding": distance(old, logits(before, tokens_BT, torch.float64)[..., :vocab]),
        "own_by_row": distance(alone, old),
    }


def _unrounded(
    before: State, after: State, pieces: Mixture | None = None
) -> tuple[State, str | None]:
    """The growth from `before` to `after` without rounding, and the first tensor of `after` (weight
    or moment) that is not its rounding; `after` itself where its record tells of no such growth."""
    lines = _lines(before, after)
    if not lines:
        return after, None
    to = model_config(State({}, {"model": lines[0]["to"]}))
    exact = grow(before, to, lines[0]["seed"], told(lines[0]), rounded=False, pieces=pieces)
    for key in exact.entries:
        written = after.read(key)
        if not torch.equal(exact.read(key).to(written.dtype), written):
            return after, key.removeprefix("weights/")
    return State(exact.entries, after.record), None


def _lines(before: State, after: State) -> list[dict[str, Any]]:
    """The one line of `after`'s record that tells of its growth from `before`, or none."""
    lines = after.record.get("growth", [])[len(before.record.get("growth", [])) :]
    return lines if len(lines) == 1 and lines[0]["from"] == to_dict(model_config(before)) else []


def against(
    state: State,
    other: Callable[[torch.Tensor, torch.dtype], dict[str, torch.Tensor]],
    tokens_BT: torch.Tensor,
    tolerance: float,
) -> dict[str, Any]:
    """Compare a state with a model that somebody else wrote, on probes; dropout off.

    `other` gives (tokens, dtype) -> what leaves each block, by our names (decoder.layers.0), and
    "logits" [B, T, V]. `tolerance` is a share of the logits' standard deviation in float64; in
    float32 the two may differ by 3 times the error of our own. Returns plain data; if they differ,
    `differs_at` names the first block at fault.
    """
    exact = outputs(state, tokens_BT, torch.float64)
    theirs = other(tokens_BT, torch.float64)
    std = float(exact["logits"].std())
    rounded = outputs(state, tokens_BT, torch.float32)["logits"]
    own_error = max(distance(rounded, exact["logits"]), tolerance * std)
    in_float32 = distance(other(tokens_BT, torch.float32)["logits"], rounded)
    far = distance(theirs["logits"], exact["logits"])
    found = {
        "float64": _verdict(far, tolerance * std, std),
        "float32": _verdict(in_float32, FLOAT32_TOLERANCE * own_error, std),
    }
    same = all(part["within"] for part in found.values())
    return {"same": same, **found, "differs_at": None if same else _first(exact, theirs, tolerance)}


def _first(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], share: float) -> str:
    for name, output_BTD in ours.items():
        if name in theirs:
            far, limit = distance(output_BTD, theirs[name]), share * float(output_BTD.std())
            if not far <= limit:
                return f"{name} (differs by {far:.2e}, allowed are {limit:.2e})"
    return "the rounding of float32 alone"


def outputs(state: State, tokens_BT: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What leaves each block (encoder.layers.0 ...), in the order of computing, and "logits"."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
            seen[name] = output.clone()

        return hook

    with model_of(state, dtype) as model:
        for name, module in model.named_modules():
            if re.fullmatch(r"(en|de)coder\.layers\.\d+", name):
                module.register_forward_hook(keep(name))
        return seen | {"logits": run(model, tokens_BT)}


def sentence(proof: dict[str, Any]) -> str:
    """The verdict in one line."""
    sizes = ", ".join(
        f"{key} {proof['from'][key]} -> {size}"
        for key, size in proof["to"].items()
        if proof["from"][key] != size
    )
    loss = f"loss on probes {proof['loss']['before']:.4f} -> {proof['loss']['after']:.4f}"
    if (batch := proof["batch"]) and "none" not in batch:
        loss = "loss of {rows} rows {float64[before]:.6f} -> {float64[after]:.6f}".format(**batch)
    far = f"logits differ by {proof['float64']['max_difference']:.1e} in float64"
    return f"growth: {sizes or 'none'}: function {verdict(proof)}; {far}, {loss}"


def verdict(proof: dict[str, Any]) -> str:
    """Whether the function was kept, in words."""
    if not holds(proof):
        if proof["means_to_keep"]:
            return f"CHANGED, first at {proof['differs_at']}"
        return f"WRITTEN WRONG at {proof['not_as_computed'] or 'logits that are no numbers'}"
    if not proof["kept"]:
        far = f"logits moved by {proof['moved']:.2g} of their deviation"
        return f"NOT kept, as method {proof['method']} does not: {far} (不保持函数)"
    if abs(proof["old_words_fall_by"]) > 1e-9:
        return "kept in the logits of the old words, NOT in their probabilities (旧词概率下降)"
    return "kept"


def logits(state: State, tokens_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The logits_BTV of a state's model in `dtype`, dropout off."""
    with model_of(state, dtype) as model:
        return run(model, tokens_BT)


def _verdict(difference: float, tolerance: float, std: float) -> dict[str, Any]:
    return {
        "max_difference": difference,
        "tolerance": tolerance,
        "std": std,
        "within": difference <= tolerance,  # a NaN is not
    }


def _loss(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> float:
    predicted = logits_BTV[:, :-1].flatten(0, 1)
    targets = tokens_BT[:, 1:].flatten() % predicted.shape[-1]  # of labels any will do
    return float(nn.functional.cross_entropy(predicted, targets))
