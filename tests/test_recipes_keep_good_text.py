"""The shipped recipes load, say what they say under any page, and keep clean text of a genre."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from configs.cleaning import Cleaning
from configs.corpus import CorpusConfig
from configs.load import from_dict, load, read_yaml
from configs.quality import Quality
from data_pipeline import build, quality
from data_pipeline.clean import judge, prepared
from data_pipeline.scores import COLUMNS, scores
from launch import grammar
from tests import dev_corpus
from tests.test_corpus_build import ROOT, SAMPLE, kept

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
PAGE = """
base: {recipe}
data: {{out: {out}, sources: [{{kind: jsonl, name: s, path: {source}}}], workers: 1}}
tokenizer: {{kind: byte_bpe, vocab_size: 320}}
split: {{valid_fraction: 0.1}}
"""
MOST_DROPPED = {"web": 0.3, "books": 0.08, "light": 0.02}
"""Share of any genre that a recipe may drop (the most is of manuals of a database, which begin with
tables of its output; of other modern genres `web` drops 0 to 10 %); `web` is not for verse and
classical prose."""


def test_what_is_explained_of_a_recipe_stands_in_it() -> None:
    """`check --explain` prints the docstrings; a number of a recipe in one is the recipe's."""
    told = 0
    for field in grammar.fields("corpus"):
        for recipe, number in re.findall(r"recipes/(\w+)\.yaml: ([\d.]*\d)", field["doc"]):
            said = read_yaml(ROOT / f"configs/recipes/{recipe}.yaml")["clean"]
            assert said[field["key"].removeprefix("clean.")] == float(number), field
            told += 1
    assert told


def write_page(tmp_path: Path, recipe: Path, more: str = "") -> Path:
    page = tmp_path / f"{recipe.stem}.yaml"
    page.write_text(PAGE.format(recipe=recipe, out=tmp_path / recipe.stem, source=SAMPLE) + more)
    return page


def verdicts(recipe: Path, texts: list[str]) -> list[str]:
    """Why each text goes, or ""."""
    said = read_yaml(recipe)
    rules, bounds = from_dict(Cleaning, said["clean"]), from_dict(Quality, said["quality"])
    reasons = []
    for text in texts:
        page = prepared(text, rules)
        verdict = judge(page, rules)
        table = scores(page).view(COLUMNS)
        poor = [name for name, rows in quality.outside(table, bounds).items() if len(rows)]
        reasons.append(verdict[1] if isinstance(verdict, tuple) else (poor or [""])[0])
    return reasons


def test_three_recipes_are_shipped() -> None:
    assert [path.stem for path in RECIPES] == ["books", "light", "web"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_page_over_a_recipe_loads_and_overrides_it(recipe: Path, tmp_path: Path) -> None:
    config = load(write_page(tmp_path, recipe), CorpusConfig)
    said = read_yaml(recipe)
    assert set(said) <= {"clean", "quality", "dedup"}
    for name, bounds in said["quality"].items():
        assert getattr(config.quality, name) == tuple(bounds)
    for name, value in said["clean"].items():
        assert getattr(config.clean, name) == value
    other = load(
        write_page(tmp_path, recipe, "quality: {dup_13grams: null}\n"),
        CorpusConfig,
        ["clean.min_characters=77"],
    )
    assert other.quality.dup_13grams is None
    assert other.clean.min_characters == 77


def test_the_sample_is_built_by_the_recipe_for_books(tmp_path: Path) -> None:
    recipe = ROOT / "configs" / "recipes" / "books.yaml"
    manifest = build.build(load(write_page(tmp_path, recipe), CorpusConfig))
    here = [row for split in ("train", "valid") for row in kept(tmp_path / "books", split)]
    lost = {
        reason: said["documents"]
        for reason, said in manifest["rejects"].items()
        if "duplicate" not in reason and reason != "too_short"
    }
    assert sum(lost.values()) <= 0.01 * manifest["read"]["documents"], lost
    assert len(here) > 0.8 * manifest["read"]["documents"]


RUBBISH = {
    "web": [
        "首页 关于我们 产品中心 联系我们\n" * 30,
        "【促销】【特价】【包邮】【正品】【限时】【秒杀】买一送一。" * 20,
        "好评！" * 200,
        "推荐阅读的文章标题展开\n今天的天气很好更多\n" * 20,
        "这是一个很长的介绍页面，看了之后可以了解。\n" * 40,
        "买房就找某某中介，全国连锁值得信赖。" * 100,
    ],
    "books": ["啊" * 5000, "一二三四五六七八九十" * 400, "读者你好展开\n再来一次更多\n" * 10],
    "light": ["哈" * 20_000, "一二三四五六七八九十" * 400],
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_rubbish_goes(recipe: Path) -> None:
    assert all(verdicts(recipe, RUBBISH[recipe.stem]))
    good = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()[:400]]
    long = [text for text in good if len(text) > 200]
    assert sum(map(bool, verdicts(recipe, long))) <= 0.05 * len(long)


@pytest.mark.slow
def test_recipes_keep_clean_text_of_every_genre() -> None:
    documents = dev_corpus.documents(400, 20_000, 9)
    for recipe in RECIPES:
        for genre, texts in documents.items():
            if recipe.stem == "web" and genre in ("poetry", "classical-prose"):
                continue
            dropped = np.mean([bool(reason) for reason in verdicts(recipe, texts)])
            assert dropped <= MOST_DROPPED[recipe.stem], (recipe.stem, genre)
