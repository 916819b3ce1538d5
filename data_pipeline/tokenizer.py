"""Text <-> token ids: encode, decode, load what was frozen. Three kinds here, pieces of
sentencepiece; the fourth, BERT's wordpiece, has a room of its own and is loaded by the same `load`.

    cpm           text -> words (jieba, HMM on) -> " " is ▂, "\\n" is ▃ -> blanks between -> unigram
                  as CPM was published; lossy: NFKC folds full-width forms, runs of blanks shrink,
                  characters outside the vocabulary are <unk>
    byte_bpe      text -> BPE, or unigram; a character outside the vocabulary is its UTF-8 bytes
    byte_unigram  every text comes back byte for byte

Text is never a control token: `<s> </s> <sep> <pad> <mask> <eod>` are ids alone, appended by who
wants one, or spelt in a prompt. The byte kinds hold them as control pieces, which sentencepiece
does not find in text. In CPM's they are ordinary pieces; but jieba gives `<`, `eod`, `>` apart, a
piece does not reach over a blank, and should one come out of text all the same, it becomes <unk>.
The other way, `decode` leaves control ids out: they stand for no text.

A tokenizer is frozen: a folder of `tokenizer.model` (sentencepiece's own) and `tokenizer.json`; its
fingerprint covers the model's bytes, the kind, the version of the rules on this page and a user's
dictionary, which lies in the folder too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece

from data_pipeline.frozen import (
    FORMAT,
    USER_DICTIONARY,
    Frozen,
    Marked,
    TokenizerFault,
    fingerprint,
    unicode_text,
)

if TYPE_CHECKING:
    from data_pipeline.wordpiece import WordPiece

sentencepiece.set_min_log_level(2)  # its C++ writes to the terminal; what fails raises anyway

KINDS = ("cpm", "byte_bpe", "byte_unigram")
RULES = {"cpm": "1, jieba-0.42.1", "byte_bpe": "1", "byte_unigram": "1"}
"""The version of what is done beside the model: a change that moves one id changes it."""
CONTROLS = ("<s>", "</s>", "<sep>", "<pad>", "<mask>", "<eod>")

_SPACE = "\u2581"  # sentencepiece's mark for a blank
_CPM_MODEL = {3: "\u2583", 4: "<sep>", 5: "<pad>", 6: "<mask>", 7: "<eod>"}


class Tokenizer(Frozen):
    """A vocabulary of sentencepiece with its way of reading text; made by `load`, training.train,
    `from_cpm_model`. With a user's dictionary, words are cut by it too: cpm's pieces lie in words,
    of the byte kinds only the marks of words change."""

    def __init__(self, kind: str, model: bytes, dictionary: bytes | None = None) -> None:
        self.kind = known(kind)
        self._model = model
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise TokenizerFault(f"not a model of sentencepiece: {error} (无法读取)") from None
        self.user_dictionary = dictionary
        self.fingerprint = fingerprint(f"{kind}\n{RULES[kind]}", model, dictionary)
        self.vocab_size: int = self._pieces.get_piece_size()
        ids = {name: self._pieces.piece_to_id(name) for name in CONTROLS}
        controls = {n: i for n, i in ids.items() if self._pieces.id_to_piece(i) == n}
        if "<eod>" not in controls or "<pad>" not in controls:
            raise TokenizerFault("the vocabulary has no <eod> or no <pad> (词表缺少控制符)")
        self.eod_id, self.pad_id = controls["<eod>"], controls["<pad>"]
        self.mask_id, self.bos_id = controls.get("<mask>"), controls.get("<s>")
        self._controls = controls
        self._is_control = np.zeros(self.vocab_size, np.bool_)
        self._is_control[list(controls.values())] = True
        self.unknown_id: int = self._pieces.piece_to_id("<unk>")
        if kind == "cpm":  # words are between blanks, and no piece has one but at its beginning
            pieces = self.pieces(range(self.vocab_size))
            self._begins = np.array([piece.startswith(_SPACE) for piece in pieces], np.bool_)
        else:
            self._bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
            self._size_of = np.array([len(piece) for piece in self._bytes], np.int64)
            self._space_ids = np.array(
                [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()], np.int32
            )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in one thread: corpora are read by processes, not threads."""
        texts = _unicode_texts(texts)
        if self.kind != "cpm":
            return self._encode_bytes(texts)
        out = self._encode_words(texts)
        for ids in out:
            self._no_control(ids)
        return out

    def encode_together(self, texts: Sequence[str]) -> Marked:
        """The ids of all texts as one, and which of them begin a word."""
        texts = _unicode_texts(texts)
        cpm = self.kind == "cpm"
        parts = self._encode_words(texts) if cpm else self._encode_bytes(texts)
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        if not cpm:
            return Marked(ids, ends, self._word_starts(texts, ids))
        starts = self._begins[ids]
        self._no_control(ids)
        return Marked(ids, ends, starts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens give none, bytes that are no UTF-8 give U+FFFD."""
        ids = [int(i) for i in ids]
        if self.kind != "cpm":
            return b"".join([self._bytes[i] for i in ids]).decode("utf-8", "replace")
        text = self._pieces.decode([i for i in ids if not self._is_control[i]])
        return text.replace(" ", "").replace("\u2582", " ").replace("\u2583", "\n")

    def control_ids(self) -> dict[str, int]:
        """Spelling -> id of <eod> and the other tokens that stand for no text."""
        return self._controls

    def words(self, text: str) -> list[str]:
        """jieba's words, HMM on; of cpm with blanks and line ends as its vocabulary spells them."""
        from data_pipeline import segment

        text = unicode_text(text)
        if self.kind == "cpm":
            text = cpm_text(text)
        return segment.words(text, True, self._lexicon())

    def with_dictionary(self, contents: bytes) -> Tokenizer:
        """The same vocabulary with a user's dictionary; TokenizerFault for a line that is wrong."""
        made = Tokenizer(self.kind, self._model, contents)
        made._lexicon()
        return made

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own spelling of token ids: ▁ for a blank, <0xE4> for a byte."""
        return [self._pieces.id_to_piece(int(i)) for i in ids]

    def _files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}

    def _rules(self) -> str:
        return RULES[self.kind]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.kind, self._model, self.user_dictionary)

    def _sentencepiece(self, texts: list[str] | list[bytes]) -> list[np.ndarray]:
        return self._pieces.encode(texts, out_type="numpy", num_threads=1) if texts else []

    def _encode_words(self, texts: list[str]) -> list[np.ndarray]:
        from data_pipeline import segment  # compiles on first use: 0.4 s that byte_bpe saves

        marked = [cpm_text(text) for text in texts]
        return self._sentencepiece(segment.spaced_utf8(marked, lexicon=self._lexicon()))

    def _no_control(self, ids: np.ndarray) -> None:
        """What came out of text is no control token, whatever it looks like."""
        control = self._is_control[ids]
        if control.any():
            ids[control] = self.unknown_id

    def _word_starts(self, texts: list[str], ids: np.ndarray) -> np.ndarray:
        """Which tokens begin with the first byte of a word (of jieba's, HMM on)."""
        from data_pipeline import segment

        if not texts:
            return np.zeros(0, np.bool_)
        codes_C, border_C = segment.cut("\x00".join(texts), True, self._lexicon())
        bytes_C = 1 + (codes_C > 0x7F) + (codes_C > 0x7FF) + (codes_C > 0xFFFF)
        # Between two texts there is a word, which no token spells.
        bytes_C[np.cumsum([len(text) + 1 for text in texts[:-1]], dtype=np.int64) - 1] = 0
        first_B = np.zeros(int(bytes_C.sum()) + 1, np.bool_)
        first_B[:1] = len(codes_C) > 0
        first_B[bytes_C.cumsum()[border_C]] = True  # where the next word begins
        size = self._size_of[ids]
        return first_B[size.cumsum() - size]

    def _encode_bytes(self, texts: list[str]) -> list[np.ndarray]:
        """A literal ▁ would come back as a blank: it goes past sentencepiece, as its bytes."""
        if not any(_SPACE in text for text in texts):
            return self._sentencepiece(texts)
        out = []
        for text in texts:
            parts: list[np.ndarray] = []
            for part in self._sentencepiece(text.split(_SPACE)):
                parts += [self._space_ids, part]
            out.append(np.concatenate(parts[1:]))
        return out

    def _bytes_of(self, number: int) -> bytes:
        piece = self._pieces.id_to_piece(number)
        if self._pieces.is_byte(number):
            return bytes([int(piece[3:5], 16)])
        if self._is_control[number]:
            return b""
        if self._pieces.is_unknown(number):
            return "\ufffd".encode()
        return piece.replace(_SPACE, " ").encode()


def load(folder: str | Path) -> Tokenizer | WordPiece:
    """The tokenizer frozen in `folder`, if its fingerprint is that of its files and these rules."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "tokenizer.json").read_bytes())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise TokenizerFault(
                f"{folder / 'tokenizer.json'}: is not of format {FORMAT} (格式不符)"
            )
        tokenizer, rules = _loaded(folder, record)
    except FileNotFoundError as error:
        raise TokenizerFault(
            f"{error.filename}: there is no such file; a tokenizer is a folder of tokenizer.json "
            "and tokenizer.model, or vocab.txt (找不到分词器)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerFault(
            f"{folder / 'tokenizer.json'}: not JSON: {error} (文件已损坏)"
        ) from None
    if record.get("rules") != rules:
        raise TokenizerFault(
            f"{folder}: was frozen under rules '{record.get('rules')}', this version of bajie has "
            f"'{rules}'; use the version that made it, or make it anew (分词规则版本不符)"
        )
    if record.get("fingerprint") != tokenizer.fingerprint:
        raise TokenizerFault(
            f"{folder}: the vocabulary has fingerprint {tokenizer.fingerprint[:19]}..., "
            f"tokenizer.json says {str(record.get('fingerprint'))[:19]}...: one of them was "
            "changed after it was frozen (分词器与指纹不符)"
        )
    return tokenizer


def _loaded(folder: Path, record: dict[str, Any]) -> tuple[Tokenizer | WordPiece, str]:
    """A tokenizer as its kind is read, and the rules that this version has for it."""
    extra = record.get("user_dictionary") is True
    dictionary = (folder / USER_DICTIONARY).read_bytes() if extra else None
    if record.get("kind") == "wordpiece":
        from data_pipeline import wordpiece

        vocabulary, word = (folder / "vocab.txt").read_bytes(), record.get("word") is True
        return wordpiece.WordPiece(vocabulary, word, dictionary), wordpiece.RULES
    model = (folder / "tokenizer.model").read_bytes()
    tokenizer = Tokenizer(record.get("kind", ""), model, dictionary)
    return tokenizer, RULES[tokenizer.kind]


def from_cpm_model(path: str | Path, out: str | Path) -> Tokenizer:
    """Freeze CPM's published `chinese_vocab.model` into the folder `out`."""
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise TokenizerFault(f"{path}: cannot be read: {error.strerror} (无法读取)") from None
    try:
        tokenizer = Tokenizer("cpm", model)
        wrong = [i for i, piece in _CPM_MODEL.items() if tokenizer.pieces([i]) != [piece]]
    except (TokenizerFault, IndexError) as error:
        raise TokenizerFault(f"{path}: {error}") from None
    if wrong:
        raise TokenizerFault(
            f"{path}: token {wrong[0]} is '{tokenizer.pieces(wrong[:1])[0]}', in CPM's vocabulary "
            f"it is '{_CPM_MODEL[wrong[0]]}'; name chinese_vocab.model of CPM-1 (不是 CPM 词表)"
        )
    tokenizer.save(out)
    return tokenizer


def _unicode_texts(texts: Sequence[str]) -> list[str]:
    """`unicode_text` of each."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [unicode_text(text) for text in texts]
    return list(texts)


def cpm_text(text: str) -> str:
    """A text as CPM's words are cut of it: ▂ for a blank, ▃ for a line end."""
    return text.replace(" ", "\u2582").replace("\n", "\u2583")  # 10 times as fast as translate


def known(kind: str) -> str:
    """`kind`, if it is one of sentencepiece's; TokenizerFault."""
    if kind not in KINDS:
        raise TokenizerFault(
            f"tokenizer.kind is '{kind}'; the kinds are {' and '.join(KINDS)}, and wordpiece "
            "(未知的种类)"
        )
    return kind
