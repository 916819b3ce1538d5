"""`python -m launch inspect`: what a corpus or a checkpoint holds, by its own files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.model import parameter_count
from data_pipeline import tokenizer, training, vocabulary
from data_pipeline.index import Index
from launch.cli import main
from launch.inspect import _token_lines, tokens_of
from pretrain import checkpoint
from pretrain.state import State
from tests.growing import TINY, trained

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_pipeline" / "sample" / "sample.jsonl"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of words."""
    place = tmp_path_factory.mktemp("inspect")
    lines = SAMPLE.read_text("utf-8").splitlines()[::9]
    (place / "text.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    page = {
        "data": {
            "out": str(place / "corpus"),
            "sources": [{"kind": "jsonl", "name": "here", "path": str(place / "text.jsonl")}],
            "workers": 1,
        },
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "wordpiece", "vocab_size": 800},
    }
    (place / "page.json").write_text(json.dumps(page), "utf-8")
    assert main(["corpus", str(place / "page.json"), "--json"]) == 0
    return place / "corpus"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run folder with one checkpoint of a model that was grown."""
    place, state = tmp_path_factory.mktemp("run"), trained()
    state = State(state.entries, {**state.record, "growth": ["layers 2 -> 3"], "data": ["here"]})
    checkpoint.write_state(
        place / "checkpoints" / "stage-00-step-00000009", state, corpus / "tokenizer"
    )
    return place


def seen(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main(["inspect", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_corpus_is_counted_as_its_manifest_says(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((corpus / "manifest.json").read_bytes())
    found = seen(capsys, str(corpus))
    for key in ("splits", "tokenizer", "sources", "rejects", "fingerprint"):
        assert found[key] == manifest[key]
    assert main(["inspect", str(corpus)]) == 0
    said = capsys.readouterr().out
    assert manifest["fingerprint"] in said and "wordpiece, 800 entries" in said
    assert f"{manifest['splits']['train']['tokens']:,} tokens" in said


def test_every_document_is_the_one_in_the_index(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index(corpus / "train")
    for number in (0, index.documents // 2, index.documents - 1):
        shown = seen(capsys, str(corpus), "--document", str(number))["document"]
        assert shown["as_in_the_index"] is True
        assert [*shown["ids"], 3] == index.document(number).tolist()  # [SEP] is 3 here
        assert "".join(shown["words"]).startswith(shown["text"][:5].lower())
    valid = seen(capsys, str(corpus), "--document", "0", "--split", "valid")["document"]
    assert valid["text"] != shown["text"]
    assert main(["inspect", str(corpus), "--document", "1"]) == 0
    assert "its ids in the index are these" in capsys.readouterr().out


def test_named_fields_are_encoded_each_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line break between two fields of a kept document is in no index."""
    lines = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()[:60]]
    rows = [{"a": line[:12].replace("\n", ""), "b": line[12:40]} for line in lines]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = {"kind": "jsonl", "name": "x", "path": str(tmp_path / "x.jsonl"), "fields": ["a", "b"]}
    page = {
        "data": {"out": str(tmp_path / "corpus"), "sources": [source], "workers": 1},
        "clean": {"min_characters": 1, "min_han_ratio": 0.0},
        "split": {"valid_documents": 5},
        "tokenizer": {"kind": "cpm", "vocab_size": 400},
    }
    (tmp_path / "page.json").write_text(json.dumps(page), "utf-8")
    assert main(["corpus", str(tmp_path / "page.json"), "--json"]) == 0
    shown = seen(capsys, str(tmp_path / "corpus"), "--document", "3")["document"]
    assert shown["as_in_the_index"] is True and "\n" in shown["text"]
    assert len(shown["begins_word"]) == len(shown["ids"]) == len(shown["tokens"])


def test_a_document_without_its_text_is_shown_by_its_ids(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus, tmp_path / "bare", ignore=shutil.ignore_patterns("documents"))
    shown = seen(capsys, str(tmp_path / "bare"), "--document", "1")["document"]
    assert shown["ids"] == Index(corpus / "train").document(1).tolist()
    assert shown["tokens"][-1] == "[SEP]" and "text" not in shown
    assert main(["inspect", str(tmp_path / "bare"), "--document", "1"]) == 0


def test_a_text_is_shown_in_words_tokens_ids_and_back(
    corpus: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, text = tokenizer.load(corpus / "tokenizer"), "我们在中国，Hello"
    for where in (corpus, run):
        shown = seen(capsys, str(where), "--text", text)["text"]
        assert shown["ids"] == made.encode(text).tolist()
        assert shown["tokens"] == made.pieces(shown["ids"])
        assert "我们" in shown["words"] and shown["back"] == made.decode(shown["ids"])
        assert shown["round_trip"] is False  # the capital is lost
    assert main(["inspect", str(corpus), "--text", "，"]) == 0
    assert "round trip: the same" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cpm", "byte_bpe", "byte_unigram", "words", "characters"])
def test_every_kind_shows_words_and_marks(kind: str, tmp_path: Path) -> None:
    lines = [json.loads(line)["text"][:800] for line in SAMPLE.read_text("utf-8").splitlines()]
    lines = [*lines[::20], *["我们在云计算小办。"] * 60]
    dictionary = "云计算小办\n".encode()
    if kind in ("words", "characters"):
        word = kind == "words"
        vocabulary.build(lines, tmp_path, 700, word=word, dictionary=dictionary)
    else:
        training.train(kind, lines, tmp_path, 700, dictionary=dictionary)
    shown = tokens_of(tmp_path, "我们在云计算小办")
    assert shown["words"] == ["我们", "在", "云计算小办"]
    marked = sum(shown["begins_word"])  # pieces of the byte kinds may lie across words
    assert marked == 3 or (kind.startswith("byte") and marked in (1, 2))
    assert shown["round_trip"] and shown["user_dictionary"]
    lost = tokens_of(tmp_path, "\U000f0000龘")  # in no vocabulary
    assert lost["round_trip"] == kind.startswith("byte")
    assert (lost["unknown_rate"] == 0) == kind.startswith("byte")
    line = next(line for line in _token_lines(shown) if line.startswith("  tokens"))
    assert line.count("|") == marked
    assert any("user's dictionary" in line for line in _token_lines(shown))


def test_a_checkpoint_is_told_as_it_was_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, state = seen(capsys, str(run)), trained()
    assert found["progress"]["step"] == 9 and found["progress"]["updates"] == 7
    assert found["parameters"] == parameter_count(TINY)
    assert found["model"]["hidden"] == TINY.hidden and found["growth"] == ["layers 2 -> 3"]
    weights = found["tensors"]["weights"]
    assert weights["tensors"] == len(state.names())
    assert weights["bytes"] == 4 * weights["values"] == 4 * parameter_count(TINY)
    assert found["tensors"]["optim/exp_avg"]["values"] == weights["values"]
    folder = run / "checkpoints" / "stage-00-step-00000009"
    assert seen(capsys, str(folder)) == found
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "layers 2 -> 3" in said and f"{parameter_count(TINY):,} parameters" in said


def test_a_corpus_is_inspected_without_torch(corpus: Path) -> None:
    program = (
        "import sys; from launch.cli import main\n"
        "assert main(['inspect', sys.argv[1], '--document', '0', '--text', '我们']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(corpus)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_mistakes_are_sentences(
    corpus: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["inspect", *words]) == 2
        return capsys.readouterr().err

    assert "there is no such folder" in refused(str(tmp_path / "absent"))
    assert "no corpus that is whole" in refused(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{", "utf-8")
    assert "is damaged" in refused(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}", "utf-8")
    assert "is not of the format" in refused(str(tmp_path))
    assert "only a corpus has documents" in refused(str(run), "--document", "1")
    assert "counted from 0" in refused(str(corpus), "--document", "-1")
    assert "counted from 0" in refused(str(corpus), "--document", "99999")
    assert "has train, valid" in refused(str(corpus), "--document", "0", "--split", "test")
    bare = tmp_path / "bare" / "checkpoints" / "stage-00-step-00000001"
    checkpoint.write_state(bare, trained())
    assert "there is no tokenizer" in refused(str(tmp_path / "bare"), "--text", "我")
