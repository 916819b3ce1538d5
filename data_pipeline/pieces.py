"""A model of sentencepiece that is no tokenizer of ours: mT5's, read for its pieces.

sentencepiece.model --> pieces in the order of their ids, and how they cut a text
"""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from data_pipeline.frozen import TokenizerFault


class Pieces:
    """The pieces of a model of sentencepiece. TokenizerFault for a file that is none."""

    def __init__(self, path: str | Path) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(Path(path).read_bytes())
        except RuntimeError as error:
            raise TokenizerFault(
                f"{path}: not a model of sentencepiece: {error} (无法读取)"
            ) from None
        self.tokens: tuple[str, ...] = tuple(
            self._pieces.id_to_piece(i) for i in range(self._pieces.get_piece_size())
        )
        self.unknown_id: int = self._pieces.unk_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end."""
        return self._pieces.encode(list(texts), num_threads=1) if texts else []
