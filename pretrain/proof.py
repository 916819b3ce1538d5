"""Proof that a changed state computes the same function: probes through both, outputs compared.

    fixed Chinese sentences --> model(before) --> logits, streams --> compared in float64
                            --> model(after)  --> logits, streams --> and float32 -> proof.json
    if they differ: the first place where the residual stream differs names the layer at fault

A state is brought to its model one module at a time: the model stands on the meta device, a
module's tensors are read just before it runs and dropped just after, so that the proof of a model
of any size needs the memory of its largest matrix and of its activations.

A growth may need numbers that float32 does not hold (the root of 3/2, a mean). So three things are
shown: the growth, computed once more without rounding, keeps the logits in float64; what was
written is its rounding to float32, value by value; and the written model keeps them in float32.

Tolerances: float64, 1e-12 x the standard deviation of the logits (rounding of another summation
order reaches 1e-14), and behind post-norms what new ones change by their eps (_of_norm_eps);
float32, 3 x the error that the model before has against its own float64 logits.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from configs.grown import PRESERVING, Growing, said, times
from configs.load import to_dict
from configs.model import ModelConfig, RoFormerConfig, T5PegasusConfig, tensors
from pretrain.growth import grow, model_config, told
from pretrain.growth.depth import source
from pretrain.mixing import Mixture
from pretrain.models import build
from pretrain.objectives.losses import token_losses_plain
from pretrain.probes import PROBE_ROWS as PROBE_ROWS
from pretrain.probes import PROBE_TOKENS as PROBE_TOKENS
from pretrain.probes import SENTENCES as SENTENCES
from pretrain.probes import ProofError as ProofError
from pretrain.probes import Recorded
from pretrain.probes import probes as probes
from pretrain.probes import recorded as recorded
from pretrain.probes import write_proof as write_proof
from pretrain.state import State

FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 3.0
HEAD_ROWS = 512
"""Positions of a batch whose logits are held at a time."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDED_TOLERANCE = 1e-5
"""Share of the stream's deviation, where weights that were rounded to float32 are looked at."""


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
    own_error = _distance(rounded_BTV, exact_BTV)
    unrounded, odd = _unrounded(before, after, pieces)
    grown_BTV = logits(unrounded, tokens_BT, torch.float64)
    std = float(exact_BTV.std())
    of_eps = _of_norm_eps(model_config(before), model_config(after)) * float(exact_BTV.abs().max())
    found = {
        "float64": {
            **_verdict(
                _distance(grown_BTV[..., :vocab], exact_BTV), FLOAT64_TOLERANCE * std + of_eps, std
            ),
            "of_norm_eps": of_eps,
        },
        "float32": _verdict(
            _distance(logits(after, tokens_BT, torch.float32)[..., :vocab], rounded_BTV),
            FLOAT32_TOLERANCE * own_error,
            std,
        ),
    }
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
        "loss": {
            "before": _loss(exact_BTV, tokens_BT),
            "after": _loss(grown_BTV, tokens_BT),
        },
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
    with _model(state, dtype) as model:
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
        "max_difference": _distance(new, old),
        "median_difference": float((new - old).abs().median()),
        "own_rounding": _distance(old, logits(before, tokens_BT, torch.float64)[..., :vocab]),
        "own_by_row": _distance(alone, old),
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
    own_error = max(_distance(rounded, exact["logits"]), tolerance * std)
    in_float32 = _distance(other(tokens_BT, torch.float32)["logits"], rounded)
    far = _distance(theirs["logits"], exact["logits"])
    found = {
        "float64": _verdict(far, tolerance * std, std),
        "float32": _verdict(in_float32, FLOAT32_TOLERANCE * own_error, std),
    }
    same = all(part["within"] for part in found.values())
    return {"same": same, **found, "differs_at": None if same else _first(exact, theirs, tolerance)}


def _first(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], share: float) -> str:
    for name, output_BTD in ours.items():
        if name in theirs:
            far, limit = _distance(output_BTD, theirs[name]), share * float(output_BTD.std())
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

    with _model(state, dtype) as model:
        for name, module in model.named_modules():
            if re.fullmatch(r"(en|de)coder\.layers\.\d+", name):
                module.register_forward_hook(keep(name))
        return seen | {"logits": _run(model, tokens_BT)}


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
    with _model(state, dtype) as model:
        return _run(model, tokens_BT)


def differs_at(before: State, after: State, tokens_BT: torch.Tensor) -> str:
    """The first place where the residual stream of two states differs, in words.

    Looked at: what enters each norm that reads the stream (float64), old places mapped to new ones,
    in a wider stream the old dimensions. A new one behind a post-norm has no counterpart.
    """
    old, old_BTV, scale = _streams(before, tokens_BT)
    new, new_BTV, _ = _streams(after, tokens_BT)
    was, now = model_config(before), model_config(after)
    exact = all(entry.dtype == "float64" for entry in after.entries.values())
    tolerance = FLOAT64_TOLERANCE if exact or _unscaled(was, now) else ROUNDED_TOLERANCE
    of_eps = _of_norm_eps(was, now)
    earlier = "the embeddings"
    for name, stream_BTD in new.items():
        expected = _counterpart(name, was, now)
        if expected is None:
            continue
        if expected not in old:
            return f"{earlier} (the stream that enters {name} has no counterpart before)"
        old_BTD = old[expected]
        seen_BTD = stream_BTD[..., : old_BTD.shape[-1]] / _stretch(was, now)
        far = _distance(seen_BTD, old_BTD)
        if not far <= tolerance * scale + of_eps * float(old_BTD.abs().max()):
            return f"{earlier} (the stream that enters {name} differs by {far:.2e})"
        earlier = _inside(name, was, now)
    far = _distance(new_BTV[..., : said(was)], old_BTV[..., : said(was)])
    return f"{earlier} or the head (the logits differ by {far:.2e})"


def _of_norm_eps(was: ModelConfig, now: ModelConfig) -> float:
    """The share of a logit, and of the stream, that new layers behind post-norms may change.

    A sum y of mean square m leaves a norm as h = y / sqrt(m + eps), whose mean square is 1 - eps/m:
    a norm behind it makes h (1 + (1/m - 1) eps / 2) of it, and further ones change no more than
    eps^2. So each old layer with new ones behind it rescales the stream once, by less than eps / 2
    where m > 1/2. What follows reads that: twice as much is granted, for each such layer.
    """
    if not isinstance(was, RoFormerConfig):
        return 0.0
    places = (source(number, was.layers, now.layers) for number in range(now.layers))
    return len({old for old, is_new in places if is_new}) * was.norm_eps


def _unscaled(was: ModelConfig, now: ModelConfig) -> bool:
    return was.hidden == now.hidden and was.head_dim == now.head_dim


def _stretch(was: ModelConfig, now: ModelConfig) -> float:
    """What the old dimensions of the stream were multiplied by."""
    gainless = isinstance(was, RoFormerConfig) and was.version == 2
    padded = times(was.hidden, now.hidden) is None
    return float((now.hidden / was.hidden) ** 0.5) if gainless and padded else 1.0


def _counterpart(name: str, was: ModelConfig, now: ModelConfig) -> str | None:
    """The norm of the smaller model that must see the same stream as norm `name` of the larger."""
    head, found, rest = name.partition(".layers.")
    if not found:
        return name
    number, _, inner = rest.partition(".")
    old, is_new = source(int(number), was.layers, now.layers)
    if not is_new:
        return f"{head}.layers.{old}.{inner}"
    if isinstance(was, RoFormerConfig):
        return None
    if old + 1 == was.layers:  # a new one behind the last layer sees what leaves the stack
        return f"{head}.final_norm"
    return f"{head}.layers.{old + 1}.{_norms(was, head)[0]}"


def _inside(name: str, was: ModelConfig, now: ModelConfig) -> str:
    """What follows norm `name`, for people: which sub-layer, and where its layer comes from."""
    head, found, rest = name.partition(".layers.")
    if not found:
        return f"{name} or what follows it"
    number, _, inner = rest.partition(".")
    old, is_new = source(int(number), was.layers, now.layers)
    what = "new, behind" if is_new else "was"
    part = inner.removesuffix("_norm")
    return f"{head}.layers.{number}.{part} ({what} layer {old})"


def _norms(config: ModelConfig, head: str) -> list[str]:
    """Names of a layer's norms, in order, from the table."""
    start = f"{head}.layers.0."
    names = [t.name for t in tensors(config) if t.op == "norm" and t.name.startswith(start)]
    return [n.removeprefix(start).removesuffix(".weight") for n in names if n.endswith(".weight")]


def _streams(
    state: State, tokens_BT: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """What enters each norm that reads the stream, the logits, the largest stream's deviation."""
    seen: dict[str, torch.Tensor] = {}
    with _model(state, torch.float64) as model:
        for name, module in model.named_modules():
            if re.search(r"(^|[._])norm$", name) and not name.startswith("head."):
                module.register_forward_pre_hook(_keeper(seen, name))
        logits_BTV = _run(model, tokens_BT)
    return seen, logits_BTV, max(float(x.std()) for x in seen.values())


def _keeper(seen: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen[name] = arguments[0].clone()

    return keep


@contextmanager
def _model(state: State, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The model of a state, in `dtype`, its tensors read as its modules run."""
    config = model_config(state)
    with torch.device("meta"):
        model = build(config)
    model.to(dtype).eval()
    model.requires_grad_(False)
    if dtype == torch.float16 and (keep_in_range := getattr(model, "keep_in_range", None)):
        keep_in_range()  # as the engine does: T5 overflows without it
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(_fetcher(state, name, dtype))
            module.register_forward_hook(_dropper)
    with torch.inference_mode():
        yield model


def _fetcher(state: State, at: str, dtype: torch.dtype) -> Callable[..., None]:
    def fetch(module: nn.Module, arguments: Any) -> None:
        for name in [n for n, p in module._parameters.items() if p is not None]:
            whole = state.read(f"weights/{at}.{name}").to(dtype)
            module._parameters[name] = nn.Parameter(whole, requires_grad=False)

    return fetch


def _dropper(module: nn.Module, arguments: Any, output: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _run(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Logits; an encoder-decoder reads the probes on both sides."""
    rows, length = tokens_BT.shape
    positions_BT = torch.arange(length).expand(rows, length)
    sides = (tokens_BT, positions_BT, None)
    twice = isinstance(model.config, T5PegasusConfig)
    hidden_BTD = model(*sides, *sides) if twice else model(*sides)
    logits_NV: torch.Tensor = model.logits(hidden_BTD.flatten(0, 1))  # type: ignore[operator]
    return logits_NV.view(rows, length, -1)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference; a NaN anywhere is a NaN."""
    return float((one.double() - other.double()).abs().max())


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
