"""Which documents are the same, nearly the same, or text of an evaluation set."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Near:
    """Which documents are nearly the same: letters and digits alone are compared, in n-grams."""

    jaccard: float = 0.5
    """Two documents are near when their sets of n-grams have at least this share in common."""
    ngram: int = 5
    """Characters in a row: one edited character changes so many n-grams."""
    bands: int = 18
    """Keys of a document; pairs that share one are compared (Jaccard s: 1 - (1 - s^rows)^bands)."""
    rows: int = 6
    """Hash functions that make a key. The usual 14 bands of 8 find 85 % of the copies with 2 % of
    their characters replaced, 18 of 6 find 98 %, and what is found by chance is compared anyway."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if not 0 < self.jaccard <= 1:
            found.append(f"jaccard: is {self.jaccard}, must lie in (0, 1]")
        for name, most in (("ngram", 50), ("bands", 500), ("rows", 50)):
            if not 1 <= getattr(self, name) <= most:
                found.append(f"{name}: is {getattr(self, name)}, must lie in [1, {most}]")
        return found


@dataclass(frozen=True)
class Lines:
    """Which lines are boilerplate: they stand in many documents of the corpus."""

    max_documents: int = 1000
    """A line of more documents than this goes. Measured on the development corpus (209,244
    documents), share of the characters that goes at 1 / 10 / 100 / 1000: poetry 0.21 / 0.003 /
    0.0007 / 0 (every edition repeats a poem), laws 0.09 / 0.009 / 0.006 / 0.004, technical pages
    0.22 / 0.05 / 0.02 / 0.007, prose below 0.007 always. So not below 100 where verse matters."""
    min_characters: int = 8
    """Lines with fewer letters and digits stay, and are not counted."""
    keep_first: bool = False
    """Leave the line in the first document that has it: with max_documents 1, line-level dedup."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        return [
            f"{name}: is {getattr(self, name)}, must be at least 1"
            for name in ("max_documents", "min_characters")
            if getattr(self, name) < 1
        ]


@dataclass(frozen=True)
class Dedup:
    """Which documents are the same."""

    lines: Lines | None = None
    """Lines that stand in very many documents are taken out of them before documents are compared;
    `{}` takes the values above, null leaves them (样板行)."""
    exact: bool = True
    """Of documents whose letters and digits are the same (punctuation and blanks do not count) only
    the first one is kept."""
    near: Near | None = None
    """Of documents that are nearly the same only the first one is kept, with their number in its
    field `near_duplicates`; `{}` takes the values above, null leaves them all (近似去重)."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation set whose text must not be in the corpus: a document that holds some of it is
    dropped as `contaminated:NAME`, and noted in contamination/."""

    name: str
    """How the set is called in the rejects."""
    path: str
    """A .json, .jsonl or .tsv file, else a text file with one item a line."""
    fields: tuple[str | int, ...] = ()
    """JSON: the fields with the text, at any depth; .tsv: numbers of columns, from 1, as
    data.sources counts them."""
    characters: int = 13
    """Letters or digits in a row (punctuation and blanks left out), more than half of them Han,
    that a document must not share with an item."""
    max_documents: int | None = 10
    """So many letters in a row that stand in more documents than this are no leak but a common
    phrase, such as a formula of the law: a document that shares nothing else with the set stays,
    and is listed. Copies, and documents that hold half of an item, are not counted, and the latter
    always go. 10 is GPT-3's (Brown et al. 2020, appendix C); null: every hit is a leak (套语)."""

    def problems(self) -> list[str]:
        """A name that is no folder's, no file, fields that are missing or no columns."""
        found = []
        if not all(part.isalnum() for part in self.name.replace("-", "_").split("_")):
            found.append(
                f"name: is '{self.name}', must be letters and digits, joined by '-' or '_'"
                " (名称不合法)"
            )
        if not self.path:
            found.append("path: is empty, must name the file of the evaluation set (须有路径)")
        if self.path.endswith((".json", ".jsonl")):
            if not self.fields:
                found.append("fields: is empty, must name the fields with the text (须有字段名)")
        elif not all(str(field).isdecimal() and int(field) for field in self.fields):
            found.append(
                f"fields: is {list(self.fields)}, must be numbers of columns, and the first is 1 "
                "(须为列号，从 1 数起)"
            )
        if not 5 <= self.characters <= 1000:
            found.append(f"characters: is {self.characters}, must lie in [5, 1000]")
        if self.max_documents is not None and self.max_documents < 1:
            found.append(f"max_documents: is {self.max_documents}, must be at least 1, or null")
        return found
