"""The outputs that a model may write: a prefix tree of token ids.

    lines of a file --tokenizer--> token ids + end --tree--> after 今 天: {气: ..., 下: ...}
    at each token: what the tree does not hold has probability 0; the others are not raised by it

A question answered out of a knowledge base, a label, a command: the output is one of the lines,
whatever the model thinks (Su on KgCLUE: seq2seq with a prefix tree, kexue.fm/archives/8802).

Legend: N hypotheses, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Node = dict[int, Any]
"""Token id -> the node behind it; the end token leads to an empty one."""


class AllowedOutputs:
    """A prefix tree of outputs, each with the end token behind it."""

    def __init__(self, outputs: Iterable[Sequence[int]], end_id: int) -> None:
        self.root: Node = {}
        self.end_id, self.longest = end_id, 0
        """`longest`: tokens of the longest output, its end included."""
        for output in outputs:
            node = self.root
            for token in (*output, end_id):
                node = node.setdefault(int(token), {})
            self.longest = max(self.longest, len(output) + 1)
        if not self.root:
            raise ValueError("allowed: holds no output; give at least one (没有可选的输出)")

    def after(self, ids: Iterable[int]) -> Node:
        """The node behind some tokens; an empty one behind an end, or where the tree has none."""
        node = self.root
        for token in ids:
            node = node.get(int(token), {})
        return node

    def only(self, logits_NV: Tensor, nodes: Sequence[Node]) -> Tensor:
        """Logits with -inf for what may not follow; a row whose node is empty keeps its end."""
        kept_NV = torch.full_like(logits_NV, -torch.inf)
        sizes = torch.tensor([max(len(node), 1) for node in nodes])
        columns = torch.tensor([token for node in nodes for token in (node or (self.end_id,))])
        rows, columns = (
            part.to(logits_NV.device)
            for part in (torch.repeat_interleave(torch.arange(len(nodes)), sizes), columns)
        )
        kept_NV[rows, columns] = logits_NV[rows, columns]
        return kept_NV

    def check_room(self, room: int, what: str) -> None:
        """ValueError if `room` tokens are too few for the longest output."""
        if room < self.longest:
            raise ValueError(
                f"{what}: leaves room for {room} tokens, the longest allowed output has "
                f"{self.longest} with its end (可写的长度不足)"
            )


def read_lines(
    path: str | Path, tokenizer: Any
) -> tuple[AllowedOutputs, dict[tuple[int, ...], str]]:
    """The distinct lines of a UTF-8 file as outputs, and the line that each spelling came from.

    Raises ValueError for a file that is not UTF-8, or a line that the vocabulary cannot spell.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error} (编码错误)") from None
    spelt: dict[tuple[int, ...], str] = {}
    unknown = getattr(tokenizer, "unknown_id", None)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        ids = tuple(int(i) for i in tokenizer.encode_prompt(line))
        if not ids or unknown in ids or tokenizer.eod_id in ids:
            raise ValueError(
                f"{path}: line {number}, '{line[:40]}', cannot be written in this vocabulary; it "
                "would give an empty, unknown or ended output (该行无法用此词表表示)"
            )
        spelt.setdefault(ids, line.strip())
    if not spelt:
        raise ValueError(f"{path}: has no line with text (文件没有内容)")
    return AllowedOutputs(spelt, tokenizer.eod_id), spelt
