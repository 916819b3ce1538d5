"""Another tokenizer over a corpus that stands: the bytes its sources would give, no cleaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig
from configs.load import ConfigError, from_dict
from data_pipeline import build
from data_pipeline.shards import CorpusError
from tests.test_corpus_build import contents, page, write_source
from tests.test_corpus_marks_words_and_sentences import pairs_page

CPM: dict[str, Any] = {
    "tokenizer": {"kind": "cpm", "vocab_size": 700},
    "encode": {"pseudo_summary": "rouge1"},
}
BPE: dict[str, Any] = {"tokenizer": {"kind": "byte_bpe", "vocab_size": 330}}
TOKENS = (".bin", ".idx", ".marks", ".gaps", ".fields", ".zst", "tokenizer.model")


def again(out: Path, corpus: Path, **sections: Any) -> CorpusConfig:
    data = {"data": {"out": str(out), "documents": str(corpus), "workers": 1}, **sections}
    return from_dict(CorpusConfig, {"split": {"valid_fraction": 0.1}, **data})


def test_the_tokens_are_those_of_the_sources(tmp_path: Path, capsys: Any) -> None:
    """Trained tokenizer, marks, gap sentences by ROUGE-1; links, not copies; a second run does
    nothing; the corpus it came from may go."""
    source = write_source(tmp_path / "text.jsonl")
    first = build.build(page(tmp_path / "bytes", source, data={"workers": 1}))
    build.build(page(tmp_path / "direct", source, data={"workers": 1}, **CPM))
    config = again(tmp_path / "again", tmp_path / "bytes", **CPM)
    manifest = build.build(config)
    direct, second = contents(tmp_path / "direct"), contents(tmp_path / "again")
    wanted = {name for name in direct if name.endswith(TOKENS) and "rejects" not in name}
    assert {"train.bin", "train.idx", "train.marks", "train.gaps", "valid.bin"} <= wanted
    assert [name for name in wanted if direct[name] != second[name]] == []
    assert contents(tmp_path / "bytes")["train.bin"] != second["train.bin"]
    there = json.loads(direct["manifest.json"])
    assert {name for name in manifest if manifest[name] != there.get(name)} == {"documents_of"}
    assert manifest["documents_of"] == first["fingerprint"] != manifest["fingerprint"]
    assert manifest["splits"]["train"]["gaps"]["criterion"] == "rouge1"
    shard = next((tmp_path / "again" / "documents").iterdir())
    assert shard.samefile(tmp_path / "bytes" / "documents" / shard.name)
    capsys.readouterr()
    assert build.build(config) == manifest
    assert "nothing to do" in capsys.readouterr().err


def test_fields_and_labels_come_along(tmp_path: Path) -> None:
    build.build(pairs_page(tmp_path, "bytes", data={"workers": 1}))
    other = {"tokenizer": {"kind": "byte_bpe", "vocab_size": 300}}
    build.build(pairs_page(tmp_path, "direct", data={"workers": 1}, **other))
    build.build(again(tmp_path / "again", tmp_path / "bytes", **other))
    direct, second = contents(tmp_path / "direct"), contents(tmp_path / "again")
    for name in ("train.bin", "train.fields", "train.marks", "valid.fields"):
        assert direct[name] == second[name], name


def test_a_corpus_is_not_encoded_over_itself(tmp_path: Path) -> None:
    """Its tokens and rejects would be lost."""
    build.build(pairs_page(tmp_path, "bytes", data={"workers": 1}))
    before = contents(tmp_path / "bytes")
    (tmp_path / "link").symlink_to(tmp_path / "bytes")
    other = {"tokenizer": {"kind": "byte_bpe", "vocab_size": 300}}
    with pytest.raises(CorpusError, match=r"data\.documents: .* is data\.out itself"):
        build.build(again(tmp_path / "link", tmp_path / "bytes", **other))
    assert contents(tmp_path / "bytes") == before


def test_texts_that_the_first_tokenizer_folds_are_encoded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Big and small letters are one to wordpiece, so that the origin's fingerprint stays; a second
    and a third set of documents is noticed, and the first one when it is back."""
    words = {"tokenizer": {"kind": "wordpiece", "vocab_size": 600}}
    other = {"tokenizer": {"kind": "byte_bpe", "vocab_size": 320}}
    plain = write_source(tmp_path / "plain.jsonl").read_text("utf-8")
    source, config = tmp_path / "text.jsonl", again(tmp_path / "again", tmp_path / "one", **other)
    origins, prints = [], []
    for text in ("abcd", "Abcd", "abcD", "abcd"):
        source.write_text(plain.replace("的", f"的{text}", 9), "utf-8")
        of = {"data": {"workers": 1}, "split": {"valid_fraction": 0}, **words}
        first = build.build(page(tmp_path / "one", source, **of))
        manifest = build.build(config)
        origins.append(first["fingerprint"])
        prints.append(manifest["fingerprint"])
        direct = build.build(page(tmp_path / text, source, **{**of, **other}))
        assert manifest["fingerprint"] == direct["fingerprint"]
        capsys.readouterr()
    assert len(set(origins)) == 1
    assert len(set(prints)) == 3 and prints[3] == prints[0]
    assert build.build(config) == manifest
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("gone", ["valid-00001", "train-00001", "*-00000", "*-00001"])
def test_a_corpus_that_lacks_some_documents_is_refused(gone: str, tmp_path: Path) -> None:
    """Nor is what was made of the rest taken for the whole when they are back."""
    source = write_source(tmp_path / "text.jsonl", copies=5, every=3)
    build.build(page(tmp_path / "bytes", source, data={"workers": 1}))
    documents = tmp_path / "bytes" / "documents"
    assert len(list(documents.iterdir())) == 4
    away = {path: path.read_bytes() for path in documents.glob(f"{gone}.jsonl.zst")}
    for path in away:
        path.unlink()
    config = again(tmp_path / "again", tmp_path / "bytes", **BPE)
    with pytest.raises(CorpusError, match=r"data\.documents: the corpus in .*; bring the") as told:
        build.build(config)
    last = "train documents in documents/, its manifest says"
    assert (last if gone == "*-00001" else "has no documents/") in str(told.value)
    assert not (tmp_path / "again" / "manifest.json").exists()
    for path, data in away.items():
        path.write_bytes(data)
    direct = build.build(page(tmp_path / "direct", source, data={"workers": 1}, **BPE))
    assert build.build(config)["splits"] == direct["splits"]


def test_what_is_no_corpus_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    tokenizer = {"tokenizer": {"kind": "byte_bpe", "vocab_size": 300}}
    for named in ("x", "y"):
        with pytest.raises(CorpusError, match=r"data\.documents: there is no whole corpus in"):
            build.build(again(tmp_path / "out", tmp_path / named, **tokenizer))
    (tmp_path / "x" / "manifest.json").write_text('{"format": "bajie-corpus-1"}')
    with pytest.raises(CorpusError, match=r"has no documents/ any more"):
        build.build(again(tmp_path / "out", tmp_path / "x", **tokenizer))
    data = {"out": "o", "documents": "x", "sources": [{"kind": "txt", "path": "p", "name": "n"}]}
    with pytest.raises(ConfigError, match="both are given"):
        from_dict(CorpusConfig, {"data": data, "split": {"valid_documents": 1}, **tokenizer})
