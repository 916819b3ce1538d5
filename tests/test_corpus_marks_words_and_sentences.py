"""Beside the tokens of a corpus stand the beginnings of words, sentences and named fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.encoding import Tokenizing
from data_pipeline import build, encode, encoder, tokenizer, training
from data_pipeline.borders import Borders
from data_pipeline.index import Index
from data_pipeline.segment import sentences
from data_pipeline.sidefile import FIELD, FIELDS, MARKS, SENTENCE, WORD, Fields, Marks
from tests.test_corpus_build import SAMPLE, contents, kept, page, write_source

PAIRS = [
    {
        "id": "a",
        "left": "　喜欢打篮球的男生喜欢什么样的女生",
        "right": "爱打篮球的男生喜欢什么？",
        "same": 1,
    },
    {"id": "b", "left": "我手机丢了。我想换个手机！", "right": "我想买个新手机，求推荐", "same": 0},
    {"id": "c", "left": "大家觉得她好看吗", "right": "大家觉得跑男好看吗？", "same": 0},
    {"id": "d", "left": "求秋色之空漫画全集", "right": "求秋色之空全集漫画\u200b", "same": 10},
    {"id": "e", "left": "晚上睡觉带着耳机听音乐有什么害处吗？", "right": " \t", "same": 1},
]
GROUPS = [
    {"id": "g", "words": ["高兴", "开心", " ", "快乐得很"], "same": 2},
    {"id": "h", "words": ["土豆", "马铃薯", "洋芋蛋"], "same": 2},
]
TINY: dict[str, Any] = {"clean": {"min_characters": 2}, "split": {"valid_documents": 1}}


def jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    return path


def pairs_page(folder: Path, out: str, **sections: Any) -> Any:
    """Labelled pairs, groups of synonyms and plain documents in one corpus."""
    texts = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()[:300:9]]
    sources = [
        {"kind": "jsonl", "name": "pairs", "path": str(jsonl(folder / "p.jsonl", PAIRS)),
         "fields": ["a=left", "b=right"], "label_field": "same"},
        {"kind": "jsonl", "name": "groups", "path": str(jsonl(folder / "g.jsonl", GROUPS)),
         "fields": ["synonym=words"], "label_field": "same"},
        {"kind": "jsonl", "name": "plain", "path": str(jsonl(folder / "t.jsonl", texts))},
    ]  # fmt: skip
    return page(folder / out, *sources, **{**TINY, **sections})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    build.build(pairs_page(folder, "corpus", data={"workers": 1}))
    return folder / "corpus"


def rows(out: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """(split, number, record) of every document of a corpus."""
    return [(s, n, r) for s in ("train", "valid") for n, r in enumerate(kept(out, s))]


def test_marks_are_those_of_the_words_and_sentences(pairs: Path) -> None:
    """Each field on its own: the words that the tokenizer tells of it, the first token of each of
    its sentences, found here by the byte at which it begins; the end of a document has no mark."""
    words = tokenizer.load(pairs / "tokenizer")
    pieces = words.pieces(range(words.vocab_size))
    sizes = np.array(
        [1 if p.startswith("<0x") else len(p.replace("▁", " ").encode()) for p in pieces]
    )
    for split, number, record in rows(pairs):
        index, marks = Index(pairs / split), Marks(pairs / split)
        assert marks.tokens == index.tokens
        ids = index.document(number)
        found = marks.slice(int(index.offsets[number]), int(index.offsets[number + 1]))
        wanted = []
        for _, start, stop in record.get("spans", [[None, 0, len(record["text"])]]):
            text = record["text"][start:stop]
            ((field_ids, begins),) = words.encode_marked([text])
            mark = begins.astype(np.uint8) * WORD
            ends = sizes[field_ids].cumsum()
            at = 0
            for sentence in sentences(text):
                mark[np.searchsorted(ends, at, side="right")] |= SENTENCE
                at += len(sentence.encode())
            mark[0] |= FIELD if "spans" in record else 0
            wanted.append(mark)
        assert np.array_equal(found, np.concatenate([*wanted, [0]]))
        assert ids[-1] == words.eod_id and found[-1] == 0


def test_fields_are_slices_of_their_document(pairs: Path) -> None:
    """Labels of both kinds of source in one table; separators are no tokens; an empty member of a
    group goes, a pair with an empty half is put aside; what is normalised keeps its place."""
    words = tokenizer.load(pairs / "tokenizer")
    seen = {}
    for split, number, record in rows(pairs):
        index, fields = Index(pairs / split), Fields(pairs / split)
        assert fields.documents == index.documents
        assert (fields.names, fields.labels) == (("a", "b", "synonym"), ("0", "1", "2", "10"))
        ids = index.document(number)
        texts = [(name, words.decode(ids[a:b])) for name, a, b in fields.document(number)]
        if "spans" not in record:
            assert texts == [] and fields.label(number) == -1
            continue
        seen[record["id"]] = texts, fields.labels[fields.label(number)]
        assert "".join(text for _, text in texts) == words.decode(ids[:-1])
        assert [text for _, text in texts] == record["text"].split("\n")
    left, right = PAIRS[0]["left"], PAIRS[0]["right"]
    assert seen["a"] == ([("a", str(left).strip("　")), ("b", right)], "1")
    assert seen["d"][0][1] == ("b", "求秋色之空全集漫画") and seen["d"][1] == "10"
    assert seen["g"] == ([("synonym", w) for w in ("高兴", "开心", "快乐得很")], "2")
    assert "e" not in seen
    manifest = json.loads((pairs / "manifest.json").read_bytes())
    assert manifest["rejects"]["empty_field"]["documents"] == 1
    said = [manifest["splits"][split] for split in ("train", "valid")]
    assert sum(part["fields"]["labels"]["0"] for part in said) == 2
    assert sum(part["fields"]["spans"] for part in said) == 8 + 6
    for split, part in zip(("train", "valid"), said, strict=True):
        assert part["fields"]["fingerprint"] == FIELDS.fingerprint(pairs / split)
        assert part["boundaries"]["fingerprint"] == MARKS.fingerprint(pairs / split)
        marks = Marks(pairs / split)
        every = marks.slice(0, marks.tokens)
        assert part["boundaries"]["words"] == int((every & WORD > 0).sum()) > 10
        assert part["boundaries"]["sentences"] == int((every & SENTENCE > 0).sum()) > 1
        assert part["boundaries"]["no_sentences"] == 0


def test_the_same_bytes_by_two_workers(pairs: Path, tmp_path: Path) -> None:
    build.build(pairs_page(tmp_path, "corpus", data={"workers": 2}))
    assert contents(tmp_path / "corpus") == contents(pairs)


def test_without_boundaries_the_tokens_are_the_same(tmp_path: Path) -> None:
    """The switch takes the marks away, and nothing of the tokens; fields need no switch."""
    source = write_source(tmp_path / "text.jsonl")
    on = build.build(page(tmp_path / "corpus", source, data={"workers": 1}))
    with_marks = contents(tmp_path / "corpus")
    off = page(tmp_path / "corpus", source, data={"workers": 1}, encode={"boundaries": False})
    manifest = build.build(off, replacing=True)
    without = contents(tmp_path / "corpus")
    assert {*with_marks} - {*without} == {"train.marks", "valid.marks"}
    differing = {name for name in without if without[name] != with_marks[name]}
    assert differing <= {"manifest.json", "report.html"}
    assert manifest["fingerprint"] != on["fingerprint"]
    assert "fields" not in manifest["splits"]["train"]


@pytest.mark.parametrize("kind", ["cpm", "wordpiece", "characters"])
def test_two_ways_to_the_beginning_of_a_sentence_agree(kind: str, tmp_path: Path) -> None:
    """By widths along the text, and by the words of each sentence encoded alone; with characters
    that the vocabulary lacks at borders, blanks, accents, wide and joined forms."""
    lines = SAMPLE.read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"][:700] for line in lines[::40]]
    config = Tokenizing(
        kind="cpm" if kind == "cpm" else "wordpiece", vocab_size=600, word=kind == "wordpiece"
    )
    encode.make_tokenizer(config, texts[:20], tmp_path / "t")
    texts += [
        "",
        " ",
        "\n",
        "。",
        "！？」』\n\n　 ",
        "𠀀。𠀀」𠀀！龘？龘",
        "é́…Ⅷ；ﷺ。㎏\u200b！ａｂｃ;ABC?",
    ]
    texts += ["“甲。”乙！”\n”丙…；）】\n丁", "x. y! z?w;" * 3, "<eod>。[SEP]。▁。▃\n\t。\r\n丑"]
    words = tokenizer.load(tmp_path / "t")
    borders, whole = Borders(words), words.encode_together(texts)
    along, sure = borders._along_the_ruler(texts, whole)
    assert np.mean(sure) > 0.3  # many words of so small a vocabulary hold unknown characters
    counted = np.zeros(len(whole.ids), np.bool_)
    assert borders._by_counting(range(len(texts)), texts, whole, counted) == 0
    found = 0
    for number, (text, begin, end) in enumerate(
        zip(texts, [0, *whole.ends.tolist()], whole.ends.tolist(), strict=False)
    ):
        one, other, word_T = along[begin:end], counted[begin:end], whole.starts[begin:end]
        assert not sure[number] or np.array_equal(one, other), text
        assert other[:1].all() and not (other & ~word_T).any()
        found += sure[number] and one.sum() > 9
    assert found


@pytest.mark.parametrize("kind", ["byte_bpe", "cpm"])
def test_a_book_encoded_in_pieces_has_the_same_ids_and_marks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()]
    words = training.train(kind, texts, tmp_path / "t", 4000)
    book = "\n".join(texts[::7]) + "\n\n  缩进 code\n\n - a\n" + "\n\n".join(texts[::11])
    whole = encoder.Encoder(words, boundaries=True).texts([book])
    monkeypatch.setattr(encoder, "BATCH_CHARACTERS", 10)
    assert len(list(encoder._pieces(book))) > 1000
    pieces = encoder.Encoder(words, boundaries=True).texts([book])
    assert all(map(np.array_equal, pieces, whole))
