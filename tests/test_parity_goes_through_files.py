"""Promise: what one side wrote to disk the other computes: logits and every gradient, in both
directions, on tiny models and on heads of the published shapes, rows packed and padded.

    out   our checkpoint --convert --to hf--> files --from_pretrained--> transformers' model
    in    transformers' save_pretrained --convert --to native--> our checkpoint --> our model

Tolerances, in standard deviations of what is compared, in float64: 2e-6 against the stock models,
1e-12 against the same with their float32 norm (MT5) and table of positions (RoFormer) in float64.
The mistakes that this would catch are made in the families' own files, test_a_fault_is_seen.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.model import ModelConfig, RoFormerConfig, tensors
from launch import convert
from pretrain import checkpoint
from pretrain.convert import hf
from pretrain.generate import load_model
from pretrain.state import Entry, State, fresh
from tests import test_bert_equals_its_origin as bert
from tests import test_cpm_equals_gpt2 as cpm
from tests import test_roformer_equals_its_origin as roformer
from tests import test_t5_pegasus_equals_mt5 as t5

transformers = pytest.importorskip("transformers")

MT5 = {"cross_position_bias": False, "logit_scale": 1.0}
CASES: dict[str, tuple[ModelConfig, Any]] = {
    "cpm, tiny": (cpm.TINY, None),
    "cpm, heads of large": (cpm.LARGE_HEADS, None),
    "t5, tiny, packed": (replace(t5.TINY, **MT5), t5.PACKED),
    "t5, tiny, padded": (replace(t5.TINY, **MT5, activation="gelu_tanh"), t5.PADDED),
    "t5, heads of small, packed": (replace(t5.SMALL_HEADS, **MT5), t5.PACKED),
    "t5, heads of base, padded": (replace(t5.BASE_HEADS, **MT5), t5.PADDED),
    "roformer, tiny, packed": (roformer.TINY, roformer.PACKED),
    "roformer, heads of base, padded": (roformer.BASE_HEADS, roformer.PADDED),
    "bert, tiny, packed": (bert.TINY, bert.PACKED),
    "bert, heads of base, padded": (bert.BASE_HEADS, bert.PADDED),
}
ROOM: dict[type, Callable[..., nn.Module]] = {
    type(cpm.TINY): cpm.gpt2_of,
    type(t5.TINY): t5.mt5_of,
}


def built(config: ModelConfig) -> Any:
    """Our model with random weights, in float32."""
    room: Any = cpm if config.family == "cpm" else t5 if config.family == "t5_pegasus" else roformer
    return room.build(config, torch.float32)


def theirs_of(model: Any) -> nn.Module:
    """transformers' model on the same weights, made in memory."""
    config = model.config
    if isinstance(config, RoFormerConfig):
        learned = config.positions is not None
        return bert.hf_of(model) if learned else roformer.hf_of(model, False)
    return ROOM[type(config)](model)


def ours_in(folder: Path) -> Any:
    """The model of a checkpoint, in float64."""
    return load_model(checkpoint.read(folder)).double().requires_grad_(True)


def write_ours(model: Any, folder: Path) -> None:
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    entries = {
        f"weights/{t.name}": Entry(tuple(found[t.name].shape), "float32", lambda t=t: found[t.name])
        for t in tensors(model.config)
    }
    checkpoint.write_state(folder, State(entries, fresh(model.config, 0).record))


def through_files(config: ModelConfig, way: str, folder: Path) -> tuple[Any, Any]:
    """(our model, theirs) in float64: one of them read the other's files."""
    model = built(config)
    if way == "out":
        write_ours(model, folder / "ours")
        assert convert.main([str(folder / "ours"), str(folder / "theirs"), "--to", "hf"]) == 0
    else:
        theirs_of(model).save_pretrained(folder / "theirs")
        line = [str(folder / "theirs"), str(folder / "ours"), "--to", "native"]
        if config.family == "t5_pegasus" and config.activation == "gelu_erf":  # type: ignore[union-attr]
            line += ["--set", "activation=gelu_erf"]  # a form that their config.json says otherwise
        assert convert.main(line) == 0
    theirs: Any = hf.reference(folder / "theirs", torch.float64)
    if config.family == "t5_pegasus":
        if way == "in" and config.activation == "gelu_erf":  # type: ignore[union-attr]
            for block in (*theirs.encoder.block, *theirs.decoder.block):
                block.layer[-1].DenseReluDense.act = nn.GELU()
        theirs.logit_scale = 1.0
        for stack in (theirs.encoder, theirs.decoder):  # the comparison adds both gradients
            table = stack.embed_tokens.weight.detach().clone()
            stack.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
    return ours_in(folder / "ours"), theirs


def exactly(theirs: Any, patch: pytest.MonkeyPatch) -> None:
    """Their norm and their table of positions in the precision of the rest."""
    patch.setattr(t5.modeling.MT5LayerNorm, "forward", t5.exact_norm)
    if hasattr(theirs, "roformer"):
        c = theirs.config
        dim = c.hidden_size // c.num_attention_heads
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(float(c.max_position_embeddings), dtype=torch.float64)[:, None]
        table = torch.cat([(angle * frequency).sin(), (angle * frequency).cos()], -1)
        theirs.roformer.encoder.embed_positions.weight = nn.Parameter(table, requires_grad=False)


def apart(ours: Any, theirs: Any, lengths: Any, exact: bool) -> tuple[float, dict[str, float]]:
    config = ours.config
    if config.family == "cpm":
        far, _, gradients = cpm.compare(ours, theirs)
        return far, gradients
    if config.family == "t5_pegasus":
        return t5.compare(ours, theirs, lengths, exact)
    room: Any = roformer if config.positions is None else bert
    name: Callable[..., dict[str, Tensor]] = roformer.to_hf if room is roformer else bert.named
    logits, expected = roformer.ours_on(ours, lengths), room.theirs_on(theirs, lengths)
    mine = name(roformer.with_gradients(logits, dict(ours.named_parameters())), config.layers)
    other = roformer.with_gradients(expected, dict(theirs.named_parameters()))
    assert mine.keys() == other.keys()
    far, gradients = roformer.apart((logits, mine), (expected, other), exact)
    blind = ".self.key.bias"  # a softmax does not see it: its gradient is rounding
    return far, {n: d for n, d in gradients.items() if not n.endswith(blind)}


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if "heads" in c else c for c in CASES]
)
def test_logits_and_gradients_are_equal_through_files(
    case: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, lengths = CASES[case]
    ours, theirs = through_files(config, way, tmp_path)
    if config.family != "cpm":
        far, gradients = apart(ours, theirs, lengths, False)
        assert far < 2e-6 and max(gradients.values()) < 2e-6, gradients
        for model in (ours, theirs):
            model.zero_grad(set_to_none=True)
        exactly(theirs, monkeypatch)
    far, gradients = apart(ours, theirs, lengths, True)
    assert far < 1e-12 and max(gradients.values()) < 1e-12, gradients
    assert len(gradients) >= len(tensors(config)) // 2


@pytest.mark.parametrize("case", ["cpm, tiny", "t5, tiny, packed", "bert, tiny, packed"])
def test_a_changed_bit_of_the_files_is_seen(case: str, tmp_path: Path) -> None:
    """The control: a single weight of the files, moved by a thousandth, is far outside."""
    from safetensors.torch import load_file, save_file

    config, lengths = CASES[case]
    through_files(config, "out", tmp_path)
    path = tmp_path / "theirs/model.safetensors"
    found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    matrix = max((n for n in found if found[n].dim() == 2 and "embed" not in n), key=len)
    found[matrix][0, 0] += 1e-3
    save_file(found, path, metadata={"format": "pt"})
    theirs: Any = hf.reference(tmp_path / "theirs", torch.float64)
    if config.family == "t5_pegasus":
        theirs.logit_scale = 1.0
        for stack in (theirs.encoder, theirs.decoder):
            table = stack.embed_tokens.weight.detach().clone()
            stack.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
    far, _ = apart(ours_in(tmp_path / "ours"), theirs, lengths, False)
    assert far > 1e-5
