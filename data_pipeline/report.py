"""What a corpus is, as a table for the terminal.

flow     documents and characters from the sources to the splits, what was refused and why
splits   tokens, characters per token
blocks   MB/s and the memory of the largest worker
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def flow(manifest: Mapping[str, Any]) -> str:
    """Documents and characters at each step, rejects by reason, tokens by split."""
    rows = [("", "documents", "characters", "tokens", "characters/token")]
    read = manifest["read"]
    rows.append(("read", f"{read['documents']:,}", f"{read['characters']:,}", "", ""))
    for reason, lost in manifest["rejects"].items():
        rows.append((f"- {reason}", f"{lost['documents']:,}", f"{lost['characters']:,}", "", ""))
    for name, split in manifest["splits"].items():
        rows.append(
            (
                f"= {name}",
                f"{split['documents']:,}",
                f"{split['characters']:,}",
                f"{split['tokens']:,}",
                f"{split['characters'] / max(split['tokens'], 1):.2f}",
            )
        )
    changed = ", ".join(f"{name} {n:,}" for name, n in manifest["changed"].items()) or "none"
    return f"{aligned(rows)}\ncharacters removed or folded: {changed}"


def speed(blocks: Mapping[str, "Counter[str]"]) -> str:
    """MB of text per second of one core, seconds and peak memory of each block."""
    rows = [("block", "MB", "MB/s per core", "core s", "peak RSS MB")]
    for name, block in figures(blocks).items():
        rows.append(
            (
                name,
                f"{block['mb']:.1f}",
                f"{block['mb_per_core_s']:.1f}" if block["mb"] else "",
                f"{block['core_s']:.1f}",
                f"{block['peak_rss_mb']:.0f}",
            )
        )
    return aligned(rows)


def figures(blocks: Mapping[str, "Counter[str]"]) -> dict[str, dict[str, float]]:
    """The numbers of `speed`."""
    return {
        name: {
            "mb": counts["worked_bytes"] / 1e6,
            "mb_per_core_s": counts["worked_bytes"] / 1e6 / max(counts["cpu_s"], 1e-9),
            "core_s": counts["cpu_s"],
            "peak_rss_mb": counts["peak_rss_mb"],
        }
        for name, counts in blocks.items()
    }


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
