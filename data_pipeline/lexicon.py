"""The dictionary that words are cut by: jieba 0.42.1's, with or without a user's words.

    jieba/dict.txt ──> published() ──copy──> Lexicon.set(word, frequency) ... (user_dictionary.py)

Suffixes of names: N nodes of the tree.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import resources

import numpy as np

from data_pipeline.trie import Trie


class Lexicon:
    """Words and their frequencies; a prefix of a word is there with frequency 0, as in jieba.

    `total` is the sum of all frequencies ever set (jieba does not subtract the one that a new one
    replaces). `forced` says of each node whether the HMM may not join its characters.
    """

    def __init__(self) -> None:
        self.trie = Trie()
        self.total = 0
        self.frequency_N = np.zeros(1, np.int64)
        self.log_N = np.zeros(1)  # of the frequency, where there is one
        self.forced_N = np.zeros(1, np.bool_)
        self.any_forced = False

    def copy(self) -> Lexicon:
        """Another with the same words, to add to."""
        made = Lexicon()
        made.trie, made.total, made.any_forced = self.trie.copy(), self.total, self.any_forced
        made.frequency_N, made.log_N = self.frequency_N.copy(), self.log_N.copy()
        made.forced_N = self.forced_N.copy()
        return made

    def fill(self, words: list[str], frequencies: np.ndarray) -> None:
        """Set many words at once, each once."""
        nodes = self.trie.add(words)
        self._grow()
        self.frequency_N[nodes] = frequencies
        distinct, which = np.unique(frequencies, return_inverse=True)
        # math.log, as jieba: numpy's differs from it in the last bit, and ties hang on that.
        log = np.array([math.log(n or 1) for n in distinct.tolist()])
        self.log_N[nodes] = log[which]
        self.total += int(frequencies.sum())

    def set(self, word: str, frequency: int) -> None:
        """What jieba's add_word does: frequency 0 takes a word out, also of the HMM's mouth."""
        node = int(self.trie.add([word])[0])
        self._grow()
        self.frequency_N[node], self.log_N[node] = frequency, math.log(frequency or 1)
        self.total += frequency
        if frequency == 0:
            self.forced_N[node] = self.any_forced = True

    def frequency(self, word: str, otherwise: int) -> int:
        """The frequency of a word, 0 of a mere prefix, `otherwise` of neither."""
        node = self.trie.find(word)
        return int(self.frequency_N[node]) if node else otherwise

    def _grow(self) -> None:
        """Room for the tree's nodes, and then some."""
        if self.trie.nodes > len(self.frequency_N):
            more = self.trie.nodes * 5 // 4 - len(self.frequency_N)
            self.frequency_N = np.append(self.frequency_N, np.zeros(more, np.int64))
            self.log_N = np.append(self.log_N, np.zeros(more))
            self.forced_N = np.append(self.forced_N, np.zeros(more, np.bool_))


@cache
def published() -> Lexicon:
    """jieba 0.42.1's own dictionary, read from its wheel; not to be changed."""
    words, frequencies = _dictionary()
    made = Lexicon()
    made.fill(words, frequencies)
    return made


def commonest(count: int) -> list[str]:
    """The `count` commonest words of jieba's dictionary; of equal ones, as they stand there."""
    words, frequencies = _dictionary()
    order = np.argsort(-frequencies, kind="stable")
    return [words[i] for i in order[:count].tolist()]


def _dictionary() -> tuple[list[str], np.ndarray]:
    """Words and frequencies as dict.txt has them; a line is word, frequency, tag."""
    fields = resources.files("jieba").joinpath("dict.txt").read_text("utf-8").split()
    return fields[::3], np.array(fields[1::3], np.int64)
