"""Where the documents of a corpus come from.

    kind       what it reads                                       a document is
    jsonl      one JSON object a line                              a line
    txt        plain text                                          text between blank lines, a file
    tsv        columns between tabs (or another separator)         a line
    mnbvc      MNBVC's JSON: one file a line, as paragraphs        a line
    parquet    columns in row groups                               a row
    datasets   a name of the Hub, or the folder of a saved dataset a row
    warc       crawled pages (.warc, .wet), the extra `web`        a response
    html       pages as files, the extra `web`                     a file
    index      Megatron's .bin/.idx with its tokenizer             a document of the index

Files but parquet, datasets and index may be packed: .gz, .zst, .bz2, .xz.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["jsonl", "txt", "tsv", "mnbvc", "parquet", "datasets", "warc", "html", "index"]
BadLines = Literal["reject", "stop"]
WITH_COLUMNS = ("jsonl", "tsv", "parquet", "datasets")


@dataclass(frozen=True)
class Source:
    """Where documents come from: files, or a dataset of the `datasets` library."""

    kind: Kind
    """What the files are; the head of this file lists the kinds."""
    path: str | tuple[str, ...]
    """A file, a folder, a pattern (`*`, `**`) or a list of these; $VARIABLES are filled in. A
    relative path is looked for in the working directory, then beside configs/."""
    name: str
    """How the source is called in ids, counts and the manifest."""
    text_field: str = "text"
    """jsonl, tsv, parquet, datasets: the field that holds the text."""
    fields: tuple[str, ...] = ()
    """In place of text_field: the fields whose texts, one a line, are the document; "source=title"
    gives the field `title` the name `source`. A field may be a list of texts (synonyms)."""
    label_field: str | None = None
    """The field that holds the document's class; it becomes `label`, beside the text."""
    separator: str = "\t"
    """tsv: what stands between columns; anything but a tab may be quoted as in CSV. Columns called
    by digits are counted from 1; by other names, the first line names them."""
    encoding: Literal["auto", "utf-8", "gb18030", "big5"] = "auto"
    """auto: strict UTF-8, else GB18030 (GBK, GB2312), else Big5, if what comes out is Chinese;
    UTF-16 by its mark. Nothing is ever replaced: what no encoding gives is a bad line."""
    bad_lines: BadLines | None = None
    """reject: put aside, count and go on; stop: end the build at the first; null: data.bad_lines.
    """
    documents: Literal["blank_line", "file"] = "blank_line"
    """txt: documents lie between blank lines, or each file is one."""
    keep_repeated: bool = False
    """mnbvc: whether paragraphs and files that are marked as repeated stay."""
    tokenizer: str | None = None
    """index: the folder of the tokenizer that it was made with."""
    split: str = "train"
    """datasets: which split."""
    subset: str | None = None
    """datasets: which configuration of the dataset."""

    def problems(self) -> list[str]:
        """A source without a name, without files or without a field."""
        found = [] if self.name.strip() else ["name: is empty, must be a name (须有名字)"]
        if not self.name.isprintable():
            found.append(f"name: is {self.name!r}, must be one line of text (名字须为一行)")
        if not self.paths or not all(self.paths):
            found.append("path: is empty, must name a file, folder, pattern or dataset (须有路径)")
        if self.kind == "datasets" and len(self.paths) > 1:
            found.append(f"path: lists {len(self.paths)} datasets, a source is one (一个来源一个)")
        if not self.text_field:
            found.append(
                "text_field: is empty, must name the field that holds the text (须有字段名)"
            )
        return found + self._problems_of_fields() + self._problems_of_a_kind()

    def _problems_of_fields(self) -> list[str]:
        found = []
        for key in ("fields", "label_field"):
            if getattr(self, key) and self.kind not in WITH_COLUMNS:
                found.append(
                    f"{key}: is set, but kind is '{self.kind}'; only {', '.join(WITH_COLUMNS)} have"
                    " fields (此类来源没有字段)"
                )
        if not all(name and column for name, column in self.columns):
            found.append("fields: an entry is empty, must be FIELD or NAME=FIELD (字段名为空)")
        names = [name for name, _ in self.columns]
        found += [
            f"fields: the name '{name}' stands {names.count(name)} times; names must differ (重名)"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        return found

    def _problems_of_a_kind(self) -> list[str]:
        found = []
        if len(self.separator) != 1:
            found.append(f"separator: is {self.separator!r}, must be one character (须为一个字符)")
        if (self.kind == "index") != (self.tokenizer is not None):
            found.append(
                f"tokenizer: is {self.tokenizer!r} and kind is '{self.kind}'; an index, and nothing"
                " else, names the folder of its tokenizer (索引须指明分词器)"
            )
        return found

    @property
    def paths(self) -> tuple[str, ...]:
        """`path`, as a list in either case."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """(name in the corpus, field of the source) of `fields`."""
        pairs = [entry.partition("=") for entry in self.fields]
        return tuple((name, column if equals else name) for name, equals, column in pairs)
