"""What a corpus is: as a table for the terminal, and as a page (report.html).

manifest --> flow     documents and characters from the sources to the splits, what was refused
counts   --> speed    MB/s and the memory of the largest worker
tally.py, score columns, rejects/, documents/ --> html   all of it, with examples to look at
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline import lines, page, tokenizer
from data_pipeline.shards import records

ROWS, TOP_TOKENS, TOKENS_SHOWN = 40, 40, 160
EXAMPLES, PAIRS, FILES_LOOKED_AT, DOCUMENTS_LOOKED_AT = 6, 5, 8, 2_000
SHARDS_SEARCHED, LINES_LOOKED_AT = 32, 50_000
COLUMNS, SAMPLED_SCORES = 36, 100_000

Bounds = tuple[float | None, float | None]
Limits = Mapping[str, Bounds]
NONE: Bounds = (None, None)


def flow(manifest: Mapping[str, Any]) -> str:
    """Documents and characters at each step, rejects by reason, tokens by split."""
    rows = [("", "documents", "characters", "tokens", "characters/token")]
    read = manifest["read"]
    rows.append(("read", f"{read['documents']:,}", f"{read['characters']:,}", "", ""))
    for reason, lost in manifest["rejects"].items():
        rows.append((f"- {reason}", f"{lost['documents']:,}", f"{lost['characters']:,}", "", ""))
    for name, split in manifest["splits"].items():
        rows.append(
            (
                f"= {name}",
                f"{split['documents']:,}",
                f"{split['characters']:,}",
                f"{split['tokens']:,}",
                f"{split['characters'] / max(split['tokens'], 1):.2f}",
            )
        )
    changed = ", ".join(f"{name} {n:,}" for name, n in manifest["changed"].items()) or "none"
    return f"{aligned(rows)}\ncharacters removed or folded: {changed}"


def speed(blocks: Mapping[str, "Counter[str]"]) -> str:
    """MB of text per second of one core, seconds and peak memory of each block."""
    rows = [("block", "MB", "MB/s per core", "core s", "peak RSS MB")]
    for name, block in figures(blocks).items():
        rows.append(
            (
                name,
                f"{block['mb']:.1f}",
                f"{block['mb_per_core_s']:.1f}" if block["mb"] else "",
                f"{block['core_s']:.1f}",
                f"{block['peak_rss_mb']:.0f}",
            )
        )
    return aligned(rows)


def figures(blocks: Mapping[str, "Counter[str]"]) -> dict[str, dict[str, float]]:
    """The numbers of `speed`."""
    return {
        name: {
            "mb": counts["worked_bytes"] / 1e6,
            "mb_per_core_s": counts["worked_bytes"] / 1e6 / max(counts["cpu_s"], 1e-9),
            "core_s": counts["cpu_s"],
            "peak_rss_mb": counts["peak_rss_mb"],
        }
        for name, counts in blocks.items()
    }


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# ---- the page


@dataclass(frozen=True)
class Facts:
    """What the page is made of; all but the manifest may be empty."""

    manifest: Mapping[str, Any]
    tally: Mapping[str, Any]
    """tally.together()."""
    folder: Path
    """The corpus: rejects/, contamination/, lines.jsonl, documents/, tokenizer/."""
    scores: Sequence[Path] = ()
    """The score columns of each shard."""
    limits: Limits = field(default_factory=dict)
    """Score -> the least and the most that was kept."""


def html(facts: Facts) -> str:
    """The report as one page; the same corpus gives the same page."""
    sources = ", ".join(source["name"] for source in facts.manifest["sources"])
    sections = (
        f"<h1>{page.text(sources)} <span>语料报告</span></h1>",
        page.paragraph(facts.manifest["fingerprint"]),
        _figures(facts),
        *_flow(facts),
        *_sources(facts),
        *_lengths(facts),
        *_scores(facts),
        *_tokenizer(facts),
        *_refused(facts),
        *_duplicates(facts),
        *_lines(facts),
        *_contamination(facts),
        *_kept(facts),
    )
    return page.document(f"bajie: {sources}", sections)


def _figures(facts: Facts) -> str:
    splits = facts.manifest["splits"].values()
    documents, characters, tokens = (
        sum(split[what] for split in splits) for what in ("documents", "characters", "tokens")
    )
    read = facts.manifest["read"]["characters"]
    return page.cards(
        {
            "documents 文档": documents,
            "characters 字符": characters,
            "tokens 词元": tokens,
            "characters a token 每词元字符": round(characters / max(tokens, 1), 3),
            "of the characters read 保留": f"{100 * characters / max(read, 1):.1f} %",
        }
    )


def _flow(facts: Facts) -> Iterator[str]:
    yield page.heading("Flow", "流程")
    manifest = facts.manifest
    read = manifest["read"]
    rows: list[tuple[Any, ...]] = [("read 读入", read["documents"], read["characters"])]
    rows += [
        (f"− {reason}", lost["documents"], lost["characters"])
        for reason, lost in manifest["rejects"].items()
    ]
    rows += [(f"= {s}", kept["documents"], kept["characters"]) for s, kept in _splits(facts)]
    lost = [row[0].startswith("−") for row in rows]
    yield page.table(("", "documents 文档", "characters 字符"), rows, lost)
    if manifest["changed"]:
        yield page.heading("Changed in kept and refused documents", "改动", 3)
        rows = [(name, n) for name, n in manifest["changed"].items()]
        yield page.table(("", "times 次"), rows)
    if scripts := manifest.get("scripts"):
        yield page.heading("Scripts of the cleaned texts (each named field is one)", "简繁", 3)
        yield page.table(("", "texts 文本"), list(scripts.items()))
    met = [
        (f"{source['name']}: {what}", n)
        for source in manifest["sources"]
        for family in ("met", "unreadable")
        for what, n in source.get(family, {}).items()
    ]
    met += [
        (f"{source['name']}: documents whose id stood before (重复的 id)", source["repeated_ids"])
        for source in manifest["sources"]
        if "repeated_ids" in source
    ]
    if met:
        yield page.heading("Met while reading", "读取时遇到", 3)
        yield page.table(("", "records 条"), met)


def _splits(facts: Facts) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from facts.manifest["splits"].items()


def _sources(facts: Facts) -> Iterator[str]:
    yield page.heading("Sources", "来源")
    every = sum(counts["tokens"] for counts in facts.tally["sources"].values()) or 1
    rows = [
        (
            name,
            counts["documents"],
            counts["characters"],
            round(counts["characters"] / max(counts["tokens"], 1), 3),
            round(100 * counts["tokens"] / every, 2),
            counts["tokens"],
        )
        for name, counts in facts.tally["sources"].items()
    ]
    names = (
        "",
        "documents 文档",
        "characters 字符",
        "characters/token",
        "% of tokens",
        "tokens 词元",
    )
    yield page.table(names, rows[:ROWS])
    if len(rows) > ROWS:
        yield page.paragraph(f"{len(rows) - ROWS} smaller sources are not shown (其余从略)")
    for label, counts in facts.tally["labels"].items():
        yield page.heading(f"By {label}", "分类", 3)
        yield page.table(("", "characters 字符"), list(counts.items()))


def _lengths(facts: Facts) -> Iterator[str]:
    yield page.heading("Lengths of documents", "文档长度")
    shown = []
    for what, chinese in (("characters", "字符"), ("tokens", "词元")):
        counts = facts.tally["lengths"].get(what, {})
        bits = range(min(counts, default=0), max(counts, default=0) + 1)
        labels = [f"{1 << max(b - 1, 0):,}" for b in bits]
        shown.append(page.columns(f"{what} {chinese}", labels, [counts.get(b, 0) for b in bits]))
    yield page.charts(shown)


def _scores(facts: Facts) -> Iterator[str]:
    if not facts.scores:
        return
    yield page.heading("Scores of the cleaned documents", "质量分数")
    yield page.paragraph(
        "Dashed: where a threshold stands; its rejects are coloured. Half a per cent at either end "
        "is counted in the last column. (虚线为阈值)"
    )

    def tables() -> Iterator[np.ndarray]:
        return (np.load(path, mmap_mode="r") for path in facts.scores)

    yield page.charts(_charts(tables, facts.limits))


def _charts(tables: Callable[[], Iterable[np.ndarray]], limits: Limits) -> Iterator[str]:
    """A chart of every score. Of many rows some, evenly spread, say where its columns lie; `tables`
    gives those of the shards one by one, three times."""
    step = max(1, -(-sum(len(table) for table in tables()) // SAMPLED_SCORES))
    some = np.concatenate([np.array(table[::step]) for table in tables()])
    edges = {name: _edges(some[name], limits.get(name, NONE)) for name in some.dtype.names or ()}
    counts = {name: np.zeros(COLUMNS, np.int64) for name in edges}
    for table in tables():
        for name, borders in edges.items():
            if borders is not None:
                values = np.asarray(table[name], np.float64)
                values = np.clip(values[np.isfinite(values)], borders[0], borders[-1])
                counts[name] += np.histogram(values, borders)[0]
    for name, borders in edges.items():
        yield "" if borders is None else _chart(name, borders, counts[name], limits)


def _edges(some: np.ndarray, limits: Bounds) -> np.ndarray | None:
    """Where the columns of a chart begin, and the last one ends; None if all values are equal."""
    some = some.astype(np.float64)
    some = some[np.isfinite(some)]
    if not len(some):
        return None
    given = [limit for limit in limits if limit is not None]
    low, high = np.quantile(some, (0.005, 0.995))
    low, high = min(low, *given, low), max(high, *given, high)
    return None if low == high else np.linspace(low, high, COLUMNS + 1)


def _chart(name: str, edges: np.ndarray, counts: np.ndarray, limits: Limits) -> str:
    least, most = limits.get(name, NONE)
    low, high = edges[0], edges[-1]
    middles = (edges[1:] + edges[:-1]) / 2
    outside = [
        (least is not None and m < least) or (most is not None and m > most) for m in middles
    ]
    given = [limit for limit in (least, most) if limit is not None]
    places = [COLUMNS * (limit - low) / (high - low) for limit in given]
    labels = [page.number(float(f"{edge:.3g}")) for edge in edges[:-1]]
    return page.columns(name, labels, counts.tolist(), outside, places)


def _tokenizer(facts: Facts) -> Iterator[str]:
    words = tokenizer.load(facts.folder / "tokenizer")
    used: np.ndarray = np.asarray(facts.tally["used"])
    ends = int(used[words.eod_id])
    used = used.copy()
    used[words.eod_id] = 0
    every = max(int(used.sum()), 1)
    unknown = _unknown(words)
    order = np.argsort(-used, kind="stable")
    yield page.heading("Tokenizer", "分词器")
    yield page.cards(
        {
            "kind 种类": words.kind,
            "vocabulary 词表": words.vocab_size,
            "of it in use 用到": f"{100 * np.count_nonzero(used) / len(used):.1f} %",
            "unknown 未登录": f"{100 * int(used[unknown].sum()) / every:.4f} %",
            "documents' ends 文档结束": ends,
        }
    )
    yield page.paragraph(words.fingerprint)
    share = used[order].cumsum() / every
    points = np.unique(np.geomspace(1, len(share), 100).astype(np.int64)) - 1
    yield page.charts(
        [
            page.curve(
                "share of the tokens that the n commonest pieces are (前 n 个词元的占比)",
                share[points].tolist(),
                ("n = 1", f"n = {len(share):,}, logarithmic"),
            )
        ]
    )
    common = [(words.pieces([i])[0], int(used[i])) for i in order[:TOP_TOKENS].tolist() if used[i]]
    yield page.folded(f"the {len(common)} commonest (最常见)", page.table(("", "times"), common))
    boxes = []
    for name, source, written in facts.tally["excerpts"]:
        ids = words.encode(written[:TOKENS_SHOWN])
        boxes.append(
            page.tokens(f"{name} · {source}", words.pieces(ids), np.isin(ids, unknown).tolist())
        )
    yield page.side_by_side(boxes)


def _unknown(words: Any) -> list[int]:
    pieces = words.pieces(range(min(words.vocab_size, 1000)))
    return [i for i, piece in enumerate(pieces) if piece in ("<unk>", "[UNK]")]


def _refused(facts: Facts) -> Iterator[str]:
    reasons = facts.manifest["rejects"]
    if not reasons:
        return
    yield page.heading("What was refused", "剔除样例")
    for reason, lost in reasons.items():
        drawn = examples(facts.folder / "rejects" / reason)
        title = f"{reason}: {lost['documents']:,} documents, {lost['characters']:,} characters"
        shown = [page.excerpt(_caption(record), record.get("text", "")) for record in drawn]
        yield page.folded(title, page.side_by_side(shown))


def _duplicates(facts: Facts) -> Iterator[str]:
    shown = []
    for reason in ("near_duplicate", "duplicate"):
        drawn = [r for r in examples(facts.folder / "rejects" / reason, PAIRS) if "kept" in r]
        kept = find(facts.folder / "documents", {str(record["kept"]) for record in drawn})
        for record in drawn:
            if (first := kept.get(str(record["kept"]))) is not None:
                alike = f" · Jaccard {record['jaccard']:.2f}" if "jaccard" in record else ""
                pair = (_caption(first), first["text"]), (_caption(record) + alike, record["text"])
                shown.append(page.difference(*pair))
    if shown:
        yield page.heading("Duplicates: the one that stays, the one that goes", "重复样例")
        yield from shown


def _lines(facts: Facts) -> Iterator[str]:
    times: Counter[str] = Counter()
    for row in islice(lines.shown(facts.folder), LINES_LOOKED_AT):
        times[row["text"]] = max(times[row["text"]], int(row["documents"]))
    if times:
        yield page.heading("Lines of many documents, taken out", "样板行")
        rows = [(text[:80], n) for text, n in times.most_common(ROWS)]
        yield page.table(("", "documents 文档"), rows, [True] * len(rows))


def _contamination(facts: Facts) -> Iterator[str]:
    sets = facts.manifest.get("contamination", {})
    if not sets:
        return
    yield page.heading("Text of evaluation sets", "评测集泄漏")
    columns = {
        "items": "items 条目",
        "short_items": "too short to be found",
        "hit_documents": "documents hit 命中",
        "spared_documents": "that share a common phrase alone, and stay 常见套语",
    }
    rows = [(name, *(said.get(what, 0) for what in columns)) for name, said in sets.items()]
    yield page.table(("", *columns.values()), rows)
    phrases = Counter(
        hit["shared"]
        for path in sorted((facts.folder / "contamination").glob("*.zst"))[:SHARDS_SEARCHED]
        for hit in islice(records(path), DOCUMENTS_LOOKED_AT)
        if "common" in hit
    )
    if phrases:
        yield page.heading("Common phrases that made no document go", "常见套语", 3)
        yield page.table(("", "documents 文档"), phrases.most_common(ROWS))


def _kept(facts: Facts) -> Iterator[str]:
    yield page.heading("Some of what was kept", "保留样例")
    yield page.side_by_side(
        page.excerpt(f"{name} · {source}", written)
        for name, source, written in facts.tally["excerpts"]
    )


def _caption(record: Mapping[str, Any]) -> str:
    return " · ".join(str(record[key]) for key in ("id", "source", "reason") if key in record)


def examples(folder: Path, number: int = EXAMPLES) -> list[dict[str, Any]]:
    """Some documents of a folder of shards: of the first ones of a few files, the same each time,
    those whose ids have the lowest hashes."""
    paths = sorted(folder.glob("*.jsonl.zst"))
    paths = [paths[i] for i in range(0, len(paths), max(1, len(paths) // FILES_LOOKED_AT))]
    drawn: list[tuple[int, int, dict[str, Any]]] = []
    for path in paths[:FILES_LOOKED_AT]:
        for record in islice(records(path), DOCUMENTS_LOOKED_AT):
            drawn.append(
                (xxhash.xxh3_64_intdigest(str(record.get("id")).encode()), len(drawn), record)
            )
        drawn = sorted(drawn, key=lambda entry: entry[:2])[:number]
    return [record for _, _, record in drawn]


def find(folder: Path, names: set[str]) -> dict[str, dict[str, Any]]:
    """The documents with these ids, as far as the first shards hold them."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl.zst"))[:SHARDS_SEARCHED]:
        if len(found) == len(names):
            break
        for record in records(path):
            if record["id"] in names:
                found[record["id"]] = record
    return found
