"""The rules of the house (CONTRIBUTING.md), kept by reading the source: nothing here runs a room.

Each rule gathers everything that breaks it, with file and line, and says what to do; so one run is
enough to put a house in order.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("configs", "data_pipeline", "pretrain", "launch")
"""From the ground up; a room imports its own floor and those below."""
EXEMPT_FROM_DOORS = ("tests", "benchmarks")

DOORS = {
    "megatron": {"pretrain/parallel.py"},
    "deepspeed": {"pretrain/engine.py", "pretrain/parallel.py", "launch/"},
    "transformers": {"pretrain/convert/hf.py"},
    "sentencepiece": {
        "data_pipeline/pieces.py",
        "data_pipeline/tokenizer.py",
        "data_pipeline/training.py",
    },
    "jieba": {"data_pipeline/segment.py"},
    "datasets": {"data_pipeline/sources/tables.py"},
    "pyarrow": {"data_pipeline/sources/tables.py"},
    "trafilatura": {"data_pipeline/sources/web.py"},
    "warcio": {"data_pipeline/sources/web.py"},
    "datatrove": {
        "data_pipeline/blocks.py",
        "data_pipeline/dedup.py",
        "data_pipeline/executors.py",
        "data_pipeline/on_ray.py",
        "data_pipeline/on_slurm.py",
    },
    "ray": {"data_pipeline/on_ray.py"},
    "tensorboard": {"pretrain/monitor.py"},
    "torch.utils.tensorboard": {"pretrain/monitor.py"},
    "opencc": {"data_pipeline/hanzi.py"},
    "yaml": {"configs/load.py"},
}
"""A guest and the files that may let it in; numba has no door, it lives wherever a kernel does."""

STRANGERS = ("models", "objectives", "growth", "convert", "checkpoint", "plan")
"""Rooms of pretrain/ that do not import each other: what they share is the table of tensors."""
FREE_OF_DISTRIBUTED = ("models", "objectives", "growth", "convert")
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core"}
FILE_LINES, FUNCTION_LINES, STORY_LINES = 450, 70, 150
STORIES = {("pretrain/train.py", "train"), ("data_pipeline/build.py", "build")}
"""Functions that tell a whole story from top to bottom may be long."""


@functools.cache
def sources(*folders: str) -> tuple[Path, ...]:
    """Every Python file of these folders of the project."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(path for path in found if "__pycache__" not in path.parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported, inside functions too: `from a import b`
    gives a.b, which is a module or something in one. Imports for the type checker count as well."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            lead = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*lead, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            named = [word for word in node.args[:1] if isinstance(word, ast.Constant)]
            yield from ((node.lineno, str(word.value)) for word in named)


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def inside(module: str, package: str) -> bool:
    """Whether a dotted name is a package or lies in it."""
    return module == package or module.startswith(package + ".")


def report(broken: list[str], rule: str) -> None:
    assert not broken, f"{rule}\n  " + "\n  ".join(broken)


# ---- who imports whom ---------------------------------------------------------------------------


def test_imports_go_down() -> None:
    broken = []
    for level, floor in enumerate(FLOORS):
        above = FLOORS[level + 1 :] + EXEMPT_FROM_DOORS
        for path in sources(floor):
            for line, module in imports(path):
                broken += [
                    f"{name(path)}:{line} imports {module}" for up in above if inside(module, up)
                ]
    report(broken, "imports go down only: launch -> pretrain -> data_pipeline -> configs")


def test_pretrain_enters_data_pipeline_by_three_doors() -> None:
    allowed = ("data_pipeline.index", "data_pipeline.sidefile", "data_pipeline.tokenizer")
    broken = [
        f"{name(path)}:{line} imports {module}"
        for path in sources("pretrain")
        for line, module in imports(path)
        if inside(module, "data_pipeline") and not any(inside(module, door) for door in allowed)
    ]
    report(broken, "pretrain reaches data_pipeline by index.py, sidefile.py, tokenizer.py alone")


def test_rooms_that_share_only_the_table_do_not_import_each_other() -> None:
    broken = []
    for path in sources("pretrain"):
        room = path.relative_to(ROOT / "pretrain").parts[0].removesuffix(".py")
        if room in STRANGERS:
            others = [f"pretrain.{other}" for other in STRANGERS if other != room]
            broken += [
                f"{name(path)}:{line} imports {module}"
                for line, module in imports(path)
                if any(inside(module, other) for other in others)
            ]
    report(broken, f"{', '.join(STRANGERS)} share configs/model.py, nothing else")


def test_every_guest_comes_in_by_its_own_door() -> None:
    broken = []
    for path in sources(*FLOORS):
        for line, module in imports(path):
            for guest, doors in DOORS.items():
                if inside(module, guest) and not any(name(path).startswith(d) for d in doors):
                    broken.append(
                        f"{name(path)}:{line} imports {module}; its door: {sorted(doors)}"
                    )
    report(broken, "one door per guest")


def test_megatron_is_imported_when_it_is_needed() -> None:
    # It takes 5 s; only tensor parallelism needs it.
    broken = [
        f"{name(path)}:{node.lineno}"
        for path in sources("pretrain")
        for node in tree(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and "megatron" in ast.unparse(node).split()[1].split(".")[0]
    ]
    report(broken, "megatron-core is imported inside functions, where tensor parallelism is on")


def test_no_torch_below_pretrain() -> None:
    broken = [
        f"{name(path)}:{line} imports {module}"
        for path in sources("configs", "data_pipeline")
        for line, module in imports(path)
        if inside(module, "torch")
    ]
    report(broken, "torch is nowhere under configs/ and data_pipeline/")


def test_importing_all_of_configs_and_data_pipeline_brings_no_torch() -> None:
    modules = [
        name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in sources("configs", "data_pipeline")
        if "sample" not in path.parts
    ]
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    if 'torch' in sys.modules: sys.exit(module + ' brings torch')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_models_know_of_no_other_rank() -> None:
    broken = []
    for path in sources(*(f"pretrain/{room}" for room in FREE_OF_DISTRIBUTED)):
        broken += [
            f"{name(path)}:{line} imports {module}"
            for line, module in imports(path)
            if inside(module, "torch.distributed")
        ]
        broken += [
            f"{name(path)}:{node.lineno} uses {ast.unparse(node)}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        ]
    report(broken, f"torch.distributed is nowhere under {', '.join(FREE_OF_DISTRIBUTED)}")


# ---- what a file looks like ---------------------------------------------------------------------


def test_no_room_is_a_drawer() -> None:
    broken = [name(p) for p in sources(*FLOORS, *EXEMPT_FROM_DOORS) if p.stem in FORBIDDEN_NAMES]
    broken += [name(d) for f in FLOORS for d in (ROOT / f).rglob("*") if d.name in FORBIDDEN_NAMES]
    report(broken, "a line without a home means that a room is missing; name it for what it does")


def test_every_file_opens_with_what_it_is() -> None:
    broken = [
        name(p) for p in sources(*FLOORS, *EXEMPT_FROM_DOORS) if not ast.get_docstring(tree(p))
    ]
    report(broken, "every file opens with a docstring that says what it is")


def test_files_can_be_read_in_one_sitting() -> None:
    broken = []
    for path in sources(*FLOORS, *EXEMPT_FROM_DOORS):
        lines = path.read_text("utf-8").count("\n")
        if lines > FILE_LINES and "Long because" not in (ast.get_docstring(tree(path)) or ""):
            broken.append(f"{name(path)} has {lines} lines")
    report(broken, "a file is about 400 lines; a longer one says 'Long because ...' at its head")


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_fit_on_a_screen() -> None:
    broken = []
    for path in sources(*FLOORS):
        for node in _functions(path):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            most = STORY_LINES if (name(path), node.name) in STORIES else FUNCTION_LINES
            if lines > most and "Long because" not in (ast.get_docstring(node) or ""):
                broken.append(f"{name(path)}:{node.lineno} {node.name}() has {lines} lines")
    report(
        broken, f"a function is about 60 lines ({FUNCTION_LINES} at most, a story {STORY_LINES})"
    )


def _public(body: list[ast.stmt], lead: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Functions, classes and methods that others may call; overloads and overrides of torch's
    `forward` explain themselves by their class."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield lead + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{node.name}.")


def test_what_others_call_says_what_it_does() -> None:
    broken = [
        f"{name(path)}:{node.lineno} {label}"
        for path in sources(*FLOORS)
        for label, node in _public(tree(path).body)
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    report(broken, "public functions and classes have a docstring")


def test_what_others_call_is_annotated() -> None:
    broken = []
    for path in sources(*FLOORS):
        for node in _functions(path):
            if any(re.search("compiled|jit", ast.unparse(mark)) for mark in node.decorator_list):
                continue  # a kernel: numba infers its types, its docstring says the shapes
            spread = [a for a in (node.args.vararg, node.args.kwarg) if a]
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs + spread
            bare = [a.arg for a in arguments if not a.annotation and a.arg not in ("self", "cls")]
            if bare or not node.returns:
                what = ", ".join(bare + ([] if node.returns else ["what it returns"]))
                broken.append(f"{name(path)}:{node.lineno} {node.name}(): {what}")
    report(broken, "every function is annotated")


# ---- what is not done here ----------------------------------------------------------------------


def _unsafe(node: ast.Call) -> str | None:
    """Why a call is not done in this house."""
    called = ast.unparse(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if called in ("eval", "exec"):
        return f"{called}() runs what it reads"
    if called == "torch.load":
        only = keywords.get("weights_only")
        safe = isinstance(only, ast.Constant) and only.value is True
        return None if safe else "torch.load() needs weights_only=True"
    if called in ("yaml.load", "yaml.load_all"):
        loader = keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
        return (
            None if loader is not None and _is_safe_loader(loader) else "yaml.load() runs objects"
        )
    if called in ("np.load", "numpy.load"):
        allow = keywords.get("allow_pickle")
        if isinstance(allow, ast.Constant) and allow.value:
            return "np.load(allow_pickle=True) reads pickles"
    return None


def _is_safe_loader(node: ast.expr) -> bool:
    """SafeLoader itself, or configs/load.py's own class, which must be made from it."""
    if ast.unparse(node) in ("yaml.SafeLoader", "yaml.CSafeLoader"):
        return True
    return any(
        isinstance(other, ast.ClassDef)
        and other.name == ast.unparse(node)
        and [ast.unparse(parent) for parent in other.bases] == ["yaml.SafeLoader"]
        for other in tree(ROOT / "configs/load.py").body
    )


def test_nothing_that_is_read_can_run() -> None:
    broken = []
    for path in sources(*FLOORS):
        for line, module in imports(path):
            if any(
                inside(module, m) for m in ("pickle", "dill", "cloudpickle", "shelve", "marshal")
            ):
                broken.append(f"{name(path)}:{line} imports {module}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and (why := _unsafe(node)):
                broken.append(f"{name(path)}:{node.lineno} {why}")
    report(broken, "safetensors, JSON and safe YAML only; foreign pickles with weights_only=True")


MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp|mnt|scratch)/[\w.]+")


def test_tables_of_the_docs_are_whole() -> None:
    """An empty line ends a table; what follows it has a head of its own."""
    cut = re.compile(r"^\|.*\|\n\n(\|.*)\|\n(?!\|[-: |]+\|$)", re.MULTILINE)
    broken = [
        f"{name(path)}: {rows.group(1)[:60]}"
        for path in [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*.md"))]
        for rows in cut.finditer(path.read_text("utf-8"))
    ]
    report(broken, "an empty line cuts a table in two; take it out")


def test_no_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the list of files is not known")
    broken = []
    for word in filter(None, listed.stdout.split("\0")):
        path = ROOT / word
        text_file = (
            path.suffix in (".py", ".sh", ".md", ".toml", ".yaml", ".txt") or word == ".ci/run"
        )
        if not text_file or path == Path(__file__).resolve() or not path.is_file():
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if found := MACHINE_PATH.search(line):
                broken.append(f"{word}:{number} {found[0]}")
    report(broken, "no path of one machine: relative ones, arguments, or pytest's tmp_path")


@pytest.mark.parametrize("what", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_is_content(what: list[str]) -> None:
    if subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True).returncode:
        pytest.skip("ruff is not installed (./launch/test.sh installs it)")
    line = [sys.executable, "-m", "ruff", *what, "--quiet", "--no-cache", "."]
    if what == ["check"]:
        line.insert(-1, "--output-format=concise")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(line[2:])}\n{done.stdout}{done.stderr}"


# ---- the rules bite (negative controls) ---------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "bites"),
    [
        ("eval('1')", True),
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("yaml.load(p)", True),
        ("yaml.load(p, Loader=yaml.Loader)", True),
        ("yaml.load(p, Loader=yaml.SafeLoader)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("model.eval()", False),
    ],
)
def test_an_unsafe_call_is_found(code: str, bites: bool) -> None:
    node = ast.parse(code, mode="eval").body
    assert isinstance(node, ast.Call)
    assert bool(_unsafe(node)) is bites


def test_imports_inside_functions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def f() -> None:\n    from . import state\n    import torch.distributed as d\n"
    monkeypatch.setitem(globals(), "tree", lambda path: ast.parse(code))
    found = list(imports(ROOT / "pretrain" / "models" / "x.py"))
    assert found == [(2, "pretrain.models.state"), (3, "torch.distributed")]


def test_a_machine_path_is_found() -> None:
    assert MACHINE_PATH.search("open('/" + "home/me/x')")
    assert not MACHINE_PATH.search("https://example.org/home/x and ./tmp/y")
