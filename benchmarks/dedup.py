"""How fast documents are signed for near-duplicate removal, against datatrove and datasketch.

    python benchmarks/dedup.py TEXT.jsonl.zst --mb 20 --peer-mb 2 [--json]

MB (10^6 bytes of UTF-8) a second of processor time of one process; every row signs the first
documents of the file, cleaned, as many as its MB hold. Ours: character 5-grams, 18 x 6 hash
functions, and the same with the 14 x 8 that the peers compute. datatrove's Chinese path
(`cmn_Hani`) cuts words with spaCy and jieba, whose dictionary is loaded before the clock starts;
a row whose library is not installed says so. Two more rows of ours: the lines that are counted for
boilerplate, and the script (traditional, classical) of a page.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.dedup import Near
from configs.sources import Source
from data_pipeline import hanzi, ingest, lines, minhash, report
from data_pipeline.clean import normalise


def documents(path: str, mb: float) -> Iterator[str]:
    """The first documents of a file, cleaned."""
    source, held = Source("jsonl", path, "text"), 0
    part = ingest.Part(0, path, path.endswith((".gz", ".zst")), 0, 1, 0)
    for document in ingest.read(source, part, ingest.Meter()):
        text = normalise(document.text).text
        held += len(text.encode())
        yield text
        if held >= mb * 1e6:
            return


def ours(bands: int, rows: int) -> Callable[[str], object]:
    """Our signature and its keys."""

    def sign(text: str) -> object:
        signed = minhash.signature(text, Near().ngram, bands * rows)
        return None if signed is None else minhash.band_keys(signed, bands)

    return sign


def datatrove(language: str) -> Callable[[str], object]:
    """datatrove's signature of words; its files are not written here."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    # sha1: datatrove 0.10.1 hands strings to xxhash, which xxhash 4 refuses.
    hashing = HashConfig(hash_fc="sha1")
    rules = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=hashing)
    step = MinhashDedupSignature(tempfile.mkdtemp(), config=rules, language=language)

    def sign(text: str) -> object:
        shingles = step.get_shingles(text)
        return step.get_signature(shingles) if shingles.size else None

    return sign


def datasketch() -> Callable[[str], object]:
    """datasketch's MinHash over the same character 5-grams as ours."""
    sketch = importlib.import_module("datasketch").MinHash

    def sign(text: str) -> object:
        solid = minhash.letters(text).astype("<u4").tobytes().decode("utf-32-le")
        signed = sketch(num_perm=112)
        signed.update_batch([solid[k : k + 5].encode() for k in range(max(1, len(solid) - 4))])
        return signed

    return sign


def measure(sign: Callable[[str], object], texts: list[str]) -> dict[str, float]:
    """Sign all texts, once they have been warmed up for."""
    for text in texts[:3]:
        sign(text)
    started = time.process_time()
    for text in texts:
        sign(text)
    core_s = time.process_time() - started
    mb = sum(len(text.encode()) for text in texts) / 1e6
    return {"mb": mb, "documents": len(texts), "core_s": core_s, "mb_per_core_s": mb / core_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", help="a jsonl file, plain, .gz or .zst")
    parser.add_argument("--mb", type=float, default=20, help="text that ours sign")
    parser.add_argument("--peer-mb", type=float, default=2, help="text that the peers sign")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    texts = list(documents(args.text, args.mb))
    few = list(documents(args.text, args.peer_mb))
    rows: dict[str, tuple[Callable[[], Callable[[str], object]], list[str]]] = {
        "bajie 18 x 6": (lambda: ours(18, 6), texts),
        "bajie 14 x 8": (lambda: ours(14, 8), texts),
        "bajie lines hashed": (lambda: lambda text: lines.of(text, 8), texts),
        "bajie script told": (lambda: hanzi.script, texts),
        "datatrove cmn_Hani 14 x 8": (lambda: datatrove("cmn_Hani"), few),
        "datasketch 112": (datasketch, few),
    }
    results: dict[str, dict[str, float] | str] = {}
    for name, (make, given) in rows.items():
        try:
            results[name] = measure(make(), given)
        except ImportError as error:
            results[name] = f"cannot run here: {str(error).splitlines()[0]}"
    if args.json:
        print(json.dumps(results, indent=1))
        return
    table = [("signatures", "MB", "documents", "core s", "MB/s per core")]
    for name, found in results.items():
        if isinstance(found, str):
            table.append((name, "", "", "", found))
        else:
            table.append(
                (
                    name,
                    f"{found['mb']:.1f}",
                    f"{found['documents']:,}",
                    f"{found['core_s']:.2f}",
                    f"{found['mb_per_core_s']:.1f}",
                )
            )
    print(report.aligned(table))


if __name__ == "__main__":
    main()
