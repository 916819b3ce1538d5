"""Promise: labels of texts and of pairs are learnt by a run like any other: the rows say what the
documents say, the head is `transformers`' own, every layout gives one loss, and what was pretrained
is what fine-tuning begins with.

Tolerances: 1e-12 of the deviation in float64 (sums in another order); 1e-5 relative between layouts
in fp32.
"""

import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.corpus import CorpusConfig
from configs.load import ConfigError, from_dict
from configs.model import RoFormerConfig
from configs.objectives import Labels as Section
from configs.run import CorpusShare, Data, RunConfig
from data_pipeline import tokenizer as tokenizers
from data_pipeline.build import build
from pretrain import checkpoint, classify, evaluate
from pretrain.batches import Batch
from pretrain.corpora import open_corpora
from pretrain.labelled import LabelRows, fit
from pretrain.masking import Controls
from pretrain.objectives.labels import Labels, right
from pretrain.state import State, fresh
from tests.run_jobs import losses, metrics
from tests.test_conversions_prove_themselves import convert_to, same_weights, saved
from tests.test_roformer_equals_its_origin import apart, with_gradients
from tests.test_roformer_equals_its_origin import build as built
from tests.worlds import World

transformers = pytest.importorskip("transformers")

GO = "tests.run_jobs:go"
OFF = {"dropout": 0.0, "attention_dropout": 0.0}
MODEL = {"family": "roformer", "version": 1, "vocab": 600, "hidden": 32, "layers": 2, "heads": 2}
MODEL |= {"head_dim": 16, "ffn": 64, "init_std": 0.1} | OFF
BERT = RoFormerConfig("roformer", 1, 97, 48, 2, 4, 12, 80, positions=40, labels=3, **OFF)
ROTARY = replace(BERT, positions=None)
V2 = replace(ROTARY, version=2)
IDS = Controls(eod=2, pad=0, mask=4, bos=1, vocab=97)


class Index:
    """Tokens 10, 11, 12 ... in documents of given lengths, each ending in [SEP]."""

    def __init__(self, lengths: list[int]) -> None:
        self.offsets = np.cumsum([0, *lengths])
        self.stream = np.arange(10, 10 + self.offsets[-1]).astype(np.uint16)
        self.stream[self.offsets[1:] - 1] = IDS.eod
        self.tokens = len(self.stream)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Part of the stream."""
        return self.stream[start:stop]


def tables(documents: list[list[tuple[int, int, int]]], labels: list[int]) -> dict[str, Any]:
    """Spans (name, start, stop) of each document, and its label."""
    spans = [span for document in documents for span in document]
    names, starts, stops = (np.array([s[at] for s in spans], np.int64) for at in range(3))
    counts = np.array([len(document) for document in documents])
    return {
        "spans": counts, "labels": np.array(labels), "starts": starts, "stops": stops,
        "names": names,
    }  # fmt: skip


PAIRS = tables(
    [[(0, 0, 3), (1, 4, 6)], [(0, 0, 1), (1, 2, 7)], [(0, 0, 2), (1, 2, 3)], [(1, 0, 2)]],
    [1, 0, -1, 1],
)
"""Four documents of 7, 8, 4 and 3 tokens; the third has no label, the last no first field."""


def labelled(seq_len: int, packing: Any = "best_fit", fields: tuple[str, ...] = ()) -> LabelRows:
    known = (Index([7, 8, 4, 3]), PAIRS, ("a", "b"), ("no", "yes"))
    return LabelRows(*known, fields, seq_len, IDS, packing)


def test_a_row_is_what_its_documents_say() -> None:
    rows = labelled(18)
    batch = rows.batch(np.arange(1))
    a, b = [1, 10, 11, 12, 2, 14, 15, 2], [1, 17, 2, 19, 20, 21, 22, 23, 2]
    assert batch.tokens_BT[0].tolist() == [*a, *b, 0]
    assert batch.segments_BT is not None
    assert batch.segments_BT[0].tolist() == [*[0] * 5, *[1] * 3, 0, 0, 0, *[1] * 6, 0]
    assert batch.document_ids_BT is not None
    assert batch.document_ids_BT[0].tolist() == [*[0] * 8, *[1] * 9, -1]
    assert batch.positions_BT[0].tolist() == [*range(8), *range(9), 17]
    assert batch.loss_at_N is not None and batch.loss_at_N.tolist() == [0, 8]
    assert batch.targets_BT[0, [0, 8]].tolist() == [1, 0] and batch.counted == 2
    assert rows.about() == {
        "packing": "best_fit", "rows": 1, "documents": 2, "documents_cut": 0, "filled": 17 / 18
    }  # fmt: skip


def test_one_field_is_one_text() -> None:
    rows = labelled(8, "documents", ("b",))
    assert len(rows) == 3  # the last document has this one
    batch = rows.batch(np.arange(3))
    assert batch.tokens_BT[0].tolist() == [1, 14, 15, 2, 0, 0, 0, 0]
    assert batch.segments_BT is not None and not batch.segments_BT.any()
    whole = LabelRows(
        Index([4, 3]), tables([[], []], [0, 1]), (), ("x", "y"), (), 8, IDS, "documents"
    )
    assert whole.batch(np.arange(1)).tokens_BT[0].tolist() == [1, 10, 11, 12, 2, 0, 0, 0]


def test_the_longer_text_loses_tokens_first() -> None:
    """As popping one by one does it (bert4keras' truncate_sequences)."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(0, 30, (500, 2))
    for room in (7, 16, 21):
        expected = []
        for a, b in sizes.tolist():
            while a + b > room:
                a, b = (a - 1, b) if a >= b else (a, b - 1)
            expected.append([a, b])
        found = sizes.copy()
        cut = fit(found, room)
        assert found.tolist() == expected and cut.tolist() == (sizes.sum(1) > room).tolist()
    assert labelled(8, "documents").batch(np.arange(2)).tokens_BT[1].tolist() == [
        1, 17, 2, 19, 20, 21, 22, 2
    ]  # fmt: skip


# ---- against transformers ----------------------------------------------------------------------


def theirs_of(ours: nn.Module) -> nn.Module:
    c = ours.config
    kind = "RoFormer" if c.positions is None else "Bert"
    page: dict[str, Any] = {
        "vocab_size": c.vocab, "hidden_size": c.hidden, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "intermediate_size": c.ffn, "hidden_act": "gelu",
        "max_position_embeddings": 40, "type_vocab_size": 2, "layer_norm_eps": c.norm_eps,
        "num_labels": c.labels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }  # fmt: skip
    if kind == "RoFormer":
        page |= {"embedding_size": c.hidden, "rotary_value": False}
    config = getattr(transformers, f"{kind}Config")(**page)
    theirs = getattr(transformers, f"{kind}ForSequenceClassification")(config).double().eval()
    missing, unknown = theirs.load_state_dict(named(ours, "data"), strict=False)
    assert not unknown and all("embed_positions" in name for name in missing)
    if kind == "RoFormer":  # its table of sines is of float32
        angle = torch.arange(40.0, dtype=torch.float64)[:, None] * 10000.0 ** (
            -torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
        )
        table = torch.cat([angle.sin(), angle.cos()], -1)
        theirs.roformer.encoder.embed_positions.weight = nn.Parameter(table, requires_grad=False)
    return theirs


def named(ours: nn.Module, what: str) -> dict[str, Tensor]:
    """Our weights or gradients by the names of transformers: the rules of the conversion."""
    from pretrain.convert import hf

    have = dict(ours.named_parameters())
    found = {}
    for rule in hf.rules(ours.config):
        if rule.native:
            of = [getattr(have[name], what) for name in rule.native]
            found |= dict(zip(rule.foreign, rule.out(of), strict=True))
    return found


@pytest.mark.parametrize("config", [BERT, ROTARY], ids=["bert", "roformer"])
def test_the_head_is_that_of_transformers(config: RoFormerConfig) -> None:
    """Logits and every gradient of a batch of pairs, padded, in float64."""
    ours = built(config)
    theirs = theirs_of(ours)
    batch = labelled(12, "documents").batch(np.arange(2))
    tokens = torch.where(batch.tokens_BT == 0, 5, batch.tokens_BT)  # theirs trains no row of [PAD]
    given = (tokens, batch.positions_BT, batch.document_ids_BT, batch.segments_BT)
    logits = ours.logits(ours(*given)[:, 0])
    mask = (batch.document_ids_BT >= 0).long()
    expected = theirs(tokens, attention_mask=mask, token_type_ids=batch.segments_BT).logits
    with_gradients(logits, {})
    other = with_gradients(expected, dict(theirs.named_parameters()))
    mine = named(ours, "grad")
    assert mine.keys() == other.keys()
    far, gradients = apart((logits, mine), (expected, other), True)
    assert far < 1e-12
    gradients = {n: d for n, d in gradients.items() if not n.endswith("key.bias")}
    assert max(gradients.values()) < 1e-12, gradients
    ours.head.learned = not ours.head.learned  # the control: the other activation
    assert (ours.logits(ours(*given)[:, 0]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("config", [BERT, ROTARY], ids=["bert", "roformer"])
def test_a_model_with_labels_goes_there_and_back(config: RoFormerConfig, tmp_path: Path) -> None:
    before = saved(config, tmp_path / "ours")
    found = convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")
    assert found["kept"] and not found["round_trip"]["different"] and found["transformers"]["same"]
    page = json.loads((tmp_path / "theirs/config.json").read_text("utf-8"))
    assert page["architectures"][0].endswith("ForSequenceClassification")
    convert_to(tmp_path / "theirs", tmp_path / "back", "native")
    after = checkpoint.read(tmp_path / "back")
    assert same_weights(before, after) and after.record["model"]["labels"] == 3


def test_packing_changes_no_sum() -> None:
    """Two pairs in a row and each in its own: one loss, one gradient. v2's head has no pooler."""
    found = []
    for seq_len, packing in ((18, "best_fit"), (18, "documents")):
        model = built(V2)
        rows = labelled(seq_len, packing)
        batch = rows.batch(np.arange(len(rows)))
        loss, count = Labels().loss(model, batch, None)  # type: ignore[arg-type]
        loss.backward()
        assert int(count) == 2 and 0 <= right(model, batch) <= 2
        found.append((loss.detach(), model.head.classifier.weight.grad))
    assert not hasattr(model.head, "pooler")
    assert (found[0][0] - found[1][0]).abs() < 1e-12
    assert (found[0][1] - found[1][1]).abs().max() < 1e-12
    nothing, count = Labels().loss(model, rows.batch(np.arange(0)), None)  # type: ignore[arg-type]
    assert float(nothing.detach()) == 0 and nothing.requires_grad and int(count) == 0


# ---- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 lines of the shipped sample, each with an answer: the label says which it is."""
    folder = tmp_path_factory.mktemp("labels")
    sample = Path(__file__).parent.parent / "data_pipeline" / "sample" / "sample.jsonl"
    lines = [json.loads(line)["text"][:20] for line in sample.read_text("utf-8").splitlines()]
    lines = [line.replace("\n", "") for line in lines][:180]
    pairs = [
        {"a": f" ２０{n}年 {a[:8]}", "b": "不是这样的" if n % 2 else "就是如此", "same": 1 - n % 2}
        for n, a in enumerate(lines)
    ]
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (folder / "pairs.jsonl").write_text(text, "utf-8")
    source = {"kind": "jsonl", "name": "pairs", "path": str(folder / "pairs.jsonl")}
    source |= {"fields": ["a", "b"], "label_field": "same"}
    config = {
        "data": {"out": str(folder / "corpus"), "sources": [source], "workers": 1},
        "clean": {"min_characters": 4, "min_han_ratio": 0.0},
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "wordpiece", "vocab_size": 300, "word": False},
    }
    build(from_dict(CorpusConfig, config))
    return folder / "corpus"


def page(run: Path, corpus: Path, steps: int = 20, **model: Any) -> dict[str, Any]:
    return {
        "model": MODEL | {"labels": 2} | model,
        "objective": {"name": "labels"},
        "data": {"train": [{"corpus": str(corpus)}], "seq_len": 64},
        "batch": {"samples": 8, "micro": 3},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": min(5, steps - 1)},
        "precision": "fp32",
        "run": {
            "out": str(run), "steps": steps, "log_every_steps": 5, "validate_samples": 8,
            "validate_every_steps": steps,
        },
    }  # fmt: skip


def test_a_run_learns_labels_on_any_layout(
    tmp_path: Path, corpus: Path, world1: World, world2: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensor 2, ZeRO 3 and shared rows agree with one process; rows of ragged numbers of
    documents."""
    world1.run(GO, config=page(tmp_path / "one", corpus))
    run, lines = str(tmp_path / "one"), (corpus.parent / "pairs.jsonl").read_text("utf-8")
    whole = evaluated(capsys, run, "--task", "labels", "--data", str(corpus))
    assert whole["samples"] >= 10 and whole["accuracy"] >= 90 and whole["f1_macro"] >= 90
    rows = [json.loads(line) for line in lines.splitlines()[:40]]
    (tmp_path / "pairs.txt").write_text(
        "".join(f"{row['a']}\t{row['b']}\t{row['same']}\n" for row in rows), "utf-8"
    )
    for task in ("labels", "lcqmc"):
        of_file = evaluated(capsys, run, "--task", task, "--data", str(tmp_path / "pairs.txt"))
        assert of_file["samples"] == 40 and of_file["accuracy"] >= 90
    assert "first_last_average" in of_file
    (tmp_path / "pairs.txt").write_text("甲\t乙\t2\n", "utf-8")
    with pytest.raises(ValueError, match=r"line 1: the label is '2', the checkpoint knows 0, 1"):
        evaluated(capsys, run, "--task", "labels", "--data", str(tmp_path / "pairs.txt"))
    assert evaluate.main([run, "--task", "labels", "--data", str(corpus)]) == 0
    assert "of 0  " in capsys.readouterr().out
    found = losses(tmp_path / "one")
    assert len(found) == 20 and sum(found[-3:]) < 0.5 * sum(found[:3])
    last = metrics(tmp_path / "one")[-1]
    assert last["valid_accuracy"] >= 0.9 and "valid_bits_per_character" not in last
    layouts = {"zero3": {"zero": 3}, "tensor": {"tensor": 2}, "shared": {"sequence": 2}}
    for name, layout in layouts.items():
        asked = page(tmp_path / name, corpus)
        asked["parallel"] = layout
        world2.run(GO, config=asked)
        assert losses(tmp_path / name) == pytest.approx(found, rel=1e-5)
        assert metrics(tmp_path / name)[-1]["valid_accuracy"] == last["valid_accuracy"]


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert evaluate.main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_file_gives_the_rows_that_its_corpus_has(corpus: Path, tmp_path: Path) -> None:
    """Full-width digits and blanks around the texts included."""

    def read(batches: Iterable[Batch]) -> set[tuple[Any, ...]]:
        found = set()
        for batch in batches:
            assert batch.segments_BT is not None
            for number, tokens in enumerate(batch.tokens_BT):
                last = int((tokens == words.eod_id).nonzero()[-1]) + 1  # of the second [SEP]
                told = tokens[:last], batch.segments_BT[number, :last]
                found.add((*(tuple(x.tolist()) for x in told), int(batch.targets_BT[number, 0])))
        return found

    rows = map(json.loads, (corpus.parent / "pairs.jsonl").read_text("utf-8").splitlines())
    text = "".join(f"{row['a']}\t{row['b']}\t{row['same']}\n" for row in rows)
    (tmp_path / "pairs.txt").write_text(text, "utf-8")
    words = tokenizers.load(corpus / "tokenizer")
    data = Data((CorpusShare(str(corpus)),), 64, packing="documents")
    learnt = open_corpora(data, Section("labels"), 0, 600)
    of_corpus = read(learnt.validation(1000, 0, 1, 4))
    assert len(of_corpus) >= 10
    of_file = read(classify._of_file(tmp_path / "pairs.txt", words, ["0", "1"], None, 64))
    assert of_corpus <= of_file


def test_every_line_has_the_columns_of_the_first(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.txt").write_text("甲\t0\n甲\t乙\t1\n", "utf-8")
    words = tokenizers.load(corpus / "tokenizer")
    with pytest.raises(ValueError, match="line 2 has 3 columns, line 1 has 2"):
        next(classify._of_file(tmp_path / "mixed.txt", words, ["0", "1"], None, 64))


def test_f1_is_over_labels_of_the_data_and_of_the_answers() -> None:
    """A label that was only answered counts with 0, one that is nowhere does not."""
    for confusion in ([[2, 0, 1], [0, 2, 0], [0, 0, 0]], np.diag([0, 4, 0])):
        found = classify._told(np.array(confusion), ["a", "b", "c"])
        assert found["f1_macro"] == pytest.approx(60 if found["samples"] == 5 else 100)


def test_fine_tuning_begins_with_what_was_pretrained(
    tmp_path: Path, corpus: Path, world1: World
) -> None:
    masked = page(tmp_path / "masked", corpus, steps=2, labels=0, positions=64)
    masked["objective"] = {"name": "masked", "masking": "token"}
    world1.run(GO, config=masked)
    tuned = page(tmp_path / "tuned", corpus, steps=1, positions=64)
    tuned["init"] = {"from": str(tmp_path / "masked")}
    tuned["optimizer"]["lr"] = 1e-12
    tuned["optimizer"]["weight_decay"] = 0.0
    world1.run(GO, config=tuned)
    before = checkpoint.read(checkpoint.resolve(tmp_path / "masked"))
    after = checkpoint.read(checkpoint.resolve(tmp_path / "tuned"))
    kept = [key for key in before.entries if key.startswith(("weights/embed", "weights/encoder"))]
    assert len(kept) == 37
    for key in kept:
        assert (before.read(key) - after.read(key)).abs().max() < 1e-9, key
    heads = {key for key in after.entries if key.startswith("weights/head.")}
    ends = ("weight", "bias")
    assert heads == {f"weights/head.{part}.{e}" for part in ("pooler", "classifier") for e in ends}
    assert after.record["model"]["labels"] == 2
    assert after.record["data"][0]["objective"]["labels"] == ["0", "1"]
    # and back: words again, the head drawn anew
    again = page(tmp_path / "again", corpus, steps=1, labels=0, positions=64)
    again["objective"], again["init"] = masked["objective"], {"from": str(tmp_path / "tuned")}
    world1.run(GO, config=again)
    assert (
        "weights/head.dense.weight"
        in checkpoint.read(checkpoint.resolve(tmp_path / "again")).entries
    )


def test_a_checkpoint_from_elsewhere_is_measured_too(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A converted classifier: its record has the names of labels, and no page of a run."""
    made = fresh(from_dict(RoFormerConfig, MODEL | {"labels": 2, "positions": 48}), 1)
    record = {"model": made.record["model"], "labels": ["0", "1"]}
    checkpoint.write_state(tmp_path / "x", State(made.entries, record), corpus / "tokenizer")
    line = [str(tmp_path / "x"), "--task", "labels", "--data", str(corpus)]
    found = evaluated(capsys, *line)
    assert found["samples"] >= 10 and 0 <= found["accuracy"] <= 100
    with pytest.raises(ValueError, match="--seq-len: is 1000, must be at least 1 and at most 48"):
        evaluated(capsys, *line, "--seq-len", "1000")


# ---- sentences ---------------------------------------------------------------------------------


def refused(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_dict(RunConfig, asked)


def test_what_does_not_fit_is_a_sentence(tmp_path: Path, corpus: Path, world1: World) -> None:
    good = page(tmp_path, corpus)
    wrong = copy.deepcopy(good)
    wrong["model"]["labels"] = 0
    refused(wrong, r"model\.labels: is 0, objective\.name=labels needs the number")
    wrong["model"]["labels"] = 1
    refused(wrong, r"labels: is 1, must be 0 .* or at least 2")
    wrong = copy.deepcopy(good)
    wrong["objective"] = {"name": "masked"}
    refused(wrong, r"model\.labels: is 2, objective\.name=masked needs 0")
    wrong["objective"] = {"name": "labels", "fields": ["a", "b", "c"]}
    refused(wrong, "fields: names a, b, c; must be one or two")
    wrong["objective"]["fields"] = ["c"]
    config = from_dict(RunConfig, wrong)
    with pytest.raises(ConfigError, match=r"objective\.fields: is c, .* has the fields a, b"):
        open_corpora(config.data, config.objective, 1, 600)
    with pytest.raises(ConfigError, match=r"model\.labels: is 5, the corpus has 2 labels \(0, 1\)"):
        world1.run(GO, config=page(tmp_path / "five", corpus, labels=5))
    with pytest.raises(ConfigError, match=r"model\.segments: is 1, .* has 2 fields"):
        world1.run(GO, config=page(tmp_path / "one-segment", corpus, segments=1))
    with pytest.raises(ValueError, match="has none with a label"):
        LabelRows(
            Index([7]), tables([[(0, 0, 3)]], [-1]), ("a",), ("x", "y"), (), 9, IDS, "documents"
        )
