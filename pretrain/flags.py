"""Flags of a command that only some of its ways read: on another way one is refused in a sentence,
and never ignored."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any


def check_read(
    given: argparse.Namespace,
    parser: argparse.ArgumentParser,
    read_by: Mapping[str, Sequence[str]],
    way: str,
    option: str = "",
) -> None:
    """ValueError for a flag that was given and that `way` does not read.

    Args:
        read_by: the ways that read a flag, for each that not all do.
        option: whose value the way is, `--task`; none where the way's name says what to change.
    """
    for name, readers in read_by.items():
        value = getattr(given, name)
        if way in readers or value == parser.get_default(name):
            continue
        asked, change = (f"{option} {way}", f" or change {option}") if option else (way, "")
        raise ValueError(
            f"--{name.replace('_', '-')}: is {_said(value)}, which {asked} does not read, only "
            f"{', '.join(readers)}; leave it out{change} (此处不使用此项)"
        )


def _said(value: Any) -> str:
    if value is True:
        return "given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
