"""What a user gets wrong in a corpus page is one sentence that names the key to change."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig
from configs.load import ConfigError, from_dict, load
from data_pipeline import build

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data_pipeline" / "sample" / "sample.jsonl"
POEMS = [line for line in SAMPLE.read_text("utf-8").splitlines() if '"poems"' in line][:40]


def page(folder: Path, **sections: Any) -> dict[str, Any]:
    path = folder / "text.jsonl"
    if not path.exists():
        path.write_text("\n".join(POEMS), "utf-8")
    source = {"kind": "jsonl", "name": "s", "path": str(path)}
    data: dict[str, Any] = {
        "data": {"out": str(folder / "c"), "sources": [source], "workers": 1},
        "split": {"valid_fraction": 0.2},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 290},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if name != "split" else section
    return data


def said(folder: Path, **sections: Any) -> str:
    with pytest.raises(ValueError) as error:
        build.build(from_dict(CorpusConfig, page(folder, **sections)))
    assert "\n" not in str(error.value)
    assert not (folder / "c" / "manifest.json").exists()
    return str(error.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_text_is_to_blame_for(workers: int, tmp_path: Path) -> None:
    """Said in the same words whether it happened here or in a worker."""
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a"}\n{"texts": "b"}\n')
    two = tmp_path / "two.jsonl"
    two.write_text('{"text": "a"}\n' * 100_000)
    sources = [
        {"kind": "jsonl", "name": "one", "path": str(one)},
        {"kind": "jsonl", "name": "two", "path": str(two)},
    ]
    data = {"sources": sources, "workers": workers, "task_mb": 1, "bad_lines": "stop"}
    assert "one.jsonl, line 2, byte 14: the line has no text" in said(tmp_path, data=data)


def test_an_empty_corpus_says_what_emptied_it(tmp_path: Path) -> None:
    sentence = said(tmp_path, clean={"min_characters": 2000})
    assert sentence.startswith("no document is left of 40: 40 too_short; loosen clean")
    (tmp_path / "text.jsonl").write_text("")
    assert said(tmp_path).startswith("the sources hold no document")


def test_an_empty_split(tmp_path: Path) -> None:
    assert "the valid split is empty" in said(tmp_path, split={"valid_fraction": 1e-9})
    assert "the train split is empty" in said(tmp_path, split={"valid_fraction": 1 - 1e-9})
    assert "valid_documents is 40, but there are only 40" in said(
        tmp_path, split={"valid_documents": 40}
    )


@pytest.mark.parametrize("kind", ["byte_bpe", "cpm"])
def test_a_vocabulary_larger_than_the_text_supports(kind: str, tmp_path: Path) -> None:
    sentence = said(tmp_path, tokenizer={"kind": kind, "vocab_size": 9000})
    assert "9000" in sentence.replace(",", "")
    assert "vocab_size" in sentence


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    model = {"vocab_size": None, "model": "/nowhere/chinese_vocab.model"}
    assert "tokenizer.model: there is no file" in said(tmp_path, tokenizer=model)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sentence = said(tmp_path, data={"out": str(tmp_path / "file" / "c")})
    assert "file is a file; the corpus needs a folder" in sentence
    assert "data.out" in sentence


def test_a_full_disk_is_a_sentence_and_the_build_goes_on_later(tmp_path: Path) -> None:
    """No file may grow beyond 4 kB: what a full disk does, at the same system call."""
    config = page(tmp_path)
    (tmp_path / "page.json").write_text(json.dumps(config))
    code = (
        "import json, sys\n"
        "from configs.load import from_dict\n"
        "from configs.corpus import CorpusConfig\n"
        "from data_pipeline import build\n"
        f"page = json.load(open({str(tmp_path / 'page.json')!r}))\n"
        "try:\n"
        "    build.build(from_dict(CorpusConfig, page))\n"
        "except ValueError as error:\n"
        "    sys.exit(str(error))\n"
    )

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=small_files,
    )
    assert done.returncode == 1, done.stderr
    assert "reading or writing failed: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert build.build(from_dict(CorpusConfig, config))["splits"]["train"]["documents"]


PAGES = [
    ({"data": {"sources": []}}, "data.sources: is empty"),
    ({"data": {"workers": -1}}, "data.workers: is -1"),
    ({"data": {"task_mb": 0}}, "data.task_mb: is 0"),
    ({"data": {"worker": 1}}, "data.worker: unknown key (未知的键); did you mean 'workers'?"),
    ({"data": {"out": " "}}, "data.out: is empty"),
    ({"split": {}}, "split.valid_fraction, valid_documents: give exactly one"),
    ({"split": {"valid_fraction": 1.5}}, "split.valid_fraction: is 1.5"),
    ({"split": {"valid_fraction": 0.1, "seed": -1}}, "split.seed: is -1"),
    ({"split": {"valid_documents": -1}}, "split.valid_documents: is -1"),
    ({"clean": {"min_han_ratio": 2.0}}, "clean.min_han_ratio: is 2.0"),
    ({"clean": {"min_characters": 0}}, "clean.min_characters: is 0"),
    ({"clean": {"max_characters": 5}}, "clean.max_characters: is 5, must be at least"),
    ({"tokenizer": {"vocab_size": None}}, "tokenizer.vocab_size, model: give exactly one"),
    ({"tokenizer": {"model": "m"}}, "tokenizer.vocab_size, model: give exactly one"),
    ({"tokenizer": {"vocab_size": 3}}, "tokenizer.vocab_size: is 3"),
    ({"tokenizer": {"sample_bytes": 10**9}}, "tokenizer.sample_bytes: is 1000000000"),
    ({"tokenizer": {"kind": "cpn"}}, "did you mean 'cpm'?"),
]


@pytest.mark.parametrize(("sections", "sentence"), PAGES, ids=[row[1][:40] for row in PAGES])
def test_a_page_that_cannot_be_built(
    sections: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(CorpusConfig, page(tmp_path, **sections))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": ""}, "data.sources.0.name: is empty"),
        ({"path": ""}, "data.sources.0.path: is empty"),
        ({"path": []}, "data.sources.0.path: is empty"),
        ({"text_field": ""}, "data.sources.0.text_field: is empty"),
        ({"kind": "datasets", "path": ["a", "b"]}, "data.sources.0.path: lists 2 datasets"),
        ({"kind": "parkett"}, "data.sources.0.kind: is 'parkett'"),
    ],
)
def test_a_source_that_cannot_be(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    data = page(tmp_path)
    data["data"]["sources"][0].update(change)
    with pytest.raises(ConfigError) as error:
        from_dict(CorpusConfig, data)
    assert sentence in str(error.value)


def test_one_name_for_two_sources(tmp_path: Path) -> None:
    data = page(tmp_path)
    data["data"]["sources"] *= 2
    with pytest.raises(ConfigError, match="the name 's' stands 2 times"):
        from_dict(CorpusConfig, data)


def test_every_shipped_corpus_page_loads() -> None:
    pages = sorted((ROOT / "configs" / "corpora").glob("*.yaml"))
    assert pages
    for path in pages:
        load(path, CorpusConfig)
