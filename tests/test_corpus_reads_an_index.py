"""An index that megatron-core wrote gives the texts that went into it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.corpus import Data
from configs.sources import Source
from data_pipeline import ingest, tokenizer, training
from data_pipeline.index import IndexWriter
from data_pipeline.ingest import CorpusError, Document, Fault, Meter
from data_pipeline.sources import tokens

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data_pipeline" / "sample" / "sample.jsonl"
TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()[:60]]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    training.train("byte_bpe", TEXTS, folder, 400)
    return folder


def read_all(source: Source, parts: int = 1) -> tuple[list[Document], list[Fault]]:
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))
    faults: list[Fault] = []
    documents: list[Document] = []
    for n in range(parts):
        part = replace(tasks[0][0], number=n, of=parts)
        documents += list(ingest.read(source, part, Meter(), faults.append))
    return documents, faults


def test_what_megatron_wrote_comes_back(words: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    encode = tokenizer.load(words)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "old.bin"), dtype=np.uint16)
    for number, ids in enumerate(encode.encode_batch(TEXTS)):
        # Some tools end a document with a token, some do not; one sequence a document or two.
        ids = [*ids, encode.eod_id] if number % 2 else list(ids)
        cut = len(ids) // 3 if number % 5 == 0 else 0
        pieces = [piece for piece in (ids[:cut], ids[cut:]) if piece]
        for piece in pieces:
            builder.add_item(torch.tensor(piece))
        builder.end_document()
    builder.finalize(str(tmp_path / "old.idx"))
    source = Source("index", str(tmp_path), "s", tokenizer=str(words))
    documents, faults = read_all(source)
    assert [document.text for document in documents] == TEXTS
    assert documents[3].id == "s/old.idx:3"
    assert not faults
    assert read_all(source, parts=4)[0] == documents


def written(folder: Path, documents: list[list[int]]) -> Path:
    with IndexWriter(folder / "a", np.uint16) as writer:
        for ids in documents:
            writer.add_document(np.array(ids, np.uint16))
    return folder / "a.idx"


def test_a_token_of_another_tokenizer_is_a_fault(words: Path, tmp_path: Path) -> None:
    path = written(tmp_path, [[70, 71], [5000], [72]])
    documents, faults = read_all(Source("index", str(path), "s", tokenizer=str(words)))
    assert len(documents) == 2
    assert "document 1: the document has token 5000, the tokenizer 400" in faults[0].sentence


def test_an_index_that_is_cut_is_a_fault(words: Path, tmp_path: Path) -> None:
    path = written(tmp_path, [[70, 71]])
    path.write_bytes(path.read_bytes()[:-3])
    documents, faults = read_all(Source("index", str(path), "s", tokenizer=str(words)))
    assert not documents
    assert faults[0].kind == "damaged"


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_an_index_that_is_gone_is_no_damage(suffix: str, words: Path, tmp_path: Path) -> None:
    """Nor is a disk that fails: its documents would be lost for good."""
    path = written(tmp_path, [[70, 71]])
    source = Source("index", str(path), "s", tokenizer=str(words))
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))
    path.with_suffix(suffix).rename(tmp_path / "away")
    with pytest.raises(CorpusError, match=rf"a\{suffix} cannot be read: No such file"):
        list(ingest.read(source, tasks[0][0], Meter(), [].append))


def test_a_disk_that_fails_changes_no_plan(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Path) -> None:
        raise OSError(5, "Input/output error")

    source = Source("index", str(written(tmp_path, [[70]])), "s", tokenizer=str(words))
    monkeypatch.setattr(tokens, "Index", failing)
    with pytest.raises(CorpusError, match=r"a\.idx cannot be read: Input/output error"):
        ingest.plan(Data(out="", sources=(source,)))


def test_a_tokenizer_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    path = written(tmp_path, [[70]])
    with pytest.raises(CorpusError, match="source 's': there is no tokenizer in 'nowhere'"):
        read_all(Source("index", str(path), "s", tokenizer="nowhere"))
