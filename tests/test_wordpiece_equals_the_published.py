"""wordpiece: the ids of BertTokenizer, and of bert4keras as SYSTEMS 1.1 tells it; 0 differences.

`slow_reading` is that tale once more, a character and a jieba word at a time, and shares nothing
with the code under test. Vocabularies are the published ones, where they are at hand.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jieba
import numpy as np
import pytest
import zstandard

from configs.corpus import CorpusConfig
from configs.load import ConfigError, dump, from_dict
from data_pipeline import encode, encoder, tokenizer, vocabulary, wordpiece
from data_pipeline.index import Index
from data_pipeline.shards import CorpusError, records
from data_pipeline.tokenizer import TokenizerFault
from data_pipeline.wordpiece import WordPiece
from launch.cli import main
from tests.dev_corpus import documents, folder

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_pipeline" / "sample" / "sample.jsonl"

BY_HAND = [
    "",
    " ",
    "\n",
    "\x00",
    "今天天气不错，Hello World! 3.14%\n",
    "[MASK][CLS] [SEP]和[PAD]、[unused1]<S><T>##中 ##ing [UNK]",
    "Café ÀÉÎ naïve İstanbul ΑΣ ΟΔΟΣ. straße ﬁ Ǆ",
    "がぎぐ パピプ 한국어 ｶﾞ",
    "甲\u200b乙\ufeff丙\u00ad丁\x07戊\x1c己\x85庚\u2028辛\u2029壬\u3000癸\u00a0子\t丑\r\n寅",
    "\ue000私\uf8ff用\ufffd替\ufffe非\U0010ffff",
    "㐂鿖𠀀𪚥龘〇豈更車\U0002f800",
    "C++和c#，T恤X光AT&T 2.5e-3 x_1 user@mail.com https://a.b/c?d=e&f=1",
    "supercalifragilisticexpialidocious " + "a" * 99 + " " + "b" * 101 + " " + "c" * 201,
    "😀👍🏽 ①㈠㍿ ＡＢＣ，：！？ “引号”——…… ℃ ∑ ≠ ÷ ½",
    "A\u0301\u0328\u0345 \u0301开头 か\u3099",
    "Ⅷ Ω K Å ſ ǅ",
]


def published(name: str) -> bytes:
    path = folder() / "tokenizers" / name / "vocab.txt"
    if not path.is_file():
        pytest.skip(f"the published vocabulary of {name} is not at hand")
    return path.read_bytes()


def sample_lines() -> list[str]:
    with SAMPLE.open(encoding="utf-8") as lines:
        return [line for text in lines for line in json.loads(text)["text"].split("\n")][::7]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> WordPiece:
    """A small vocabulary of the sample's own words, so that all runs without published files."""
    lines, out = sample_lines(), tmp_path_factory.mktemp("built")
    return vocabulary.build(lines, out, 3000, word=True, dictionary_words=50_000)


def slow_reading(vocabulary: bytes) -> Callable[[str], list[int]]:
    """SYSTEMS 1.1: bert4keras' Tokenizer with jieba (HMM off) before it."""
    ids: dict[str, int] = {}
    for line in vocabulary.decode().split("\n")[:-1]:
        ids.setdefault(line.split()[0] if line.split() else line.strip(), len(ids))
    blocks = "4E00-9FFF 3400-4DBF 20000-2A6DF 2A700-2B73F 2B740-2B81F 2B820-2CEAF F900-FAFF"
    han = [[int(end, 16) for end in b.split("-")] for b in f"{blocks} 2F800-2FA1F".split()]

    def pieces(word: str) -> list[str]:
        if len(word) > 200:
            return [word]
        found: list[str] = []
        start = 0
        while start < len(word):
            stop = len(word)
            while stop > start:
                token = word[start:stop] if start == 0 else "##" + word[start:stop]
                if token in ids:
                    break
                stop -= 1
            if stop == start:
                return [word]
            found.append(token)
            start = stop
        return found

    def basic(text: str) -> list[str]:
        spaced = ""
        for char in text:
            code, category = ord(char), unicodedata.category(char)
            sign = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96
            sign = sign or 123 <= code <= 126 or category.startswith("P")
            if sign or any(first <= code <= last for first, last in han):
                spaced += f" {char} "
            elif char in " \n\r\t" or category == "Zs":
                spaced += " "
            elif code in (0, 0xFFFD) or category in ("Cc", "Cf"):
                continue
            else:
                spaced += char
        return [piece for word in spaced.split() for piece in pieces(word)]

    def read(text: str) -> list[int]:
        text = unicodedata.normalize("NFD", text.lower())
        text = "".join(char for char in text if unicodedata.category(char) != "Mn")
        tokens: list[str] = []
        for word in jieba.cut(text, HMM=False):
            tokens += [word] if word in ids else basic(word)
        return [ids.get(token, ids["[UNK]"]) for token in tokens]

    return read


def differing(made: WordPiece, read: Callable[[str], list[int]], texts: list[str]) -> list[str]:
    return [
        text
        for text, ids in zip(texts, made.encode_batch(texts), strict=True)
        if ids.tolist() != read(text)
    ]


def twenty_thousand(longest: int) -> list[str]:
    """A passage of each of so many documents, drawn from the whole corpus in its proportions."""
    draw, texts = random.Random(9), []
    with (folder() / "data" / "dev-open.jsonl.zst").open("rb") as packed:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            text = json.loads(line)["text"]
            at = draw.randrange(max(1, len(text) - longest))
            texts.append(text[at : at + longest])
    assert len(texts) >= 20_000
    return draw.sample(texts, 20_000)


def mixtures(texts: list[str], count: int) -> list[str]:
    """Random cuts of texts, signs and code points of the first two planes in any order."""
    draw = random.Random(3)
    rows = []
    for _ in range(count):
        text = draw.choice(texts) or "无"
        at = draw.randrange(len(text))
        points = [*range(0x20, 0xD800), *range(0xE000, 0x20000)]
        parts = [text[at : at + 30], *draw.choices(BY_HAND, k=2)]
        parts += [chr(draw.choice(points)) for _ in range(3)]
        draw.shuffle(parts)
        rows.append("".join(parts))
    return rows


# ---- words: WoBERT, RoFormer, T5 PEGASUS


def test_words_equal_the_slow_reading_by_hand(built: WordPiece) -> None:
    read = slow_reading(built.__reduce__()[1][0])
    assert differing(built, read, BY_HAND) == []
    assert differing(built, read, mixtures(sample_lines(), 100)) == []


def test_words_equal_the_slow_reading_on_every_genre() -> None:
    vocabulary = published("roformer")
    made, read = WordPiece(vocabulary, word=True), slow_reading(vocabulary)
    texts = [text for found in documents(220, longest=400, seed=5).values() for text in found]
    assert len(texts) > 1500
    assert differing(made, read, texts) == []
    assert differing(made, read, mixtures(texts, 200)) == []


@pytest.mark.slow
def test_words_equal_the_slow_reading_on_twenty_thousand_documents() -> None:
    vocabulary = published("roformer")
    made, read = WordPiece(vocabulary, word=True), slow_reading(vocabulary)
    texts = twenty_thousand(longest=2000)
    for at in range(0, 20_000, 500):
        assert differing(made, read, texts[at : at + 500]) == []


def test_words_are_cut_after_lowering_and_without_hmm() -> None:
    """Negative control: transformers' RoFormer cuts first; CPM's way guesses words. Both differ."""
    vocabulary = published("roformer")
    made, read = WordPiece(vocabulary, word=True), slow_reading(vocabulary)
    assert list(jieba.cut("T恤", HMM=False)) == ["T恤"] and made.words("T恤") == ["t", "恤"]
    assert "杭研" in jieba.lcut("杭研大厦") and made.words("杭研大厦") == ["杭", "研", "大厦"]
    assert differing(made, lambda text: read(text)[::-1], ["今天天气"]) == ["今天天气"]


# ---- characters: BERT


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[int]]:
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("bert")
    (place / "vocab.txt").write_bytes(published("bert"))
    theirs = transformers.BertTokenizer.from_pretrained(place)

    def read(text: str) -> list[int]:
        ids: list[int] = theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    theirs.backend_tokenizer.encode_special_tokens = True  # text is text there too
    return read


def test_characters_equal_bert_tokenizer_on_every_genre(
    bert_tokenizer: Callable[[str], list[int]],
) -> None:
    made = WordPiece(published("bert"), word=False)
    texts = [text for found in documents(500, longest=2000, seed=7).values() for text in found]
    assert len(texts) > 3500
    assert differing(made, bert_tokenizer, texts) == []
    assert differing(made, bert_tokenizer, BY_HAND) == []
    cased = [text for text in texts if text != text.lower()][:50]
    assert differing(made, lambda text: bert_tokenizer(text + "A"), cased) == cased  # control


@pytest.mark.slow
def test_characters_equal_bert_tokenizer_on_twenty_thousand_documents(
    bert_tokenizer: Callable[[str], list[int]],
) -> None:
    made = WordPiece(published("bert"), word=False)
    texts = twenty_thousand(longest=5000)
    for at in range(0, 20_000, 500):
        assert differing(made, bert_tokenizer, texts[at : at + 500]) == []


def test_characters_equal_bert_tokenizer_on_every_code_point(
    bert_tokenizer: Callable[[str], list[int]],
) -> None:
    """Every assigned one that both know alike: transformers' tables are of Unicode 8 or so, which
    has fewer marks, signs and formats; and its Han block of 2B820 begins at 2B920. These differ."""
    made = WordPiece(published("bert"), word=False)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    points = [c for c in points if unicodedata.category(chr(c)) != "Cn"]
    texts = [f"a{chr(c)}b中{chr(c)}文" for c in points]
    wrong = [ord(text[1]) for text in differing(made, bert_tokenizer, texts)]
    assert len(wrong) < 900
    common = [c for c in wrong if c < 0x500 or 0x2000 <= c < 0x2E40 or 0x3000 <= c < 0xA000]
    assert common == []


# ---- one tokenizer


def test_text_is_never_a_control_token(built: WordPiece) -> None:
    pieces = built.pieces(range(built.vocab_size))
    controls = [i for i, piece in enumerate(pieces) if len(piece) > 1 and piece[0] == "["]
    assert len(controls) == 5
    unknown = built.pieces(controls).index("[UNK]")
    forbidden = set(controls) - {controls[unknown]}
    for word in (True, False):
        made = WordPiece(built.__reduce__()[1][0], word)
        for text in [*BY_HAND, "[MASK]", "[ MASK ]", "x[SEP]y", "[PAD]" * 50]:
            assert not forbidden & set(made.encode(text).tolist())
        plain = made.encode("今天").tolist()
        prompt = made.encode_prompt("[CLS]今天[MASK]今天[ MASK ]")  # in a prompt they are spelt
        assert prompt[: 2 * len(plain) + 2].tolist() == [made.bos_id, *plain, made.mask_id, *plain]
        assert not forbidden & set(prompt[2 * len(plain) + 2 :].tolist())


def test_what_the_vocabulary_lacks_is_unknown(built: WordPiece) -> None:
    assert built.pieces(built.encode("ᚠ")) == ["[UNK]"]
    assert built.pieces(built.encode("a" * 201)) == ["[UNK]"]


@pytest.mark.parametrize("word", [True, False])
def test_a_text_alone_is_a_text_in_a_batch(built: WordPiece, word: bool) -> None:
    made = WordPiece(built.__reduce__()[1][0], word)
    texts = [*BY_HAND, *mixtures(sample_lines(), 100), "甲\ud800乙"]
    for text, ids in zip(texts, made.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == made.encode(text).tolist()
        assert ids.tolist() == pickle.loads(pickle.dumps(made)).encode(text).tolist()
    assert made.encode_batch([]) == []
    assert made.encode("甲\ud800乙").tolist() == made.encode("甲\ufffd乙").tolist()


@pytest.mark.parametrize("word", [True, False])
def test_a_book_read_line_by_line_is_the_book(
    built: WordPiece, word: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = WordPiece(built.__reduce__()[1][0], word)
    book = "\n".join([*sample_lines()[:200], "ΑΣ", "ΣΑ \u0301甲", "乙"])
    monkeypatch.setattr(encoder, "BATCH_CHARACTERS", 100)
    ids, _, _ = encoder.Encoder(made, boundaries=False).texts([book])
    assert ids.tolist() == made.encode(book).tolist()


def test_decode_guesses_blanks_as_bert4keras() -> None:
    made = WordPiece(published("bert"), word=False)
    for text, back in {
        "今天天气不错，我们去玩吧！": "今天天气不错，我们去玩吧！",
        "Hello, world. It's 3.14 (three)": "hello, world. it's 3.14(three)",
        "使用 Python 语言 C++": "使用python语言c++",
        "unbelievable！": "unbelievable！",
        "pages 1-2": "pages 1-2",
    }.items():
        assert made.decode([101, *made.encode(text), 102]) == back
    assert made.decode([0, 103]) == ""


def test_a_saved_one_is_the_same_and_frozen(built: WordPiece, tmp_path: Path) -> None:
    built.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert isinstance(again, WordPiece) and again.word
    assert again.fingerprint == built.fingerprint and again.vocab_size == 3000
    assert again.fingerprint != WordPiece(built.__reduce__()[1][0], False).fingerprint
    text = (tmp_path / "vocab.txt").read_text("utf-8")
    (tmp_path / "vocab.txt").write_text(text.replace("\n的\n", "\n底\n"), "utf-8")
    with pytest.raises(TokenizerFault, match="changed after it was frozen"):
        tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(TokenizerFault, match=r"vocab.txt: there is no such file"):
        tokenizer.load(tmp_path)


# ---- building


def test_a_built_vocabulary_holds_the_most_frequent_candidates(tmp_path: Path) -> None:
    """Counted once more by hand; of equal counts the earlier candidate, in candidates' order."""
    base = tmp_path / "base.txt"
    tokens = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "我", "爱", "丙", "##x"]
    base.write_text("\n".join([*tokens, "北", "京", "，", "x"]) + "\n", "utf-8")
    lines = ["我爱北京，北京北", "我x，xx"]  # 我2 爱1 北京2 北1 ，2 x2 ##x1
    made = vocabulary.build(
        lines, tmp_path / "6", 10, word=True, base=base, dictionary_words=349_046
    )
    assert made.pieces(range(10)) == [*tokens[:6], "我", "，", "x", "北京"]
    made = vocabulary.build(
        lines, tmp_path / "8", 12, word=True, base=base, dictionary_words=349_046
    )
    assert made.pieces(range(12))[6:] == ["我", "爱", "##x", "，", "x", "北京"]
    with pytest.raises(TokenizerFault, match="supports 7 to 13 for wordpiece"):
        vocabulary.build(lines, tmp_path / "9", 14, word=True, base=base, dictionary_words=349_046)


def test_the_same_text_builds_the_same_vocabulary(built: WordPiece, tmp_path: Path) -> None:
    again = vocabulary.build(
        iter(sample_lines()), tmp_path, 3000, word=True, dictionary_words=50_000
    )
    assert again.fingerprint == built.fingerprint
    words = [t for t in built.pieces(range(3000)) if len(t) > 1 and "\u4e00" <= t[0] <= "\u9fff"]
    assert len(words) > 300 and built.pieces([0, 1, 2, 3, 4]) == list(wordpiece.CONTROLS)


@pytest.mark.parametrize("word", [True, False])
def test_a_corpus_is_built_end_to_end(word: bool, tmp_path: Path) -> None:
    page: dict[str, Any] = {
        "data": {
            "out": str(tmp_path / "corpus"),
            "sources": [{"kind": "jsonl", "name": "sample", "path": str(SAMPLE)}],
            "workers": 1,
        },
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "wordpiece", "word": word, "vocab_size": 1500},
    }
    if not word:  # the page may name a vocabulary to choose from
        base = tmp_path / "base.txt"
        chars = dict.fromkeys("".join(sample_lines()))
        base.write_text("\n".join([*wordpiece.CONTROLS, *chars]) + "\n", "utf-8")
        page["tokenizer"]["base_vocab"] = str(base)
    (tmp_path / "page.yaml").write_text(dump(from_dict(CorpusConfig, page)), "utf-8")
    assert main(["corpus", str(tmp_path / "page.yaml"), "--json"]) == 0
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_bytes())
    assert manifest["tokenizer"]["kind"] == "wordpiece"
    made = tokenizer.load(tmp_path / "corpus" / "tokenizer")
    index = Index(tmp_path / "corpus" / "train")
    assert index.dtype == np.uint16 and made.vocab_size == 1500
    documents = sorted((tmp_path / "corpus" / "documents").glob("train-*"))
    texts = [record["text"] for path in documents for record in records(path)]
    assert index.documents == len(texts)
    for number in range(0, len(texts), 97):
        expected = [*made.encode(texts[number]).tolist(), made.eod_id]
        assert index.document(number).tolist() == expected


def test_mistakes_are_sentences(built: WordPiece, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking.txt"
    lacking.write_text("[PAD]\n[UNK]\n我\n", "utf-8")
    with pytest.raises(TokenizerFault, match=r"has no \[CLS\] and no \[SEP\]"):
        wordpiece.from_vocabulary(lacking, tmp_path / "out", word=True)
    with pytest.raises(TokenizerFault, match=r"has no \[CLS\] and no \[SEP\]"):
        vocabulary.build(["我"], tmp_path / "out", 300, word=True, base=lacking)
    with pytest.raises(TokenizerFault, match="cannot be read"):
        wordpiece.from_vocabulary(tmp_path / "absent.txt", tmp_path / "out", word=True)
    with pytest.raises(TokenizerFault, match="cannot be read"):
        vocabulary.build(["我"], tmp_path / "out", 300, word=True, base=tmp_path / "absent.txt")
    lacking.write_bytes("[PAD]\n我".encode("gb18030"))
    with pytest.raises(TokenizerFault, match="UTF-8"):
        wordpiece.from_vocabulary(lacking, tmp_path / "out", word=True)

    def section(**keys: object) -> object:
        data = {"out": "x", "sources": [{"kind": "txt", "name": "s", "path": "x"}]}
        return from_dict(
            CorpusConfig, {"data": data, "split": {"valid_fraction": 0}, "tokenizer": keys}
        )

    with pytest.raises(ConfigError, match="base_vocab: is 'b', goes with kind: wordpiece"):
        section(kind="cpm", vocab_size=300, base_vocab="b")
    with pytest.raises(ConfigError, match="dictionary_words: is -1"):
        section(kind="wordpiece", vocab_size=300, dictionary_words=-1)
    built.save(tmp_path / "frozen")
    page = section(kind="wordpiece", model=str(tmp_path / "frozen"), word=False)
    with pytest.raises(CorpusError, match=r"was frozen with word true, tokenizer.word is false"):
        encode.make_tokenizer(page.tokenizer, [], tmp_path / "made")  # type: ignore[attr-defined]
    page = section(kind="wordpiece", vocab_size=300, base_vocab="absent.txt")
    with pytest.raises(CorpusError, match=r"tokenizer.base_vocab: there is no file or folder"):
        encode.model_files(page.tokenizer)  # type: ignore[attr-defined]
