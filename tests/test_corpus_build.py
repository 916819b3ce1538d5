"""A corpus is what its text and its page say: the same bytes for any workers, none done twice."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.corpus import CorpusConfig
from configs.load import from_dict
from data_pipeline import (
    blocks,
    build,
    clean,
    executors,
    ingest,
    progress,
    tokenizer,
)
from data_pipeline.index import Index
from data_pipeline.shards import CorpusError, records, shard

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data_pipeline" / "sample" / "sample.jsonl"


def write_source(path: Path, copies: int = 1, every: int = 9) -> Path:
    """Documents of the sample; each further copy has its sentences in another order."""
    draw = random.Random(5)
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for line in SAMPLE.read_text("utf-8").splitlines()[::every]:
                record = json.loads(line)
                if copy:
                    sentences = record["text"].split("。")
                    record["text"] = f"第{copy}版" + "。".join(
                        draw.sample(sentences, len(sentences))
                    )
                    record["id"] += f"/{copy}"
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def page(out: Path, *sources: Any, **sections: Any) -> CorpusConfig:
    """A corpus page; keyword arguments change sections."""
    listed = [
        source
        if isinstance(source, dict)
        else {"kind": "jsonl", "name": f"s{n}", "path": str(source)}
        for n, source in enumerate(sources)
    ]
    data = {
        "data": {"out": str(out), "sources": listed, "workers": 2, "task_mb": 1},
        "clean": {"min_characters": 10},
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 320},
    }
    for name, section in sections.items():
        merged = name not in ("split", "decontaminate")
        data[name] = {**data.get(name, {}), **section} if merged else section
    return from_dict(CorpusConfig, data)


def contents(out: Path) -> dict[str, bytes]:
    """Every file a user gets."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "stages" not in path.parts and path.name != ".lock"
    }


def kept(out: Path, split: str) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob(f"documents/{split}-*")) for row in records(path)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "text.jsonl", copies=6, every=3)


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "corpus"
    build.build(page(out, source))
    return out


def test_the_manifest_says_what_is_on_the_disk(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    words = tokenizer.load(built / "tokenizer")
    assert manifest["tokenizer"]["fingerprint"] == words.fingerprint
    for split in ("train", "valid"):
        said, index, rows = manifest["splits"][split], Index(built / split), kept(built, split)
        assert said["documents"] == index.documents == len(rows) > 0
        assert said["tokens"] == index.tokens == int(index.lengths.sum())
        assert said["characters"] == sum(len(row["text"]) for row in rows)
        assert said["bytes"] == sum(len(row["text"].encode()) for row in rows)
    rejected = sum(reason["documents"] for reason in manifest["rejects"].values())
    assert manifest["read"]["documents"] == rejected + sum(
        split["documents"] for split in manifest["splits"].values()
    )
    for reason, said in manifest["rejects"].items():
        aside = [row for path in (built / "rejects" / reason).iterdir() for row in records(path)]
        assert len(aside) == said["documents"]
        assert sum(len(row["text"]) for row in aside) == said["characters"]


def test_every_document_comes_back_from_its_tokens(built: Path) -> None:
    words = tokenizer.load(built / "tokenizer")
    for split in ("train", "valid"):
        index = Index(built / split)
        for number, row in enumerate(kept(built, split)):
            ids = np.asarray(index.document(number))
            assert ids[-1] == words.eod_id
            assert words.eod_id not in ids[:-1]
            assert words.decode(ids[:-1]) == row["text"]


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    source: Path, built: Path, tmp_path: Path
) -> None:
    build.build(page(tmp_path / "c", source, data={"workers": 1}))
    one, two = contents(tmp_path / "c"), contents(built)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert len(list(built.glob("documents/train-*"))) > 1  # there was work to share


def test_a_second_run_does_nothing(
    source: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.name != ".lock"}

    before = times()
    manifest = build.build(page(built, source))
    assert "nothing to do" in capsys.readouterr().err
    assert times() == before
    assert manifest == json.loads((built / "manifest.json").read_text())


def test_a_changed_page_repeats_only_what_depends_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "text.jsonl")

    def done_again(**sections: Any) -> set[str]:
        build.build(page(tmp_path / "c", source, **{"data": {"workers": 1}, **sections}), True)
        lines = capsys.readouterr().err.splitlines()
        before = {line.split()[0] for line in lines if line.endswith("done before")}
        return {"clean", "duplicates", "divide", "tokenizer", "encode"} - before

    assert len(done_again()) == 5
    assert done_again(tokenizer={"vocab_size": 330}) == {"tokenizer", "encode"}
    again = {"tokenizer": {"vocab_size": 330}}
    assert done_again(**again, split={"valid_fraction": 0.2}) == {"divide", "tokenizer", "encode"}
    assert len(done_again(**again, clean={"min_characters": 12})) == 5
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "c" / "stages").glob("*-*")}
    assert len(list((tmp_path / "c" / "stages").glob("*-*"))) == len(names) == 5  # no old stages


def test_other_text_is_another_fingerprint(source: Path, built: Path, tmp_path: Path) -> None:
    lines = source.read_text("utf-8").splitlines()
    other = tmp_path / "text.jsonl"
    other.write_text("\n".join([*lines[:-1], lines[-1].replace("。", "！", 1)]) + "\n", "utf-8")
    manifest = build.build(page(tmp_path / "c", other))
    assert (
        manifest["fingerprint"] != json.loads((built / "manifest.json").read_text())["fingerprint"]
    )


def test_a_source_that_changed_is_read_again(tmp_path: Path) -> None:
    text = write_source(tmp_path / "text.jsonl")
    config = page(tmp_path / "c", text, data={"workers": 1})
    first = build.build(config)
    with text.open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"text": "后来又添了一篇，比原来的多一篇。"}, ensure_ascii=False) + "\n"
        )
    second = build.build(config)
    assert second["read"]["documents"] == first["read"]["documents"] + 1
    assert second["fingerprint"] != first["fingerprint"]


def test_another_file_of_the_same_size_and_time_is_read(tmp_path: Path) -> None:
    text = write_source(tmp_path / "text.jsonl")
    config = page(tmp_path / "c", text, data={"workers": 1})
    first, time_ns = build.build(config), text.stat().st_mtime_ns
    text.write_text(text.read_text("utf-8").replace("。", "，"), "utf-8")
    os.utime(text, ns=(time_ns, time_ns))
    assert build.build(config)["fingerprint"] != first["fingerprint"]


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_source(tmp_path / "text.jsonl")
    config, read = page(tmp_path / "c", text, data={"workers": 1}), ingest.read

    def read_while_written(*parts: Any) -> Iterator[ingest.Document]:
        yield from read(*parts)
        with text.open("a", encoding="utf-8") as file:
            file.write('{"text": "后来又添了一篇，比原来的多一篇。"}\n')

    monkeypatch.setattr(ingest, "read", read_while_written)
    with pytest.raises(CorpusError, match=r"data\.sources changed while it was read"):
        build.build(config)
    monkeypatch.undo()
    assert build.build(config)["read"]["documents"] == len(text.read_text("utf-8").splitlines())


def test_a_shard_that_is_cut_short_is_not_a_shorter_shard(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl.zst"
    with shard(path) as add:
        for number in range(2000):
            add({"text": f"第{number}篇：床前明月光"})
    whole = path.read_bytes()
    for size in (0, 3, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match="is cut short"):
            list(records(path))


def test_a_note_of_completion_that_says_nothing_is_not_believed(tmp_path: Path) -> None:
    config = page(tmp_path / "c", write_source(tmp_path / "text.jsonl"), data={"workers": 1})
    manifest = build.build(config)
    (tmp_path / "c" / "stages" / "built.json").write_text("{}")
    assert build.build(config) == manifest


def test_a_dump_is_refused_before_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalising takes many times a text's bytes: one file of a gigabyte would kill a worker."""
    looked: list[int] = []
    look = clean._look_at
    monkeypatch.setattr(clean, "_look_at", lambda some: looked.extend(map(len, some)) or look(some))
    text = write_source(tmp_path / "text.jsonl")
    with text.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "长" * 100_001}) + "\n")
    rules = {"max_characters": 50_000}
    manifest = build.build(page(tmp_path / "c", text, data={"workers": 1}, clean=rules))
    assert manifest["rejects"]["too_long"] == {"documents": 1, "characters": 100_001}
    assert max(looked) < 100_000


def test_a_log_file_hears_of_a_long_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FILE_EVERY_S", 0.01)
    said = io.StringIO()
    with progress.Progress(said).watch("clean", 4e6)(tmp_path, 1):
        (tmp_path / "progress").mkdir()
        (tmp_path / "progress" / "00000").write_text("1000000")
        while "] 25% " not in " ".join(said.getvalue().split()):
            time.sleep(0.01)
    assert "\r" not in said.getvalue()


def test_a_missing_file_is_made_again(tmp_path: Path) -> None:
    config = page(tmp_path / "c", write_source(tmp_path / "text.jsonl"), data={"workers": 1})
    build.build(config)
    whole = contents(tmp_path / "c")
    (tmp_path / "c" / "train.bin").unlink()
    build.build(config)
    assert contents(tmp_path / "c") == whole


def test_train_and_valid_share_nothing_and_documents_keep_their_side(
    source: Path, built: Path, tmp_path: Path
) -> None:
    letters = {
        split: {"".join(filter(str.isalnum, row["text"])) for row in kept(built, split)}
        for split in ("train", "valid")
    }
    assert not letters["train"] & letters["valid"]
    share = len(letters["valid"]) / sum(map(len, letters.values()))
    assert 0.05 < share < 0.15  # a tenth of 2,700 documents, give or take eight deviations
    lines = source.read_text("utf-8").splitlines()
    (tmp_path / "half.jsonl").write_text("\n".join(lines[::2]), "utf-8")
    build.build(page(tmp_path / "c", tmp_path / "half.jsonl", data={"workers": 1}))
    for split in ("train", "valid"):
        now = {row["id"] for row in kept(tmp_path / "c", split)}
        assert now <= {row["id"] for row in kept(built, split)}


def test_valid_documents_is_a_number(tmp_path: Path) -> None:
    text = write_source(tmp_path / "text.jsonl")
    manifest = build.build(page(tmp_path / "c", text, split={"valid_documents": 7}))
    assert manifest["splits"]["valid"]["documents"] == 7
    config = page(tmp_path / "c", text, split={"valid_documents": 7, "seed": 1})
    assert (
        build.build(config, replacing=True)["splits"]["valid"]["fingerprint"]
        != (manifest["splits"]["valid"]["fingerprint"])
    )


def test_nothing_held_out_is_an_empty_split(tmp_path: Path) -> None:
    text = write_source(tmp_path / "text.jsonl")
    manifest = build.build(page(tmp_path / "c", text, split={"valid_fraction": 0.0}))
    assert manifest["splits"]["valid"]["documents"] == 0


def test_the_published_tokenizer_of_a_corpus_serves_another(built: Path, tmp_path: Path) -> None:
    text = write_source(tmp_path / "text.jsonl")
    config = page(
        tmp_path / "c", text, tokenizer={"vocab_size": None, "model": str(built / "tokenizer")}
    )
    fingerprint = tokenizer.load(built / "tokenizer").fingerprint
    assert build.build(config)["tokenizer"]["fingerprint"] == fingerprint


# ---- killed builds


BUILD = """
import sys
from configs.load import load
from configs.corpus import CorpusConfig
from data_pipeline import build
if __name__ == "__main__":
    print("ready", flush=True)
    build.build(load(sys.argv[1], CorpusConfig))
"""


def start(config: CorpusConfig, folder: Path) -> "subprocess.Popen[str]":
    from configs.load import dump

    (folder / "page.yaml").write_text(dump(config), "utf-8")
    (folder / "run.py").write_text(BUILD)
    process = subprocess.Popen(
        [sys.executable, str(folder / "run.py"), str(folder / "page.yaml")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill_and_finish(
    kills: int, seed: int, source: Path, built: Path, folder: Path, **sections: Any
) -> None:
    """Kill a build again and again (its group, or only its main process), then let it finish. The
    moment is drawn in files written, so that it falls within the work on any machine."""
    draw = random.Random(seed)
    out = folder / built.name
    config = page(out, source, data={"workers": 1 + seed % 2}, **sections)

    def files() -> int:
        return sum(len(names) for _, _, names in os.walk(out))

    whole = sum(len(names) for _, _, names in os.walk(built))
    struck = 0
    for attempt in range(kills):
        moment = files() + draw.randrange(1, max(whole - files(), 10))
        process = start(config, folder)
        while process.poll() is None and files() < moment:
            time.sleep(0.001)
        if process.poll() is None:
            struck += 1
            group = attempt % 3 < 2
            (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # done before the blow: the next ones hit a fresh build
            (out / "manifest.json").unlink()
    process = start(config, folder)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert contents(out) == contents(built)
    assert not list(out.rglob("*.partial"))
    assert struck > 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_to_the_same_bytes(
    seed: int, source: Path, built: Path, tmp_path: Path
) -> None:
    kill_and_finish(3, seed, source, built, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 16))
def test_thirty_kills(seed: int, source: Path, built: Path, tmp_path: Path) -> None:
    kill_and_finish(5, seed, source, built, tmp_path)


def test_two_builds_in_one_folder_are_refused(tmp_path: Path) -> None:
    config = page(tmp_path / "c", write_source(tmp_path / "text.jsonl"))
    (tmp_path / "c").mkdir()
    with (
        build.only_builder(tmp_path / "c"),
        pytest.raises(CorpusError, match=r"another build is at work in .*data\.out"),
    ):
        build.build(config)
    build.build(config)


class Suicide(blocks.Block):
    """A block whose worker dies as if the kernel had killed it."""

    name = "suicide"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from ()


def test_a_worker_that_is_killed_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"worker process was killed .*data\.workers"):
        blocks.run(
            tmp_path, "x", [Suicide()], 3, executors.local(2), [], progress.Progress().watch("x", 0)
        )


def test_building_imports_no_torch(tmp_path: Path) -> None:
    config = page(tmp_path / "c", write_source(tmp_path / "text.jsonl"), data={"workers": 1})
    process = start(config, tmp_path)
    process.communicate(timeout=120)
    code = (
        BUILD
        + '    assert "numpy" in sys.modules and "torch" not in sys.modules, "torch came in"\n'
    )
    (tmp_path / "c" / "manifest.json").unlink()
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "page.yaml")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
