"""report.html shows what the manifest counts, needs nothing else, and trusts no text."""

import json
import re
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from configs.corpus import CorpusConfig
from configs.load import from_dict
from data_pipeline import page, report, tally
from data_pipeline.build import build

SAMPLE = Path(__file__).parent.parent / "data_pipeline" / "sample" / "sample.jsonl"
HOSTILE = (
    "<script>alert('注入')</script><img src=x onerror=alert(1)> & \"引号\" 这是一段正常的中文。"
)
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Checked(HTMLParser):
    """Every tag closed in its order; what the page refers to; its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"an event handler: {name}={value}"
            if name in ("src", "href", "srcset", "action", "data"):
                self.references.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    lines = SAMPLE.read_text("utf-8").splitlines()[::5]
    first = json.loads(max(lines, key=len))
    again = {**first, "id": "copy", "text": first["text"].replace("的", "地", 2)}
    hostile = {"id": "<b>id</b>", "source": "</table><script>", "text": HOSTILE}
    short = {"id": "short", "source": "</table><script>", "text": "<i>短</i>"}
    added = [json.dumps(r, ensure_ascii=False) for r in (again, hostile, short)]
    (folder / "text.jsonl").write_text("\n".join([*lines, *added]) + "\n", "utf-8")
    build(config(folder))
    return folder / "corpus"


def config(folder: Path) -> CorpusConfig:
    source = {"kind": "jsonl", "name": "t", "path": str(folder / "text.jsonl")}
    return from_dict(
        CorpusConfig,
        {
            "data": {"out": str(folder / "corpus"), "sources": [source], "workers": 1},
            "clean": {"min_characters": 10},
            "dedup": {"near": {}},
            "split": {"valid_fraction": 0.1},
            "tokenizer": {"kind": "byte_bpe", "vocab_size": 320},
        },
    )


def test_the_page_is_whole_and_stands_alone(corpus: Path) -> None:
    html = (corpus / "report.html").read_text("utf-8")
    checked = Checked(html)
    assert checked.open == []
    assert checked.references == []
    assert "script" not in checked.tags and "img" not in checked.tags and "b" in checked.tags
    assert "@import" not in html and "url(" not in html


def test_the_page_shows_the_manifests_numbers(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text("utf-8"))
    text = Checked((corpus / "report.html").read_text("utf-8")).text
    assert manifest["rejects"]["near_duplicate"]["documents"] >= 1
    for reason, lost in manifest["rejects"].items():
        said = f"{reason}: {lost['documents']:,} documents, {lost['characters']:,} characters"
        assert said in text
    for split in manifest["splits"].values():
        assert f"{split['characters']:,}" in text
    total = sum(split["tokens"] for split in manifest["splits"].values())
    assert f"{total:,}" in text
    for source in ("poems", "debian-handbook"):
        assert source in text


def test_text_of_a_corpus_is_never_markup(corpus: Path) -> None:
    html = (corpus / "report.html").read_text("utf-8")
    assert "<script" not in html and "<i>短" not in html
    assert "&lt;i&gt;短&lt;/i&gt;" in html  # a reject, shown as it is
    assert "&lt;/table&gt;&lt;script&gt;" in html  # a source
    with pytest.raises(AssertionError):
        Checked(html + "</p>")  # the check can fail
    with pytest.raises(AssertionError):
        Checked(html.replace("<h1>", "<h1 onclick=alert(1)>"))


def test_the_tally_adds_up_to_the_manifest(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text("utf-8"))
    (stage,) = (corpus / "stages").glob("tally-*")
    tasks = len(list((stage / "data" / "tally").iterdir()))
    counted = tally.together(stage / "data", tasks)
    for what in ("documents", "characters", "tokens"):
        total = sum(split[what] for split in manifest["splits"].values())
        assert sum(counts[what] for counts in counted["sources"].values()) == total
    documents = sum(split["documents"] for split in manifest["splits"].values())
    assert sum(counted["lengths"]["characters"].values()) == documents
    tokens = np.concatenate(
        [np.fromfile(corpus / f"{split}.bin", np.uint16) for split in ("train", "valid")]
    )
    vocabulary = manifest["tokenizer"]["vocab_size"]
    assert np.array_equal(counted["used"], np.bincount(tokens, minlength=vocabulary))


def test_a_source_for_every_page_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that name their address: the large sources are told apart, the rest is one line, the
    sums stay, and neither a shard nor the sum of all holds more."""
    monkeypatch.setattr(tally, "SOURCES", 20)
    for rank in range(3):
        shard = tally.ShardCounts()
        for number in range(400):
            for source in (f"http://{rank}/{number}", "news", "web"):
                text = "字" * (1 if source.startswith("http") else 9)
                shard.add("train", {"id": source, "text": text, "source": source}, 2)
                assert len(shard.sources) <= 2 * tally.SOURCES + 1
        tally.save(tmp_path / "used" / f"{rank:05d}.npy", np.zeros(3, np.int64))
        (tmp_path / "tally").mkdir(exist_ok=True)
        (tmp_path / "tally" / f"{rank:05d}.json").write_text(json.dumps(shard.said()))
    sources = tally.together(tmp_path, 3)["sources"]
    assert len(sources) <= tally.SOURCES + 1
    assert list(sources)[:2] == ["news", "web"] and "others 其余" in sources
    assert sources["news"] == {
        "documents": 1200, "characters": 10800, "tokens": 2400, "train_documents": 1200
    }  # fmt: skip
    for what, total in (("documents", 3600), ("train_documents", 3600), ("characters", 22800)):
        assert sum(counts[what] for counts in sources.values()) == total


def test_a_page_is_the_same_when_it_is_built_again(corpus: Path, tmp_path: Path) -> None:
    shutil.copy(corpus.parent / "text.jsonl", tmp_path / "text.jsonl")
    build(config(tmp_path))
    assert (tmp_path / "corpus/report.html").read_bytes() == (corpus / "report.html").read_bytes()


def test_what_a_threshold_cuts_off_is_coloured() -> None:
    scores = np.zeros(1000, np.dtype([("entropy", "<f4")]))
    scores["entropy"] = np.linspace(0, 10, 1000)
    (svg,) = report._charts(lambda: [scores], {"entropy": (2.5, None)})
    heights = re.findall(r'class="(col|out)"', svg)
    assert len(heights) == report.COLUMNS
    assert heights.count("out") == round(report.COLUMNS / 4)
    (svg,) = report._charts(lambda: [scores], {})
    assert "out" not in re.findall(r'class="(col|out)"', svg)


def test_scores_of_many_shards_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of every shard say where the columns lie, all are counted, two at most are open."""
    monkeypatch.setattr(report, "SAMPLED_SCORES", 1000)
    looked_at, drawn, given = [], [], list[weakref.ref[np.ndarray]]()
    edges, columns = report._edges, page.columns
    monkeypatch.setattr(
        report, "_edges", lambda some, limits: looked_at.append(some) or edges(some, limits)
    )
    monkeypatch.setattr(page, "columns", lambda *of: drawn.append(of[2]) or columns(*of))

    def tables() -> Iterator[np.ndarray]:
        for shard in range(40):
            table = np.zeros(500 if shard else 3, np.dtype([("entropy", "<f4")]))
            table["entropy"] = np.random.default_rng(shard).normal(
                10 * (shard == 39), 1, len(table)
            )
            given.append(weakref.ref(table))
            assert sum(one() is not None for one in given) <= 2
            yield table

    list(report._charts(tables, {}))
    assert 900 < len(looked_at[0]) <= 1000 + 40
    assert looked_at[0].max() > 10  # the last shard's were seen
    assert sum(drawn[0]) == 39 * 500 + 3


def test_what_differs_between_two_texts_is_marked() -> None:
    shown = page.difference(("a", "甲乙丙丁"), ("b", "甲乙戊丁"))
    assert re.findall(r"<mark>(.)</mark>", shown) == ["丙", "戊"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_draws_the_page(corpus: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1100,3000", f"--screenshot={picture}"]
    subprocess.run([*command, (corpus / "report.html").as_uri()], check=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000


def test_no_number_below_a_histogram_is_cut() -> None:
    """A label that runs over the edge reads as another number."""
    fewer = 0
    for columns in range(1, 60):
        drawn = page.columns("x", ["10,000"] * columns, [1.0] * columns)
        places = [float(x) for x in re.findall(r'<text x="([\d.]+)"', drawn)]
        assert max(places) + 6 * page.LETTER <= 360
        fewer += len(places) < len(range(0, columns, max(1, -(-columns // 8))))
    assert fewer, "some do not fit"
