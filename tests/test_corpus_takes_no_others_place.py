"""A build takes nobody's place: neither that of files that are not its own, nor, unasked, that of a
corpus of another page."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig
from configs.load import dump, load
from data_pipeline import build
from data_pipeline.shards import CorpusError
from launch import cli
from tests.test_corpus_build import contents, page, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "text.jsonl", every=29)


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "corpus"
    build.build(of(out, source))
    return out


@pytest.fixture
def standing(built: Path, tmp_path: Path) -> Path:
    """A whole corpus that a test may spoil."""
    return shutil.copytree(built, tmp_path / "corpus")


def of(out: Path, source: Path, **sections: Any) -> CorpusConfig:
    return page(out, source, **{"data": {"workers": 1}, **sections})


def others(source: Path, out: Path) -> list[CorpusConfig]:
    """Pages of other corpora in the same folder."""
    more = {"kind": "jsonl", "name": "more", "path": str(source)}
    return [
        of(out, source, tokenizer={"vocab_size": 330}),
        page(out, source, more, data={"workers": 1}),
        of(out, source, clean={"min_characters": 12}, split={"valid_fraction": 0.2}),
    ]


@pytest.mark.parametrize("word", [[], ["--replace"]])
@pytest.mark.parametrize("name", ["rejects/my.txt", "documents/paper.txt", "train.bin", "stages/x"])
def test_files_that_are_no_corpus_are_left_alone(
    name: str, word: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junk = tmp_path / "junk"
    for file in (name, "notes.txt"):
        (junk / file).parent.mkdir(parents=True, exist_ok=True)
        (junk / file).write_text("years of work")
    (tmp_path / "page.yaml").write_text(dump(of(tmp_path / "c", source)), "utf-8")
    line = ["corpus", str(tmp_path / "page.yaml"), f"data.out={junk}", *word]
    assert cli.main(line) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    first = min(Path(name).parts[0], "notes.txt")
    assert f"data.out '{junk}' is no corpus, but holds '{first}' and 1 more" in said
    assert {str(p.relative_to(junk)) for p in junk.rglob("*") if p.is_file()} == {name, "notes.txt"}
    assert (junk / name).read_text() == "years of work"


def test_a_checkpoint_is_no_corpus(source: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(CorpusError, match=r"is no corpus"):
        build.build(of(tmp_path, source))
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(CorpusError, match=r"is no corpus"):
        build.build(of(tmp_path, source))


def test_a_corpus_of_another_page_stays(
    source: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(built)
    said = []
    for number, config in enumerate(others(source, built)):
        (tmp_path / f"{number}.yaml").write_text(dump(config), "utf-8")
        assert cli.main(["corpus", str(tmp_path / f"{number}.yaml")]) == 2
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert "(tokenizer.vocab_size is 320 there and 330 here)" in said[0]
    assert 'data.sources.1.kind is null there and "jsonl" here; ' in said[1]
    assert "split.valid_fraction is 0.1 there and 0.2 here; 2 keys differ" in said[2]
    assert all("--replace" in one for one in said)
    assert contents(built) == before
    build.build(of(built, source, data={"workers": 2}))  # who works is no matter
    assert contents(built) == before


def test_with_the_word_it_is_replaced(source: Path, standing: Path, tmp_path: Path) -> None:
    other = others(source, standing)[0]
    (tmp_path / "page.yaml").write_text(dump(other), "utf-8")
    assert cli.main(["corpus", str(tmp_path / "page.yaml"), "--replace"]) == 0
    manifest = json.loads((standing / "manifest.json").read_bytes())
    assert manifest["tokenizer"]["vocab_size"] == 330
    assert load(standing / "stages" / "page.yaml", CorpusConfig) == other
    with pytest.raises(CorpusError, match="is 330 there and 320 here"):
        build.build(of(standing, source))


def test_a_corpus_encoded_again_takes_no_place_either(
    source: Path, built: Path, standing: Path
) -> None:
    config = of(standing, source, data={"sources": [], "documents": str(built)})
    with pytest.raises(CorpusError, match=r"of another page \(data\.sources"):
        build.build(config)


@pytest.mark.parametrize("word", [False, True])
def test_a_corpus_is_not_built_of_its_own_files(word: bool, source: Path, standing: Path) -> None:
    """Documents that this page drops would be lost."""
    before = contents(standing)
    (standing.parent / "link").symlink_to(standing)
    for path in ("corpus/documents", "link/documents/*.zst"):
        own = of(standing, standing.parent / path)
        with pytest.raises(CorpusError, match=r"source 's0' reads files of data\.out itself"):
            build.build(own, replacing=word)
    assert contents(standing) == before


def test_a_corpus_that_names_no_page_is_kept(source: Path, standing: Path) -> None:
    """One of an earlier version, or one whose stages were removed; whole ones are recognised."""
    (standing / "stages" / "page.yaml").unlink()
    build.build(of(standing, source))
    shutil.rmtree(standing / "stages")
    with pytest.raises(CorpusError, match="of what page is not on record"):
        build.build(of(standing, source))


@pytest.mark.parametrize("step", ["publish", "remember"])
def test_a_build_broken_off_among_its_files_goes_on(
    step: str, source: Path, standing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced by another page, killed when the manifest has gone or has just come: the page on
    record is that of the files, so the same page goes on and the old one is refused or begins
    again."""
    config, old = others(source, standing)[0], of(standing, source)
    stop = {"publish": "data_pipeline.publish.describe", "remember": "data_pipeline.build.remember"}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stop[step], killed)
    with pytest.raises(KeyboardInterrupt):
        build.build(config, replacing=True)
    monkeypatch.undo()
    if step == "remember":
        with pytest.raises(CorpusError, match="of another page"):
            build.build(old)
    assert build.build(config)["tokenizer"]["vocab_size"] == 330
