"""What the corpora of a run say against its page, by their manifests: before a job runs. No torch.

    page -> each stage's corpora that are built --manifest.json--> readable? one tokenizer, not
            above model.vocab? the files beside the index that the objective reads? -> sentences

`check` and `plan` ask; a run asks the same of each corpus that it opens (corpora.py),
and more, which needs the files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.grown import said
from configs.load import ConfigError
from configs.objectives import Labels, Masked, Objective, Pairs, PseudoSummary, packing_of
from configs.run import Data, RunConfig, at_stage, stages


class Side(NamedTuple):
    """A file beside the index."""

    entry: str
    """Its entry in the manifest of a corpus."""
    format: str
    """The name of its format in data_pipeline/sidefile.py."""
    key: str
    """The key of a corpus that builds it, and how."""

    @property
    def layout(self) -> Any:
        """Its format."""
        from data_pipeline import sidefile  # numpy: `check` of a page without such files has none

        return getattr(sidefile, self.format)


MARKS = Side("boundaries", "MARKS", "encode.boundaries=true")
GAPS = Side("gaps", "GAPS", "encode.pseudo_summary=true")
FIELDS = Side("fields", "FIELDS", "`fields` of a source in data.sources")


def needs(objective: Objective, data: Data) -> list[Side]:
    """What has to lie beside the index."""
    if isinstance(objective, Masked):
        packed = packing_of(objective, data.packing) != "windows"
        return [MARKS] if packed or objective.masking != "token" else []
    sides: Mapping[type, Side] = {PseudoSummary: GAPS, Pairs: FIELDS, Labels: FIELDS}
    return [sides[type(objective)]] if type(objective) in sides else []


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus. ConfigError for a folder that is none."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        for split in ("train", "valid"):
            manifest["splits"][split]["fingerprint"]
        manifest["tokenizer"]["fingerprint"]
    except FileNotFoundError:
        raise ConfigError(
            f"data.train: {folder} is no corpus, it has no manifest.json; build it with "
            "`python -m launch corpus CONFIG` (语料不存在)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: cannot be read as a corpus manifest (清单已损坏)") from None
    return dict(manifest)


def check_vocab(folder: Path, tokens: int, vocab: int) -> None:
    """ConfigError for a tokenizer of more tokens than are said: a masked one cannot be learnt."""
    if tokens > vocab:
        raise ConfigError(
            f"model.vocab: is {vocab}, the tokenizer of {folder} has {tokens} "
            "tokens; model.vocab, and model.words_said if given, must be at least that (词表过小)"
        )


def check_sides(folder: Path, manifest: Mapping[str, Any], sides: Sequence[Side]) -> None:
    """ConfigError for a corpus that was built without one of the files, or has lost it."""
    for side in sides:
        if any(side.entry not in known for known in manifest["splits"].values()):
            raise ConfigError(
                f"data.train: {folder} has no {side.layout.suffix} files ({side.layout.holds}), "
                f"this objective needs them; build the corpus with {side.key} "
                f"(语料缺少{side.layout.chinese})"
            )
        paths = [side.layout.path(folder / split) for split in manifest["splits"]]
        if missing := [str(path) for path in paths if not path.is_file()]:
            raise ConfigError(f"data.train: {', '.join(missing)} is missing (文件缺失)")


def check_alike(prints: Mapping[str, Path]) -> None:
    """ConfigError for corpora of several tokenizers; `prints`: a corpus of each fingerprint."""
    if len(prints) > 1:
        raise ConfigError(
            f"data.train: the corpora {', '.join(map(str, prints.values()))} were encoded by "
            "different tokenizers; encode them by one (分词器不一致)"
        )


def checked(config: RunConfig) -> RunConfig:
    """The page; ConfigError with all problems() of it."""
    if found := problems(config):
        raise ConfigError("\n".join(found))
    return config


def problems(config: RunConfig) -> list[str]:
    """What the corpora that are built would end the run by, a sentence each; one that is not built
    yet has none."""
    found, prints = [], {}
    for number in range(len(stages(config))):
        page = at_stage(config, number)
        for folder in (Path(share.corpus) for share in page.data.train):
            if not (folder / "manifest.json").is_file():
                continue
            try:
                manifest = manifest_of(folder)
                tokenizer = manifest["tokenizer"]
                prints[tokenizer["fingerprint"]] = folder
                check_vocab(folder, tokenizer.get("vocab_size", 0), said(config.model))
                check_sides(folder, manifest, needs(page.objective, page.data))
            except ConfigError as error:
                found.append(str(error))
    try:
        check_alike(prints)
    except ConfigError as error:
        found.append(str(error))
    return list(dict.fromkeys(found))
