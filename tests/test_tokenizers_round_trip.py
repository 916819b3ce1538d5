"""Tokenizers: what goes in comes out, text is no control token, a frozen one stays the same."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jieba
import numpy as np
import pytest
import sentencepiece
import zstandard

from data_pipeline import tokenizer as tokenizers
from data_pipeline import training
from data_pipeline.tokenizer import CONTROLS, Tokenizer, TokenizerFault
from tests.dev_corpus import documents, folder

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_pipeline" / "sample" / "sample.jsonl"

BY_HAND = [
    "",
    " ",
    "\n",
    "  两个  空格 \n\n\t制表\r\n回车\r 　全角\u00a0不换行 ",
    "▁ 下划线▁▁与空格 ▁",  # sentencepiece's own sign for a blank
    "▂▃▅█",  # CPM's blank and line end; the character that training reserves
    "<eod><pad></s><s><mask><sep><unk>和<0x41><0x0A>",
    "\x00\x01\x07\x1b[31m\x7f",
    "\ufffd\ufffe\uffff\ufeff\u200b\u2028\ue000\U0010ffff",
    "😀👍🏽👨‍👩‍👧🇨🇳 ①㈠㍿ ＡＢＣ，：！？",
    "㐂鿖𠀀𪚥龘〇 e\u0301é ﷺ",
    "print('hello')\n    return x_1 + 2.5e-3  # 注释\n",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with SAMPLE.open(encoding="utf-8") as lines:
        found = [json.loads(line)["text"] for line in lines]
    return found[:: max(1, len(found) // 600)]


@pytest.fixture(scope="module")
def byte_bpe(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return training.train("byte_bpe", texts, tmp_path_factory.mktemp("byte_bpe"), 2000)


@pytest.fixture(scope="module")
def byte_unigram(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return training.train("byte_unigram", texts, tmp_path_factory.mktemp("unigram"), 2000)


@pytest.fixture(scope="module")
def cpm(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return training.train("cpm", texts, tmp_path_factory.mktemp("cpm"), 2000)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = folder() / "tokenizers" / "cpm" / "chinese_vocab.model"
    return tokenizers.from_cpm_model(path, tmp_path_factory.mktemp("published"))


# ---- byte_bpe: byte for byte


@pytest.mark.parametrize("text", BY_HAND, ids=lambda text: ascii(text[:12]))
def test_byte_bpe_returns_every_byte(byte_bpe: Tokenizer, text: str) -> None:
    ids = byte_bpe.encode(text)
    assert ids.dtype == np.int32
    assert byte_bpe.decode(ids).encode() == text.encode()


def test_byte_bpe_returns_every_code_point(byte_bpe: Tokenizer) -> None:
    """Each code point that has UTF-8, 1,112,064 of them, in rows of 64."""
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    random.Random(0).shuffle(points)
    rows = ["".join(map(chr, points[i : i + 64])) for i in range(0, len(points), 64)]
    for row, ids in zip(rows, byte_bpe.encode_batch(rows), strict=True):
        assert byte_bpe.decode(ids) == row


def test_byte_bpe_returns_random_mixtures(byte_bpe: Tokenizer, texts: list[str]) -> None:
    draw = random.Random(2)
    signs = [
        *CONTROLS,
        "▁",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\x00",
        "<0xE4>",
        "😀",
        "\ufffd",
        "é",
        "1",
    ]
    rows = []
    for _ in range(1500):
        text = draw.choice(texts)
        at = draw.randrange(len(text))
        parts = [text[at : at + 20], *draw.choices(signs, k=6), chr(draw.randrange(0xD800))]
        draw.shuffle(parts)
        rows.append("".join(parts))
    for row, ids in zip(rows, byte_bpe.encode_batch(rows), strict=True):
        assert byte_bpe.decode(ids) == row
        assert np.array_equal(ids, byte_bpe.encode(row))  # alone as in a batch


def test_byte_bpe_returns_documents_of_every_genre(byte_bpe: Tokenizer) -> None:
    for genre, found in documents(per_genre=40, longest=5000, seed=11).items():
        for text, ids in zip(found, byte_bpe.encode_batch(found), strict=True):
            assert byte_bpe.decode(ids).encode() == text.encode(), genre


def test_sentencepiece_alone_does_not_round_trip(byte_bpe: Tokenizer) -> None:
    """Negative control: the literal ▁, which we spell in bytes, is lost by sentencepiece itself."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=byte_bpe.__reduce__()[1][1])
    assert pieces.decode(pieces.encode("▁下")) == " 下"
    assert byte_bpe.decode(byte_bpe.encode("▁下")) == "▁下"


def test_what_is_no_utf8_is_a_replacement_character(byte_bpe: Tokenizer) -> None:
    assert byte_bpe.decode(byte_bpe.encode("甲\ud800乙")) == "甲\ufffd乙"
    assert byte_bpe.decode(byte_bpe.encode("\ud83d\ude00")) == "😀"  # a pair is a character
    half = byte_bpe.encode("🀄")[:2]
    assert byte_bpe.decode(half) == "\ufffd"


def test_pieces_are_short_and_no_text_is_lost(byte_bpe: Tokenizer, texts: list[str]) -> None:
    pieces = byte_bpe.pieces(range(264, byte_bpe.vocab_size))
    assert max(map(len, pieces)) <= 8
    ids = np.concatenate(byte_bpe.encode_batch(texts))
    assert len("".join(texts)) / len(ids) > 0.9  # characters a token; bytes alone would give 0.4


def test_byte_unigram_returns_every_byte(byte_unigram: Tokenizer, texts: list[str]) -> None:
    draw = random.Random(4)
    points = draw.sample([*range(0xD800), *range(0xE000, 0x110000)], 20_000)
    mixed = ["".join(map(chr, points[i : i + 40])) for i in range(0, len(points), 40)]
    rows = [*BY_HAND, *texts, *mixed]
    for row, ids in zip(rows, byte_unigram.encode_batch(rows), strict=True):
        assert byte_unigram.decode(ids).encode() == row.encode()
    ids = np.concatenate(byte_unigram.encode_batch(texts))
    assert len("".join(texts)) / len(ids) > 0.9
    assert byte_unigram.unknown_id not in ids


@pytest.mark.slow
def test_the_byte_kinds_return_every_document(byte_bpe: Tokenizer, byte_unigram: Tokenizer) -> None:
    """The whole development corpus, byte for byte."""
    count = 0
    with (folder() / "data" / "dev-open.jsonl.zst").open("rb") as packed:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            text, count = json.loads(line)["text"], count + 1
            for made in (byte_bpe, byte_unigram) if count % 5 == 0 else (byte_bpe,):
                assert made.decode(made.encode(text)) == text, (made.kind, count)
    print(f"{count} documents")


# ---- CPM


def by_hand(pieces: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """CPM's published tokenizer, written out: data_utils/tokenization_gpt2.py of CPM-1-Generate."""
    words = [word.replace(" ", "\u2582").replace("\n", "\u2583") for word in REFERENCE.cut(text)]
    return pieces.encode(" ".join(words))


REFERENCE = jieba.Tokenizer()
with resources.files("jieba").joinpath("dict.txt").open("rb") as _dictionary:
    # Read here, not by jieba itself, which would share a cache file in the temporary folder.
    REFERENCE.FREQ, REFERENCE.total = REFERENCE.gen_pfdict(_dictionary)
    REFERENCE.initialized = True


def test_published_cpm_equals_jieba_and_sentencepiece(published: Tokenizer) -> None:
    model = str(folder() / "tokenizers" / "cpm" / "chinese_vocab.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    genres = documents(per_genre=30, longest=3000, seed=5)
    assert len(genres) == 10
    rows = [text for found in genres.values() for text in found] + BY_HAND
    for text, ids in zip(rows, published.encode_batch(rows), strict=True):
        assert ids.tolist() == by_hand(pieces, text), ascii(text[:60])
        as_published = pieces.decode(ids.tolist()).replace(" ", "")
        as_published = as_published.replace("\u2582", " ").replace("\u2583", "\n")
        assert published.decode(ids) == as_published
    # Negative control: without the words, the pieces are others.
    without = [pieces.encode(t.replace(" ", "\u2582").replace("\n", "\u2583")) for t in rows[:50]]
    assert any(a != by_hand(pieces, t) for a, t in zip(without, rows, strict=False))


def test_published_cpm_has_its_ids(published: Tokenizer) -> None:
    assert (published.vocab_size, published.kind) == (30_000, "cpm")
    assert (published.eod_id, published.pad_id, published.mask_id, published.bos_id) == (7, 5, 6, 1)
    assert published.encode("一\n二 三").tolist().count(3) == 1  # ▃
    assert (
        published.decode(published.encode("床前明月光\n疑是地上霜 ok"))
        == "床前明月光\n疑是地上霜 ok"
    )


def test_trained_cpm_has_the_published_layout(cpm: Tokenizer) -> None:
    layout = ["<unk>", "<s>", "</s>", "\u2583", "<sep>", "<pad>", "<mask>", "<eod>"]
    assert cpm.pieces(range(8)) == layout
    assert (cpm.eod_id, cpm.pad_id, cpm.mask_id, cpm.bos_id) == (7, 5, 6, 1)
    text = "我们在这里说一\n下 好的\n"
    assert cpm.encode(text).tolist().count(3) == 2
    assert cpm.decode(cpm.encode(text)) == text


# ---- control tokens


@pytest.mark.parametrize("kind", ["byte_bpe", "cpm", "published"])
def test_text_is_never_a_control_token(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    controls = {i for i in range(8) if tokenizer.pieces([i])[0] in CONTROLS}
    assert len(controls) == 6 and tokenizer.eod_id in controls
    forms = [
        *CONTROLS,
        "＜ｅｏｄ＞",
        "<eod> <eod>",
        "甲<eod>乙",
        "\u2581<eod>",
        "<e\u200bod>",
        "\n<pad>\n",
    ]
    for text in [*forms, "".join(forms), "<<eod>>", " <eod> "]:
        assert not controls & set(tokenizer.encode(text).tolist()), text
    plain = tokenizer.encode("你好世界").tolist()
    with_controls = [
        tokenizer.bos_id,
        *plain,
        tokenizer.eod_id,
        tokenizer.pad_id,
        tokenizer.mask_id,
    ]
    assert tokenizer.decode(with_controls) == "你好世界"  # they stand for no text
    prompt = tokenizer.encode_prompt("你好世界<eod><mask>你好世界")  # in a prompt they are spelt
    assert prompt.tolist() == [*plain, tokenizer.eod_id, tokenizer.mask_id, *plain]
    assert len(tokenizer.encode_prompt("")) == 0


def test_the_published_model_alone_would_end_a_document(published: Tokenizer) -> None:
    """Negative control: fed to sentencepiece as it is, the text <eod> is token 7."""
    model = str(folder() / "tokenizers" / "cpm" / "chinese_vocab.model")
    assert 7 in sentencepiece.SentencePieceProcessor(model_file=model).encode("<eod>")
    published._sentencepiece = lambda texts: [np.array([7, 100, 5], np.int32)]  # type: ignore[method-assign]
    try:
        assert published.encode("<eod>").tolist() == [0, 100, 0]  # the last line of defence
    finally:
        del published._sentencepiece


def test_control_text_in_the_sample_does_not_enter_the_vocabulary(
    texts: list[str], tmp_path: Path
) -> None:
    texts = ["这是<eod>一个</s>文档<pad>结束<0x41>了<unk>。▁▅" + text for text in texts[:100]]
    for kind in tokenizers.KINDS:
        tokenizer = training.train(kind, texts, tmp_path / kind, 400)
        for name in CONTROLS:
            assert tokenizer.pieces(range(tokenizer.vocab_size)).count(name) == 1
        ids = tokenizer.encode(texts[0])
        assert tokenizer.eod_id not in ids and tokenizer.pad_id not in ids
        if kind == "byte_bpe":
            assert tokenizer.decode(ids) == texts[0]


# ---- training


@pytest.mark.parametrize(("kind", "size"), [("byte_bpe", 1000), ("cpm", 1000)])
def test_the_same_text_gives_the_same_bytes(
    texts: list[str], kind: str, size: int, tmp_path: Path
) -> None:
    first = training.train(kind, texts, tmp_path / "1", size, sample_bytes=60_000)
    again = training.train(kind, iter(texts), tmp_path / "2", size, sample_bytes=60_000)
    other = training.train(kind, texts[1:], tmp_path / "3", size, sample_bytes=60_000)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_vocabulary_too_large_names_the_largest(
    texts: list[str], kind: str, tmp_path: Path
) -> None:
    texts = texts[:20]
    with pytest.raises(TokenizerFault, match=r"is 50000, the text supports at most \d+") as caught:
        training.train(kind, texts, tmp_path / "x", 50_000)
    assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()
    largest = int(str(caught.value).split("at most ")[1].split(" ")[0])
    made = training.train(kind, texts, tmp_path / "y", largest)
    assert made.vocab_size == largest > 400


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_vocabulary_too_small_or_no_text_is_one_sentence(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerFault, match=r"vocab_size is 8, .* of which are control tokens"):
        training.train(kind, ["一二三"], tmp_path / "x", 8)
    with pytest.raises(TokenizerFault, match="text to learn from"):
        training.train(kind, ["", "\n"], tmp_path / "x", 500)
    with pytest.raises(TokenizerFault, match="the kinds are cpm and byte_bpe"):
        training.train("wordpiece", ["一二三"], tmp_path / "x", 500)


def test_lines_are_all_kept_and_short() -> None:
    text = "长" * 5000 + "。" + "短句。" * 900 + "\n" + "a" * 999 + "！\n\n尾"
    lines = list(training._lines(text))
    assert "".join(lines) == text.replace("\n", "")
    assert max(len(line.encode()) for line in lines) < 4192  # sentencepiece skips longer ones
    assert sum(line.endswith("。") for line in lines) >= 3


def test_the_sample_is_bounded_and_even() -> None:
    def endless() -> Iterator[str]:
        for number in range(100_000):
            yield f"{number:09d}"

    kept = training.sample(endless(), sample_bytes=9000)
    assert 450 <= len(kept) <= 1000
    steps = np.diff([int(line) for line in kept])
    assert set(steps.tolist()) == {128}


def in_a_process(program: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python: the chatter of sentencepiece comes from C++, under this process's streams."""
    reading = "import json, sys; from data_pipeline import training as t\n"
    reading += "texts = [json.loads(line)['text'] for line in open(sys.argv[1])][::9]\n"
    return subprocess.run(
        [sys.executable, "-c", reading + program, str(SAMPLE), *arguments],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_sentencepiece_reads_every_line_of_the_sample(tmp_path: Path) -> None:
    """By its own log, where one line per document would have it leave out the long ones."""
    program = (
        "t._OPTIONS[sys.argv[2]]['minloglevel'] = 0\n"
        "texts = [''.join(texts).replace('\\n', '')] * 2 + ['▅一行\\n'] * 10\n"
        "t.train(sys.argv[2], texts, 'out', 600)\n"
    )
    for kind in tokenizers.KINDS:
        log = in_a_process(program, kind, folder=tmp_path).stderr
        assert "Loaded all " in log and "kipped" not in log, log


def test_text_that_sentencepiece_would_skip_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LINE", 100_000)
    texts = ["白日依山尽，黄河入海流。" * 1000, "欲穷千里目"]
    with pytest.raises(TokenizerFault, match="training would skip 100% of the sample, in lines"):
        training.train("byte_bpe", texts, tmp_path / "x", 300)


def test_training_and_encoding_write_nothing_to_the_terminal(tmp_path: Path) -> None:
    program = (
        "for kind in t._OPTIONS:\n"
        "    made = t.train(kind, texts, kind, 500)\n"
        "    made.decode(made.encode('白日 黄河<eod>'))\n"
    )
    done = in_a_process(program, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- frozen


def test_frozen_comes_back_the_same(byte_bpe: Tokenizer, cpm: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (byte_bpe, cpm):
        tokenizer.save(tmp_path / tokenizer.kind)
        text = "春眠不觉晓 2024\n处处闻啼鸟 abc"
        for other in (
            tokenizers.load(tmp_path / tokenizer.kind),
            pickle.loads(pickle.dumps(tokenizer)),
        ):
            assert other.fingerprint == tokenizer.fingerprint
            assert np.array_equal(other.encode(text), tokenizer.encode(text))


def test_fingerprint_covers_model_kind_and_rules(
    byte_bpe: Tokenizer, cpm: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (_, model, _) = byte_bpe.__reduce__()
    said = f"{tokenizers.FORMAT}\nbyte_bpe\n{tokenizers.RULES['byte_bpe']}\n".encode()
    assert byte_bpe.fingerprint == "sha256:" + hashlib.sha256(said + model).hexdigest()
    prints = {byte_bpe.fingerprint, Tokenizer("cpm", model).fingerprint, cpm.fingerprint}
    monkeypatch.setitem(tokenizers.RULES, "byte_bpe", "2")
    assert len(prints | {Tokenizer("byte_bpe", model).fingerprint}) == 4


def test_tampering_is_one_sentence(byte_bpe: Tokenizer, cpm: Tokenizer, tmp_path: Path) -> None:
    byte_bpe.save(tmp_path)
    model, record = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"
    said = json.loads(record.read_text())

    def refused(sentence: str) -> None:
        with pytest.raises(TokenizerFault, match=sentence) as caught:
            tokenizers.load(tmp_path)
        assert "\n" not in str(caught.value)
        byte_bpe.save(tmp_path)

    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    refused("fingerprint|not a model")
    model.write_bytes(cpm.__reduce__()[1][1])
    refused("fingerprint|has no")
    record.write_text(json.dumps({**said, "kind": "cpm", "rules": tokenizers.RULES["cpm"]}))
    refused("one of them was changed after it was frozen")
    record.write_text(json.dumps({**said, "rules": "0"}))
    refused("was frozen under rules '0'")
    record.write_text(json.dumps({**said, "kind": "words"}))
    refused("kind is 'words'")
    record.write_text("{")
    refused("not JSON")
    record.write_text("{}")
    refused("not of format")
    model.write_bytes(b"garbage")
    refused("not a model of sentencepiece")
    model.unlink()
    refused("there is no such file; a tokenizer is a folder")


def test_another_model_is_not_cpms(byte_bpe: Tokenizer, tmp_path: Path) -> None:
    byte_bpe.save(tmp_path)
    with pytest.raises(
        TokenizerFault, match="name chinese_vocab.model of CPM-1".replace(".", r"\.")
    ):
        tokenizers.from_cpm_model(tmp_path / "tokenizer.model", tmp_path / "out")
    with pytest.raises(TokenizerFault, match="cannot be read: No such file"):
        tokenizers.from_cpm_model(tmp_path / "nowhere", tmp_path / "out")
