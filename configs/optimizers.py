"""The update rule and the learning rate of a run: its `optimizer` and `schedule` sections.

    optimizer   adamw | lamb | rms_adamw | adafactor | muon, and what goes beside each of them
    schedule    wsd | cosine | inverse_root | piecewise | constant

What each computes, with its source: pretrain/optimizers/ and docs/optimizers.md. A key that the
chosen rule does not read is refused, so that no page says something that does not happen.
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal

from configs.grown import Growing
from configs.model import ModelConfig, Tensor, local_shape, shape, tensors

SMALLEST_EPS = 1e-30
"""Far above the smallest float32, far below what any rule was published with."""
Rule = Literal["adamw", "lamb", "rms_adamw", "adafactor", "muon"]
ADAMS = ("adamw", "lamb", "rms_adamw", "muon")
READ_BY: dict[str, tuple[str, ...]] = {
    "beta2": ADAMS,
    "eps": ADAMS,
    "bias_correction": ("lamb",),
    "adapt": ("lamb",),
    "relative_step": ("adafactor",),
    "rms_floor": ("adafactor", "rms_adamw"),
    "momentum": ("muon",),
    "muon_scale": ("muon",),
}
"""Keys that only some rules read."""
SCHEDULED_BY: dict[str, tuple[str, ...]] = {
    "decay_steps": ("wsd",),
    "decay": ("wsd",),
    "min_ratio": ("wsd", "cosine"),
}
"""Keys that only some schedules read. A stage that takes another one leaves them behind."""

SIZES_ITS_STEPS = ("lamb", "rms_adamw", "adafactor", "muon")
"""Rules whose step in a matrix has the matrix's own size, or one that is set: what was divided
among copies is not trained at a divided rate."""


@dataclass(frozen=True)
class Optimizer:
    """The update rule."""

    lr: float
    """Peak learning rate."""
    name: Rule = "adamw"
    """adamw; lamb: its step times |weights| / |step| for each tensor; rms_adamw: times the root
    mean square of the tensor; adafactor: that, with second moments by row and column; muon:
    orthogonalised momentum for the matrices of the layers, adamw for the rest."""
    beta1: float = 0.9
    """Decay of the first moment; adafactor keeps none at 0."""
    beta2: float = 0.95
    """Decay of the second moment (adafactor: 1 - step ** -0.8 instead)."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled; applied to what `decay` names."""
    decay: Literal["table", "all"] = "table"
    """table: matrices and embeddings, not norms and biases; all: every tensor."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 clips nothing."""
    layer_decay: float = 1.0
    """Each layer learns at this times the rate of the one above it; 1: all alike."""
    bias_correction: bool = True
    """lamb: moments divided by 1 - beta ** step; RoFormer v2 was trained without."""
    adapt: Literal["all", "decayed"] = "all"
    """lamb: the tensors whose step is adapted; decayed leaves out norms and biases."""
    relative_step: bool = False
    """adafactor: the rate is at most 1 / sqrt(updates), as T5 was trained."""
    rms_floor: float = 1e-3
    """adafactor, rms_adamw: a tensor's root mean square counts as at least this."""
    momentum: float = 0.95
    """muon: decay of its momentum (Nesterov)."""
    muon_scale: Literal["rms", "spectral"] = "rms"
    """muon: step of 0.2 sqrt(larger side), so that adamw's lr and decay fit, or sqrt(out / in)."""
    lazy_rows: bool = False
    """Rows of an embedding that no sample of the step used stay as they are, moments too."""
    ema: float = 0.0
    """Keep the average of the weights beside them, with this decay per update; 0: none."""
    lookahead_every: int = 0
    """Updates after which slow weights move towards the fast ones, which go back to them; 0: no."""
    lookahead_share: float = 0.5
    """How far the slow weights move."""

    def problems(self) -> list[str]:
        """Numbers outside their range, and keys that the rule does not read."""
        found = [] if self.lr > 0 else [f"lr: is {self.lr}, must be above 0"]
        for name in ("beta1", "beta2", "momentum", "ema"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name}: is {getattr(self, name)}, must lie in [0, 1)")
        for name in ("weight_decay", "clip_norm", "lookahead_every", "rms_floor"):
            if getattr(self, name) < 0:
                found.append(f"{name}: is {getattr(self, name)}, must not be negative")
        for name in ("layer_decay", "lookahead_share"):
            if not 0 < getattr(self, name) <= 1:
                found.append(f"{name}: is {getattr(self, name)}, must lie in (0, 1]")
        if self.eps < SMALLEST_EPS:
            found.append(
                f"eps: is {self.eps:g}, must be at least {SMALLEST_EPS:g}: it keeps float32 from "
                "dividing 0 by 0 (过小)"
            )
        found += _unread(self, READ_BY, "optimizer.name (该优化器不使用此项)")
        if not self.lookahead_every and self.lookahead_share != 0.5:
            found.append(
                f"lookahead_share: is {self.lookahead_share}, lookahead_every is 0, so that "
                "nothing looks ahead; set both or neither (未启用)"
            )
        if self.lazy_rows and self.name != "adamw":
            found.append(
                f"lazy_rows: is built for adamw, optimizer.name is {self.name} (只用于 adamw)"
            )
        return found


def _unread(section: Any, read_by: dict[str, tuple[str, ...]], name: str) -> list[str]:
    """Keys that say something which the chosen name does not read."""
    defaults = {field.name: field.default for field in fields(section)}
    return [
        f"{key}: is {getattr(section, key)}, which {section.name} does not read, only "
        f"{', '.join(names)}; leave it out (set it to {defaults[key]} where a base page has it) or "
        f"change {name}"
        for key, names in read_by.items()
        if section.name not in names and getattr(section, key) != defaults[key]
    ]


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps of the whole run."""

    name: Literal["wsd", "cosine", "inverse_root", "piecewise", "constant"] = "wsd"
    """wsd: warm up, stay, decay; cosine: warm up, then a half cosine; inverse_root: warm up, then
    sqrt(warmup_steps / step); piecewise: lines between `points`; constant: warm up, stay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """wsd: steps of decay at the end of the run."""
    decay: Literal["linear", "sqrt"] = "linear"
    """wsd: the shape of the decay; sqrt is 1 - sqrt(progress)."""
    min_ratio: float = 0.1
    """wsd, cosine: the last learning rate, as a share of the peak."""
    steps: int = 0
    """Steps that the schedule spans; 0: the whole run."""
    points: tuple[tuple[int, float], ...] = ()
    """piecewise: (updates, share of the peak), rising in updates; lines between them, from (0, 0),
    and the last share to the end."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = [
            f"{name}: is {getattr(self, name)}, must not be negative"
            for name in ("warmup_steps", "decay_steps", "steps")
            if getattr(self, name) < 0
        ]
        found += _unread(self, SCHEDULED_BY, "schedule.name (该学习率方案不使用此项)")
        if not 0 <= self.min_ratio <= 1:
            found.append(f"min_ratio: is {self.min_ratio}, must lie in [0, 1]")
        if (self.name == "piecewise") != bool(self.points):
            found.append(
                f"points: has {len(self.points)} points under {self.name}; piecewise needs them, "
                "as [[updates, share], ...], and no other schedule reads them (折线的折点)"
            )
        at = [step for step, _ in self.points]
        if any(step < 0 for step in at) or at != sorted(set(at)):
            found.append(f"points: stand at {at} updates; they must rise, from 0 on (步数须递增)")
        if any(share < 0 for _, share in self.points):
            found.append("points: a share of the peak is negative; it must be 0 or more (不得为负)")
        if self.name == "piecewise" and self.warmup_steps:
            found.append(
                "warmup_steps: piecewise says its warm-up in points; leave it out "
                "(预热写在 points 中)"
            )
        return found


def read_by_schedule(before: dict[str, Any], name: str, unread: dict[str, Any]) -> dict[str, Any]:
    """What a schedule of that name takes over from the one `before`; what it does not read is
    kept in `unread`, for a later stage that reads it again."""
    own = {k: v for k, v in before.items() if before["name"] in SCHEDULED_BY.get(k, ())}
    unread |= own
    return {
        key: value
        for key, value in {**before, **unread}.items()
        if name in SCHEDULED_BY.get(key, (name,))
    }


def moments(section: Optimizer) -> frozenset[str]:
    """What the rule remembers, by name; two rules with the same may follow one another."""
    if section.name == "adafactor":
        return frozenset(("factors", *(["exp_avg"] if section.beta1 else [])))
    adam = {"exp_avg", "exp_avg_sq"}
    return frozenset(adam | {"momentum"} if section.name == "muon" else adam)


def moment_bytes(section: Optimizer, model: ModelConfig, tensor: int = 1) -> tuple[int, int]:
    """(bytes that lie like the weights, bytes that every device has) of all that is remembered.

    The former are divided by ZeRO; `tensor` devices share each matrix.
    """
    spread = whole = 0
    beside = (section.ema > 0) + (section.lookahead_every > 0)
    for t in tensors(model):
        values, size = prod(local_shape(model, t, tensor)), shape(model, t)
        each = 2
        if section.name == "adafactor":
            each = int(section.beta1 > 0)
            whole += 4 * (sum(size) if len(size) == 2 else size[0])
        elif section.name == "muon" and orthogonalised(t):
            each = 1
        spread += 4 * values * (each + beside)
    return spread, whole


def orthogonalised(tensor: Tensor) -> bool:
    """Whether muon's momentum is for it: a matrix of a layer."""
    return tensor.op == "linear" and tensor.layer is not None


def problems_with_model(
    section: Optimizer, model: ModelConfig, how: Growing | None = None
) -> list[str]:
    """What the rule cannot do for a model, or for one whose matrices have grown, and how."""
    found = []
    tied = [t.name for t in tensors(model) if t.op == "lookup" and t.tied_to is not None]
    if section.lazy_rows and tied:
        found.append(
            f"lazy_rows: {tied[0]} of {model.family} is tied to the head, whose gradient reaches "
            "every row; leave it out (词表与输出层共享，没有未用到的行)"
        )
    if how is not None and section.name == "muon" and how.method == "su":
        found.append(
            "name: muon cannot go on as the small model did from matrices that grew by method su; "
            "grow by method exact (生长须用 exact)"
        )
    elif how is not None and section.name == "muon" and section.muon_scale != "spectral":
        found.append(
            f"muon_scale: is {section.muon_scale}, a grown matrix goes on as the small one only "
            "with spectral; set that from the first stage on (生长须用 spectral)"
        )
    return found
