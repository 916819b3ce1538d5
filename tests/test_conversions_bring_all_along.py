"""Checkpoints of other houses: half precision, old files, tokenizers and labels go along, what only
looks like one of ours is refused, and nothing has its name before its proof holds."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import wordpiece
from launch import convert
from pretrain import checkpoint
from pretrain.convert import bundle, files
from pretrain.convert.rules import ConversionError
from pretrain.labelled import label_names
from pretrain.state import State
from tests.test_conversions_prove_themselves import (
    ALL,
    BERT,
    CPM,
    MODELS,
    ROFORMER,
    Harm,
    convert_to,
    same_weights,
    saved,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", list(MODELS))
def test_half_precision_goes_there_and_back(family: str, dtype: str, tmp_path: Path) -> None:
    """RoFormer's table of sines follows from the config, and is rounded in the file as all is."""
    before = saved(MODELS[family], tmp_path / "ours")
    found = convert_to(tmp_path / "ours", tmp_path / "theirs", "hf", "--dtype", dtype)
    assert found["kept"] and found["dtype"] == dtype
    convert_to(tmp_path / "theirs", tmp_path / "back", "native")
    after, half = checkpoint.read(tmp_path / "back"), convert.DTYPES[dtype]
    for key in before.entries:
        assert torch.equal(after.read(key), before.read(key).to(half).float()), key
    with pytest.raises(ConversionError, match="--to native writes float32"):
        convert.main(
            [str(tmp_path / "ours"), str(tmp_path / "x"), "--to", "native", "--dtype", dtype]
        )


def test_a_table_of_other_sines_is_refused(tmp_path: Path) -> None:
    """The control of the test above: rounding is forgiven, another base is not."""
    from safetensors.torch import load_file, save_file

    saved(ROFORMER, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "theirs", "hf", "--dtype", "bfloat16")
    path = tmp_path / "theirs/model.safetensors"
    page = {name: tensor.clone() for name, tensor in load_file(path).items()}
    page["roformer.encoder.embed_positions.weight"] *= 1.02
    save_file(page, path)
    with pytest.raises(ConversionError, match="is not what follows from the config"):
        convert.read(tmp_path / "theirs", None, [], None)


def test_a_pickle_from_before_zip_files_comes_in(tmp_path: Path) -> None:
    """As torch wrote until 1.6; one that would run something is refused there too."""
    before = saved(BERT, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")
    path = tmp_path / "theirs/model.safetensors"
    page = {name: read_it() for name, read_it in files.read(tmp_path / "theirs").items()}
    path.unlink()
    old = {"_use_new_zipfile_serialization": False}
    torch.save(page, tmp_path / "theirs/pytorch_model.bin", **old)
    convert_to(tmp_path / "theirs", tmp_path / "back", "native")
    assert same_weights(before, checkpoint.read(tmp_path / "back"))
    torch.save({"x": Harm(tmp_path / "mark")}, tmp_path / "theirs/pytorch_model.bin", **old)
    with pytest.raises(ConversionError, match="cannot be read as tensors alone"):
        convert.read(tmp_path / "theirs", None, [], None)
    assert not (tmp_path / "mark").exists()


def with_words(state: State, folder: Path, tokens: int, word: bool = True) -> Path:
    """The state as a checkpoint with a tokenizer of so many tokens."""
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(chr(0x4E00 + n) for n in range(tokens)),
    ]
    words = wordpiece.WordPiece("".join(f"{n}\n" for n in names[:tokens]).encode(), word)
    words.save(folder / "words")
    checkpoint.write_state(folder / "with", state, folder / "words")
    return folder / "with"


@pytest.mark.parametrize(
    ("family", "to"),
    [("cpm", "cpm1"), ("cpm", "megatron"), ("t5_published", "bert4keras"), ("roformer", "hf")],
)
def test_the_tokenizer_goes_along_to_every_format(family: str, to: str, tmp_path: Path) -> None:
    ours = with_words(saved(ALL[family], tmp_path / "ours"), tmp_path, 96)
    convert_to(ours, tmp_path / "theirs", to)
    # bert4keras asks for a vocab.txt; transformers would cut other words by one
    assert (tmp_path / "theirs/vocab.txt").exists() == (to == "bert4keras")
    known = ["--set", "heads=4"] if to == "cpm1" else []
    convert_to(tmp_path / "theirs", tmp_path / "back", "native", *known)
    one, other = ours / "tokenizer", tmp_path / "back/tokenizer"
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert all((other / p.name).read_bytes() == p.read_bytes() for p in one.iterdir())


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    saved(BERT, tmp_path / "ours")
    words = with_words(saved(BERT, tmp_path / "other"), tmp_path, 120) / "tokenizer"
    line = [str(tmp_path / "ours"), str(tmp_path / "x"), "--to", "hf", "--tokenizer", str(words)]
    with pytest.raises(ConversionError, match="has 120 tokens, the model 96 rows"):
        convert.main(line)
    assert not (tmp_path / "x").exists()


def test_another_tokenizer_than_the_sources_own_is_refused(tmp_path: Path) -> None:
    """Its rows would stand for other tokens, and corpora of those ids would be let in."""
    ours = with_words(saved(BERT, tmp_path / "ours"), tmp_path, 96)
    convert_to(ours, tmp_path / "theirs", "hf")
    own = wordpiece.WordPiece((ours / "tokenizer/vocab.txt").read_bytes(), True).fingerprint
    other = with_words(saved(BERT, tmp_path / "other"), tmp_path / "beside", 90) / "tokenizer"
    foreign = json.loads((other / "tokenizer.json").read_text("utf-8"))["fingerprint"]
    state = checkpoint.read(ours)
    alone = State(state.entries, state.record | {"tokenizer": own})  # says which, has it not
    checkpoint.write_state(tmp_path / "alone", alone)
    for source in (ours, tmp_path / "theirs", tmp_path / "alone"):
        for to in ("native", "hf"):
            line = [str(source), str(tmp_path / "x"), "--to", to, "--tokenizer", str(other)]
            with pytest.raises(ConversionError, match="by `launch revocab`") as refused:
                convert.main(line)
            assert own in str(refused.value) and foreign in str(refused.value)
            assert not (tmp_path / "x").exists()
        line = ["--tokenizer", str(ours / "tokenizer")]
        convert_to(source, tmp_path / f"{source.name}-same", "native", *line)
    convert_to(tmp_path / "alone", tmp_path / "without", "native")
    for name in ("with-same", "theirs-same", "alone-same", "without"):
        assert checkpoint.read(tmp_path / name).record["tokenizer"] == own


@pytest.mark.parametrize(
    "page", [{"use_relative_position": True}, {"hidden_act": "relu"}], ids=["nezha", "act"]
)
def test_what_has_berts_names_and_is_none_is_refused(page: dict[str, Any], tmp_path: Path) -> None:
    """NEZHA has no table of positions either; its distances stand in every layer."""
    saved(ROFORMER, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "theirs", "bert4keras")
    path = tmp_path / "theirs/bert4keras_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | page), "utf-8")
    with pytest.raises(ConversionError, match=f"{next(iter(page))} is"):
        convert.read(tmp_path / "theirs", None, [], None)


def test_layers_that_are_one_are_no_bert(tmp_path: Path) -> None:
    """ALBERT: the names of one layer for all; a sentence, no KeyError."""
    tensors_ = {
        "bert/embeddings/word_embeddings": torch.ones(9, 4),
        "bert/encoder/layer_shared/attention/self/query/kernel": torch.ones(4, 4),
        "bert/encoder/layer_shared/attention/self/query/bias": torch.ones(4),
    }
    bundle.write(tmp_path / "model.ckpt", tensors_.items())
    (tmp_path / "config.json").write_text('{"num_attention_heads": 1}')
    with pytest.raises(ConversionError, match=r"has no 'bert/.*is it another architecture"):
        convert.read(tmp_path, None, [], None)


def test_an_average_is_converted_by_its_name(tmp_path: Path) -> None:
    state = saved(CPM, tmp_path / "ours")
    shadow = {k.replace("weights/", "optim/ema/"): e for k, e in state.entries.items()}
    zeros = {
        key: type(entry)(entry.shape, "float32", lambda shape=entry.shape: torch.zeros(shape))
        for key, entry in state.entries.items()
    }
    checkpoint.write_state(tmp_path / "run", State({**zeros, **shadow}, state.record))
    found = convert_to(Path(f"{tmp_path / 'run'}@ema"), tmp_path / "theirs", "hf")
    assert found["source"] == f"{tmp_path / 'run'}@ema"
    convert_to(tmp_path / "theirs", tmp_path / "back", "native")
    assert same_weights(state, checkpoint.read(tmp_path / "back"))


@pytest.mark.parametrize("positions", [None, 64])
def test_labels_keep_their_names(positions: int | None, tmp_path: Path) -> None:
    config = dataclasses.replace(ROFORMER, labels=3, positions=positions)
    state, names = saved(config, tmp_path / "ours"), ["体育", "财经", "科技"]
    record = state.record | {"data": [{"objective": {"name": "labels", "labels": names}}]}
    checkpoint.write_state(tmp_path / "named", State(state.entries, record))
    convert_to(tmp_path / "named", tmp_path / "theirs", "hf")
    page = json.loads((tmp_path / "theirs/config.json").read_text("utf-8"))
    assert page["id2label"] == dict(zip("012", names, strict=True))
    assert page["label2id"] == {name: number for number, name in enumerate(names)}
    convert_to(tmp_path / "theirs", tmp_path / "back", "native")
    assert label_names(checkpoint.read(tmp_path / "back").record) == names
    convert_to(tmp_path / "ours", tmp_path / "plain", "hf")
    assert label_names(convert.read(tmp_path / "plain", None, [], None).state.record) == []


def test_what_is_not_proven_has_not_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A proof that fails, or is broken off, leaves nothing under the name; a second try works."""
    saved(CPM, tmp_path / "ours")
    line = [str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "hf"]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "_against_transformers", lambda *_: {"same": False, "note": "no"})
        assert convert.main(line) == 1
    both = capsys.readouterr()
    assert "was not made" in both.err and not (tmp_path / "theirs").exists()
    assert not json.loads((tmp_path / ".theirs.writing/proof.json").read_text("utf-8"))["kept"]

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_prove", broken)
        with pytest.raises(KeyboardInterrupt):
            convert.main(line)
    assert not (tmp_path / "theirs").exists()
    assert convert.main(line) == 0 and not (tmp_path / ".theirs.writing").exists()


def test_a_model_too_large_for_the_comparison_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(CPM, tmp_path / "ours")
    monkeypatch.setattr(convert.psutil, "virtual_memory", lambda: Namespace(available=1000))
    found = convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")
    assert found["kept"] and "of memory are free" in found["transformers"]["note"]
