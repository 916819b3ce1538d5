"""Promise: a run of any objective goes through the same train(): it learns, layouts agree, a resume
goes on as if nothing had been, and a corpus without what the objective reads is refused by the key
that builds it. Two processes, against one where it says so: 1e-5 relative in fp32, as the order of
sums differs."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig
from configs.load import ConfigError, from_dict
from configs.run import RunConfig
from data_pipeline.build import build
from pretrain.corpora import changes, open_corpora
from tests.run_jobs import losses, metrics
from tests.worlds import World

GO = "tests.run_jobs:go"
SIZES = {"vocab": 600, "hidden": 32, "layers": 2, "heads": 2, "head_dim": 16, "ffn": 64}
OFF = {"dropout": 0.0, "attention_dropout": 0.0}
ROFORMER = SIZES | OFF | {"family": "roformer", "version": 1}
T5 = SIZES | OFF | {"family": "t5_pegasus"}
PAIRS = {"seq_len": 64, "target_len": 32}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "causal": {
        "model": SIZES | OFF | {"family": "cpm", "positions": 64},
        "objective": {"name": "causal"},
        "data": {"seq_len": 48},
    },
    "masked": {
        "model": ROFORMER,
        "objective": {"name": "masked"},
        "data": {"seq_len": 48},
    },
    "pseudo_summary": {
        "model": T5,
        "objective": {"name": "pseudo_summary", "source_tokens": 64, "target_tokens": 32},
        "data": PAIRS,
    },
    "span_corruption": {
        "model": T5,
        "objective": {"name": "span_corruption"},
        "data": PAIRS,
    },
    "prefix": {"model": T5, "objective": {"name": "prefix"}, "data": PAIRS},
    "pairs": {
        "model": T5,
        "objective": {
            "name": "pairs", "source": ["text"], "target": ["title"],
            "source_tokens": 48, "target_tokens": 16,
        },
        "data": PAIRS,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 150 documents of the shipped sample, 75 with named fields, 500 tokens of words,
    with all that can lie beside an index. Documents with fields have no gap sentences."""
    folder = tmp_path_factory.mktemp("words")
    sample = Path(__file__).parent.parent / "data_pipeline" / "sample" / "sample.jsonl"
    lines = [json.loads(line) for line in sample.read_text("utf-8").splitlines()]
    plain = [{"text": line["text"]} for line in lines[::9]]
    fields = [{"title": line["text"][:12], "text": line["text"]} for line in lines[4::18]]
    sources = []
    for name, texts in (("plain", plain), ("fields", fields)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts), "utf-8")
        sources.append({"kind": "jsonl", "name": name, "path": str(path)})
    sources[1]["fields"] = ["title", "text"]
    config = {
        "data": {"out": str(folder / "corpus"), "sources": sources, "workers": 1},
        "clean": {"min_characters": 10},
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "wordpiece", "vocab_size": 500},
        "encode": {"pseudo_summary": True},
    }
    build(from_dict(CorpusConfig, config))
    return folder / "corpus"


def page(run: Path, corpus: Path, name: str, steps: int = 30) -> dict[str, Any]:
    sections = copy.deepcopy(OBJECTIVES[name])
    return {
        "model": sections["model"],
        "objective": sections["objective"],
        "data": {"train": [{"corpus": str(corpus)}]} | sections["data"],
        "batch": {"samples": 8, "micro": 2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 5},
        "precision": "fp32",
        "run": {
            "out": str(run), "steps": steps, "log_every_steps": 5, "validate_samples": 4,
            "validate_every_steps": steps,
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", ["masked", "pseudo_summary"])
def test_a_run_on_two_processes_is_the_run_on_one(
    tmp_path: Path, corpus: Path, world1: World, world2: World, name: str
) -> None:
    world2.run(GO, config=page(tmp_path / "two", corpus, name))
    found = losses(tmp_path / "two")
    assert len(found) == 30
    assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - 0.3  # it learns
    last = metrics(tmp_path / "two")[-1]
    assert last["valid_loss"] < found[0]
    # Stopped at step 9 on one process, resumed on two with another micro-batch.
    half = page(tmp_path / "one", corpus, name)
    half["batch"]["micro"] = 4
    world1.run(GO, config=half | {"run": half["run"] | {"stop_at_step": 9}})
    world2.run(GO, config=half)
    assert losses(tmp_path / "one") == pytest.approx(found, rel=1e-5)


CHAIN = [(2, 0, 1), (1, 1, 1), (2, 2, 1), (2, 3, 1), (2, 0, 2), (1, 1, 1), (2, 0, 1)]
"""Processes, ZeRO stage and tensor parallelism, four steps each: 2 -> 1 -> 2, 0 -> 1 -> 2 -> 3 -> 0
and back, 1 -> 2 -> 1."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "masked", "pseudo_summary"])
def test_a_run_goes_through_every_layout(
    tmp_path: Path, corpus: Path, world1: World, world2: World, name: str
) -> None:
    """The run of one process that never changed is what it is compared with."""
    whole, chain = (page(tmp_path / run, corpus, name, 28) for run in ("whole", "chain"))
    world1.run(GO, config=whole)
    for number, (processes, zero, tensor) in enumerate(CHAIN, 1):
        chain["parallel"] = {"zero": zero, "tensor": tensor}
        stop = {"stop_at_step": 4 * number} if number < len(CHAIN) else {}
        {1: world1, 2: world2}[processes].run(GO, config=chain | {"run": chain["run"] | stop})
    assert losses(tmp_path / "chain") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    seen = [[(line["samples"], line["tokens"]) for line in metrics(tmp_path / run)[-28:]]
            for run in ("chain", "whole")]  # fmt: skip
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["span_corruption", "prefix", "pairs"])
def test_the_other_objectives_learn(tmp_path: Path, corpus: Path, world1: World, name: str) -> None:
    world1.run(GO, config=page(tmp_path, corpus, name, steps=20))
    found = losses(tmp_path)
    assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - 0.1


@pytest.mark.parametrize(
    ("name", "entry", "key"),
    [
        ("masked", "boundaries", r"encode\.boundaries=true"),
        ("pseudo_summary", "gaps", r"encode\.pseudo_summary=true"),
        ("pairs", "fields", r"`fields` of a source"),
    ],
)
def test_a_corpus_without_what_is_read_is_refused_by_its_key(
    tmp_path: Path, corpus: Path, name: str, entry: str, key: str
) -> None:
    config = from_dict(RunConfig, page(tmp_path, corpus, name))
    whole = open_corpora(config.data, config.objective, 1, 600)
    assert len(whole.said()) == (name != "masked")  # windows are always full
    assert all(re.search(r"[\d,]+ rows .*% filled, [\d,]+ pairs", said) for said in whole.said())
    without = tmp_path / "without"
    shutil.copytree(corpus, without)
    manifest = json.loads((without / "manifest.json").read_text("utf-8"))
    for known in manifest["splits"].values():
        del known[entry]
    (without / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    mixture = page(tmp_path, corpus, name)
    mixture["data"]["train"].append({"corpus": str(without)})
    config = from_dict(RunConfig, mixture)
    with pytest.raises(ConfigError, match=f"without has no .* files .*{key}"):
        open_corpora(config.data, config.objective, 1, 600)


def test_packed_rows_are_told(tmp_path: Path, corpus: Path) -> None:
    packed = page(tmp_path, corpus, "masked")
    packed["data"]["packing"] = "best_fit"
    config = from_dict(RunConfig, packed)
    (said,) = open_corpora(config.data, config.objective, 1, 600).said()
    assert re.search(r"rows \(best_fit\), \d\d\.\d% filled, \d+ of \d+ documents cut", said)


def test_a_resume_with_another_objective_is_refused(tmp_path: Path, corpus: Path) -> None:
    def record(**changed: Any) -> list[dict[str, Any]]:
        asked = page(tmp_path, corpus, "masked")
        asked["objective"] |= changed
        config = from_dict(RunConfig, asked)
        found = open_corpora(config.data, config.objective, 1, 600).record
        return list(json.loads(json.dumps(found)))  # as a checkpoint keeps it

    begun = record()
    assert changes(begun, record()) == []
    (sentence,) = changes(begun, record(ratio=0.2))
    assert re.search("ratio of .* differ from what the run was started with", sentence)
    older = [{key: value for key, value in begun[0].items() if key != "objective"}]
    assert changes(older, record()) == []  # a checkpoint from before this was kept


def test_a_changed_side_file_is_refused(tmp_path: Path, corpus: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(corpus, changed)
    path = changed / "train.marks"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    config = from_dict(RunConfig, page(tmp_path, changed, "masked"))
    with pytest.raises(ConfigError, match=r"train\.marks: the content has the fingerprint"):
        open_corpora(config.data, config.objective, 1, 600)
    path.unlink()
    with pytest.raises(ConfigError, match=r"train\.marks is missing"):
        open_corpora(config.data, config.objective, 1, 600)


def refused(page: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_dict(RunConfig, page)


def test_pages_that_fit_no_objective_are_sentences(tmp_path: Path, corpus: Path) -> None:
    wrong = page(tmp_path, corpus, "masked")
    wrong["model"] = T5
    refused(wrong, "objective.name: is masked, which trains roformer; model.family is t5_pegasus")
    wrong = page(tmp_path, corpus, "prefix")
    wrong["data"]["packing"] = "best_fit"
    refused(wrong, "data.packing: is best_fit, objective.name=prefix needs one of windows")
    wrong = page(tmp_path, corpus, "pseudo_summary")
    del wrong["data"]["target_len"]
    refused(wrong, "data.target_len: must be given for objective.name=pseudo_summary")
    wrong = page(tmp_path, corpus, "pairs")
    wrong["objective"]["source_tokens"] = 99
    refused(wrong, "data.seq_len: is 64, objective.source_tokens=99 must fit in it")
    wrong["objective"] = {"name": "pairs", "source": ["a"], "target": ["a"]}
    refused(wrong, "source, target: both name a")
    wrong = page(tmp_path, corpus, "masked")
    wrong["data"]["target_len"] = 8
    refused(wrong, "data.target_len: is 8, objective.name=masked has no target")
    wrong["objective"]["ratio"] = 1.0
    refused(wrong, "objective.ratio: is 1.0, must lie between 0 and 1")
    wrong = page(tmp_path, corpus, "masked")
    wrong["objective"]["document_boundaries"] = False
    wrong["data"]["packing"] = "documents"
    refused(wrong, "objective.document_boundaries=false reads the stream in windows")


def test_corpora_that_fit_no_objective_are_sentences(tmp_path: Path, corpus: Path) -> None:
    def opened(name: str, vocab: int = 600, **changes: Any) -> None:
        sections = page(tmp_path, corpus, name)
        for section, values in changes.items():
            sections[section] |= values
        config = from_dict(RunConfig, sections)
        open_corpora(config.data, config.objective, 1, vocab)

    with pytest.raises(ConfigError, match=r"objective\.target: names gist.* has the fields"):
        opened("pairs", objective={"target": ["gist"]})
    with pytest.raises(ConfigError, match=r"model\.vocab: is 500, rows of .* need . sentinels"):
        opened("span_corruption", vocab=500)
    with pytest.raises(ConfigError, match=r"data\.seq_len, data\.target_len: .* too short"):
        opened("prefix", data={"seq_len": 3, "target_len": 1})
