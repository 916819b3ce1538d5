"""python -m launch corpus CONFIG [key=value ...]: build a corpus, or go on with a build.

CONFIG --configs.load--> CorpusConfig --data_pipeline.mixture--> what it is made of, as a tree
                                      --data_pipeline.build--> data.out/manifest.json --> a summary
"""

import argparse
import json
import sys
from typing import Any

from configs.corpus import CorpusConfig
from configs.load import load


def main(argv: list[str]) -> int:
    """The verb; 0 when the corpus is whole. Raises ConfigError and what the build has to say."""
    parser = argparse.ArgumentParser("python -m launch corpus", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a page like configs/corpora/sample.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. data.workers=2"
    )
    parser.add_argument("--plan", action="store_true", help="only say what it is made of")
    parser.add_argument("--json", action="store_true", help="print the manifest, or plan, as JSON")
    parser.add_argument(
        "--replace", action="store_true", help="build over a corpus of another page"
    )
    args = parser.parse_intermixed_args(argv)
    config = load(args.config, CorpusConfig, args.overrides)
    from data_pipeline import build, mixture

    branches, tasks = mixture.survey(config.data)
    if args.plan:
        print(planned(branches, tasks) if args.json else mixture.tree(branches, tasks))
        return 0
    if not mixture.is_trivial(branches):
        print(mixture.tree(branches, tasks), file=sys.stderr, flush=True)
    manifest = build.build(config, args.replace)
    if args.json:
        print(json.dumps(manifest, ensure_ascii=False, indent=1))
    else:
        print(summary(manifest, config.data.out))
    return 0


def planned(branches: list[Any], tasks: int) -> str:
    """What `mixture.survey` found, as JSON."""
    told = {"sources": [branch.as_dict() for branch in branches], "tasks": tasks}
    return json.dumps(told, ensure_ascii=False, indent=1)


def summary(manifest: dict[str, Any], out: str) -> str:
    """A manifest in a few lines: documents, tokens and characters of each split, the tokenizer."""
    tokenizer = manifest["tokenizer"]
    lines = [f"corpus {out} (语料)"]
    for name, split in manifest["splits"].items():
        ratio = split["characters"] / max(1, split["tokens"])
        lines.append(
            f"  {name:<10}{split['documents']:>12,} documents  {split['tokens']:>15,} tokens"
            f"  {split['characters']:>15,} characters  {ratio:.2f} characters a token"
        )
    fingerprint = str(tokenizer["fingerprint"])[:23]
    lines.append(
        f"  tokenizer {tokenizer['kind']}, {tokenizer['vocab_size']:,} entries, {fingerprint}"
    )
    if "fingerprint" in manifest:
        lines.append(f"  contents  {manifest['fingerprint']}")
    return "\n".join(lines)
