"""Text <-> token ids: train, encode, decode, freeze. Two kinds here, pieces of sentencepiece; the
third, BERT's wordpiece, has a room of its own (wordpiece.py) and is loaded by the same `load`.

    cpm        text -> words (jieba, HMM on) -> " " is ▂, "\\n" is ▃ -> blanks between -> unigram
               as CPM was published; lossy: NFKC folds full-width forms, runs of blanks shrink,
               characters outside the vocabulary are <unk>
    byte_bpe   text -> BPE; a character outside the vocabulary is its UTF-8 bytes
               every text comes back byte for byte

Text is never a control token: `<s> </s> <sep> <pad> <mask> <eod>` are ids alone, appended by who
wants one. Vocabularies of byte_bpe hold them as control pieces, which sentencepiece does not find
in text. In CPM's they are ordinary pieces; but jieba gives `<`, `eod`, `>` apart, a piece does not
reach over a blank, and should one come out of text all the same, it becomes <unk>. The other way,
`decode` leaves control ids out: they stand for no text.

A tokenizer is frozen: a folder of `tokenizer.model` (sentencepiece's own) and `tokenizer.json`; its
fingerprint covers the model's bytes, the kind and the version of the rules on this page.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece

from data_pipeline import alphabet
from data_pipeline.frozen import FORMAT, Frozen, TokenizerFault, fingerprint, unicode_text

if TYPE_CHECKING:
    from data_pipeline.wordpiece import WordPiece

sentencepiece.set_min_log_level(2)  # its C++ writes to the terminal; what fails raises anyway

KINDS = ("cpm", "byte_bpe")
RULES = {"cpm": "1, jieba-0.42.1", "byte_bpe": "1"}
"""The version of what is done beside the model: a change that moves one id changes it."""
CONTROLS = ("<s>", "</s>", "<sep>", "<pad>", "<mask>", "<eod>")

SAMPLE_BYTES = 20_000_000
"""Text that training reads at most: it needs 17 (cpm) to 33 (byte_bpe) times that in memory."""
LINE = 1000  # characters of a line of the sample, 4,000 bytes at most; jieba's blanks double them
LONGEST_LINE_BYTES = 8000  # what sentencepiece reads; it leaves out longer lines silently
SKIPPED = 0.01  # the share of the sample that may be lost so
LONGEST_ALPHABET = {"cpm": 0.65, "byte_bpe": 0.5}  # of the vocabulary: the rest is for pieces

_SPACE = "\u2581"  # sentencepiece's mark for a blank
_CPM_MARKS = str.maketrans(" \n", "\u2582\u2583")
_CPM_MODEL = {3: "\u2583", 4: "<sep>", 5: "<pad>", 6: "<mask>", 7: "<eod>"}


class Tokenizer(Frozen):
    """A frozen vocabulary with its way of reading text; made by `load`, `train`, `from_cpm_model`.

    `vocab_size`, `eod_id`, `pad_id`, `mask_id`, `bos_id`; `kind`; `fingerprint` ("sha256:...").
    """

    def __init__(self, kind: str, model: bytes) -> None:
        self.kind = _known(kind)
        self._model = model
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise TokenizerFault(f"not a model of sentencepiece: {error}") from None
        self.fingerprint = fingerprint(f"{kind}\n{RULES[kind]}", model)
        self.vocab_size: int = self._pieces.get_piece_size()
        controls = {name: self._id(name) for name in CONTROLS}
        if controls["<eod>"] is None or controls["<pad>"] is None:
            raise TokenizerFault("the vocabulary has no <eod> or no <pad> (词表缺少控制符)")
        self.eod_id: int = controls["<eod>"]
        self.pad_id: int = controls["<pad>"]
        self.mask_id, self.bos_id = controls["<mask>"], controls["<s>"]
        self._is_control = np.zeros(self.vocab_size, np.bool_)
        self._is_control[[i for i in controls.values() if i is not None]] = True
        self._unknown: int = self._pieces.piece_to_id("<unk>")
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
        texts = [unicode_text(text) for text in texts]
        out = self._encode_bytes(texts) if self.kind == "byte_bpe" else self._encode_words(texts)
        if self.kind == "cpm":
            self._no_control(out)
        return out

    def encode_marked(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of each text, and which of its tokens begin a word: a bool for each."""
        texts = [unicode_text(text) for text in texts]
        if self.kind == "cpm":
            out = self._encode_words(texts)
            starts = [self._begins[ids] for ids in out]
            self._no_control(out)
        else:
            out = self._encode_bytes(texts)
            starts = self._word_starts(texts, out)
        return list(zip(out, starts, strict=True))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens give none, bytes that are no UTF-8 give U+FFFD."""
        ids = [int(i) for i in ids]
        if self.kind == "byte_bpe":
            return b"".join([self._bytes[i] for i in ids]).decode("utf-8", "replace")
        text = self._pieces.decode([i for i in ids if not self._is_control[i]])
        return text.replace(" ", "").replace("\u2582", " ").replace("\u2583", "\n")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own spelling of token ids: ▁ for a blank, <0xE4> for a byte."""
        return [self._pieces.id_to_piece(int(i)) for i in ids]

    def _files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}

    def _rules(self) -> str:
        return RULES[self.kind]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.kind, self._model)

    def _id(self, piece: str) -> int | None:
        """The id of a piece, None if the vocabulary lacks it."""
        number = self._pieces.piece_to_id(piece)
        return number if self._pieces.id_to_piece(number) == piece else None

    def _sentencepiece(self, texts: list[str]) -> list[np.ndarray]:
        return self._pieces.encode(texts, out_type="numpy", num_threads=1) if texts else []

    def _encode_words(self, texts: list[str]) -> list[np.ndarray]:
        from data_pipeline import segment  # compiles on first use: 0.4 s that byte_bpe saves

        return self._sentencepiece(segment.spaced([text.translate(_CPM_MARKS) for text in texts]))

    def _no_control(self, out: list[np.ndarray]) -> None:
        """What came out of text is no control token, whatever it looks like."""
        for ids in out:
            control = self._is_control[ids]
            if control.any():
                ids[control] = self._unknown

    def _word_starts(self, texts: list[str], out: list[np.ndarray]) -> list[np.ndarray]:
        """Which tokens begin with the first byte of a word (of jieba's, HMM on)."""
        from data_pipeline import segment

        starts = []
        for text, ids in zip(texts, out, strict=True):
            codes_C, border_C = segment.cut(text, hmm=True)
            bytes_C = 1 + (codes_C > 0x7F) + (codes_C > 0x7FF) + (codes_C > 0xFFFF)
            first_B = np.zeros(int(bytes_C.sum()) + 1, np.bool_)
            first_B[:1] = len(text) > 0
            first_B[bytes_C.cumsum()[border_C]] = True  # where the next word begins
            size = self._size_of[ids]
            starts.append(first_B[size.cumsum() - size])
        return starts

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
            raise TokenizerFault(f"{folder / 'tokenizer.json'}: is not of format {FORMAT}")
        tokenizer, rules = _loaded(folder, record)
    except FileNotFoundError as error:
        raise TokenizerFault(
            f"{error.filename}: there is no such file; a tokenizer is a folder of tokenizer.json "
            "and tokenizer.model, or vocab.txt (找不到分词器)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerFault(f"{folder / 'tokenizer.json'}: not JSON: {error}") from None
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
    if record.get("kind") == "wordpiece":
        from data_pipeline import wordpiece

        made = wordpiece.WordPiece((folder / "vocab.txt").read_bytes(), record.get("word") is True)
        return made, wordpiece.RULES
    tokenizer = Tokenizer(record.get("kind", ""), (folder / "tokenizer.model").read_bytes())
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


def train(
    kind: str,
    texts: Iterable[str],
    out: str | Path,
    vocab_size: int,
    *,
    sample_bytes: int = SAMPLE_BYTES,
) -> Tokenizer:
    """Train a vocabulary of exactly `vocab_size` on a sample of the texts, freeze it into `out`.

    The sample is lines spread evenly over all texts, of at most `sample_bytes`; texts may be any
    stream. The same texts give the same bytes. TokenizerFault if the text cannot support the size.
    """
    _known(kind)
    lines = sample(texts, sample_bytes)
    if kind == "cpm":
        from data_pipeline import segment

        for start in range(0, len(lines), 500):  # words take 20 times their text in memory
            some = [line.translate(_CPM_MARKS) for line in lines[start : start + 500]]
            lines[start : start + 500] = segment.spaced(some)
    try:
        model = _model(kind, lines, vocab_size)
    except _TooLarge as fault:
        largest = fault.largest
        while True:  # sentencepiece's figure may be too large again: cpm prunes on the way
            try:
                _model(kind, lines, largest)
                break
            except _TooLarge as again:
                largest = min(again.largest, largest - 1)
        raise TokenizerFault(
            f"tokenizer.vocab_size is {vocab_size}, the text supports at most {largest} for "
            f"{kind}; lower it, or give more text (词表大于语料所能支持)"
        ) from None
    tokenizer = Tokenizer(kind, model)
    tokenizer.save(out)
    return tokenizer


class _TooLarge(Exception):
    """The text does not give a vocabulary of the size asked for."""

    def __init__(self, largest: int) -> None:
        super().__init__(largest)
        self.largest = largest


_SHARED = {
    "num_threads": 1,  # more would sum in any order
    "minloglevel": 2,
    "character_coverage": 1.0,  # the alphabet is chosen here
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "cpm": _SHARED
    | {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "pad_id": 5,
        "user_defined_symbols": ["\u2583", "<sep>", "<mask>", "<eod>"],  # ids 3, 4, 6, 7
    },
    "byte_bpe": _SHARED
    | {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        "split_digits": True,
        "max_sentencepiece_length": 8,  # longer ones are boilerplate, not words
        "pad_id": 3,
        "control_symbols": ["<sep>", "<mask>", "<eod>"],  # ids 4, 5, 6
        "user_defined_symbols": ["\n"],  # 7
    },
}


def _model(kind: str, lines: list[str], vocab_size: int) -> bytes:
    """sentencepiece's model of the lines; a text too poor in pieces may fill it with characters."""
    try:
        return _trained(kind, lines, vocab_size, LONGEST_ALPHABET[kind])
    except _TooLarge:
        return _trained(kind, lines, vocab_size, 0.95)


def _trained(kind: str, lines: list[str], vocab_size: int, longest_alphabet: float) -> bytes:
    fixed = 8 + (256 if kind == "byte_bpe" else 0)  # controls and ▃ or \n; bytes
    chars = alphabet.chosen(lines, kind, int((vocab_size - fixed) * longest_alphabet))
    if len(chars) < 2:
        raise TokenizerFault(
            f"tokenizer.vocab_size is {vocab_size}, {fixed} of which are control tokens and bytes; "
            f"{kind} needs {fixed + 8} at least, and text to learn from (词表过小或没有文本)"
        )
    parts = list(alphabet.covered(lines, chars))
    _check_nothing_skipped(parts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=LONGEST_LINE_BYTES,
            **_OPTIONS[kind],
        )
    except RuntimeError as error:
        if found := re.search(r"Vocabulary size too high .* value <= (\d+)", str(error)):
            raise _TooLarge(int(found[1])) from None
        raise TokenizerFault(
            f"sentencepiece cannot train {kind} of {vocab_size}: {error}"
        ) from None
    return model.getvalue()


def sample(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Lines spread evenly over all texts: every one, and each time they outgrow the budget half
    of those that are kept and half as many from then on."""
    kept: list[str] = []
    size, every, number = 0, 1, 0
    for text in texts:
        for line in _lines(unicode_text(text)):
            number += 1
            if number % every:
                continue
            kept.append(line)
            size += len(line.encode())
            if size > sample_bytes:
                kept, every = kept[1::2], every * 2
                size = sum(len(line.encode()) for line in kept)
    return kept


_SENTENCE_END = re.compile(r"(?s).*[。！？]")


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, long ones cut after their last 。！？ before LINE characters."""
    for line in text.split("\n"):
        while len(line) > LINE:
            end = _SENTENCE_END.match(line, 0, LINE)
            cut = end.end() if end else LINE
            yield line[:cut]
            line = line[cut:]
        if line:
            yield line


def _check_nothing_skipped(parts: list[str]) -> None:
    """sentencepiece leaves out lines above its limit without a word: here they are counted."""
    sizes = np.array([len(part.encode()) for part in parts])
    skipped = sizes[sizes > LONGEST_LINE_BYTES].sum() / sizes.sum()
    if skipped > SKIPPED:
        raise TokenizerFault(
            f"training would skip {skipped:.0%} of the sample, in lines of more than "
            f"{LONGEST_LINE_BYTES} bytes; at most {SKIPPED:.0%} may be (训练会跳过部分文本)"
        )


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise TokenizerFault(
            f"tokenizer.kind is '{kind}'; the kinds are {' and '.join(KINDS)}, and wordpiece "
            "(未知的种类)"
        )
    return kind
