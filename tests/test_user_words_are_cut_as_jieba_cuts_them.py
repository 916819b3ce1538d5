"""tokenizer.user_dictionary: the words of jieba 0.42.1 after load_userdict, frozen with the ids."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jieba
import numpy as np
import pytest
from jieba import finalseg

from configs.encoding import Tokenizing
from data_pipeline import build, encode, segment, tokenizer, training, user_dictionary, vocabulary
from data_pipeline.characters import normal
from data_pipeline.frozen import TokenizerFault
from data_pipeline.shards import CorpusError
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.wordpiece import WordPiece
from tests import test_corpus_build as corpus
from tests.dev_corpus import documents, folder

SAMPLE = Path(__file__).parent.parent / "data_pipeline" / "sample" / "sample.jsonl"

BY_HAND = """云计算 5
李小福 2 nr
创新办 3 i
easy_install 3 eng
好用 300
韩玉赏鉴 3 nz
八一双鹿 3 nz
台中
凱特琳 nz
Edu Trust认证 2000
T恤衫
C++程序
GPT-4
x_1
2.5mL
今天天气 0
中国 0
的 0
仁心 0
龘靐
龘 0
马丁·路德
㐂龘
我们在 1
在一起 99999999
在一起 3
的一
abc
-
1.5%
镇中 0
他常 0
""".replace("Edu Trust认证 2000\n", "")


def by_jieba(contents: bytes) -> Any:
    """jieba as it stands, its dictionary from its wheel, with a user's words."""
    made = jieba.Tokenizer()
    dictionary = resources.files("jieba").joinpath("dict.txt").open("rb")
    made.FREQ, made.total = made.gen_pfdict(dictionary)
    made.initialized = True
    made.load_userdict(io.BytesIO(contents))
    return made


@pytest.fixture(autouse=True)
def nothing_forced() -> Iterator[None]:
    """jieba keeps the words taken out in one set for the whole process: a trap, cleared here."""
    finalseg.Force_Split_Words.clear()
    yield
    finalseg.Force_Split_Words.clear()


def passages(contents: bytes, count: int) -> list[str]:
    """Texts that meet the dictionary's words, whole, in parts and next to each other."""
    draw = random.Random(5)
    words = [word for _, word, _ in user_dictionary.entries(contents)]
    lines = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()[::40]]
    found = []
    for _ in range(count):
        parts = [draw.choice(words) for _ in range(draw.randint(1, 4))]
        parts += [word[draw.randrange(len(word)) :] for word in draw.choices(words, k=2)]
        for _ in range(3):
            line = draw.choice(lines)
            at = draw.randrange(len(line))
            parts.append(line[at : at + draw.randint(1, 12)])
        parts += draw.choices(
            ["，", " ", "x", "_", "1.5", "%", "\n", "我们", "在", "㐂", "常在"], k=3
        )
        draw.shuffle(parts)
        found.append("".join(parts))
    return found


def differing(contents: bytes, texts: list[str]) -> list[tuple[str, bool]]:
    lexicon, theirs = user_dictionary.loaded(contents), by_jieba(contents)
    assert lexicon.total == theirs.total
    return [
        (text, hmm)
        for text in texts
        for hmm in (True, False)
        if segment.words(text, hmm, lexicon) != list(theirs.cut(text, HMM=hmm))
        or segment.spaced([text], hmm, lexicon) != [" ".join(theirs.cut(text, HMM=hmm))]
    ]


def test_words_by_hand() -> None:
    contents = BY_HAND.encode()
    texts = passages(contents, 1000)
    assert not differing(contents, texts)
    lexicon = user_dictionary.loaded(contents)
    plain = [text for text in texts if segment.words(text) != segment.words(text, True, lexicon)]
    assert len(plain) > 300  # negative control: without the dictionary most differ


def test_dictionaries_made_at_random() -> None:
    draw = random.Random(8)
    lines = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()[::20]]
    for _ in range(4):
        rows = []
        for _ in range(300):
            line = draw.choice(lines).replace("\n", "").replace(" ", "")
            at = draw.randrange(len(line))
            word = "".join(line[at : at + draw.randint(1, 6)].split()) or "甲乙"
            end = draw.choice(["", "", " 0", " 1", " 50", " 100000", " n", " 7 nz"])
            rows.append(f"{word}{end}")
        contents = ("\ufeff" + "\r\n".join(rows)).encode()
        finalseg.Force_Split_Words.clear()
        assert not differing(contents, passages(contents, 150))


def test_documents_of_every_genre() -> None:
    contents = BY_HAND.encode()
    genres = documents(per_genre=5, longest=1500, seed=17)
    assert len(genres) == 10
    assert not differing(contents, [text for texts in genres.values() for text in texts])


def test_two_dictionaries_in_one_process() -> None:
    """What one tokenizer takes out or puts in, no other sees; nor jieba."""
    text = "中国的云计算小办，李小福在台中"
    plain = segment.words(text)
    one, other = user_dictionary.loaded(b"\xe4\xb8\xad\xe5\x9b\xbd 0"), by_lines("的云计算小办")
    first = segment.words(text, True, one)
    assert "中国" in plain and "中国" not in first
    assert "的云计算小办" in segment.words(text, True, other)
    assert segment.words(text, True, one) == first
    assert segment.words(text) == plain == list(by_jieba(b"").cut(text))
    assert not finalseg.Force_Split_Words


def by_lines(*lines: str) -> Any:
    return user_dictionary.loaded("\n".join(lines).encode())


# ---- tokenizers


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = SAMPLE.read_text("utf-8").splitlines()
    return [json.loads(line)["text"][:1500] for line in lines[:: max(1, len(lines) // 300)]]


def test_frozen_with_the_tokenizer(texts: list[str], tmp_path: Path) -> None:
    contents = "云计算小办 5\n大模型x1\nChatGPT\n".encode()
    cpm = training.train("cpm", texts, tmp_path / "cpm", 1000, dictionary=contents)
    bpe = training.train("byte_bpe", texts, tmp_path / "bpe", 800, dictionary=contents)
    rows = [*texts, *["我们的云计算小办和大模型x1，ChatGPT是什么"] * 9]
    words = vocabulary.build(rows, tmp_path / "w", 1500, word=True, dictionary=contents)
    chars = vocabulary.build(rows, tmp_path / "c", 1000, word=False, dictionary=contents)
    text = "云计算小办的大模型x1与ChatGPT"
    for made, name in [(cpm, "cpm"), (bpe, "bpe"), (words, "w"), (chars, "c")]:
        again = tokenizer.load(tmp_path / name)
        assert (tmp_path / name / "user_dictionary.txt").read_bytes() == contents
        for other in (again, pickle.loads(pickle.dumps(made))):
            assert other.fingerprint == made.fingerprint
            assert other.user_dictionary == contents
            assert np.array_equal(other.encode(text), made.encode(text))
        assert made.words(text)[0] == "云计算小办" and "大模型x1" in made.words(text)
        prints = {made.fingerprint}
        for changed in (contents + b"x", contents[:-1], b""):
            prints.add(made.with_dictionary(changed).fingerprint)
        assert len(prints) == 4
        _, starts = made.encode_marked([text])[0]
        assert starts.sum() == len(made.words(text)) == 5
        (tmp_path / name / "user_dictionary.txt").write_bytes(contents + b"x")
        with pytest.raises(TokenizerFault, match="changed after it was frozen"):
            tokenizer.load(tmp_path / name)
        (tmp_path / name / "user_dictionary.txt").unlink()
        with pytest.raises(TokenizerFault, match="no such file"):
            tokenizer.load(tmp_path / name)
    # Words of one's own are tokens of a built vocabulary; they are lowered as the text is.
    assert {"云计算小办", "大模型x1", "chatgpt"} <= set(words.pieces(words.encode(text)))


def test_words_of_wordpiece_are_jiebas_of_the_lowered_text() -> None:
    contents = "ChatGPT手机 5\nCafé店\n大模型 0\n".encode()
    made = WordPiece("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "大"]).encode(), True, contents)
    lowered = "\n".join(normal(line) for line in contents.decode().split("\n")).encode()
    theirs = by_jieba(lowered)
    for text in ["ChatGPT手机好", "CAFÉ店的大模型", "小café店chatgpt手机"]:
        assert made.words(text) == list(theirs.cut(normal(text), HMM=False))
        assert any(len(word) > 5 or word == "cafe店" for word in made.words(text))


def test_a_published_model_with_words_of_ones_own(tmp_path: Path) -> None:
    model = folder() / "tokenizers" / "cpm" / "chinese_vocab.model"
    contents = BY_HAND.encode()
    (tmp_path / "mine.txt").write_bytes(contents)
    page = Tokenizing("cpm", model=str(model), user_dictionary=str(tmp_path / "mine.txt"))
    assert tmp_path / "mine.txt" in encode.model_files(page)
    encode.make_tokenizer(page, [], tmp_path / "made")
    made, theirs = tokenizer.load(tmp_path / "made"), by_jieba(contents)
    plain = tokenizer.from_cpm_model(model, tmp_path / "plain")
    assert isinstance(made, Tokenizer)
    assert made.fingerprint != plain.fingerprint
    rows = passages(contents, 200)
    for text, ids in zip(rows, made.encode_batch(rows), strict=True):
        words = theirs.cut(text.replace(" ", "▂").replace("\n", "▃"))
        assert ids.tolist() == plain._pieces.encode(" ".join(words))
    # A tokenizer that has a dictionary keeps it, and takes no other.
    page = Tokenizing("cpm", model=str(tmp_path / "made"))
    encode.make_tokenizer(page, [], tmp_path / "again")
    assert tokenizer.load(tmp_path / "again").fingerprint == made.fingerprint
    (tmp_path / "other.txt").write_text("别的词\n")
    page = Tokenizing(
        "cpm", model=str(tmp_path / "made"), user_dictionary=str(tmp_path / "other.txt")
    )
    with pytest.raises(CorpusError, match="was frozen with another dictionary"):
        encode.make_tokenizer(page, [], tmp_path / "third")


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (
            "好\n云计算\t5\n".encode(),
            "line 2 '云计算\t5' has as its word '云计算\t5', with a blank",
        ),
        ("好 3.5 n\n".encode(), "line 1 '好 3.5 n' has as its word '好 3.5', with a blank"),
        ("好 3 N\n".encode(), "line 1 '好 3 N' has as its word"),
        ("好 3\n\n新词".encode("gb18030"), "line 1 is not UTF-8"),
        (f"好 {10**13}\n".encode(), "line 1 has frequency 10000000000000; 1000000000000 is"),
    ],
)
def test_a_wrong_line_is_named(contents: bytes, said: str) -> None:
    with pytest.raises(TokenizerFault) as fault:
        user_dictionary.loaded(contents)
    assert f"tokenizer.user_dictionary: {said}" in str(fault.value)
    assert "用户词典" in str(fault.value)


def test_a_word_of_accents_alone_is_no_word() -> None:
    with pytest.raises(TokenizerFault, match="line 2 is nothing that is left of a text"):
        user_dictionary.loaded("好\n\u0301\n".encode(), normal)


def test_no_dictionary_where_one_is_named(tmp_path: Path) -> None:
    page = Tokenizing("cpm", vocab_size=500, user_dictionary=str(tmp_path / "absent"))
    with pytest.raises(CorpusError, match=r"tokenizer.user_dictionary: there is no file"):
        encode.model_files(page)
    page = Tokenizing("cpm", vocab_size=500, user_dictionary=str(tmp_path))
    with pytest.raises(CorpusError, match=r"tokenizer.user_dictionary: '.*' cannot be read"):
        encode.make_tokenizer(page, ["一"], tmp_path / "out")


def test_a_tokenizer_learns_from_changed_text_whatever_stands_beside_it(tmp_path: Path) -> None:
    """A user's dictionary is no published model: the vocabulary is that of a fresh build."""
    text, words = corpus.write_source(tmp_path / "text.jsonl"), tmp_path / "words.txt"
    words.write_text("床前明月光\n", "utf-8")
    one = {"data": {"workers": 1}, "tokenizer": {"user_dictionary": str(words)}}
    first = build.build(corpus.page(tmp_path / "c", text, **one))
    corpus.write_source(text, every=7)
    second = build.build(corpus.page(tmp_path / "c", text, **one))
    assert second == build.build(corpus.page(tmp_path / "fresh", text, **one))
    assert second["tokenizer"]["fingerprint"] != first["tokenizer"]["fingerprint"]
