"""What is freed goes back to the system: for commands that take a state through one by one.

glibc keeps freed blocks below a threshold in its heap, and raises the threshold to the size of what
was freed last, up to 32 MB: tensor after tensor of other sizes leaves holes in that heap, until it
is as large as the model. With a fixed threshold every tensor has pages of its own.
"""

import ctypes

OWN_PAGES_FROM = 1 << 17
"""Bytes of a block that gets pages of its own."""
_M_MMAP_THRESHOLD = -3
"""<malloc.h>"""


def give_back() -> bool:
    """From now on freed tensors leave this process; whether its C library can (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, OWN_PAGES_FROM))
