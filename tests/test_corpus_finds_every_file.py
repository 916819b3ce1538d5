"""Every file that a path means is read, and none twice, whatever links lead to it."""

import errno
import glob
import os
from pathlib import Path
from typing import Any

import pytest

from configs.sources import Source
from data_pipeline.shards import CorpusError
from data_pipeline.sources.places import files, named_files, reaches

TREE = (
    *("a.txt", "b/a.txt", "b/c.txt", "b/d/e.txt", "b.txt", "b/d/f/g.txt", "b-c/a.txt", "说/明.txt"),
    *("other.md", "b/other.md", ".hidden/h.txt", "b/.h.txt", "b/d/.g/i.txt"),
)
PATTERNS = (
    *("*.txt", "*/*.txt", "**/*.txt", "**/d/*.txt", "b/**", "**", "b*/?.txt", "*/.h.txt"),
    *("**/.g/*", "b/**/f/**/*.txt", "[ab]/d/e.txt", "**/**/e.txt", "*/../a.txt"),
)


def tree(folder: Path, names: tuple[str, ...] = TREE) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("春眠不觉晓")
    return folder


def found(path: Path | str, top: Path) -> list[str]:
    return [str(p.relative_to(top)) for p in files(Source("txt", str(path), "s"))]


def test_the_order_is_that_of_pathlib_and_of_glob(tmp_path: Path) -> None:
    """So that a corpus of ordinary folders is the one that it was."""
    top = tree(tmp_path / "t")
    assert files(Source("txt", str(top), "s")) == sorted(top.rglob("*.txt"))
    for pattern in PATTERNS:
        by_glob = {Path(p) for p in glob.glob(f"{top}/{pattern}", recursive=True)}
        wanted = sorted(path for path in by_glob if path.is_file())
        assert wanted and files(Source("txt", f"{top}/{pattern}", "s")) == wanted, pattern


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**"])
def test_linked_folders_are_read_once(pattern: str, tmp_path: Path) -> None:
    """A folder elsewhere that two links lead to; one within; links to a folder above, and loops."""
    top = tree(tmp_path / "t", ("a.txt", "z/b.txt"))
    elsewhere = tree(tmp_path / "elsewhere", ("c.txt", "d/e.txt"))
    (top / "first").symlink_to(elsewhere)
    (top / "second").symlink_to(elsewhere / "d")
    (top / "inside").symlink_to(top / "z")
    (top / "loop").symlink_to(top)
    (top / "above").symlink_to(tmp_path)
    (elsewhere / "d" / "back").symlink_to(elsewhere)
    wanted = ["a.txt", "first/c.txt", "first/d/e.txt", "z/b.txt"]
    assert found(top / pattern, top) == wanted
    assert list(named_files(Source("txt", str(top / pattern), "s")).values()) == wanted


def test_names_in_capitals_are_read(tmp_path: Path) -> None:
    top = tree(tmp_path / "t", ("A.TXT", "b.txt", "c.Txt.GZ", "d.MD"))
    assert found(top, top) == ["A.TXT", "b.txt", "c.Txt.GZ"]
    tree(tmp_path / "j", ("A.JSONL", "b.Json"))
    assert len(files(Source("jsonl", str(tmp_path / "j"), "s"))) == 2


def test_a_corpus_behind_a_link_is_found_out(tmp_path: Path) -> None:
    """A link from the sources to a folder above data.out: the build would read what it writes."""
    top = tree(tmp_path / "t", ("a.jsonl",))
    (tmp_path / "scratch").mkdir()
    out = tmp_path / "scratch" / "corpus"
    source = Source("jsonl", str(top), "s")
    assert not reaches(source, out)
    (top / "more").symlink_to(tmp_path / "scratch")
    assert reaches(source, out)
    (top / "more").unlink()
    (top / "back").symlink_to(tmp_path)  # leads above the source, and is not followed
    assert not reaches(source, out)
    assert reaches(source, top / "inside")


def test_a_disks_own_folder_holds_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lost+found at the root of a disk: root's alone, and never text; elsewhere it is a folder."""
    top = tree(tmp_path / "t", ("a.txt", "lost+found/b.txt", "c/lost+found/d.txt"))
    assert len(found(top, top)) == 3
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == top)
    assert found(top, top) == ["a.txt", "c/lost+found/d.txt"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*/*.txt"])
def test_a_folder_that_cannot_be_listed_is_a_sentence(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions, or a file system that fails: what lies there would be missing."""
    top = tree(tmp_path / "t")

    def refusing(list_it: Any) -> Any:
        def listed(path: Any) -> Any:
            if Path(path) == top / "b" / "d":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return list_it(path)

        return listed

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    with pytest.raises(CorpusError, match=r"source 's': .*b/d cannot be looked into: Permission"):
        files(Source("txt", str(top / pattern), "s"))
