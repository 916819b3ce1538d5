"""The characters that a vocabulary of sentencepiece is to hold: chosen by us, not by its trainer.

    lines --counted--> the commonest, enough to cover the text --> the lines without the others

What the alphabet lacks is bytes (byte_bpe, byte_unigram) or <unk> (cpm), and lies in no piece.
"""

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

COVERAGE = {
    "cpm": 0.9995,
    "byte_bpe": 0.9999,
    "byte_unigram": 0.9999,
}  # of the sample's characters, by the vocabulary
_RESERVED = "\x00\t\n\u2581\u2585"  # what sentencepiece means something else by, in training


def chosen(lines: list[str], kind: str, longest: int) -> set[str]:
    """The commonest characters, enough to cover the sample but at most `longest`; the others are
    bytes, or <unk>."""
    times = np.zeros(0x110000, np.int64)
    for start in range(0, len(lines), 20_000):
        some = "".join(lines[start : start + 20_000]).encode("utf-32-le", "surrogatepass")
        times += np.bincount(np.frombuffer(some, np.uint32), minlength=len(times))
    counts = Counter({chr(code): int(times[code]) for code in np.flatnonzero(times).tolist()})
    for char in _RESERVED + "\u2583" * (kind == "cpm"):
        counts.pop(char, None)
    missing = counts.total() * (1 - COVERAGE[kind])
    alphabet: set[str] = set()
    left = counts.total()
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if left <= missing or len(alphabet) >= longest:
            break
        alphabet.add(char)
        left -= count
    return alphabet


def covered(lines: list[str], alphabet: set[str]) -> Iterator[str]:
    """The lines cut at characters outside the alphabet, which no piece may hold."""
    foreign = re.compile(f"[^{re.escape(''.join(sorted(alphabet)))}]+")
    for line in lines:
        for part in foreign.split(line):
            if part:
                yield part
