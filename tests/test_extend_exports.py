"""An extended model goes to transformers where that can say it, and is refused where it cannot.

There and back is the identity; transformers computes the same at every length of the table: float32
tables, so 2e-6 of the logits' deviation.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.extended import Extend, extended
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from launch import convert
from launch.cli import main
from pretrain import checkpoint, proof
from pretrain.convert import hf
from pretrain.growth.positions import extend
from pretrain.state import State
from tests.growing import trained

pytest.importorskip("transformers")
SIZES: dict[str, Any] = {"vocab": 97, "hidden": 32, "layers": 2, "heads": 4, "head_dim": 8}
CPM = CPMConfig("cpm", **SIZES, ffn=64, positions=40, init_std=0.1)
BERT = RoFormerConfig("roformer", 1, **SIZES, ffn=64, positions=40, init_std=0.1)
ROFORMER = RoFormerConfig("roformer", 1, **SIZES, ffn=64, init_std=0.1)
T5 = T5PegasusConfig(
    "t5_pegasus", **SIZES, ffn=48, init_std=0.1, cross_position_bias=False, logit_scale=1.0
)


def longer(config: ModelConfig, method: str, **how: Any) -> State:
    page = Extend(method, known=40, **how)  # type: ignore[arg-type]
    return extend(trained(config), extended(config, 160, page), page, 160, 1)


@pytest.mark.parametrize(
    ("config", "method", "how"),
    [
        (CPM, "hierarchical", {"alpha": 0.3}),
        (CPM, "last", {}),
        (BERT, "hierarchical", {}),
        (ROFORMER, "linear", {"dynamic": False}),
        (ROFORMER, "ntk_mixed", {"dynamic": False}),
        (ROFORMER, "yarn", {"dynamic": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transformers_reads_the_long_rows_as_we_do(
    config: ModelConfig, method: str, how: dict[str, Any], tmp_path: Path
) -> None:
    state = longer(config, method, **how)
    checkpoint.write_state(tmp_path / "long", state)
    assert main(["convert", str(tmp_path / "long"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    tokens = torch.randint(97, (2, 160), generator=torch.Generator().manual_seed(1))
    ours = proof.logits(state, tokens, torch.float64)
    theirs = hf.outputs(tmp_path / "hf", tokens, torch.float64)["logits"]
    assert (theirs - ours).abs().max() <= 2e-6 * ours.std()
    plain = proof.logits(trained(config), tokens[:, :40], torch.float64)
    known = (theirs[:, :40] - plain).abs().max()
    causal = config.family == "cpm"  # an encoder sees what is behind
    assert not causal or known <= 2e-6 * plain.std()
    back = convert.read(tmp_path / "hf", None, [], None).state
    assert (
        back.record["model"]["position_table" if causal else "rope"]
        == (state.record["model"]["position_table" if causal else "rope"])
    )
    for key in back.entries:
        assert torch.equal(back.read(key), state.read(key)), key


def test_a_table_that_was_trained_on_there_is_no_decomposition(tmp_path: Path) -> None:
    checkpoint.write_state(tmp_path / "long", longer(CPM, "hierarchical"))
    assert main(["convert", str(tmp_path / "long"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    from safetensors.torch import load_file, save_file

    (path,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(path)
    tensors["transformer.wpe.weight"][100] += 1.0
    save_file(tensors, path)
    state = convert.read(tmp_path / "hf", None, [], None).state
    with pytest.raises(ValueError, match="take bajie_position_table out"):
        state.read("weights/embed.positions.weight")


@pytest.mark.parametrize(
    ("config", "method", "how", "said"),
    [
        (CPM, "interpolated", {}, "position_table.method is interpolated, which follows"),
        (ROFORMER, "ntk", {}, "rope.dynamic is true, it has one table"),
        (ROFORMER, "rerope", {"log_n": False}, "rope.method is rerope, which changes distances"),
        (ROFORMER, "as_it_is", {"log_n": True}, "model.log_n is 40"),
        (T5, "buckets", {}, "model.bucket_spans is 2, must be 1"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_transformers_cannot_say_is_one_sentence(
    config: ModelConfig,
    method: str,
    how: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint.write_state(tmp_path / "long", longer(config, method, **how))
    assert main(["convert", str(tmp_path / "long"), str(tmp_path / "hf"), "--to", "hf"]) == 2
    sentence = capsys.readouterr().err
    assert said in sentence and sentence.count("\n") == 1 and not (tmp_path / "hf").exists()


def test_other_formats_have_no_longer_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.write_state(tmp_path / "long", longer(CPM, "hierarchical"))
    for to in ("cpm1", "megatron"):
        assert main(["convert", str(tmp_path / "long"), str(tmp_path / to), "--to", to]) == 2
        assert "model.position_table says how rows are read" in capsys.readouterr().err
