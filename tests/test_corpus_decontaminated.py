"""A document that holds text of an evaluation set leaves the corpus, and what was hit is said."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.dedup import Evaluation
from configs.load import ConfigError
from data_pipeline import build, decontaminate, minhash
from data_pipeline.clean import HAN, normalise
from data_pipeline.shards import CorpusError, records
from tests.test_corpus_build import SAMPLE, contents, kept, page

QUESTION = "小明家里有三只猫和两条狗，请问一共有几条腿？"
WORDS = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
SHORT = "床前明月光，疑是地上霜。"


def write_source(path: Path) -> Path:
    """The sample, and documents that hold an evaluation item with other punctuation, half of one,
    or too little of one."""
    lines = SAMPLE.read_text("utf-8").splitlines()[::5]
    extra = {
        "whole": "课本里的一道题：小明家里有三只猫 和两条狗！请问一共有几条腿？答案是二十。",
        "thirteen": "很久以前，家里有三只猫和两条狗，请问一下许多人都不知道该怎么办才好。",
        "twelve": "很久以前，家里有三只猫和两条狗，请问了许多人都不知道该怎么办才好呢。",
        "short": SHORT + "举头望明月，低头思故乡。这是李白的诗。",
        "english": "关于 internationalization 的中文说明，写给第一次接触这个概念的读者。",
    }
    texts = [json.dumps({"id": k, "text": t}, ensure_ascii=False) for k, t in extra.items()]
    path.write_text("\n".join([*lines[:60], *texts, *lines[60:]]) + "\n", "utf-8")
    return path


def write_sets(folder: Path) -> list[dict[str, Any]]:
    questions = [
        {"id": 7, "question": "无关的问题：今天晚上到底应该吃什么才好呢？", "answer": "面"},
        {"id": 8, "question": QUESTION, "answer": SHORT},
        {"id": 9, "question": "What is internationalization?", "answer": ""},
    ]
    (folder / "q.jsonl").write_text(
        "\n".join(json.dumps(item, ensure_ascii=False, indent=1) for item in questions), "utf-8"
    )
    (folder / "p.tsv").write_text(f"0\t{SHORT}\t{SHORT}\n1\t{QUESTION}\t\n", "utf-8")
    return [
        {"name": "quiz", "path": str(folder / "q.jsonl"), "fields": ["question"]},
        {"name": "pairs", "path": str(folder / "p.tsv"), "fields": [2, "3"]},
    ]


def test_contaminated_documents_go_and_are_reported(tmp_path: Path) -> None:
    source, sets = write_source(tmp_path / "text.jsonl"), write_sets(tmp_path)
    manifest = build.build(page(tmp_path / "c", source, decontaminate=sets[:1]))
    (aside,) = (tmp_path / "c" / "rejects" / "contaminated:quiz").iterdir()
    assert [row["id"] for row in records(aside)] == ["whole", "thirteen"]
    assert manifest["rejects"]["contaminated:quiz"]["documents"] == 2
    assert manifest["contamination"] == {
        "quiz": {"items": 3, "short_items": 1, "hit_documents": 2}  # one item is English
    }
    hits = [r for p in (tmp_path / "c" / "contamination").iterdir() for r in records(p)]
    assert [(hit["document"], hit["items"]) for hit in hits] == [
        ("whole", ["8"]),
        ("thirteen", ["8"]),
    ]
    assert hits[1]["shared"] == "家里有三只猫和两条狗请问一"
    stay = {row["id"] for split in ("train", "valid") for row in kept(tmp_path / "c", split)}
    assert {"twelve", "short", "english"} <= stay
    assert manifest["read"]["documents"] == len(stay) + sum(
        said["documents"] for said in manifest["rejects"].values()
    )


def test_the_bytes_do_not_depend_on_workers_and_a_changed_set_is_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, sets = write_source(tmp_path / "text.jsonl"), write_sets(tmp_path)
    sections = {"decontaminate": sets[1:], "dedup": {"near": {}}}
    first = build.build(page(tmp_path / "a", source, **sections))
    build.build(page(tmp_path / "b", source, **sections, data={"workers": 1}))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert first["contamination"]["pairs"] == {"items": 2, "short_items": 1, "hit_documents": 2}
    assert first["rejects"]["contaminated:pairs"]["documents"] == 2
    (tmp_path / "p.tsv").write_text(f"0\t{SHORT}\t{SHORT}\n", "utf-8")
    capsys.readouterr()
    second = build.build(page(tmp_path / "a", source, **sections))
    assert "contaminated:pairs" not in second["rejects"]
    lines = capsys.readouterr().err.splitlines()
    before = {line.split()[0] for line in lines if line.endswith("done before")}
    assert {"clean", "duplicates", "signatures"} <= before
    assert "contaminated" not in before


def test_a_corpus_built_again_without_sets_has_no_report(tmp_path: Path) -> None:
    source, sets = write_source(tmp_path / "text.jsonl"), write_sets(tmp_path)
    build.build(page(tmp_path / "c", source, decontaminate=sets))
    manifest = build.build(page(tmp_path / "c", source), replacing=True)
    assert "contamination" not in manifest
    assert not (tmp_path / "c" / "contamination").exists()


def test_found_n_grams_equal_a_search_of_strings(tmp_path: Path) -> None:
    draw = random.Random(3)
    texts = [
        normalise(json.loads(line)["text"]).text for line in SAMPLE.read_text("utf-8").splitlines()
    ]
    (tmp_path / "e.txt").write_text("\n".join(text.replace("\n", " ") for text in texts[::9]))
    index = decontaminate.grams(Evaluation("e", str(tmp_path / "e.txt")))

    def grams(text: str) -> list[str]:
        solid = minhash.letters(text).astype("<u4").tobytes().decode("utf-32-le")
        return [solid[k : k + 13] for k in range(len(solid) - 12)]

    def han(gram: str) -> bool:
        return int((minhash.kinds()[minhash.letters(gram)] == HAN).sum()) > 6

    known = {gram for text in texts[::9] for gram in grams(text) if han(gram)}
    assert len(index.hashes) == len(known) > 1000
    hits, lens = 0, decontaminate.Filter([index])
    for text in draw.sample(texts, 400):
        places, hashes = lens.passing(minhash.letters(text))
        found = places[index.find(hashes)[0]].tolist()
        assert found == [k for k, gram in enumerate(grams(text)) if gram in known]
        hits += bool(found)
    assert 20 < hits < 400
    assert len(lens.passing(np.empty(0, np.uint32))[0]) == 0


def test_a_common_phrase_is_no_leak_but_half_an_item_is(tmp_path: Path) -> None:
    phrase = "本法自公布之日起施行原条例同时废止"
    item = f"下列说法正确的是哪一项：{phrase}。甲说从明年开始，乙说从公布那天开始，丙说不知道。"
    (tmp_path / "e.txt").write_text(item, "utf-8")
    laws = [
        {"id": f"law{n}", "text": f"第{n}号令：{phrase}。共计{n}条，{n * 7}款。"} for n in range(12)
    ]
    leaks = [{"id": f"leak{n}", "text": f"{n}年真题{n}：{item}答案{n}"} for n in range(15)]
    one = [{"id": "one", "text": "许多人都在说：乙说从公布那天开始，丙说不知道。也许吧。"}]
    others = [{"id": f"o{n}", "text": f"{WORDS}{n}，{n + 1}。"} for n in range(30)]
    for limit, spared in ((10, 12), (30, 0), (None, 0)):
        source = tmp_path / "text.jsonl"
        source.write_text(
            "\n".join(json.dumps(r, ensure_ascii=False) for r in [*laws, *leaks, *one, *others])
        )
        sets = [{"name": "e", "path": str(tmp_path / "e.txt"), "max_documents": limit}]
        config = page(tmp_path / "c", source, decontaminate=sets, data={"workers": 1})
        said = build.build(config, replacing=True)["contamination"]["e"]
        assert said.get("spared_documents", 0) == spared
        assert said["hit_documents"] == 12 + 15 + 1 - spared
    build.build(page(tmp_path / "d", source, decontaminate=[sets[0] | {"max_documents": 10}]))
    gone = [r["id"] for p in (tmp_path / "d/rejects/contaminated:e").iterdir() for r in records(p)]
    assert sorted(gone) == sorted([r["id"] for r in leaks] + ["one"])
    hits = [r for p in (tmp_path / "d" / "contamination").iterdir() for r in records(p)]
    assert {r["document"] for r in hits if "common" in r} == {r["id"] for r in laws}
    assert phrase[:13] in (tmp_path / "d" / "report.html").read_text("utf-8")


def test_copies_that_stay_are_counted_whatever_was_built_before(tmp_path: Path) -> None:
    """A phrase in 12 equal documents: one document if copies go, common if they stay."""
    phrase = "本法自公布之日起施行原条例同时废止"
    (tmp_path / "e.txt").write_text(f"下列说法正确的是哪一项：{phrase}。甲说从明年开始。", "utf-8")
    texts = [f"第一号令：{phrase}。共计一条。"] * 12 + [f"{WORDS}{n}，{n + 1}。" for n in range(30)]
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sets = [{"name": "e", "path": str(tmp_path / "e.txt"), "max_documents": 10}]
    for exact, spared in ((True, 0), (False, 12), (True, 0)):
        one = {"data": {"workers": 1}, "dedup": {"exact": exact}, "decontaminate": sets}
        said = build.build(page(tmp_path / "c", source, **one), replacing=True)["contamination"]
        assert said["e"].get("spared_documents", 0) == spared


def test_fields_are_found_at_any_depth(tmp_path: Path) -> None:
    nested = {
        "data": [
            {"id": "a", "paragraphs": [{"id": "p", "context": "甲", "qas": [{"question": "乙"}]}]},
            {"paragraphs": [{"context": ["丙", "丁"], "qas": []}]},
        ]
    }
    path = tmp_path / "n.json"
    path.write_text("\ufeff" + json.dumps(nested), "utf-8")
    both = Evaluation("n", str(path), ("context", "question"))
    assert list(decontaminate.items(both)) == [
        ("p", ["甲"]),
        ("p", ["乙"]),
        ("2", ["丙", "丁"]),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "nowhere.jsonl"}, "decontaminate: quiz: there is no file 'nowhere.jsonl'"),
        ({"fields": ["nothing"]}, r"quiz: .* has no field of \['nothing'\]; correct fields"),
        ({"text": '{"question": '}, "quiz: .* cannot be read: "),
    ],
)
def test_a_set_that_cannot_be_read_is_a_sentence(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source, sets = write_source(tmp_path / "text.jsonl"), write_sets(tmp_path)
    if "text" in change:
        Path(sets[0]["path"]).write_text(change.pop("text"))
    quiz = sets[0] | change
    with pytest.raises(CorpusError, match=said):
        build.build(page(tmp_path / "c", source, decontaminate=[quiz], data={"workers": 1}))


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ([{"name": "../x", "path": "x.txt"}], "name: is '../x', must be letters and digits"),
        ([{"name": "x", "path": ""}], "path: is empty"),
        ([{"name": "x", "path": "x.json"}], "fields: is empty"),
        ([{"name": "x", "path": "x.tsv", "fields": ["a"]}], r"must be numbers of columns, and"),
        ([{"name": "x", "path": "x.tsv", "fields": [0, 2]}], r"is \[0, 2\].* and the first is 1"),
        ([{"name": "x", "path": "x.txt", "characters": 4}], r"characters: is 4"),
        ([{"name": "x", "path": "x.txt"}] * 2, "the name 'x' stands 2 times"),
    ],
)
def test_mistakes_in_decontaminate_are_sentences(sets: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        page(Path("c"), Path("t"), decontaminate=sets)
