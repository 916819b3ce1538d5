"""Promise: what a run would refuse of corpora that are built, `check` and `plan` refuse in its own
words, before a job is asked for."""

import json
from pathlib import Path

import pytest

from configs import grown
from configs.load import ConfigError, load
from configs.run import RunConfig
from launch import cli
from launch.check import check
from pretrain.corpora import open_corpora

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs/runs/cpm-tiny-cpu.yaml")


@pytest.mark.parametrize(
    ("page", "changed"),
    [
        ("cpm-tiny-cpu", ["model.vocab=319"]),
        ("cpm-tiny-cpu", ["model.vocab=400", "model.words_said=319"]),
        ("t5-pegasus-tiny-cpu", []),  # gap sentences: .gaps beside the index
    ],
)
@pytest.mark.parametrize("verb", ["check", "plan"])
def test_what_a_run_would_refuse_of_its_corpora_is_refused_before_it(
    verb: str,
    page: str,
    changed: list[str],
    tiny_corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In its own words; a corpus that is not built yet is no problem."""
    line = [str(ROOT / f"configs/runs/{page}.yaml"), *changed]
    built = f"data.train=[{{corpus: {tiny_corpus}, weight: 1}}]"
    config = load(line[0], RunConfig, [*changed, built])
    with pytest.raises(ConfigError) as run:
        open_corpora(config.data, config.objective, 1, grown.said(config.model))
    assert cli.main([verb, *line, built]) == 2
    assert capsys.readouterr().err == f"bajie: {run.value}\n"
    assert cli.main([verb, *line, "data.train=[{corpus: nowhere, weight: 1}]"]) == 0
    assert cli.main([verb, TINY, built, "model.vocab=320"]) == 0


def test_check_names_a_manifest_that_is_damaged_and_tokenizers_that_differ(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    for name in ("other", "damaged"):
        (tmp_path / name).mkdir()
    manifest = json.loads((tiny_corpus / "manifest.json").read_text("utf-8"))
    manifest["tokenizer"] |= {"fingerprint": "sha256:0", "vocab_size": 20}
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest), "utf-8")
    (tmp_path / "damaged/manifest.json").write_text('{"splits": {', "utf-8")
    mixture = (f"{{corpus: {f}, weight: 1}}" for f in (tiny_corpus, *tmp_path.iterdir()))
    with pytest.raises(ConfigError) as refused:
        check(TINY, [f"data.train=[{', '.join(mixture)}]"])
    assert f"{tmp_path}/damaged/manifest.json: cannot be read" in str(refused.value)
    assert "were encoded by different tokenizers" in str(refused.value)
