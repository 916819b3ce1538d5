"""How a kernel is compiled: by numba, kept on disk for the next process, the interpreter's lock let
go while it runs, so that the loader's thread and the training step do not wait for each other.

numba keeps a kernel by the text of its own file alone: what a kernel calls stands in that file.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, and kept on disk if there is a place to write."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return numba.njit(nogil=True)(function)


def fixed(array: np.ndarray) -> np.ndarray:
    """A mapped file's or any array as a kernel takes it: a plain view that is not written to, so
    that each dtype is compiled once."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
