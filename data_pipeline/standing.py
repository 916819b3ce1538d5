"""What stands in a corpus folder, and what may be built over it.

    data.out --no_file, not_others--> empty, or a folder that a build of ours began
             --finished--> the corpus that is asked for, whole: nothing to do
             --not_another--> no corpus, or one of the same page, or the word --replace

A folder is ours if it holds a manifest of our format, or the lock and the stages of a build.
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from configs.corpus import CorpusConfig
from configs.load import ConfigError, dump, flat, load, to_dict
from data_pipeline import sidefile
from data_pipeline.blocks import Stage
from data_pipeline.shards import CorpusError, aside

FORMAT = "bajie-corpus-1"


# ---- what must not be built over


def folder_of(config: CorpusConfig) -> Path:
    """data.out with its variables. CorpusError for one that is not set: the corpus would lie in a
    folder that is called so."""
    for name in re.findall(r"\$\{?(\w+)", config.data.out, re.ASCII):
        if name not in os.environ:
            raise CorpusError(
                f"data.out: the variable ${name} is not set; set it, or write the folder itself "
                "(环境变量未设置)"
            )
    return Path(os.path.expandvars(config.data.out)).expanduser()


def no_file(config: CorpusConfig, out: Path) -> None:
    """Refuse a place where a file stands."""
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise CorpusError(
                f"data.out is '{config.data.out}', but {path} is a file; the corpus needs a folder:"
                " change data.out, or move the file away (输出位置是一个文件)"
            )


def not_others(config: CorpusConfig, out: Path) -> None:
    """Refuse a folder with files that no build of ours made: some would be lost."""
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    strange = [name for name in names if name != ".lock"]
    if not strange or {".lock", "stages"} <= set(names) or _manifest(out).get("format") == FORMAT:
        return
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    raise CorpusError(
        f"data.out '{config.data.out}' is no corpus, but holds '{strange[0]}'{more}, which a "
        "corpus could overwrite; name an empty or a new folder (目录非空且不是语料，请换一个目录)"
    )


def not_another(config: CorpusConfig, out: Path, replacing: bool) -> None:
    """Refuse to build over a corpus of another page, unless that is asked for."""
    if replacing or not (out / "manifest.json").exists():
        return
    try:
        there, here = (
            flat(to_dict(replace(page, data=_content(page))))
            for page in (load(out / "stages" / "page.yaml", CorpusConfig), config)
        )
    except ConfigError:  # of a version that noted none, or of one that had other keys
        said = "of what page is not on record"
    else:
        keys = [key for key in there | here if there.get(key) != here.get(key)]
        if not keys:
            return
        old, new = (orjson.dumps(page.get(keys[0])).decode() for page in (there, here))
        said = f"{keys[0]} is {old} there and {new} here"
        said += f"; {len(keys)} keys differ" if len(keys) > 1 else ""
    raise CorpusError(
        f"data.out '{config.data.out}' holds a corpus of another page ({said}); name another "
        "folder, or build over it with --replace (已有另一配置的语料：请换目录，或加 --replace)"
    )


def note_page(config: CorpusConfig, out: Path) -> None:
    """Write the page that the corpus is made by: before its files are, so that a build that is
    killed among them goes on."""
    with aside(out / "stages" / "page.yaml") as file:
        file.write(dump(config).encode())


def _content(page: CorpusConfig) -> Any:
    return replace(page.data.content(), documents=page.data.documents)


def _manifest(out: Path) -> dict[str, Any]:
    """What manifest.json says; nothing if it is missing or damaged."""
    try:
        manifest = orjson.loads((out / "manifest.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


# ---- what is complete


def finished(out: Path, asked: str) -> dict[str, Any] | None:
    """The manifest, if the folder holds what is asked for, whole."""
    try:
        built = orjson.loads((out / "stages" / "built.json").read_bytes())
        manifest = orjson.loads((out / "manifest.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    whole = built == {"asked": asked, "sizes": sizes_of(out)}
    return manifest if whole else None


def remember(out: Path, asked: str, kept: Sequence[Stage]) -> None:
    """Note that this corpus is complete, then drop the folders that nothing needs: stages of older
    configs, and the shards that were merged into the index."""
    with aside(out / "stages" / "built.json") as file:
        file.write(orjson.dumps({"asked": asked, "sizes": sizes_of(out)}))
    names = {stage.folder.name for stage in kept}
    for folder in (out / "stages").iterdir():
        if folder.is_dir() and folder.name not in names:
            shutil.rmtree(folder)


def with_its_stage(sentence: str, out: Path) -> str:
    """A sentence about a damaged file of a stage, which begins with its path, and the folder to
    remove: while that stands, its tasks are marked as done. The rooms that read files do not know
    it, and their text is in the keys of stages."""
    stages = f"{out / 'stages'}/"
    name, inside, _ = sentence.removeprefix(stages).partition("/data/")
    if not sentence.startswith(stages) or not inside or "/" in name:
        return sentence
    return f"{sentence}; the folder to remove first is {stages}{name} (先删除此目录)"


def sizes_of(out: Path) -> dict[str, int]:
    """Bytes of the files that make the corpus."""
    files = [
        out / "manifest.json",
        out / "report.html",
        *out.glob("*.bin"),
        *out.glob("*.idx"),
        *(file for layout in sidefile.LAYOUTS for file in out.glob(f"*{layout.suffix}")),
        *out.glob("tokenizer/*"),
    ]
    return {
        str(file.relative_to(out)): file.stat().st_size for file in sorted(files) if file.exists()
    }
