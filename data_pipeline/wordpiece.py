"""Text <-> token ids of the BERT family: kind `wordpiece`, a vocab.txt read in one of two ways.

    characters   text -> drop control -> lower, NFD without accents -> single Han and signs | the
                 rest between them, greedy WordPiece                 BERT, RoBERTa-wwm, SimBERT
    word: true   text -> lower, NFD without accents -> words (jieba, HMM off)
                   word in vocab.txt -> that token
                   any other         -> Han and signs apart, greedy WordPiece
                                                     WoBERT, RoFormer v1, T5 PEGASUS

Both lose blanks, line ends, case and accents; か is what is left of が. `characters` equals
transformers' BertTokenizer, `word` equals bert4keras, which differ in small things: private-use
characters (BERT drops them), the longest piece that is cut (100 characters and 200), Σ at the end
of a word (BERT lowers it to σ). transformers' RoFormerTokenizer looks words up before it lowers
them: it is not what the published models were trained with.

Text is never a control token: what stands in brackets is split at the bracket, and control tokens
are not among the words that are looked up. Unknown pieces are [UNK]. The end of a document is
[SEP], as in T5 PEGASUS; [CLS] begins.

A frozen one is a folder of `vocab.txt`, byte for byte what it was made of, and `tokenizer.json`;
vocabulary.py builds new ones.

Suffixes of names: C characters, U units (a word, a single character or a run), R units that Python
reads, T tokens of the vocabulary, S slots of its hash table, N numbers of tokens in the table.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import segment, user_dictionary
from data_pipeline.characters import (
    ALONE,
    INSIDE,
    NEXT,
    accents,
    basic,
    classes,
    dropped_codes,
    is_han,
    is_sign,
    normal,
    without,
)
from data_pipeline.frozen import Frozen, Marked, TokenizerFault, fingerprint, unicode_text
from data_pipeline.lexicon import Lexicon
from data_pipeline.trie import compiled

RULES = f"1, {segment.SEGMENTATION}"
"""The version of what is done beside the vocabulary: a change that moves one id changes it."""
CONTROLS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CACHED_WORDS = 200_000  # beside the vocabulary; some 50 MB
LONGEST_CACHED = 32  # characters
LONGEST_PIECE = {False: 100, True: 200}  # characters; a longer one is [UNK]: BERT's, bert4keras'

_UNREAD = -2  # in place of an id: Python has to look


class WordPiece(Frozen):
    """A frozen vocab.txt with its way of reading text; the attributes of tokenizer.Tokenizer.

    `vocab_size`, `eod_id` ([SEP]), `pad_id`, `mask_id`, `bos_id` ([CLS]); `kind`, `word`;
    `fingerprint` ("sha256:..."). TokenizerFault if the vocabulary lacks a control token.
    """

    kind = "wordpiece"

    def __init__(self, vocabulary: bytes, word: bool, dictionary: bytes | None = None) -> None:
        self.word = word
        self._vocabulary = vocabulary
        self._tokens = tokens_of(vocabulary)
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        missing = [name for name in CONTROLS[:4] if name not in self._ids]
        if missing:
            raise TokenizerFault(
                f"the vocabulary has no {' and no '.join(missing)} (词表缺少控制符)"
            )
        self.vocab_size = len(self._tokens)
        self.pad_id, self.unknown_id = self._ids["[PAD]"], self._ids["[UNK]"]
        self.bos_id: int | None = self._ids["[CLS]"]
        self.eod_id = self._ids["[SEP]"]
        self.mask_id: int | None = self._ids.get("[MASK]")
        self.user_dictionary = dictionary
        head = f"wordpiece\nword {word}\n{RULES}"
        self.fingerprint = fingerprint(head, vocabulary, dictionary)
        self._texts = {t: i for t, i in self._ids.items() if not is_control(t)}
        self._longest = max(map(len, self._texts), default=1)
        self._read = _Read(self)
        self._id_of, self._size_of = np.zeros(0, np.int32), np.zeros(0, np.int64)
        self._table: tuple[np.ndarray, ...] | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in one thread; they are read as one: a call has its own price."""
        ids, bounds = self._together(texts, None)
        return [ids[a:b].copy() for a, b in bounds]

    def encode_together(self, texts: Sequence[str]) -> Marked:
        """The ids of all texts as one, and which of them begin a word (of jieba's, HMM off, in the
        text as it is looked up)."""
        marks: list[np.ndarray] = []
        ids, bounds = self._together(texts, marks)
        ends = np.array([stop - number for number, (_, stop) in enumerate(bounds)], np.int64)
        return Marked(ids[ids >= 0], ends, marks[0][ids >= 0])

    def _together(
        self, texts: Sequence[str], marks: list[np.ndarray] | None
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The ids of the texts as one, and where each text's begin and end."""
        if not texts:
            if marks is not None:
                marks.append(np.zeros(0, np.bool_))
            return np.zeros(0, np.int32), []
        together = NEXT.join(
            self._lowered(unicode_text(text).replace(NEXT, "\x01")) for text in texts
        )
        ids = (self._words if self.word else self._characters)(together, marks)
        ends = np.flatnonzero(ids < 0)
        starts = [0, *(ends + 1).tolist()]
        return ids, list(zip(starts, [*ends.tolist(), len(ids)], strict=True))

    def decode(self, ids: Iterable[int]) -> str:
        """A text of token ids, its blanks guessed as bert4keras does: around what is not Chinese,
        none after a Chinese sign. Tokens in brackets, [UNK] among them, give nothing."""
        text = ""
        for number, token in enumerate(self.pieces(ids)):
            if is_control(token):
                continue
            if token.startswith("##"):
                text += token[2:]
            elif len(token) == 1 and is_han(ord(token)):
                text += token
            elif len(token) == 1 and is_sign(token):
                text += token + " "
            elif number > 0 and text and is_han(ord(text[-1])):
                text += token
            else:
                text += " " + token
        text = re.sub(" +", " ", text)
        text = re.sub("' (re|m|s|t|ve|d|ll) ", r"'\1 ", text)
        text = _BEFORE_BLANK.sub(r"\1", text)
        return re.sub(r"(\d\.) (\d)", r"\1\2", text).strip()

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own spelling of token ids: ## where a piece goes on."""
        return [self._tokens[int(i)] for i in ids]

    def control_ids(self) -> dict[str, int]:
        """Spelling -> id of [CLS], [unused1] and the other tokens that stand for no text."""
        return {token: i for token, i in self._ids.items() if is_control(token)}

    def words(self, text: str) -> list[str]:
        """jieba's words, HMM off, of a text lowered, without accents and what is dropped."""
        lowered = self._lowered(unicode_text(text).replace(NEXT, "\x01"))
        dropped = accents() if self.word else accents() | dropped_codes()
        return segment.words(without(lowered, dropped), False, self._lexicon())

    def with_dictionary(self, contents: bytes) -> WordPiece:
        """The same vocabulary with a user's dictionary; TokenizerFault for a line that is wrong."""
        made = WordPiece(self._vocabulary, self.word, contents)
        made._lexicon()
        return made

    def _lexicon(self) -> Lexicon | None:
        """The dictionary to cut words by, a user's words lowered as the text is."""
        if self.user_dictionary is None:
            return None
        return user_dictionary.loaded(self.user_dictionary, normal)

    def _files(self) -> dict[str, bytes]:
        return {"vocab.txt": self._vocabulary}

    def _rules(self) -> str:
        return RULES

    def _told(self) -> dict[str, bool]:
        return {"word": self.word}

    def __reduce__(self) -> tuple[Any, ...]:
        return WordPiece, (self._vocabulary, self.word, self.user_dictionary)

    def _lowered(self, text: str) -> str:
        """Lower case and decomposed; what is dropped of it later is still there."""
        if not self.word:
            text = text.replace("Σ", "σ")  # BERT lowers each character on its own
        return unicodedata.normalize("NFD", text.lower())

    def _words(self, text: str, marks: list[np.ndarray] | None) -> np.ndarray:
        """Ids of texts with NEXT between them, -1 for it: words of the vocabulary by the table,
        the others, with the pieces they fall into, through the cache."""
        text = without(text, accents())
        codes_C, border_C = segment.cut(text, False, self._lexicon())
        if self._table is None:
            self._table = _table(self._texts)
        id_U, start_U, end_U = _look_up_words(codes_C, border_C, *self._table)
        ids, count_U = self._assembled(text, id_U, start_U, end_U)
        if marks is not None:  # the first token of each unit that has one
            first_N = np.zeros(len(ids) + 1, np.bool_)
            first_N[(count_U.cumsum() - count_U)[count_U > 0]] = True
            marks.append(first_N[:-1])
        return ids

    def _characters(self, text: str, marks: list[np.ndarray] | None) -> np.ndarray:
        """Ids of texts with NEXT between them, -1 for it: single characters by one look-up each,
        and between them runs, which go through the cache."""
        if not len(self._id_of):
            self._id_of = np.full(0x110000, self.unknown_id, np.int32)
            self._id_of[0] = -1
            for token, i in self._texts.items():
                if len(token) == 1:
                    self._id_of[ord(token)] = i
        text = without(text, accents() | dropped_codes())
        codes_C = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        class_C = classes()[codes_C]
        alone_C = class_C == ALONE
        inside_C = np.zeros(len(codes_C) + 2, np.bool_)
        inside_C[1:-1] = class_C == INSIDE
        start_C = alone_C | (inside_C[1:-1] & ~inside_C[:-2])
        end_C = alone_C | (inside_C[1:-1] & ~inside_C[2:])
        id_C = np.where(alone_C, self._id_of[codes_C], _UNREAD)
        start_U = np.flatnonzero(start_C)
        ids, count_U = self._assembled(text, id_C[start_U], start_U, np.flatnonzero(end_C) + 1)
        if marks is not None:
            _, border_C = segment.cut(text, False, self._lexicon())
            word_C = np.ones(len(codes_C) + 1, np.bool_)
            word_C[1:] = border_C
            marks.append(word_C[self._places(ids, start_U, count_U)])
        return ids

    def _places(self, ids: np.ndarray, start_U: np.ndarray, count_U: np.ndarray) -> np.ndarray:
        """Where in the text each token begins, given where its unit does; [UNK] is a whole unit."""
        if not len(self._size_of):
            sizes = [len(token) - 2 * token.startswith("##") for token in self._tokens]
            sizes = [len(t) if t in "##" else n for t, n in zip(self._tokens, sizes, strict=True)]
            self._size_of = np.array(sizes, np.int64)
        size = self._size_of[ids]
        before = size.cumsum() - size  # since the first token of all
        first_U = count_U.cumsum() - count_U
        return np.repeat(start_U - before[first_U], count_U) + before

    def _assembled(
        self, text: str, id_U: np.ndarray, start_U: np.ndarray, end_U: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of units [start, end) of a text: one of each, or, where it is _UNREAD, what the cache
        has for it; and how many each unit has."""
        count_U = np.ones(len(id_U), np.int64)
        unread_R = np.flatnonzero(id_U == _UNREAD)
        if not len(unread_R):
            return id_U, count_U
        places = zip(start_U[unread_R].tolist(), end_U[unread_R].tolist(), strict=True)
        runs = [self._read[text[start:end]] for start, end in places]
        size_R = np.fromiter(map(len, runs), np.int64, len(runs))
        count_U[unread_R] = size_R
        ids = np.repeat(id_U, count_U)
        ids[ids == _UNREAD] = np.fromiter(chain.from_iterable(runs), np.int32, size_R.sum())
        return ids, count_U

    def _look_up(self, word: str) -> tuple[int, ...]:
        """The ids of a word that the vocabulary lacks, or of a run of characters."""
        return tuple(i for piece in basic(word, self.word) for i in self._cut(piece))

    def _cut(self, piece: str) -> list[int]:
        """Greedy: the longest token that begins the piece, then the longest that goes on, ..."""
        if len(piece) > LONGEST_PIECE[self.word]:
            return [self.unknown_id]
        ids: list[int] = []
        start = 0
        while start < len(piece):
            for stop in range(min(len(piece), start + self._longest), start, -1):
                part = piece[start:stop] if start == 0 else "##" + piece[start:stop]
                if (found := self._texts.get(part)) is not None:
                    break
            else:
                return [self.unknown_id]
            ids.append(found)
            start = stop
        return ids


class _Read(dict[str, tuple[int, ...]]):
    """Words and their ids: those of the vocabulary, and as many others as there is room for."""

    def __init__(self, tokenizer: WordPiece) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._room = tokenizer.vocab_size + CACHED_WORDS

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._tokenizer._look_up(word)
        if len(self) < self._room and len(word) <= LONGEST_CACHED:
            self[word] = ids
        return ids


def from_vocabulary(path: str | Path, out: str | Path, word: bool) -> WordPiece:
    """Freeze a published vocab.txt (one token a line) into the folder `out`."""
    try:
        made = WordPiece(Path(path).read_bytes(), word)
    except OSError as error:
        raise TokenizerFault(f"{path}: cannot be read: {error.strerror} (无法读取)") from None
    except TokenizerFault as error:
        raise TokenizerFault(f"{path}: {error}") from None
    made.save(out)
    return made


def is_control(token: str) -> bool:
    """[PAD], [unused1], ...: ids alone."""
    return len(token) > 2 and token[0] == "[" and token[-1] == "]"


def tokens_of(vocabulary: bytes) -> list[str]:
    """The distinct tokens of a vocab.txt in order: the first word of each line, as bert4keras."""
    try:
        lines = io.StringIO(vocabulary.decode(), newline=None)
    except UnicodeDecodeError as error:
        raise TokenizerFault(f"a vocab.txt is UTF-8, this one is not: {error} (编码错误)") from None
    return list(dict.fromkeys((line.split() or [line.strip()])[0] for line in lines))


def _table(texts: dict[str, int]) -> tuple[np.ndarray, ...]:
    """The vocabulary as a hash table for compiled code: the id, or -1, of each slot; and the
    characters of the tokens, end to end, with where each id begins and ends."""
    codes_C = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    size = max(texts.values(), default=0) + 1
    start_T, end_T = np.zeros(size, np.int64), np.zeros(size, np.int64)
    id_N = np.fromiter(texts.values(), np.int64, len(texts))
    end_N = np.fromiter(map(len, texts), np.int64, len(texts)).cumsum()
    start_T[id_N[1:]], end_T[id_N] = end_N[:-1], end_N
    slot_S = np.full(1 << (4 * size).bit_length(), -1, np.int32)
    _fill(slot_S, codes_C, start_T, end_T, id_N)
    return slot_S, codes_C, start_T, end_T


@compiled
def _fill(slot_S, codes_C, start_T, end_T, id_N):  # type: ignore[no-untyped-def]
    """Put each token at its hash, or at the next free slot."""
    for i in id_N:
        slot = _hash(codes_C, start_T[i], end_T[i]) & (len(slot_S) - 1)
        while slot_S[slot] >= 0:
            slot = (slot + 1) & (len(slot_S) - 1)
        slot_S[slot] = i


@compiled
def _hash(codes_C, start, end):  # type: ignore[no-untyped-def]
    """FNV-1a over code points, its upper bits folded down."""
    value = np.int64(-3750763034362895579)
    for c in range(start, end):
        value = (value ^ np.int64(codes_C[c])) * np.int64(1099511628211)
    return (value ^ (value >> 29)) & np.int64(0x7FFFFFFFFFFFFFFF)


@compiled
def _look_up_words(codes_C, border_C, slot_S, tokens_C, start_T, end_T):  # type: ignore[no-untyped-def]
    """The id, or _UNREAD, of each word of a text, and the word's [start, end)."""
    count = border_C.sum()
    id_U = np.empty(count, np.int32)
    start_U, end_U = np.empty(count, np.int64), np.empty(count, np.int64)
    first = unit = 0
    for c in range(len(codes_C)):
        if not border_C[c]:
            continue
        end = c + 1
        if end - first == 1 and (codes_C[first] == 0x20 or codes_C[first] == 0x0A):
            first = end  # a blank gives no token; most words that are in no vocabulary are blanks
            continue
        found = _UNREAD
        if codes_C[first] == 0:
            found = -1
        slot = _hash(codes_C, first, end) & (len(slot_S) - 1)
        while found == _UNREAD and slot_S[slot] >= 0:
            i = slot_S[slot]
            same = end_T[i] - start_T[i] == end - first
            k = 0
            while same and k < end - first:
                same = codes_C[first + k] == tokens_C[start_T[i] + k]
                k += 1
            if same:
                found = i
            slot = (slot + 1) & (len(slot_S) - 1)
        id_U[unit], start_U[unit], end_U[unit] = found, first, end
        unit += 1
        first = end
    return id_U[:unit], start_U[:unit], end_U[:unit]


_CHINESE_SIGNS = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏﹑﹔·！？｡。"
)
_BEFORE_BLANK = re.compile(f"([{re.escape(_CHINESE_SIGNS)}" + r"+\-/={(<\[]) ")
