"""How a kernel is compiled: by numba, and kept for the next process where there is a place."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, and kept on disk for the next process if there is a place to write."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return numba.njit(function)
