"""Opening corpora costs what has to be read: tables of documents only where an objective reads
them, and the content of a folder once, however many stages read it."""

from pathlib import Path
from typing import Any

import pytest

from configs.load import from_dict
from configs.objectives import Causal, Masked
from configs.run import CorpusShare, Data
from pretrain import corpora
from pretrain.corpora import Reading, open_corpora, open_stages

CAUSAL = from_dict(Causal, {"name": "causal"}, "objective")


def test_windows_need_no_table_of_documents(tiny_corpus: Path) -> None:
    """12 bytes a document and rank, 17 GB for a million million tokens of short ones."""
    data = Data((CorpusShare(str(tiny_corpus)),), 64)
    opened = open_corpora(data, CAUSAL, 0, 400)
    opened.train[0].batch([0, 1])
    index = opened.train[0].index
    assert index.tokens > 1000 and not {"offsets", "lengths"} & vars(index).keys()
    assert index.offsets[-1] == index.tokens and len(index.lengths) == index.documents
    assert "offsets" in vars(index)  # the control: there they are


def test_stages_check_a_corpus_once(tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RoFormer's curriculum: six lengths over one corpus."""
    seen: list[Any] = []
    whole = corpora.corpus_index.fingerprint
    monkeypatch.setattr(
        corpora.corpus_index, "fingerprint", lambda at: (seen.append(at), whole(at))[1]
    )
    share = (CorpusShare(str(tiny_corpus)),)
    stages = [Reading(Data(share, length), CAUSAL, 10 * n) for n, length in enumerate((32, 64, 96))]
    open_stages(stages, 0, 400)
    assert sorted(path.name for path in seen) == ["train", "valid"]
    masked = from_dict(Masked, {"name": "masked", "masking": "word"}, "objective")
    seen.clear()  # what reads more beside the tokens checks that as well
    open_stages([*stages, Reading(Data(share, 64), masked, 40)], 0, 400)
    assert len(seen) == 4
