"""Where the documents of a corpus come from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """Where documents come from: files, or a dataset of the `datasets` library."""

    kind: Literal["jsonl", "txt", "datasets"]
    """jsonl: one JSON object a line; txt: plain text; both also .gz or .zst; datasets: a Hub name
    or the folder of a saved dataset."""
    path: str | tuple[str, ...]
    """A file, a folder, a pattern (`*`, `**`) or a list of these; $VARIABLES are filled in. A
    relative path is looked for in the working directory, then beside configs/."""
    name: str
    """How the source is called in ids, counts and the manifest."""
    text_field: str = "text"
    """jsonl, datasets: the field that holds the text."""
    documents: Literal["blank_line", "file"] = "blank_line"
    """txt: documents lie between blank lines, or each file is one."""
    split: str = "train"
    """datasets: which split."""
    subset: str | None = None
    """datasets: which configuration of the dataset."""

    def problems(self) -> list[str]:
        """A source without a name, without files or without a field."""
        found = [] if self.name.strip() else ["name: is empty, must be a name (须有名字)"]
        if not self.paths or not all(self.paths):
            found.append("path: is empty, must name a file, folder, pattern or dataset (须有路径)")
        if self.kind == "datasets" and len(self.paths) > 1:
            found.append(f"path: lists {len(self.paths)} datasets, a source is one (一个来源一个)")
        if not self.text_field:
            found.append("text_field: is empty, must name the field that holds the text")
        return found

    @property
    def paths(self) -> tuple[str, ...]:
        """`path`, as a list in either case."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)
