"""Promise: RoFormer v1 with learned positions is BERT: `transformers`' BertForMaskedLM, logits and
every gradient; TensorFlow's files of BERT, WoBERT and SimBERT come in; WoBERT begins a RoFormer.

Tolerances, in standard deviations of what is compared: 1e-12 in float64 (both sides compute in
float64 throughout; sums in another order), 1e-5 in fp32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.model import RoFormerConfig
from launch import convert
from pretrain import checkpoint
from pretrain.convert import bert4keras, bundle, files
from pretrain.convert.rules import ConversionError, exported
from pretrain.models.layers import gelu_tanh
from pretrain.models.roformer import RoFormer
from tests.test_conversions_prove_themselves import convert_to, same_weights, saved
from tests.test_roformer_equals_its_origin import (
    PACKED,
    PADDED,
    apart,
    build,
    ours_on,
    rows,
    to_hf,
    with_gradients,
)

transformers = pytest.importorskip("transformers")

OFF = {"dropout": 0.0, "attention_dropout": 0.0}
TINY = RoFormerConfig("roformer", 1, 97, 48, 3, 4, 12, 80, positions=40, **OFF)
# The heads of the published base size, on one layer with a small FFN and vocabulary.
BASE_HEADS = RoFormerConfig("roformer", 1, 211, 768, 1, 12, 64, 96, positions=160, **OFF)
SMALL = RoFormerConfig("roformer", 1, 96, 32, 2, 4, 8, 64, positions=64)
LONG = [[150]]


def named(ours: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our names (of weights or gradients) -> theirs; every layout is the same."""
    found = {n.replace("roformer.", "bert.", 1): t for n, t in to_hf(ours, layers).items()}
    table = "bert.embeddings.position_embeddings.weight"
    return found | {table: ours["embed.positions.weight"]}


def hf_of(ours: RoFormer) -> nn.Module:
    """transformers' model on the same weights."""
    c = ours.config
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, intermediate_size=c.ffn, hidden_act="gelu",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            max_position_embeddings=c.positions, type_vocab_size=c.segments,
            layer_norm_eps=c.norm_eps, pad_token_id=0, attn_implementation="eager",
        )
    ).to(next(ours.parameters()).dtype).eval()  # fmt: skip
    weights = {n: p.detach().clone() for n, p in ours.named_parameters()}
    missing, unknown = theirs.load_state_dict(named(weights, c.layers), strict=False)
    assert not unknown and {name.rsplit(".", 2)[-2] for name in missing} <= {"decoder"}
    theirs.tie_weights()
    return theirs


def theirs_on(theirs: nn.Module, lengths: Any) -> Tensor:
    row, segments = rows(lengths, theirs.config.vocab_size)
    dtype = next(theirs.parameters()).dtype
    sees = row[2][:, None, :, None] == row[2][:, None, None, :]
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    given = {"input_ids": row[0], "token_type_ids": segments, "attention_mask": mask}
    return theirs(**given, position_ids=row[1]).logits[row[2] >= 0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize(
    ("config", "lengths"),
    [(TINY, PACKED), (TINY, PADDED), (BASE_HEADS, PACKED), (BASE_HEADS, LONG)],
    ids=["packed", "padded", "base heads, packed", "base heads, long"],
)
def test_learned_positions_equal_bert(
    config: RoFormerConfig, lengths: Any, dtype: torch.dtype, tolerance: float
) -> None:
    ours = build(config, dtype)
    theirs = hf_of(ours)
    logits, expected = ours_on(ours, lengths), theirs_on(theirs, lengths)
    mine = named(with_gradients(logits, dict(ours.named_parameters())), config.layers)
    other = with_gradients(expected, dict(theirs.named_parameters()))
    assert mine.keys() == other.keys()
    exact = dtype == torch.float64
    far, gradients = apart((logits, mine), (expected, other), exact)
    assert far < tolerance
    # but for the keys' biases: BERT's softmax does not see them, their gradient is rounding
    gradients = {n: d for n, d in gradients.items() if not n.endswith(".self.key.bias")}
    assert len(gradients) == len(mine) - config.layers
    assert max(gradients.values()) < tolerance, gradients


def rotary(model: RoFormer) -> None:
    model.config = replace(model.config, positions=None)


def no_table(model: RoFormer) -> None:
    model.embed.positions.weight.data.zero_()


def one_place_on(model: RoFormer) -> None:
    model.embed.positions.weight.data = model.embed.positions.weight.data.roll(1, 0)


def tanh(model: RoFormer) -> None:
    for block in model.encoder.layers:
        block.ffn.activation = gelu_tanh


@pytest.mark.parametrize("fault", [rotary, no_table, one_place_on, tanh])
def test_a_fault_is_seen(fault: Any) -> None:
    """Each well-known mistake lies far outside the fp32 tolerance."""
    ours = build(TINY)
    with torch.no_grad():
        expected = ours_on(ours, PADDED)
        fault(ours)
        assert (ours_on(ours, PADDED) - expected).abs().max() / expected.std() > 10 * 1e-5


def test_a_packed_document_equals_the_document_alone() -> None:
    model = build(TINY)
    (tokens, positions, documents), segments = rows(PACKED, 97)
    together = model(tokens, positions, documents, segments)
    mine = documents[0] == 1
    given = (part[0, mine][None] for part in (tokens, positions))
    alone = model(*given, None, segments[0, mine][None])
    assert (together[0, mine] - alone[0]).abs().max() < 1e-12


# ---- files -------------------------------------------------------------------------------------


def test_hugging_faces_files_there_and_back(tmp_path: Path) -> None:
    """Ours -> theirs -> ours -> theirs: tensors to the bit, the second files byte for byte."""
    before = saved(SMALL, tmp_path / "ours")
    seen = convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")
    assert seen["kept"] and not seen["round_trip"]["different"]
    part = seen["transformers"]["float64"]
    assert part["max_difference"] <= 1e-12 * part["std"]
    convert_to(tmp_path / "theirs", tmp_path / "back", "native")
    after = checkpoint.read(tmp_path / "back")
    assert same_weights(before, after) and after.record["model"]["positions"] == 64
    convert_to(tmp_path / "back", tmp_path / "again", "hf")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_bert_that_transformers_wrote_comes_in(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With pooler and next-sentence head too, which stay behind, and it is said."""
    torch.manual_seed(2)
    model = getattr(transformers, kind)(
        transformers.BertConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=64,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    convert_to(tmp_path / "theirs", tmp_path / "ours", "native")
    said = capsys.readouterr().out
    assert ("left behind: the pooler" in said) == (kind == "BertForPreTraining")
    assert ("the next-sentence head" in said) == (kind == "BertForPreTraining")
    assert convert_to(tmp_path / "ours", tmp_path / "again", "hf")["transformers"]["same"]
    theirs = {n: r() for n, r in files.read(tmp_path / "theirs").items()}
    for name, read_it in files.read(tmp_path / "again").items():
        if name in theirs:
            assert torch.equal(read_it(), theirs[name]), name


def google(folder: Path, config: RoFormerConfig, beside: bool) -> Any:
    """A TensorFlow checkpoint as google-research/bert and bert4keras name it."""
    state = saved(config, folder.with_name("ours"))
    folder.mkdir()
    named_ = list(exported(bert4keras.rules(config), lambda n: state.read(f"weights/{n}")))
    if beside:
        named_ += [
            ("bert/pooler/dense/kernel", torch.ones(32, 32)),
            ("bert/pooler/dense/bias", torch.ones(32)),
            ("cls/seq_relationship/output_weights", torch.ones(2, 32)),
            ("cls/seq_relationship/output_bias", torch.ones(2)),
            ("bert/pooler/dense/bias/adam_m", torch.ones(32)),
        ]
    bundle.write(folder / "bert_model.ckpt", named_)
    page = '{"hidden_size": 32, "num_attention_heads": 4, "hidden_act": "gelu"}'
    (folder / "bert_config.json").write_text(page, "utf-8")
    return state


def test_googles_files_come_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = google(tmp_path / "tf", SMALL, beside=True)
    assert "bert/embeddings/position_embeddings" in bundle.places(tmp_path / "tf/bert_model.ckpt")
    convert_to(tmp_path / "tf", tmp_path / "back", "native")
    assert same_weights(state, checkpoint.read(tmp_path / "back"))
    said = capsys.readouterr().out
    assert "left behind: the pooler" in said and "left behind: the next-sentence head" in said
    # and out again, where the variables are the same to the byte, without what stayed behind
    found = convert_to(tmp_path / "back", tmp_path / "out", "bert4keras")
    assert found["kept"] and not found["round_trip"]["different"]
    one = {n: t() for n, t in bundle.read(tmp_path / "tf/bert_model.ckpt").items()}
    other = {n: t() for n, t in bundle.read(tmp_path / "out/model.ckpt").items()}
    assert len(one) == len(other) + 5 and all(torch.equal(t, one[n]) for n, t in other.items())


@pytest.mark.parametrize("kind", ["bert4keras", "hf", "native"])
def test_wobert_begins_a_roformer(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As RoFormer v1 began: the weights of WoBERT without its table, queries and keys turned."""
    state = google(tmp_path / "tf", SMALL, beside=False)
    source = {"bert4keras": tmp_path / "tf", "native": tmp_path / "ours", "hf": tmp_path / "hf"}
    if kind == "hf":
        convert_to(tmp_path / "ours", tmp_path / "hf", "hf")
    convert_to(source[kind], tmp_path / "new", "native", "--set", "positions=null")
    new = checkpoint.read(tmp_path / "new")
    assert new.record["model"]["positions"] is None
    assert set(state.entries) - set(new.entries) == {"weights/embed.positions.weight"}
    assert all(torch.equal(new.read(key), state.read(key)) for key in new.entries)
    assert "left behind: the table of positions" in capsys.readouterr().out
    assert convert_to(tmp_path / "new", tmp_path / "roformer", "hf")["transformers"]["same"]


def test_what_is_not_there_cannot_be_set(tmp_path: Path) -> None:
    saved(replace(SMALL, positions=None), tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"embed\.positions\.weight would be"):
        convert.read(tmp_path / "ours", None, ["positions=64"], None)
