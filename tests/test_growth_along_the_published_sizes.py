"""The published sizes of each family, scaled down, are reached one from another by the command.

T5 PEGASUS small -> base      CPM small -> medium -> large
RoFormer 384 x 6 -> 768 x 12  RoFormer v2 small -> base -> large
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from configs.load import dump, to_dict
from configs.model import ModelConfig
from launch.cli import main
from pretrain import checkpoint
from tests.growing import trained
from tests.test_growth_of_every_family import FAMILIES


def sizes(hidden: int, layers: int, heads: int, head_dim: int, ffn: int) -> dict[str, int]:
    return {
        "hidden": hidden, "layers": layers, "heads": heads, "head_dim": head_dim, "ffn": ffn,
    }  # fmt: skip


# hidden, head_dim and ffn are those published / 16 (CPM: / 32), layers and heads as they are
PATHS: dict[str, list[dict[str, int]]] = {
    "t5": [sizes(32, 8, 6, 4, 64), sizes(48, 12, 12, 4, 128)],
    "cpm": [sizes(24, 12, 12, 4, 96), sizes(32, 24, 16, 4, 128), sizes(80, 32, 32, 5, 320)],
    "v1": [sizes(24, 6, 6, 4, 96), sizes(48, 12, 12, 4, 192)],
    "v2": [sizes(24, 6, 6, 4, 96), sizes(48, 12, 12, 4, 192), sizes(64, 24, 16, 4, 256)],
}


@pytest.mark.parametrize("family", PATHS)
def test_each_is_reached_from_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """The pages say sizes only; the proof is the command's own (float64, float32, rounding)."""
    pages: list[ModelConfig] = [
        dataclasses.replace(FAMILIES[family], **path) for path in PATHS[family]
    ]
    checkpoint.write_state(tmp_path / "0", trained(pages[0]))
    for number, larger in enumerate(pages[1:], 1):
        (tmp_path / "larger.yaml").write_text(dump({"model": to_dict(larger)}), "utf-8")
        words = ["--to", str(tmp_path / "larger.yaml"), "--out", str(tmp_path / str(number))]
        assert main(["grow", str(tmp_path / str(number - 1)), *words]) == 0
        said = capsys.readouterr().out
        assert "function         kept" in said
        proof: dict[str, Any] = json.loads((tmp_path / str(number) / "proof.json").read_text())
        assert proof["float64"]["max_difference"] <= 1e-12 * proof["float64"]["std"]
        changed = proof["from"]["norm_eps"] != proof["to"]["norm_eps"]
        assert ("model.norm_eps: " in said) == changed
        if family == "t5":
            assert f"model.logit_scale: {32**-0.5!r}" in said
    last = checkpoint.read(tmp_path / str(len(pages) - 1)).record
    assert len(last["growth"]) == len(pages) - 1 and last["updates"] == 7


def test_what_cannot_be_reached_is_refused_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.write_state(tmp_path / "v1", trained(FAMILIES["v1"]))
    (tmp_path / "page.yaml").write_text(dump({"model": to_dict(FAMILIES["v1"])}), "utf-8")
    words = ["--to", str(tmp_path / "page.yaml"), "--set", "hidden=48"]
    assert main(["grow", str(tmp_path / "v1"), *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "hidden 32 cannot become 48" in said and "hidden=64" in said
    assert not (tmp_path / "out").exists()
