"""What tokenizers of every kind share: a frozen vocabulary, its folder, its fingerprint.

    Frozen ── tokenizer.Tokenizer   (cpm, byte_bpe, ...)   tokenizer.model ┐   tokenizer.json
         └─── wordpiece.WordPiece   (wordpiece)            vocab.txt       ┴ + user_dictionary.txt

In a corpus text is never a control token: `<eod>`, `[MASK]` stand there for themselves. In a prompt
they are control tokens, and nothing cuts them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from data_pipeline.lexicon import Lexicon

FORMAT = "bajie-tokenizer-1"
USER_DICTIONARY = "user_dictionary.txt"


class TokenizerFault(ValueError):
    """A tokenizer missing, damaged or of another kind; a vocabulary that the text cannot give."""


class Marked(NamedTuple):
    """The ids of several texts, one text after the other."""

    ids: np.ndarray
    """[tokens] int32."""
    ends: np.ndarray
    """[texts] int64: where those of each text end."""
    starts: np.ndarray
    """[tokens] bool: which begin a word."""

    def of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids and starts of one text."""
        mine = slice(self.ends[number - 1] if number else 0, self.ends[number])
        return self.ids[mine].copy(), self.starts[mine].copy()


class Frozen(ABC):
    """A frozen vocabulary with its way of reading text.

    `vocab_size`, `eod_id`, `pad_id`, `mask_id`, `bos_id`, `unknown_id`; `kind`; `fingerprint`
    ("sha256:..."); `user_dictionary`, the contents of a user's dictionary, or None.
    """

    kind: str
    vocab_size: int
    eod_id: int
    pad_id: int
    mask_id: int | None
    bos_id: int | None
    unknown_id: int
    fingerprint: str
    user_dictionary: bytes | None = None

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32, without an end of document; a lone surrogate is as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_folded(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` of texts from outside a corpus: their characters folded as a corpus' are.
        What is spelt like a control token is text, as it is there."""
        from data_pipeline.clean import folded

        return self.encode_batch([folded(unicode_text(text)) for text in texts])

    def encode_prompt(self, text: str) -> np.ndarray:
        """encode_folded() of one text, but what is spelt like a control token is that token."""
        controls = self.control_ids()
        names = "|".join(re.escape(name) for name in sorted(controls, key=len, reverse=True))
        parts = re.split(f"({names})", unicode_text(text))
        found = [
            np.array([controls[part]], np.int32) if number % 2 else self.encode_folded([part])[0]
            for number, part in enumerate(parts)
            if part
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in one thread: corpora are read by processes, not threads."""

    def encode_marked(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of each text, and of each of its tokens whether it begins a word of jieba's:
        whether its first character does, in the text that the vocabulary is applied to (bool)."""
        whole = self.encode_together(texts)
        return [whole.of(number) for number in range(len(texts))]

    @abstractmethod
    def encode_together(self, texts: Sequence[str]) -> Marked:
        """What encode_marked says, of all texts as one: a call for each has a price of its own."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens give none."""

    @abstractmethod
    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own spelling of token ids."""

    @abstractmethod
    def control_ids(self) -> dict[str, int]:
        """Spelling -> id of the tokens that stand for no text."""

    @abstractmethod
    def words(self, text: str) -> list[str]:
        """The words that `encode_marked` marks, in the text as the segmenter sees it."""

    @abstractmethod
    def with_dictionary(self, contents: bytes) -> Frozen:
        """The same vocabulary with a user's dictionary; its fingerprint is another."""

    def _lexicon(self) -> Lexicon | None:
        """The dictionary to cut words by; None is jieba's own."""
        if self.user_dictionary is None:
            return None
        from data_pipeline import user_dictionary

        return user_dictionary.loaded(self.user_dictionary)

    @abstractmethod
    def _files(self) -> dict[str, bytes]:
        """Name -> contents of the vocabulary's files."""

    @abstractmethod
    def _rules(self) -> str:
        """The version of what is done beside the vocabulary."""

    def _told(self) -> dict[str, Any]:
        """What tokenizer.json says of this kind alone."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write the vocabulary and tokenizer.json, each aside and then renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "format": FORMAT,
            "kind": self.kind,
            **self._told(),
            "user_dictionary": self.user_dictionary is not None,
            "rules": self._rules(),
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "pad_id": self.pad_id,
            "mask_id": self.mask_id,
            "bos_id": self.bos_id,
            "fingerprint": self.fingerprint,
        }
        files = self._files()
        if self.user_dictionary is not None:
            files[USER_DICTIONARY] = self.user_dictionary
        for name, contents in files.items():
            write(folder / name, contents)
        write(folder / "tokenizer.json", json.dumps(record, indent=1).encode() + b"\n")


def fingerprint(head: str, vocabulary: bytes, user_dictionary: bytes | None) -> str:
    """sha256 over the lines of `head` (kind, rules, settings), the bytes of a user's dictionary, if
    there is one, and the vocabulary's bytes."""
    digest = hashlib.sha256(f"{FORMAT}\n{head}\n".encode())
    if user_dictionary is not None:
        digest.update(b"user dictionary, %d bytes\n" % len(user_dictionary) + user_dictionary)
    digest.update(vocabulary)
    return f"sha256:{digest.hexdigest()}"


def unicode_text(text: str) -> str:
    """`text` with its surrogates joined to characters, or, where they stand alone, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def write(path: Path, data: bytes) -> None:
    """Write a file aside, then put it in its place."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
