"""New words of a run wait behind a mask, change nothing, and learn from the stage that lets them.

Two processes, ZeRO. While they are masked the larger model is the small one: its losses are those
of a run that never grew, to fp32 rounding (1e-5; another order of sums). The control grows without
the mask, and is off by more from the first step on.
"""

import copy
from pathlib import Path
from typing import Any

import pytest

from configs.load import dump
from launch.cli import main
from pretrain import checkpoint
from tests.run_jobs import digests, losses, page
from tests.test_run_of_every_objective import corpus  # noqa: F401
from tests.test_run_of_every_objective import page as page_of
from tests.worlds import World

GO = "tests.run_jobs:go"
MASKED: dict[str, Any] = {"new_words": "masked"}


def staged(plain: dict[str, Any], vocab: int, grow: dict[str, Any]) -> dict[str, Any]:
    """4 steps, 4 with twice the words, 4 in which all of them are said."""
    plain["run"] |= {"steps": None, "save_every_steps": 2, "keep_checkpoints": 9}
    more = {"steps": 4, "model": {"vocab": 2 * vocab}, "grow": grow}
    said = {"steps": 4, "model": {"words_said": 2 * vocab}}
    return plain | {"stages": [{"steps": 4}, more, *([said] if grow else [])]}


def check(
    folder: Path, world2: World, vocab: int, rows: str, plain: dict[str, Any], zero: int
) -> None:
    def run(name: str, sections: dict[str, Any], **changes: Any) -> list[float]:
        sections["run"] |= {"out": str(folder / name), **changes}
        sections["schedule"] = {"name": "constant", "warmup_steps": 2}
        sections["parallel"] = {"zero": zero}
        world2.run(GO, config=sections, timeout_s=400)
        return losses(folder / name)

    small = run("small", copy.deepcopy(plain), steps=8)
    found = run("whole", staged(copy.deepcopy(plain), vocab, MASKED))
    assert found[:8] == pytest.approx(small, rel=1e-5)
    assert found[8] > small[7] - 1  # all words: less is left for the old ones
    control = run("control", staged(copy.deepcopy(plain), vocab, {}))
    assert abs(control[4] - small[4]) > 1e-3
    waiting, learning = (
        checkpoint.read(folder / "whole/checkpoints" / name).read(f"optim/exp_avg/{rows}")[vocab:]
        for name in ("stage-01-step-00000008", "stage-02-step-00000012")
    )
    assert not waiting.any() and float(learning.abs().amax(1).min()) > 0
    # killed while they learn, it goes on to the last bit
    run("broken", staged(copy.deepcopy(plain), vocab, MASKED), stop_at_step=10)
    assert run("broken", staged(copy.deepcopy(plain), vocab, MASKED)) == found
    last = "checkpoints/stage-02-step-00000012"
    assert digests(folder / "broken" / last) == digests(folder / "whole" / last)


def test_new_words_wait_and_then_learn(tmp_path: Path, tiny_corpus: Path, world2: World) -> None:
    plain = page(tmp_path / "run", tiny_corpus)
    check(tmp_path, world2, plain["model"]["vocab"], "embed.tokens.weight", plain, zero=2)


def test_all_words_said_is_no_change(tmp_path: Path, tiny_corpus: Path, world1: World) -> None:
    """A run whose page says nothing of it goes on where the page names the whole vocabulary; with
    fewer it is refused."""
    vocab = 330  # ten more than the tokenizer has
    changes: dict[str, Any] = {"run__steps": 4, "run__stop_at_step": 2, "schedule": {}}
    plain = page(tmp_path, tiny_corpus, **changes, model__vocab=vocab)
    world1.run(GO, config=plain)
    plain["run"]["stop_at_step"] = 3
    plain["model"] = plain["model"] | {"words_said": vocab - 1}
    with pytest.raises(ValueError, match=rf"words_said: is {vocab - 1}, the checkpoint .* {vocab}"):
        world1.run(GO, config=plain)
    plain["model"] = plain["model"] | {"words_said": vocab}
    world1.run(GO, config=plain)
    assert len(losses(tmp_path)) == 3


def test_a_page_says_the_words_that_wait(tmp_path: Path, tiny_corpus: Path, world1: World) -> None:
    """A grown and masked checkpoint goes on in a run whose page names all words; one that names
    none of its own is refused."""
    plain = page(tmp_path / "small", tiny_corpus, run__steps=2, schedule={})
    world1.run(GO, config=plain)
    (tmp_path / "page.yaml").write_text(dump({"model": plain["model"]}), "utf-8")
    old, out = plain["model"]["vocab"], tmp_path / "grown"
    words = ["--to", str(tmp_path / "page.yaml"), "--set", f"vocab={2 * old}", "--out", str(out)]
    assert main(["grow", str(tmp_path / "small"), *words, "--new-words", "masked"]) == 0
    on = page(tmp_path / "on", tiny_corpus, run__steps=4, schedule={}, model__vocab=2 * old)
    on["init"] = {"from": str(out), "what": "all"}
    with pytest.raises(ValueError, match=rf"words_said: is {2 * old}, the checkpoint .* {old}"):
        world1.run(GO, config=on)
    on["model"] = on["model"] | {"words_said": 2 * old}
    on["run"] |= {"stop_at_step": 3}
    world1.run(GO, config=on)
    on["run"] |= {"stop_at_step": 0}
    world1.run(GO, config=on)  # and goes on from its own checkpoint
    last = checkpoint.read(tmp_path / "on/checkpoints/stage-00-step-00000004")
    assert last.record["model"]["words_said"] == 2 * old
    assert last.read("optim/exp_avg/embed.tokens.weight")[old:].any()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["t5", "v1", "v2"])
def test_in_every_family(
    tmp_path: Path,
    corpus: Path,  # noqa: F811
    world2: World,
    family: str,
) -> None:
    plain = page_of(tmp_path / "run", corpus, "span_corruption" if family == "t5" else "masked")
    if family == "v2":
        plain["model"] = plain["model"] | {"version": 2}
    rows = "head.weight" if family == "t5" else "embed.tokens.weight"
    check(tmp_path, world2, plain["model"]["vocab"], rows, plain, zero=3)
