"""What may stand in a config, read from the source of configs/ itself.

    configs/{run,model,corpus}.py --ast--> dataclasses, fields, defaults, docstrings --> a page

Docstrings under fields do not exist at run time; hence the source. One text, two readers: whoever
opens the file and whoever asks `check --explain`.
"""

import ast
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs

PAGES = {
    "run": (
        "RunConfig",
        (
            *(
                "positions",
                "batch",
                "extended",
                "grown",
                "model",
                "objectives",
                "faults",
                "monitoring",
            ),
            *("optimizers", "parallel", "recompute", "run"),
        ),
    ),
    "corpus": (
        "CorpusConfig",
        ("corpus", "sources", "executing", "cleaning", "quality", "dedup", "encoding"),
    ),
    "sizes": ("ModelConfig", ("positions", "model")),
}
"""The kinds of pages: the class that is the whole page, the modules that it is made of."""
WIDTH, COLUMN = 110, 46


@dataclass(frozen=True)
class Field:
    """A key as its source says it."""

    name: str
    type: str
    default: str | None
    """None: it must be given."""
    doc: str


@dataclass(frozen=True)
class Section:
    """A dataclass as its source says it."""

    doc: str
    fields: tuple[Field, ...]


def fields(kind: str) -> list[dict[str, Any]]:
    """Every key of a page ("run", "corpus" or "sizes"), in order: {key, type, default (None: must
    be given), doc, depth}; a row without a key opens one of several families or objectives."""
    top, modules = PAGES[kind]
    sections, unions = _source(modules)
    rows: list[dict[str, Any]] = []

    def walk(name: str, lead: str, depth: int) -> None:
        for alternative in unions.get(name, [name]):
            section = sections[alternative]
            if name in unions:
                tag = section.fields[0]
                family = ast.literal_eval(tag.type.removeprefix("Literal"))[0]
                rows.append(_row("", f"where {tag.name} is {family}", "", section.doc, depth))
            for item in section.fields:
                row = _row(lead + item.name, item.type, item.default, item.doc, depth)
                rows.append(row)
                for word in _names(item.type):
                    if word in sections or word in unions:
                        several = "N." if item.type.startswith(("tuple[", "list[")) else ""
                        row["section"] = True
                        walk(word, f"{lead}{item.name}.{several}", depth + 1)

    if kind == "sizes":
        rows.append(_row("model", top, None, "The architecture and its sizes.", 0))
        walk(top, "model.", 1)
    else:
        walk(top, "", 0)
    return rows


def page(kind: str) -> str:
    """The grammar of one kind of page, for people: a key a line, its meaning beside it."""
    lines = [f"{kind}:  key: type = default        what it means (缺省值与含义)", ""]
    for row in fields(kind):
        name = row["key"].rpartition(".")[2]
        if not name:
            left = f"-- {row['type']} --"
        elif row.get("section"):
            left = f"{name}:" + ("" if row["default"] is None else "  (may be left out)")
        else:
            given = "  (must be given)" if row["default"] is None else f" = {row['default']}"
            left = f"{name}: {row['type']}{given}"
        left = "  " * (row["depth"] + 1) + left
        doc = textwrap.wrap(row["doc"], WIDTH - COLUMN) or [""]
        if len(left) >= COLUMN:
            lines.append(left)
            left = ""
        lines.append(f"{left:<{COLUMN}}{doc[0]}".rstrip())
        lines += [" " * COLUMN + rest for rest in doc[1:]]
    return "\n".join(lines) + "\n"


def _row(key: str, kind: str, default: str | None, doc: str, depth: int) -> dict[str, Any]:
    return {"key": key, "type": kind, "default": default, "doc": doc, "depth": depth}


def _names(annotation: str) -> list[str]:
    tree = ast.parse(annotation, mode="eval")
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [node.id for node in sorted(names, key=lambda node: node.col_offset)]


def _source(modules: tuple[str, ...]) -> tuple[dict[str, Section], dict[str, list[str]]]:
    """The dataclasses and the unions of dataclasses that stand in these modules of configs/."""
    sections: dict[str, Section] = {}
    unions: dict[str, list[str]] = {}
    for module in modules:
        path = Path(configs.__file__ or "").parent / f"{module}.py"
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                sections[node.name] = Section(ast.get_docstring(node) or "", _fields(node))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
                unions[ast.unparse(node.targets[0])] = _names(ast.unparse(node.value))
    # `tuple[float, float] | None` has a name too, and is no choice between sections.
    return sections, {n: parts for n, parts in unions.items() if set(parts) <= set(sections)}


def _fields(node: ast.ClassDef) -> tuple[Field, ...]:
    """The annotated names of a class body, each with the docstring that follows it."""
    found = []
    for here, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(here, ast.AnnAssign) or "ClassVar" in ast.unparse(here.annotation):
            continue
        doc = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            doc = " ".join(str(after.value.value).split())
        default = None if here.value is None else ast.unparse(here.value)
        if default and default.startswith("field(default_factory="):
            default = default.removeprefix("field(default_factory=").removesuffix(")") + "()"
        name = ast.unparse(here.target).rstrip("_")  # `from_` is `from:` on the page
        found.append(Field(name, ast.unparse(here.annotation), default, doc))
    return tuple(found)
