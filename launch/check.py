"""python -m launch check CONFIG [key=value ...]: is this page right? About a second, no torch.

CONFIG --its sections tell--> a run (RunConfig) | a corpus (CorpusConfig) | sizes (a model alone)
       --configs.load-------> ok and what it comes to, or every problem at once

Of a run, the corpora that are built are asked as well, by their manifests: the vocabulary, and the
files that the objective reads.

--explain prints the grammar: every field, its default and its docstring, out of the source of
configs/ itself.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import corpus as corpus_page
from configs import run as run_page
from configs.load import ConfigError, load, read_yaml
from configs.model import ModelConfig, parameter_count
from launch import grammar
from launch.machines import at_least_one
from pretrain import manifests
from pretrain.staged import idle_options

CORPUS_SECTIONS = {"tokenizer", "split", "clean", "dedup"}


@dataclass(frozen=True)
class Sizes:
    """A file of configs/sizes: a model and nothing else."""

    model: ModelConfig
    """The architecture and its sizes."""


PAGES: dict[str, type[Any]] = {
    "run": run_page.RunConfig,
    "corpus": corpus_page.CorpusConfig,
    "sizes": Sizes,
}


def main(argv: list[str]) -> int:
    """The verb; 0 when the page is right. Raises ConfigError with every problem; with --json the
    problems are printed instead, and the exit code is 2."""
    parser = argparse.ArgumentParser("python -m launch check", description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", help="a run, a corpus or a file of sizes")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. batch.samples=64"
    )
    parser.add_argument("--devices", type=int, help="also: can this run live on so many?")
    parser.add_argument("--explain", action="store_true", help="print what may stand in a page")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    if args.explain:
        kinds = [kind_of(args.config)] if args.config else ["run", "corpus"]
        pages = {kind: grammar.fields(kind) for kind in kinds}
        as_json = json.dumps(pages, ensure_ascii=False, indent=1)
        print(as_json if args.json else "\n".join(map(grammar.page, kinds)))
        return 0
    if args.config is None:
        raise ConfigError("check wants a CONFIG, e.g. configs/runs/cpm-small-1gpu.yaml (缺少配置)")
    try:
        found = check(args.config, args.overrides, args.devices)
    except ConfigError as error:
        if not args.json:
            raise
        answer = {"ok": False, "config": args.config, "problems": str(error).splitlines()}
        print(json.dumps(answer, ensure_ascii=False, indent=1))
        return 2
    if args.json:
        print(json.dumps({"ok": True, **found}, ensure_ascii=False, indent=1))
    else:
        remarks = found.pop("remarks", [])
        print("ok (配置正确)")
        print("\n".join(f"  {key:<24}{_shown(value)}" for key, value in found.items()))
        print("".join(f"  note: {sentence}\n" for sentence in remarks), end="")
    return 0


def check(path: str, overrides: list[str], devices: int | None = None) -> dict[str, Any]:
    """What a page comes to, as plain data; ConfigError lists every problem of it."""
    if devices is not None:
        at_least_one("--devices", devices)
    kind = kind_of(path)
    config = load(path, PAGES[kind], overrides)
    found: dict[str, Any] = {"config": path, "kind": kind}
    if isinstance(config, corpus_page.CorpusConfig):
        return found | _corpus_summary(config)
    if isinstance(config, run_page.RunConfig):
        problems = [] if devices is None else run_page.world_problems(config, devices)
        if problems := [*problems, *manifests.problems(config)]:
            raise ConfigError("\n".join(problems))
        return found | _run_summary(config)
    assert isinstance(config, Sizes)
    return found | _model_summary(config.model)


def kind_of(path: str) -> str:
    """Whether a file is a "run", a "corpus" or "sizes", by the sections that stand in it."""
    data = read_yaml(path)
    section = data.get("data")
    if CORPUS_SECTIONS & set(data) or (isinstance(section, dict) and "sources" in section):
        return "corpus"
    return "sizes" if set(data) == {"model"} else "run"


def _model_summary(model: ModelConfig) -> dict[str, Any]:
    return {"family": model.family, "parameters": parameter_count(model)}


def _run_summary(config: run_page.RunConfig) -> dict[str, Any]:
    samples, steps = run_page.step_samples(config), run_page.total_steps(config)
    last = run_page.stage_model(config, len(run_page.stages(config)) - 1)
    found = _model_summary(run_page.stage_model(config, 0))
    if last != run_page.stage_model(config, 0):
        found["parameters_at_the_end"] = parameter_count(last)
    pages = [run_page.at_stage(config, n) for n in range(len(run_page.stages(config)))]
    corpora = list(dict.fromkeys(share.corpus for page in pages for share in page.data.train))
    tokens = [
        run_page.stage_samples(config, number) * page.data.seq_len
        for number, page in enumerate(pages)
    ]
    return found | {
        "corpora": corpora,
        "corpora_not_built": [c for c in corpora if not Path(c, "manifest.json").is_file()],
        "stages": len(pages),
        "steps": steps,
        "samples_per_step": samples,
        "tokens_per_step": samples * config.data.seq_len,
        "tokens": sum(tokens),
        "precision": config.precision,
        "zero_stage": config.parallel.zero,
        "tensor_parallel": config.parallel.tensor,
        "sequence_parallel": config.parallel.sequence,
        "out": config.run.out,
        "remarks": [told for number in range(len(pages)) for told in idle_options(config, number)],
    }


def _corpus_summary(config: corpus_page.CorpusConfig) -> dict[str, Any]:
    from data_pipeline import ingest

    def found(source: corpus_page.Source) -> bool:
        try:
            return source.kind == "datasets" or bool(ingest.files(source))
        except ingest.CorpusError:
            return False

    return {
        "sources": [f"{source.name}: {', '.join(source.paths)}" for source in config.data.sources],
        "sources_not_found": [s.name for s in config.data.sources if not found(s)],
        "tokenizer": config.tokenizer.kind,
        "vocab_size": config.tokenizer.vocab_size,
        "tokenizer_model": config.tokenizer.model,
        "out": config.data.out,
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)
