"""How sample.jsonl was made: the Chinese paragraphs of three Debian packages, a section a document.

    apt-get download debian-handbook debmake-doc fortunes-zh
    for package in *.deb; do dpkg -x "$package" unpacked; done
    python data_pipeline/sample/make.py unpacked data_pipeline/sample/sample.jsonl

Nothing of the project imports this file; it stands here so that the sample can be made again.
LICENSES.md beside it says what may be done with the text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
PARAGRAPHS = {"p", "li", "dt", "dd", "td", "th"} | HEADINGS
SKIPPED = {"pre", "script", "style", "head"}


class Sections(HTMLParser):
    """Collects [title, paragraph, ...] lists: a heading or a sidebar's title opens the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[list[str]] = [[]]
        self.section = self.sections[0]
        self.open: list[
            tuple[str, bool, list[str] | None]
        ] = []  # (tag, begins a paragraph, section to return to)
        self.text: list[str] = []
        self.opens_section = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A paragraph, a heading or a sidebar may begin."""
        classes = (dict(attrs).get("class") or "").split()
        paragraph = tag in PARAGRAPHS or (
            tag == "div" and not {"para", "section", "sidebar"}.isdisjoint(classes)
        )
        if paragraph:
            self.end_paragraph()
            self.opens_section = tag in HEADINGS or "title" in classes
        if tag not in {"img", "br", "hr", "link", "meta", "col", "input"}:
            self.open.append((tag, paragraph, self.section if "sidebar" in classes else None))

    def handle_endtag(self, tag: str) -> None:
        """It may end; tags left open inside it end with it."""
        while self.open:
            name, paragraph, section = self.open.pop()
            if paragraph or section is not None:
                self.end_paragraph()
            if section is not None:
                self.section = section
            if name == tag:
                return

    def handle_data(self, data: str) -> None:
        """Text, unless it is a listing."""
        if not any(tag in SKIPPED for tag, *_ in self.open):
            self.text.append(data)

    def end_paragraph(self) -> None:
        """Put the text so far into its section."""
        text = tidy("".join(self.text))
        self.text = []
        if not text:
            return
        if self.opens_section:
            self.section = [
                re.sub(r"^(第 *\d+ *章|(Chapter|Appendix) \w+\.|[\dA-Z]+(\.\d+)*\.) *", "", text)
            ]
            self.sections.append(self.section)
            self.opens_section = False
        else:
            self.section.append(text)


def tidy(text: str) -> str:
    """One line: a break between two Chinese characters is nothing, other runs of blanks one space."""
    text = re.sub(
        r"(?<=[\u3000-\u9fff\uff00-\uffef])\s*\n\s*(?=[\u3000-\u9fff\uff00-\uffef])", "", text
    )
    return re.sub(r"\s+", " ", text).strip()


def chinese(paragraph: str) -> bool:
    """At least 8 Chinese characters, and at least 3 in 10 of those that are not blank."""
    han = len(HAN.findall(paragraph))
    return han >= 8 and han >= 0.3 * len(re.sub(r"\s", "", paragraph))


def book(pages: list[Path], source: str, licence: str) -> Iterator[dict[str, str]]:
    """One document for each section of a book that has a Chinese paragraph."""
    for page in pages:
        parser = Sections()
        parser.feed(page.read_text(encoding="utf-8"))
        parser.end_paragraph()
        for number, section in enumerate(parser.sections):
            title, paragraphs = section[:1], [line for line in section[1:] if chinese(line)]
            if paragraphs:
                stem = re.sub(r"\.zh-cn$", "", page.stem)
                text = "\n".join([line for line in title if HAN.search(line)] + paragraphs)
                yield {
                    "id": f"{source}/{stem}/{number}",
                    "source": source,
                    "license": licence,
                    "text": text,
                }


def poems(path: Path) -> Iterator[dict[str, str]]:
    """Title, poet, verses; ordered by poet and title, which is nobody's arrangement."""
    found = []
    for entry in COLOUR.sub("", path.read_text(encoding="utf-8")).split("\n%"):
        lines = [line.strip() for line in entry.strip().splitlines() if line.strip()]
        if len(lines) < 3:
            continue
        title = re.sub(r"^题目[:：]", "", lines[0]).strip("《》")
        poet = re.sub(r"^作者[:：]|（.*）$|\(.*\)$", "", lines[1])
        found.append((poet, title, "\n".join(lines[2:])))
    for number, (poet, title, verses) in enumerate(sorted(found)):
        text = f"{title}\n{poet}\n{verses}"
        yield {
            "id": f"poems/{path.name}/{number}",
            "source": "poems",
            "license": "public domain",
            "text": text,
        }


def main(unpacked: Path, out: Path) -> None:
    """Write the sample."""
    documents = unpacked / "usr/share/doc"
    handbook = sorted((documents / "debian-handbook/html/zh-CN").glob("*.html"))
    debmake = sorted((documents / "debmake-doc/html").glob("*.zh-cn.html"))
    fortunes = unpacked / "usr/share/games/fortunes"
    rows = [
        *book(handbook, "debian-handbook", "CC-BY-SA-3.0"),
        *book(debmake, "debmake-doc", "Expat"),
        *poems(fortunes / "tang300"),
        *poems(fortunes / "song100"),
    ]
    seen: set[str] = set()
    with out.open("w", encoding="utf-8") as file:
        for row in rows:
            if row["text"] not in seen:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            seen.add(row["text"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
