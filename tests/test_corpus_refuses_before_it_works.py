"""A mistake that the config and its files show is said before the first document is read: of a
crawl, cleaning is days."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig
from configs.load import from_dict
from data_pipeline import build

WORDS = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
NOT_THERE = {"vocab_size": None, "model": "/nowhere"}


def refused(folder: Path, **sections: Any) -> str:
    """What a build says, which must have made no stage."""
    (folder / "text").mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"{number}：{WORDS}"}) for number in range(20)]
    (folder / "text" / "a.jsonl").write_text("\n".join(lines))
    source = {"kind": "jsonl", "name": "mine", "path": str(folder / "text")}
    page: dict[str, Any] = {
        "data": {"out": str(folder / "out"), "sources": [source], "workers": 1},
        "split": {"valid_documents": 2},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 420},
    }
    for name, section in sections.items():
        page[name] = page[name] | section if isinstance(section, dict) else section
    with pytest.raises(ValueError) as error:
        build.build(from_dict(CorpusConfig, page))
    assert not list(folder.glob("**/stages/*")), "nothing was cleaned"
    return str(error.value)


def test_an_evaluation_set_without_its_field(tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": WORDS}))
    exam = {"name": "exam", "path": str(tmp_path / "exam.jsonl"), "fields": ["q"]}
    assert "has no field of ['q']" in refused(tmp_path, decontaminate=[exam])
    (tmp_path / "exam.jsonl").write_text('{"q": "a"}\n{"q": ')
    assert "exam.jsonl cannot be read" in refused(tmp_path, decontaminate=[exam])


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_bytes(b"\xff\xfe\x00")
    for kind in ("cpm", "wordpiece", "byte_bpe"):
        said = refused(tmp_path, tokenizer={"kind": kind, "vocab_size": None, "model": str(model)})
        assert "model" in said or "vocab.txt" in said
    said = refused(
        tmp_path, tokenizer={"kind": "wordpiece", "vocab_size": 300, "base_vocab": str(model)}
    )
    assert "is UTF-8" in said


def test_a_dictionary_with_a_mistake(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("生命起源 5 n\n生命\t起源 5\n")
    said = refused(tmp_path, tokenizer={"kind": "cpm", "user_dictionary": str(words)})
    assert "tokenizer.user_dictionary: line 2" in said


@pytest.mark.parametrize("path", ["text", "text/**/*.jsonl*", "text/*/*/*.zst"])
def test_a_corpus_within_its_own_source(path: str, tmp_path: Path) -> None:
    source = {"kind": "jsonl", "name": "mine", "path": str(tmp_path / path)}
    inside = {"out": str(tmp_path / "text" / "corpus"), "sources": [source]}
    said = refused(tmp_path, data=inside)
    assert "lies within source 'mine'" in said and "data.out" in said
    if "**" in path:  # a pattern that does not reach into folders, and another kind of file
        source["path"] = str(tmp_path / "text" / "*.jsonl")
        assert "lies within" not in refused(tmp_path, data=inside, tokenizer=NOT_THERE)
        source |= {"path": str(tmp_path / "text"), "kind": "parquet"}
        assert "no file at" in refused(tmp_path, data=inside)


def test_a_place_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for out in ("taken", "taken/corpus"):
        said = refused(tmp_path, data={"out": str(tmp_path / out)})
        assert f"{tmp_path / 'taken'} is a file" in said and "data.out" in said


def test_a_variable_that_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is set is replaced, so that the same page serves several machines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCRATCH", raising=False)
    for out in ("$SCRATCH/corpus", "a/${SCRATCH}"):
        said = refused(tmp_path, data={"out": out})
        assert said.startswith("data.out: the variable $SCRATCH is not set") and "环境变量" in said
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    monkeypatch.setenv("SCRATCH", str(tmp_path / "text" / "a.jsonl"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "text" / "a.jsonl"))
    assert "is a file" in refused(tmp_path, data={"out": "$SCRATCH/corpus"})
    (tmp_path / "x语料").write_text("")
    monkeypatch.setenv("SCRATCH", str(tmp_path / "x"))  # a name is of ASCII
    assert "x语料 is a file" in refused(tmp_path, data={"out": "$SCRATCH语料/corpus"})


def test_what_is_not_there_is_called_by_its_name(tmp_path: Path) -> None:
    said = refused(tmp_path, tokenizer={"kind": "cpm", "user_dictionary": "nowhere.txt"})
    assert "tokenizer.user_dictionary: there is no file" in said and "用户词典" in said


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    """To open one waits for a writer, for ever."""
    (tmp_path / "text").mkdir()
    os.mkfifo(tmp_path / "text" / "b.jsonl")
    said = refused(tmp_path)
    assert "source 'mine': " in said and "b.jsonl is a pipe or a device" in said
