"""One update of everything: what ZeRO hands over piece by piece is collected, clipped, applied.

    DeepSpeed's step:  for each group or sub-group   flat.grad --step()--> kept
                       with the last one             norm of every logical tensor, one message
                                                     global norm, clip          (clip_weight)
                                                     the rule: adamw, lamb ...  (rules.py)
                                                     weights of the others handed on again

DeepSpeed calls its optimizer once for every group (ZeRO 1, 2) or sub-group (ZeRO 3) and copies the
masters into the weights after each. A rule that needs whole tensors, or a norm over all of them,
can only work when all gradients are there; so that is when everything happens, in one place on
every layout. The gradients of all groups live until then: 4 bytes a value of this rank.

Clipping weighs tensors: global norm = sqrt(sum of clip_weight x |gradient of the tensor|^2). A
tensor that growth made of copies counts as the one that it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.optimizers.fragments import Logical


class Rule(Protocol):
    """How gradients become changes of weights."""

    @property
    def slots(self) -> Mapping[str, str]:
        """What is kept for each value of a weight -> what it starts from: `zeros` or `weight`."""

    @property
    def part(self) -> str | None:
        """Whose groups it updates; None: it looks at all."""

    def begin(self, update: "Update") -> None:
        """The layout is known: make what depends on it."""

    @property
    def masks(self) -> bool:
        """Whether apply() heeds `sick`; if not, a sick step waits for the device instead."""

    def apply(self, update: "Update", grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """Change the masters (the keys of grads), unless sick; the gradients may be used up."""


class Update(torch.optim.Optimizer):
    """DeepSpeed's client optimizer: collects, clips, applies a rule.

    Args:
        groups: torch's parameter groups; each has lr_scale, born and what the rule reads.
        rules: applied one after another; the first one changes weights by gradients.
        clip_norm: largest global norm; 0 clips nothing.
        clip_weights: by tensor name, where it is not 1.

    Until begin() has said where everything is, step() does nothing: ZeRO 3 makes a step of zero
    gradients when it is built.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rules: Sequence[Rule],
        clip_norm: float,
        clip_weights: Mapping[str, float],
    ) -> None:
        super().__init__(list(groups), {"lr": 0.0})
        self.groups = list(self.param_groups)  # DeepSpeed shows step() one of them at a time
        self.rules, self.clip_norm, self._weights = list(rules), clip_norm, dict(clip_weights)
        self.flats: list[Tensor] = []
        self.group_of: dict[Tensor, dict[str, Any]] = {}
        self.flat_of: dict[int, Tensor] = {}
        """id of a group -> one of its flats, whose step counts for all."""
        self.whole: dict[str, Tensor] = {}
        """State that is no longer than a side of its tensor, whole on every rank: by its key."""
        self.updates = 0
        """Updates of the run so far."""
        self.logical: Logical
        self.squares: Tensor | None = None
        """Of each logical tensor's last gradient, float64 [tensors], before clipping."""
        self.norm: Tensor | None = None
        """The global norm of the last gradient, 0-d float32 on the device, before clipping."""
        self.measures = False
        """Whether the coming update is measured."""
        self.measured: Tensor | None = None
        """Of the last update that was: float64 [3, tensors], squares of each logical tensor's
        gradient (as clipping weighs it: they add up to norm squared), of its change and of its
        values before."""
        self.judge: Callable[[Tensor], Tensor] | None = None
        """From the global norm to what is not 0 if the step must change nothing; 0-d float32 on the
        device. None: every step that comes here is sound."""
        self._arrived: dict[Tensor, Tensor] = {}
        self._growth_lr: tuple[tuple[float, ...], Tensor] | None = None
        self._hand_on: Callable[[], None] = lambda: None

    def slots(self, part: str) -> dict[str, str]:
        """What lies beside the weights of a part's groups -> what it starts from."""
        rules = [rule for rule in self.rules if rule.part in (part, None)]
        return {name: start for rule in rules for name, start in rule.slots.items()}

    def slots_by_name(self) -> dict[str, dict[str, str]]:
        """The same by tensor name."""
        return {n: self.slots(group["part"]) for group in self.groups for n in group["names"]}

    def fill(self, group: dict[str, Any], flat: Tensor) -> dict[str, Any]:
        """Make the state of one flat tensor exist."""
        state: dict[str, Any] = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for slot in self.slots(group["part"]):
                state[slot] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        return state

    def begin(
        self,
        flats: Sequence[tuple[dict[str, Any], Tensor]],
        logical: Logical,
        hand_on: Callable[[], None],
    ) -> None:
        """Where everything is.

        Args:
            flats: (its parameter group, flat master), all of this rank.
            logical: the tensors that they hold.
            hand_on: gives the forward pass the masters of those that step() was called with early.
        """
        self.flats = [flat for _, flat in flats]
        self.group_of = {flat: group for group, flat in flats}
        self.logical, self._hand_on = logical, hand_on
        self._clip_weight = logical.vector(self._weights)
        self.flat_of = {id(group): flat for group, flat in flats}
        for group, flat in flats:
            self.fill(group, flat)
        for rule in self.rules:
            rule.begin(self)

    def _look(self, grads: dict[Tensor, Tensor]) -> Tensor:
        """The global norm of the gradients, by flat tensor, as clipping weighs it; 0-d float32, and
        no waiting for it."""
        (self.squares,) = self.logical.reduced(
            self.logical.squares(lambda f: f.view(grads[f.flat]))
        )
        self.norm = (self.squares * self._clip_weight).sum().sqrt().float()
        return self.norm

    def norms(self) -> dict[str, float]:
        """The norm of each logical tensor's last gradient; waits for the device."""
        if self.squares is None:
            return {}
        return dict(zip(self.logical.names, self.squares.sqrt().tolist(), strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the gradients of what is in the groups now; with the last of all, update."""
        if not self.flats:
            return
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._arrived[flat] = flat.grad
        if len(self._arrived) < len(self.flats):
            return
        grads, self._arrived = {flat: self._arrived[flat] for flat in self.flats}, {}
        norm = self._look(grads)
        sick = None if self.judge is None else self.judge(norm)
        if sick is not None and not all(rule.masks for rule in self.rules) and bool(sick):
            return
        if self.clip_norm:
            scale = torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
            beside = {flat.device: scale.to(flat.device) for flat in grads}
            for flat, grad in grads.items():
                grad.mul_(beside[flat.device])
        steps = [self.state[flat]["step"] for flat in self.flats]
        torch._foreach_add_(steps, 1)
        self.updates += 1
        before = {flat: flat.detach().clone() for flat in grads} if self.measures else {}
        for rule in self.rules:
            rule.apply(self, grads, sick)
        if before:
            self.measured = self._measured(before)
        if sick is not None:
            torch._foreach_sub_(steps, [sick.to(step.device) for step in steps])
        self._hand_on()

    def _measured(self, before: dict[Tensor, Tensor]) -> Tensor:
        """What `measured` says, in one more message; uses up the copies."""
        assert self.squares is not None
        weights = self.logical.squares(lambda f: f.view(before[f.flat]))
        torch._foreach_sub_(list(before.values()), [flat.detach() for flat in before])
        change = self.logical.squares(lambda f: f.view(before[f.flat]))
        return torch.stack(
            [self.squares * self._clip_weight, *self.logical.reduced(change, weights)]
        )

    def by_group(self, part: str = "") -> list[tuple[dict[str, Any], list[Tensor]]]:
        """(parameter group, its flat tensors) of a part."""
        found: dict[int, tuple[dict[str, Any], list[Tensor]]] = {}
        for flat, group in self.group_of.items():
            if group["part"] == part:
                found.setdefault(id(group), (group, []))[1].append(flat)
        return list(found.values())

    def growth_lr(self) -> Tensor:
        """What growth multiplies each tensor's learning rate by now, float64 [tensors].

        The engine may bring the groups' lr_scale back to 1 over some steps.
        """
        now = tuple(group["lr_scale"] / group["layer_scale"] for group in self.groups)
        if self._growth_lr is None or self._growth_lr[0] != now:
            by_name = {
                n: x for group, x in zip(self.groups, now, strict=True) for n in group["names"]
            }
            self._growth_lr = now, self.logical.vector(by_name)
        return self._growth_lr[1]
