"""How fast documents are cleaned, step by step, and what the recipes drop of a corpus.

    python benchmarks/cleaning.py TEXT.jsonl.zst --mb 20 --peer-mb 0.5 [--json]
    python benchmarks/cleaning.py TEXT.jsonl.zst --recipes [--every 10]

MB (10^6 bytes of UTF-8) a second of processor time of one process. Ours: each step of Clean on the
same documents, and all of them as the recipes `books` and `web` ask for. Peers, on fewer documents,
since they are slow: repetition and quality filters of datatrove with words (jieba, loaded before
the clock starts) and with plain characters; repetition and masks in plain Python. --recipes prints
the share of documents of each genre that each rule drops.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.cleaning import Cleaning
from configs.load import from_dict, read_yaml
from configs.quality import Quality
from data_pipeline import clean, leftovers, mojibake, private, quality, report, scores, shards

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml"))}


def documents(path: str, every: int = 1) -> Iterator[dict[str, Any]]:
    """The documents of a jsonl.zst file; of a genre of 10,000 and more only one of `every`."""
    seen: Counter[str] = Counter()
    for record in shards.records(Path(path)):
        genre = record.get("genre", record.get("source", ""))
        seen[genre] += 1
        if seen[genre] < 10_000 or seen[genre] % every == 0:
            yield record


def sample(path: str, mb: float) -> list[str]:
    """Texts drawn at random from the whole file, as many as the MB hold."""
    texts = [record["text"] for record in documents(path)]
    random.Random(1).shuffle(texts)
    held, last = 0, 0
    while last < len(texts) and held < mb * 1e6:
        held, last = held + len(texts[last].encode()), last + 1
    return texts[:last]


def rules(recipe: str) -> Cleaning:
    """A recipe's section `clean`."""
    return from_dict(Cleaning, read_yaml(RECIPES[recipe])["clean"])


def whole(asked: Cleaning) -> Callable[[str], object]:
    """All that Clean does with a document."""

    def one(text: str) -> object:
        page = clean.prepared(text, asked)
        if clean.judge(page, asked) is True:
            return clean.digest(page), scores.scores(page)
        return None

    return one


def ours(texts: list[str]) -> dict[str, tuple[Callable[[Any], object], list[Any]]]:
    """Each step with what it is given."""
    pages, asked = [clean.normalise(text) for text in texts], rules("web")
    everything = replace(rules("books"), simplify=True, mask_private=True)
    return {
        "normalise": (clean.normalise, texts),
        "simplify (script)": (clean.simplify, pages),
        "filters": (lambda page: clean.judge(page, asked), pages),
        "mojibake (in filters)": (lambda page: mojibake.traces(page.text, page.codes), pages),
        "scores": (scores.scores, pages),
        "digest": (clean.digest, pages),
        "private data": (lambda page: private.mask(page.text), pages),
        "markup": (leftovers.strip, texts),
        "all of `books`": (whole(rules("books")), texts),
        "`books`, simplified, masked": (whole(everything), texts),
        "all of `web`": (whole(asked), texts),
    }


def plain_repeats(text: str) -> object:
    """Shares of frequent and of repeated runs of characters, in Python."""
    solid = "".join(text.split())
    top = [
        Counter(solid[k : k + n] for k in range(len(solid) - n + 1)).most_common(1)
        for n in (2, 3, 4)
    ]
    again = []
    for n in (5, 6, 7, 8, 9, 10, 13):
        seen: set[str] = set()
        k = found = 0
        while k < len(solid) - n + 1:
            run = solid[k : k + n]
            found, k = (found + n, k + n) if run in seen else (found, k + 1)
            seen.add(run)
        again.append(found)
    return top, again


def ungated_masks(text: str) -> object:
    """Three patterns over the whole text, as most pipelines have them."""
    for pattern in (
        r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}",
        r"(?<!\d)1[3-9]\d{9}(?!\d)",
        r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])[0-3]\d{4}[\dXx](?![\dXx])",
    ):
        text = re.sub(pattern, "[]", text)
    return text


def datatrove(name: str, words: str) -> Callable[[str], object]:
    """A filter of datatrove, with its Chinese words or with characters."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils import word_tokenizers

    if words == "jieba":
        import jieba

        cut = jieba.lcut
    else:
        cut = list
    # Its own road to jieba leads through spaCy, which only adds to the time.
    word_tokenizers.load_word_tokenizer = lambda language: SimpleNamespace(word_tokenize=cut)
    made = {
        "repetition": GopherRepetitionFilter,
        "gopher": GopherQualityFilter,
        "fineweb": FineWebQualityFilter,
    }[name](language="cmn_Hani")
    made.filter(Document("春眠不觉晓，处处闻啼鸟。", "0"))
    return lambda text: made.filter(Document(text, "0"))


def measure(step: Callable[[Any], object], given: list[Any]) -> dict[str, float]:
    """Run a step over all it is given, once it has been warmed up for."""
    for one in given[:3]:
        step(one)
    started = time.process_time()
    for one in given:
        step(one)
    core_s = time.process_time() - started
    mb = sum(len((one if isinstance(one, str) else one.text).encode()) for one in given) / 1e6
    return {"mb": mb, "documents": len(given), "core_s": core_s, "mb_per_core_s": mb / core_s}


def speeds(args: argparse.Namespace) -> dict[str, dict[str, float] | str]:
    """Ours, then the peers."""
    texts, few = sample(args.text, args.mb), sample(args.text, args.peer_mb)
    results: dict[str, dict[str, float] | str] = {
        name: measure(step, given) for name, (step, given) in ours(texts).items()
    }
    results["repetition in plain Python"] = measure(plain_repeats, few)
    results["three patterns, no gate"] = measure(ungated_masks, texts)
    for words in ("jieba", "characters"):
        for name in ("repetition", "gopher", "fineweb"):
            try:
                results[f"datatrove {name}, {words}"] = measure(datatrove(name, words), few)
            except (ImportError, OSError, ValueError) as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                results[f"datatrove {name}, {words}"] = f"cannot run here: {reason[0]}"
    return results


def dropped(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Recipe -> rule -> genre -> percent of its documents."""
    read = {name: read_yaml(path) for name, path in RECIPES.items()}
    asked = {name: from_dict(Cleaning, said["clean"]) for name, said in read.items()}
    bounds = {name: from_dict(Quality, said["quality"]) for name, said in read.items()}
    total: Counter[str] = Counter()
    gone: dict[str, dict[str, Counter[str]]] = {name: defaultdict(Counter) for name in read}
    for record in documents(args.text, args.every):
        genre = record.get("genre", record.get("source", ""))
        total[genre] += 1
        for name, rule in asked.items():
            page = clean.prepared(record["text"], rule)
            verdict = clean.judge(page, rule)
            if isinstance(verdict, tuple):
                gone[name][verdict[1]][genre] += 1
                continue
            table = scores.scores(page).view(scores.COLUMNS)
            poor = [
                rule for rule, rows in quality.outside(table, bounds[name]).items() if len(rows)
            ]
            if poor:
                gone[name][f"quality:{poor[0]}"][genre] += 1
    for name, by_rule in gone.items():
        by_rule["all"] = sum(by_rule.values(), Counter())
        gone[name] = dict(sorted(by_rule.items(), key=lambda item: -item[1].total()))
    return {
        name: {
            rule: {genre: 100 * count[genre] / total[genre] for genre in total}
            for rule, count in by_rule.items()
        }
        for name, by_rule in gone.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", help="a jsonl.zst file")
    parser.add_argument("--mb", type=float, default=20, help="text for ours")
    parser.add_argument("--peer-mb", type=float, default=0.5, help="text for the peers")
    parser.add_argument("--recipes", action="store_true", help="what each rule drops instead")
    parser.add_argument("--every", type=int, default=10, help="one of so many in large genres")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = dropped(args) if args.recipes else speeds(args)
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    if args.recipes:
        for name, by_rule in results.items():
            genres = list(next(iter(by_rule.values())))
            rows = [(f"{name}, %", *(genre[:9] for genre in genres))]
            rows += [
                (rule, *(f"{percent[genre]:.2f}" for genre in genres))
                for rule, percent in by_rule.items()
            ]
            print(report.aligned(rows) + "\n")
        return
    table = [("step", "MB", "documents", "core s", "MB/s per core")]
    for name, found in results.items():
        if isinstance(found, str):
            table.append((name, "", "", "", found))
            continue
        numbers = (f"{found['core_s']:.2f}", f"{found['mb_per_core_s']:.1f}")
        table.append((name, f"{found['mb']:.1f}", f"{found['documents']:,}", *numbers))
    print(report.aligned(table))


if __name__ == "__main__":
    main()
