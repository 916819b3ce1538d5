"""YAML + `base:` + `key=value` -> frozen dataclasses.

    file.yaml --base:--> size.yaml        later files and then overrides win, mappings are merged
         |                                every problem of the whole page is gathered, then raised
         v                                together; an unknown key is shown with its neighbour
    {"data": {...}} -> typed, frozen dataclasses -> .problems() of each

A section that can be one of several dataclasses (a model is a CPM or a T5 PEGASUS ...) is
annotated as their union; the literal field that they share (`family`) decides. A section with a
`SHORT` may be given as one word, the value of that key (`recompute: full`).
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, cast

import yaml

T = TypeVar("T")
MISSING = dataclasses.MISSING
SCALARS = {
    bool: ("true or false", " true 或 false"),
    int: ("a whole number", "整数"),
    float: ("a number", "数"),
    str: ("text", "文本"),
}
BOUND = re.compile(r"must (not be negative|lie |be (at least|above|more than|0|null))")
CHINESE = re.compile("[\u4e00-\u9fff]")


class ConfigError(ValueError):
    """What a user wrote cannot be used; a line for every problem, each with the key to change."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses a repeated key."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if isinstance(key, list | dict):
            raise ConfigError(
                f"line {line}: a key is a word, this one is a {_kind(key)} (键须为词)"
            )
        if key in seen:
            raise ConfigError(
                f"line {line}: the key '{key}' stands twice; keep one of them (键重复)"
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def load(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a config file into the frozen dataclass `cls`.

    `overrides` are `a.b.c=value` strings, their values read as YAML. Raises ConfigError with every
    problem found: unreadable files, unknown keys, wrong types, and what the dataclasses' own
    `problems()` say.
    """
    data = read_yaml(path)
    for text in overrides:
        override(data, text)
    try:
        return from_dict(cls, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The merged mapping of a config file and all its `base:` files, before typing."""
    return _read(Path(path), ())


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` goes in a circle (base 循环引用)")
    try:
        data = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file (配置文件不存在)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error} (无法读取)") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_broken(error)}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of sections, this file is a {_kind(data)} "
            "(须为键值映射)"
        )
    return cast("dict[str, Any]", _expand(data, path, (*seen, path.resolve())))


def _expand(data: Any, path: Path, seen: tuple[Path, ...]) -> Any:
    """Lay every mapping over its `base:` files (`stages: [{steps: 9, base: size.yaml}]`)."""
    if isinstance(data, list):
        return [_expand(item, path, seen) for item in data]
    if not isinstance(data, dict):
        return data
    bases = data.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{path}: base: must name a file or list files, is {bases!r} (须为文件名)"
        )
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, seen))
    return _merge(merged, {key: _expand(value, path, seen) for key, value in data.items()})


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged


def override(data: dict[str, Any], text: str) -> None:
    """Set `a.b=value` of a page of plain data, the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"'{text}': an override is written key=value, e.g. batch.samples=64 (须写作 键=值)"
        )
    *parents, last = key.split(".")
    for parent in parents:
        data = cast("dict[str, Any] | list[Any]", data)  # type: ignore[assignment]
        if isinstance(data, list):
            data = _element(data, parent, key)
        else:
            data = data.setdefault(parent, {})
        if not isinstance(data, dict | list):
            raise ConfigError(
                f"{key}: '{parent}' is a {_kind(data)}, it has no keys of its own (没有下级键)"
            )
    try:
        parsed = yaml.load(value, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {_broken(error)}") from None
    if isinstance(data, list):
        _element(data, last, key)
        data[int(last)] = parsed
    else:
        data[last] = parsed


def _element(items: list[Any], number: str, key: str) -> Any:
    if not number.isdigit() or int(number) >= len(items):
        raise ConfigError(
            f"{key}: '{number}' must be a number below {len(items)}, the list's length (序号不对)"
        )
    return items[int(number)]


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Turn plain data into the dataclass `cls`; ConfigError lists every problem at once."""
    problems: list[str] = []
    value = _build(cls, data, where, problems)
    if not problems:
        _gather(value, where, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return cast(T, value)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars, ready for YAML or JSON and for from_dict()."""
    return cast("dict[str, Any]", _plain(config))


def dump(config: Any) -> str:
    """A config as YAML, with every default written out."""
    return yaml.safe_dump(to_dict(config), allow_unicode=True, sort_keys=False)


def flat(value: Any, lead: str = "") -> dict[str, Any]:
    """Dotted key -> value, of mappings and of lists of mappings."""
    inside = value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        inside = dict(enumerate(value))
    if not isinstance(inside, dict) or not inside:
        return {lead: value}
    dot = f"{lead}." if lead else ""
    return {k: v for name, one in inside.items() for k, v in flat(one, f"{dot}{name}").items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {_key(f): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _gather(value: Any, where: str, problems: list[str]) -> None:
    """Collect what each section says about itself, innermost first."""
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _gather(item, f"{where}.{number}", problems)
    elif isinstance(value, dict):
        for key, item in value.items():
            _gather(item, _join(where, key), problems)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _gather(getattr(value, field.name), _join(where, _key(field)), problems)
        said = value.problems() if hasattr(value, "problems") else []
        problems.extend(_join(where, _in_both(sentence)) for sentence in said)


def _in_both(sentence: str) -> str:
    """What a section says of a bound, with the Chinese half that all bounds share."""
    if CHINESE.search(sentence) or not BOUND.search(sentence):
        return sentence
    return f"{sentence} (超出取值范围)"


def _build(kind: Any, data: Any, where: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _build_union(args, data, where, problems)
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, data, where, problems)
    if origin is typing.Literal:
        if data not in args:
            allowed = ", ".join(str(a) for a in args)
            near = difflib.get_close_matches(str(data), [str(a) for a in args], 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"{where}: is '{data}', must be one of {allowed}{hint} (不在可选值内)")
        return data
    if origin in (tuple, list):
        if not isinstance(data, list | tuple):
            problems.append(f"{where}: must be a list, is a {_kind(data)} (须为列表)")
            return ()
        if origin is tuple and args[-1:] != (Ellipsis,):
            if len(data) != len(args):
                problems.append(
                    f"{where}: must hold {len(args)} values, holds {len(data)} (个数不符)"
                )
                return ()
            return tuple(
                _build(a, item, f"{where}.{n}", problems)
                for n, (a, item) in enumerate(zip(args, data, strict=True))
            )
        return tuple(_build(args[0], item, f"{where}.{n}", problems) for n, item in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            problems.append(f"{where}: must be a mapping, is a {_kind(data)} (须为映射)")
            return {}
        return {k: _build(args[1], v, _join(where, str(k)), problems) for k, v in data.items()}
    return _build_scalar(kind, data, where, problems)


def _build_scalar(kind: Any, data: Any, where: str, problems: list[str]) -> Any:
    right = {
        bool: isinstance(data, bool),
        int: isinstance(data, int) and not isinstance(data, bool),
        float: isinstance(data, int | float) and not isinstance(data, bool),
        str: isinstance(data, str),
    }
    if kind not in right:
        raise AssertionError(f"{where}: the config grammar has no type {kind}")
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)  # 1e6 steps
    if not right[kind]:
        name, chinese = SCALARS[kind]
        problems.append(f"{where}: must be {name}, is {_kind(data)} {data!r} (须为{chinese})")
        return data
    if kind is float and not math.isfinite(data):
        problems.append(f"{where}: is {data}, must be a finite number (必须是有限的数)")
    return float(data) if kind is float else data


def _build_union(args: tuple[Any, ...], data: Any, where: str, problems: list[str]) -> Any:
    if data is None and type(None) in args:
        return None
    kinds = [a for a in args if a is not type(None)]
    if len(kinds) == 1:
        return _build(kinds[0], data, where, problems)
    sections = [k for k in kinds if dataclasses.is_dataclass(k)]
    if len(sections) == len(kinds):
        return _build_section(_choose(sections, data, where, problems), data, where, problems)
    for kind in kinds:  # scalars: the first that accepts
        trial: list[str] = []
        value = _build(kind, data, where, trial)
        if not trial:
            return value
    names = ", ".join(_name(k) for k in kinds)
    problems.append(f"{where}: {data!r} is none of {names} (类型不符)")
    return data


def _choose(sections: list[Any], data: Any, where: str, problems: list[str]) -> Any:
    """The one of several dataclasses whose literal first field equals the data's."""
    field = dataclasses.fields(sections[0])[0].name
    choices = {
        value: section
        for section in sections
        for value in typing.get_args(typing.get_type_hints(section)[field])
    }
    chosen = data.get(field) if isinstance(data, dict) else None
    if chosen not in choices:
        names = ", ".join(map(str, choices))
        problems.append(
            f"{_join(where, field)}: is {chosen!r}, must be one of {names} (不在可选值内)"
        )
        return None
    return choices[chosen]


def _build_section(cls: Any, data: Any, where: str, problems: list[str]) -> Any:
    if cls is None:
        return None
    if data is None:
        data = {}
    if isinstance(data, str) and hasattr(cls, "SHORT"):
        data = {cls.SHORT: data}
    if not isinstance(data, dict):
        name = where or cls.__name__
        problems.append(f"{name}: must be a mapping of keys, is a {_kind(data)} (须为键值映射)")
        return None
    hints = typing.get_type_hints(cls)
    fields = {_key(f): f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, cutoff=0.5)
            advice = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(fields)}"
            problems.append(f"{_join(where, str(key))}: unknown key (未知的键){advice}")
    values: dict[str, Any] = {}
    before = len(problems)
    for name, field in fields.items():
        hint = hints[field.name]
        if name in data:
            values[field.name] = _build(hint, data[name], _join(where, name), problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            if dataclasses.is_dataclass(hint):
                values[field.name] = _build_section(hint, {}, _join(where, name), problems)
            else:
                problems.append(f"{_join(where, name)}: must be given (必须给出)")
    return cls(**values) if len(problems) == before else None


def _key(field: "dataclasses.Field[Any]") -> str:
    """The YAML key of a field; `from` is no Python name, so the field is `from_`."""
    return field.name.rstrip("_")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _broken(error: yaml.YAMLError) -> str:
    return f"not valid YAML: {' '.join(str(error).split())} (YAML 语法错误)"


def _kind(data: Any) -> str:
    names = {dict: "mapping", list: "list", tuple: "list", str: "text", bool: "true/false"}
    return names.get(type(data), "empty value" if data is None else "number")


def _name(kind: Any) -> str:
    if typing.get_origin(kind) in (tuple, list):
        return "a list"
    if kind is str:
        return "text"
    return str(getattr(kind, "__name__", kind))
