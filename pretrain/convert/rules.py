"""How a foreign format lays the tensors of a family out: rules, each with its inverse.

    native weights/NAME ... --out--> foreign tensors --files of the format-->
                        <--in--

A rule owns some native tensors and some foreign ones; together the rules of a format own every
tensor of either side exactly once (`check`), so that nothing is dropped and nothing invented. A
rule that can be undone to the last bit makes a conversion that can be: there and back is the
identity, and the proof of a conversion shows it on the files that were written.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

import torch
from torch import Tensor

from configs.grown import said
from configs.model import ModelConfig, shape, tensors
from pretrain.state import Entry

Tensors = list[Tensor]
Foreign = Mapping[str, Callable[[], Tensor]]
"""Foreign name -> how to read that tensor, on the CPU."""


class ConversionError(ValueError):
    """A file cannot be converted; the message names the tensor or the setting."""


def masked(config: ModelConfig) -> list[str]:
    """Why a format without `words_said` cannot have a model that masks words; empty for others."""
    if said(config) == config.vocab:
        return []
    why = f"model.words_said is {config.words_said}, the words from it on would be said"
    return [f"{why}; train them with words_said={config.vocab}, or grow to that, first"]


@dataclass(frozen=True)
class Rule:
    """Some native tensors as some foreign ones."""

    native: tuple[str, ...]
    foreign: tuple[str, ...]
    out: Callable[[Tensors], Tensors]
    """Native tensors -> foreign ones."""
    back: Callable[[Tensors], Tensors]
    """Foreign tensors -> native ones; ConversionError if they are no image of any."""
    copies: tuple[str, ...] = ()
    """Foreign names that may be left out: they are copies of the first."""


# ---- the kinds of rules


def same(native: str, foreign: str, transposed: bool = False) -> Rule:
    """One tensor under another name; `transposed`: the foreign one is [in, out]."""

    def turn(x: Tensors) -> Tensors:
        return [x[0].t() if transposed else x[0]]

    return Rule((native,), (foreign,), turn, turn)


def scaled(native: str, foreign: str, scale: float, transposed: bool = False) -> Rule:
    """The foreign tensor is `scale` times the native one. A power of two loses no bit; any other
    scale is undone to half a unit in the last place."""

    def out(x: Tensors) -> Tensors:
        y = (x[0].double() * scale).to(x[0].dtype)
        return [y.t() if transposed else y]

    def back(x: Tensors) -> Tensors:
        y = x[0].t() if transposed else x[0]
        return [(y.double() / scale).to(y.dtype)]

    return Rule((native,), (foreign,), out, back)


def stacked(natives: Sequence[str], foreign: str, transposed: bool = False) -> Rule:
    """Several tensors of one shape under each other (q, k, v); `transposed`: as [in, 3 out]."""

    def out(x: Tensors) -> Tensors:
        y = torch.cat(x)
        return [y.t() if transposed and y.dim() > 1 else y]

    def back(x: Tensors) -> Tensors:
        y = x[0].t() if transposed and x[0].dim() > 1 else x[0]
        return list(y.chunk(len(natives)))

    return Rule(tuple(natives), (foreign,), out, back)


def interleaved(natives: Sequence[str], foreign: str, heads: int) -> Rule:
    """q, k, v head by head: [q_0; k_0; v_0; q_1; ...], as megatron-core lays them out."""

    def out(x: Tensors) -> Tensors:
        by_head = [y.reshape(heads, -1, *y.shape[1:]) for y in x]
        return [torch.cat(by_head, dim=1).flatten(0, 1)]

    def back(x: Tensors) -> Tensors:
        by_head = x[0].reshape(heads, -1, *x[0].shape[1:])
        return [y.flatten(0, 1) for y in by_head.chunk(len(natives), dim=1)]

    return Rule(tuple(natives), (foreign,), out, back)


def padded(native: str, foreign: str, rows: int, multiple: int) -> Rule:
    """Rows of zeros below the `rows` true ones, up to the next multiple."""
    whole = -(-rows // multiple) * multiple

    def out(x: Tensors) -> Tensors:
        return [torch.cat([x[0], x[0].new_zeros(whole - rows, *x[0].shape[1:])])]

    def back(x: Tensors) -> Tensors:
        if len(x[0]) < rows:
            raise ConversionError(
                f"{foreign}: has {len(x[0])} rows, the model {rows}; it is another model's "
                "(词表行数不符)"
            )
        return [x[0][:rows]]

    return Rule((native,), (foreign,), out, back)


def derived(foreign: str, make: Callable[[], Tensor]) -> Rule:
    """A foreign tensor that follows from the config: written as it is, and compared when read."""

    def back(x: Tensors) -> Tensors:
        if x[0].is_meta:  # shapes alone are looked at
            return []
        expected = make().to(x[0].dtype)  # as it is rounded in a file of half precision
        rounding = max(torch.finfo(x[0].dtype).eps, 1e-5)
        same_shape = x[0].shape == expected.shape
        if not same_shape or not torch.allclose(x[0].double(), expected.double(), rounding):
            raise ConversionError(
                f"{foreign}: is not what follows from the config; the file was changed, or made by "
                "other code (与配置不符)"
            )
        return []

    return Rule((), (foreign,), lambda x: [make()], back)


def tied(native: str, foreigns: Sequence[str]) -> Rule:
    """One tensor that the format holds several times; they must be equal when read."""

    def back(x: Tensors) -> Tensors:
        for name, other in zip(foreigns[1:], x[1:], strict=True):
            if not other.is_meta and not torch.equal(x[0], other):
                raise ConversionError(
                    f"{name}: differs from {foreigns[0]}, of which it must be a copy (应为同一张量)"
                )
        return [x[0]]

    names = tuple(foreigns)
    return Rule((native,), names, lambda x: [x[0]] * len(names), back, copies=names[1:])


def over_ranks(rule: Rule, ranks: int, dim: int | None, parts: int = 1) -> Rule:
    """A rule's one foreign tensor cut along `dim` over tensor-parallel ranks, named
    `RANK:NAME`; with `parts`, each rank holds its piece of each of so many stacked parts
    ([q_r; k_r; v_r]). dim None: every rank holds the whole."""
    (name,) = rule.foreign
    names = tuple(f"{rank}:{name}" for rank in range(ranks))
    if dim is None:
        copies = tied("", names)
        return Rule(
            rule.native,
            names,
            lambda x: copies.out(rule.out(x)),
            lambda x: rule.back(copies.back(x)),
        )

    def out(x: Tensors) -> Tensors:
        pieces = [part.chunk(ranks, dim) for part in rule.out(x)[0].chunk(parts, dim)]
        return [torch.cat(mine, dim) for mine in zip(*pieces, strict=True)]

    def back(x: Tensors) -> Tensors:
        pieces = zip(*(mine.chunk(parts, dim) for mine in x), strict=True)
        return rule.back([torch.cat([torch.cat(part, dim) for part in pieces], dim)])

    return Rule(rule.native, names, out, back)


# ---- all rules of a format together


def check(rules: Sequence[Rule], config: ModelConfig) -> None:
    """Every native tensor is owned by one rule, every foreign name by one."""
    owned = Counter(name for rule in rules for name in rule.native)
    wanted = Counter(tensor.name for tensor in tensors(config))
    assert owned == wanted, f"rules and table differ in {(owned - wanted) + (wanted - owned)}"
    foreign = Counter(name for rule in rules for name in rule.foreign)
    assert all(n == 1 for n in foreign.values()), f"two rules for {foreign.most_common(3)}"


def exported(rules: Sequence[Rule], read: Callable[[str], Tensor]) -> Iterable[tuple[str, Tensor]]:
    """(foreign name, tensor) one rule after the other; `read` gives a native weight by name."""
    for rule in rules:
        made = rule.out([read(name) for name in rule.native])
        for name, tensor in zip(rule.foreign, made, strict=True):
            yield name, tensor.contiguous()


def imported(
    rules: Sequence[Rule],
    foreign: Foreign,
    config: ModelConfig,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Entry]:
    """weights/NAME -> entry of every native tensor, read from the foreign ones when asked for.

    ConversionError if foreign tensors are missing, or there are others that no rule owns (but
    `ignored` ones: buffers that follow from the config).
    """
    foreign = dict(foreign)
    for rule in rules:
        for name in rule.copies:
            if rule.foreign[0] in foreign:
                foreign.setdefault(name, foreign[rule.foreign[0]])
    wanted = [name for rule in rules for name in rule.foreign]
    missing = [name for name in wanted if name not in foreign]
    if missing:
        near = get_close_matches(missing[0], foreign, 1)
        raise ConversionError(
            f"{len(missing)} tensors are missing, the first is '{missing[0]}'"
            + (f" (there is '{near[0]}')" if near else "")
            + f"; the file is not a {config.family} of this config (缺少张量)"
        )
    spare = sorted(set(foreign) - set(wanted) - {name for name in foreign if ignored(name)})
    if spare:
        raise ConversionError(
            f"{len(spare)} tensors have no place in a {config.family} of this config, the first is "
            f"'{spare[0]}'; is it another architecture? (多出的张量)"
        )
    for rule in rules:
        if not rule.native:
            rule.back([foreign[name]() for name in rule.foreign])
    sizes = {tensor.name: shape(config, tensor) for tensor in tensors(config)}
    entries = {}
    for rule in rules:
        shapes = rule.back([foreign[name]().to("meta") for name in rule.foreign])
        for name, tensor in zip(rule.native, shapes, strict=True):
            if tuple(tensor.shape) != sizes[name]:
                raise ConversionError(
                    f"{', '.join(rule.foreign)}: gives {name} the shape {list(tensor.shape)}, the "
                    f"config says {list(sizes[name])} (形状不符)"
                )
        made = _once(rule, foreign)
        for place, name in enumerate(rule.native):
            entries[f"weights/{name}"] = Entry(sizes[name], "float32", _reader(made, place))
    return {f"weights/{t.name}": entries[f"weights/{t.name}"] for t in tensors(config)}


def _once(rule: Rule, foreign: Foreign) -> Callable[[], Tensors]:
    """The native tensors of a rule; q, k and v read after each other come from one reading."""

    @lru_cache(maxsize=1)
    def made() -> Tensors:
        return rule.back([foreign[name]() for name in rule.foreign])

    return made if len(rule.native) > 1 else made.__wrapped__


def _reader(made: Callable[[], Tensors], place: int) -> Callable[[], Tensor]:
    return lambda: made()[place].float().contiguous()
