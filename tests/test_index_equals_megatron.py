"""Ours and megatron-core's IndexedDataset read each other's files; a bad file is one sentence."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_pipeline.index import Index, IndexFault, IndexWriter, fingerprint, merge

DTYPES = [np.uint16, np.int32]
LENGTHS = [5, 0, 1, 300, 0, 0, 17, 0]  # empty documents first, last and side by side


def documents(dtype: type, lengths: list[int] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    top = 65_499 if dtype is np.uint16 else 2**31 - 1
    return [draw.integers(0, top + 1, length, dtype) for length in lengths]


def write_ours(prefix: Path, texts: list[np.ndarray], dtype: type) -> None:
    with IndexWriter(prefix, dtype) as writer:
        for ids in texts:
            writer.add_document(ids)


def write_megatrons(prefix: Path, texts: list[np.ndarray], dtype: type) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in texts:
        builder.add_document(torch.from_numpy(ids.astype(np.int64)), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def same_files(a: Path, b: Path) -> bool:
    return all(
        Path(f"{a}{s}").read_bytes() == Path(f"{b}{s}").read_bytes() for s in (".bin", ".idx")
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_ours(tmp_path: Path, dtype: type) -> None:
    texts = documents(dtype)
    write_ours(tmp_path / "ours", texts, dtype)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert theirs.index.dtype == dtype
    assert len(theirs) == len(texts)
    for number, ids in enumerate(texts):
        assert np.array_equal(theirs[number], ids)
    assert np.array_equal(theirs.document_indices, np.arange(len(texts) + 1))
    assert np.array_equal(theirs.get(3, offset=7, length=11), texts[3][7:18])


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_megatrons(tmp_path: Path, dtype: type) -> None:
    texts = documents(dtype)
    write_megatrons(tmp_path / "theirs", texts, dtype)
    index = Index(tmp_path / "theirs")
    assert (index.documents, index.tokens, index.dtype) == (8, sum(LENGTHS), dtype)
    assert index.lengths.dtype == np.int32 and index.lengths.tolist() == LENGTHS
    assert index.offsets.dtype == np.int64
    assert index.offsets.tolist() == np.cumsum([0, *LENGTHS]).tolist()
    for number, ids in enumerate(texts):
        assert np.array_equal(index.document(number), ids)
    assert np.array_equal(index.slice(3, 200), np.concatenate(texts)[3:200])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_write_the_same_bytes(tmp_path: Path, dtype: type) -> None:
    texts = documents(dtype)
    write_ours(tmp_path / "ours", texts, dtype)
    write_megatrons(tmp_path / "theirs", texts, dtype)
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    assert fingerprint(tmp_path / "ours") == fingerprint(tmp_path / "theirs")
    # Negative control: one token of 323 differs.
    texts[3][150] ^= 1
    write_ours(tmp_path / "other", texts, dtype)
    assert not same_files(tmp_path / "other", tmp_path / "theirs")
    assert fingerprint(tmp_path / "other") != fingerprint(tmp_path / "theirs")


def test_we_read_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [3, 0, 7])
    builder.add_document(torch.arange(0), [])
    builder.add_document(torch.arange(10, 14), [2, 2])
    builder.add_document(torch.arange(0), [])
    builder.finalize(str(tmp_path / "x.idx"))
    index = Index(tmp_path / "x")
    assert index.lengths.tolist() == [10, 0, 4, 0]
    assert index.document(2).tolist() == [10, 11, 12, 13]
    assert index.document(3).tolist() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_equals_megatrons_and_one_writer(tmp_path: Path, dtype: type) -> None:
    parts = [documents(dtype, seed=1), [], documents(dtype, [4, 0], seed=2)]
    prefixes = [tmp_path / f"part{i}" for i in range(3)]
    for prefix, texts in zip(prefixes, parts, strict=True):
        write_ours(prefix, texts, dtype)
    merge(prefixes, tmp_path / "merged")
    write_ours(tmp_path / "one", [ids for part in parts for ids in part], dtype)
    assert same_files(tmp_path / "merged", tmp_path / "one")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert same_files(tmp_path / "merged", tmp_path / "theirs")


def test_a_merge_holds_no_file_of_its_parts_open(tmp_path: Path) -> None:
    """A corpus of a terabyte has 15,000 shards, a process often 1,024 files."""
    prefixes = [tmp_path / f"part{i}" for i in range(40)]
    for prefix in prefixes:
        write_ours(prefix, documents(np.uint16, [3]), np.uint16)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, limits[1]))
    try:
        merge(prefixes, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert Index(tmp_path / "merged").documents == 40


def test_merge_keeps_several_sequences_a_document(tmp_path: Path) -> None:
    for name, lengths in [("a", [[3, 4], [], [1]]), ("b", [[2, 2], [5]])]:
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        for sequences in lengths:
            builder.add_document(torch.arange(sum(sequences)), sequences)
        builder.finalize(str(tmp_path / f"{name}.idx"))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    builder.add_index(str(tmp_path / "a"))
    builder.add_index(str(tmp_path / "b"))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert same_files(tmp_path / "ours", tmp_path / "theirs")


def test_no_documents_at_all(tmp_path: Path) -> None:
    write_ours(tmp_path / "none", [], np.uint16)
    write_ours(tmp_path / "empty", documents(np.uint16, [0, 0]), np.uint16)
    none, empty = Index(tmp_path / "none"), Index(tmp_path / "empty")
    assert (none.documents, none.tokens, none.slice(0, 0).tolist()) == (0, 0, [])
    assert (empty.documents, empty.tokens, empty.document(1).tolist()) == (2, 0, [])


def test_an_index_travels_to_another_process(tmp_path: Path) -> None:
    write_ours(tmp_path / "x", documents(np.uint16), np.uint16)
    packed = pickle.dumps(Index(tmp_path / "x"))
    assert len(packed) < 1000
    assert pickle.loads(packed).tokens == sum(LENGTHS)


def test_nothing_is_seen_before_it_is_whole(tmp_path: Path) -> None:
    old = documents(np.uint16, seed=1)
    write_ours(tmp_path / "x", old, np.uint16)
    before = fingerprint(tmp_path / "x")
    writer = IndexWriter(tmp_path / "x", np.uint16)
    writer.add_document(np.arange(60_000))
    assert fingerprint(tmp_path / "x") == before
    writer.discard()
    with (
        pytest.raises(RuntimeError, match="unplugged"),
        IndexWriter(tmp_path / "x", "<u2") as writer,
    ):
        writer.add_document(np.arange(10))
        raise RuntimeError("unplugged")
    assert fingerprint(tmp_path / "x") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def damaged(tmp_path: Path) -> Path:
    write_ours(tmp_path / "x", documents(np.uint16), np.uint16)
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("rm x.idx", r"x\.idx: there is no such token file; build the corpus"),
        ("rm x.bin", r"x\.bin: there is no such token file"),
        ("truncate -s 0 x.idx", "does not start with MMIDIDX"),
        ("truncate -s 20 x.idx", "is cut short: 20 bytes, the header alone has 34"),
        ("truncate -s -8 x.idx", "has 194 bytes, its header speaks of 202: cut or damaged"),
        ("truncate -s -2 x.bin", "has 644 bytes, the lengths in the .idx add up to 646"),
        ("printf zz >> x.bin", "has 648 bytes, the lengths in the .idx add up to 646"),
        ("printf GARBAGE! | dd of=x.idx conv=notrunc", "does not start with MMIDIDX"),
        (r"printf '\2' | dd of=x.idx bs=1 seek=9 conv=notrunc", "has version 2"),
        (r"printf '\7' | dd of=x.idx bs=1 seek=17 conv=notrunc", "dtype code 7"),
        (r"printf '\4' | dd of=x.idx bs=1 seek=34 conv=notrunc", "that do not add up"),
        (r"printf '\9' | dd of=x.idx bs=1 seek=138 conv=notrunc", "that fall"),
        (r"printf '\7' | dd of=x.idx bs=1 seek=194 conv=notrunc", "that fall|from 0 to 7"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, damage: str, sentence: str) -> None:
    prefix = damaged(tmp_path)
    subprocess.run(damage, shell=True, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    with pytest.raises(IndexFault, match=sentence) as caught:
        Index(prefix)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    prefix = damaged(tmp_path)
    with IndexWriter(tmp_path / "y", np.int32) as other:
        with pytest.raises(IndexFault, match="ids from -1 to 70000, uint16 holds 0 to 65535"):
            IndexWriter(tmp_path / "z", np.uint16).add_document(np.array([-1, 70_000]))
        other.add_document(np.array([70_000]))
    with pytest.raises(IndexFault, match="have one dtype"):
        merge([prefix, tmp_path / "y"], tmp_path / "z")
    with pytest.raises(IndexFault, match="no index to merge"):
        merge([], tmp_path / "z")
    with pytest.raises(IndexFault, match="no dtype complex128"):
        IndexWriter(tmp_path / "z", np.complex128)
    with pytest.raises(IndexFault, match="tokens 0 to 324 were asked for, it has 323"):
        Index(prefix).slice(0, 324)
    with pytest.raises(IndexFault, match="document 8 was asked for, it has 8"):
        Index(prefix).document(8)


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    """400,000 documents of 20 tokens, and five times that merged, add under 60 MB."""
    program = textwrap.dedent(
        """
        import resource, sys
        import numpy as np
        from data_pipeline.index import IndexWriter, merge

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        with IndexWriter("small", np.uint16) as writer:
            writer.add_document(np.arange(20))
        start, ids = peak(), np.arange(20, dtype=np.uint16)
        with IndexWriter("large", np.uint16) as writer:
            for _ in range(400_000):
                writer.add_document(ids)
        merge(["large"] * 5, "merged")
        print(peak() - start)
        """
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert (
        float(done.stdout) < 60
    )  # 80 MB of tokens, 16 MB of lengths and 40 of offsets are written
    assert Index(tmp_path / "merged").documents == 2_000_000
