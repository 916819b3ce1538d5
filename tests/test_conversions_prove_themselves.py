"""Checkpoints of other houses go in and out: every tensor comes back, the logits are the same.

Tolerances, as shares of the logits' standard deviation in float64: 1e-12 for GPT-2, rounding alone;
2e-6 for MT5, whose norm, and RoFormer, whose table of positions, transformers keeps in float32.
"""

import dataclasses
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import load
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig, shape, tensors
from launch import convert
from pretrain import checkpoint
from pretrain.convert import bert4keras, bundle, cpm1, files, hf, hf_config, megatron
from pretrain.convert.rules import ConversionError, check, exported
from pretrain.state import State, fresh

transformers = pytest.importorskip("transformers", reason="extra hf is not installed")

TENSORFLOW = Path(__file__).parent / "data" / "tensorflow"
DATA = "model.ckpt.data-00000-of-00001"
CPM = CPMConfig("cpm", vocab=96, hidden=32, layers=3, heads=4, head_dim=8, ffn=64, positions=64)
T5 = T5PegasusConfig("t5_pegasus", 96, 32, 2, 3, 8, 48, cross_position_bias=False, logit_scale=1.0)
ROFORMER = RoFormerConfig("roformer", 1, vocab=96, hidden=32, layers=2, heads=4, head_dim=8, ffn=64)
MODELS: dict[str, ModelConfig] = {"cpm": CPM, "t5_pegasus": T5, "roformer": ROFORMER}
PUBLISHED = T5PegasusConfig("t5_pegasus", 96, 32, 2, 3, 8, 48)
V2 = RoFormerConfig("roformer", 2, vocab=96, hidden=32, layers=2, heads=4, head_dim=8, ffn=64)
BERT = RoFormerConfig("roformer", 1, 96, 32, 2, 4, 8, 64, positions=64)
ALL = MODELS | {"bert": BERT, "t5_published": PUBLISHED, "roformer_v2": V2}


def saved(config: ModelConfig, folder: Path) -> State:
    """A checkpoint with every weight random, norms and biases too."""
    generator = torch.Generator().manual_seed(5)
    state = fresh(config, 1)
    entries = {}
    for key, entry in state.entries.items():
        tensor = entry.read() + 0.05 * torch.randn(entry.shape, generator=generator)
        entries[key] = type(entry)(entry.shape, "float32", lambda tensor=tensor: tensor)
    checkpoint.write_state(folder, State(entries, state.record))
    return checkpoint.read(folder)


def same_weights(one: State, other: State) -> bool:
    return one.entries.keys() == other.entries.keys() and all(
        torch.equal(one.read(key), other.read(key)) for key in one.entries
    )


def convert_to(source: Path, target: Path, to: str, *more: str) -> dict[str, Any]:
    code = convert.main([str(source), str(target), "--to", to, *more])
    found: dict[str, Any] = json.loads((target / "proof.json").read_text("utf-8"))
    assert code == (0 if found["kept"] else 1)
    return found


@pytest.mark.parametrize(
    ("family", "to"),
    [
        ("cpm", "hf"),
        ("cpm", "cpm1"),
        ("cpm", "megatron"),
        ("t5_pegasus", "hf"),
        ("roformer", "hf"),
        ("t5_published", "bert4keras"),
        ("roformer", "bert4keras"),
        ("roformer_v2", "bert4keras"),
    ],
)
def test_there_and_back_is_the_identity(family: str, to: str, tmp_path: Path) -> None:
    before = saved(ALL[family], tmp_path / "ours")
    more = ["--ranks", "2"] if to in ("cpm1", "megatron") else []
    found = convert_to(tmp_path / "ours", tmp_path / "theirs", to, *more)
    assert found["kept"] and found["round_trip"]["different"] == []
    known = ["--set", "heads=4"] if to == "cpm1" else []
    convert_to(tmp_path / "theirs", tmp_path / "back", "native", *known)
    after = checkpoint.read(tmp_path / "back")
    assert same_weights(before, after)
    free = {"dropout", "attention_dropout", "init_std", "positions"}
    old, new = before.record["model"], after.record["model"]
    assert {k: v for k, v in old.items() if k not in free} == {
        k: v for k, v in new.items() if k not in free
    }


@pytest.mark.parametrize(
    ("family", "to"),
    [
        ("cpm", "hf"),
        ("cpm", "cpm1"),
        ("cpm", "megatron"),
        ("t5_pegasus", "hf"),
        ("roformer", "hf"),
        ("bert", "hf"),
        ("t5_published", "bert4keras"),
        ("roformer", "bert4keras"),
        ("roformer_v2", "bert4keras"),
        ("bert", "bert4keras"),
    ],
)
def test_files_that_went_there_and_back_are_the_same_bytes(
    family: str, to: str, tmp_path: Path
) -> None:
    """Their files -> ours -> their files: every byte, names of folders left out."""
    saved(ALL[family], tmp_path / "ours")
    more = ["--ranks", "2"] if to in ("cpm1", "megatron") else []
    known = ["--set", "heads=4"] if to == "cpm1" else []
    convert_to(tmp_path / "ours", tmp_path / "one", to, *more)
    convert_to(tmp_path / "one", tmp_path / "between", "native", *known)
    convert_to(tmp_path / "between", tmp_path / "two", to, *more)
    names = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()}
    names -= {Path("proof.json")}
    assert len(names) >= 2
    for name in names:
        first, second = (tmp_path / at / name for at in ("one", "two"))
        assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.parametrize("family", list(MODELS))
def test_transformers_computes_what_we_compute(family: str, tmp_path: Path) -> None:
    saved(MODELS[family], tmp_path / "ours")
    seen = convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")["transformers"]
    assert seen["same"]
    share = 1e-12 if family == "cpm" else 2e-6
    assert seen["float64"]["max_difference"] <= share * seen["float64"]["std"]


@pytest.mark.parametrize("family", list(MODELS))
def test_a_checkpoint_that_transformers_wrote_comes_in(family: str, tmp_path: Path) -> None:
    page = hf_config.theirs(MODELS[family])
    kind = getattr(transformers, page["architectures"][0])
    torch.manual_seed(2)
    model = kind(kind.config_class(**{k: v for k, v in page.items() if v is not None}))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
        if family == "t5_pegasus":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))  # it was tied
    model.save_pretrained(tmp_path / "theirs")
    convert_to(tmp_path / "theirs", tmp_path / "ours", "native")
    found = convert_to(tmp_path / "ours", tmp_path / "again", "hf")
    assert found["transformers"]["same"]
    written = files.read(tmp_path / "again")
    for name, read_it in files.read(tmp_path / "theirs").items():
        if name in written:
            assert torch.equal(read_it(), written[name]()), name


def test_the_scale_of_t5_pegasus_head_is_folded(tmp_path: Path) -> None:
    config = T5PegasusConfig("t5_pegasus", 96, 32, 1, 3, 8, 48, cross_position_bias=False)
    saved(config, tmp_path / "ours")
    found = convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")
    assert found["kept"] and found["transformers"]["same"]
    (head,) = found["round_trip"]["different"]  # 32 ** -0.5 is no power of two
    assert head["tensor"] == "weights/head.weight" and head["relative"] < 2**-23


def test_the_wrong_gelu_is_caught_and_its_layer_named(tmp_path: Path) -> None:
    state = saved(T5, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")
    page = json.loads((tmp_path / "theirs/config.json").read_text("utf-8"))
    assert page["feed_forward_proj"] == "gated-gelu_python"
    page["feed_forward_proj"] = "gated-gelu"
    (tmp_path / "theirs/config.json").write_text(json.dumps(page), "utf-8")
    seen = convert._against_transformers(state, tmp_path / "theirs", torch.float32)
    assert not seen["same"] and seen["differs_at"].startswith("encoder.layers.0 ")


def test_exchanged_queries_and_keys_are_caught_at_their_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = saved(CPM, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")
    path = tmp_path / "theirs/model.safetensors"
    tensors_ = {name: tensor.clone() for name, tensor in load_file(path).items()}
    q, k, v = tensors_["transformer.h.1.attn.c_attn.weight"].chunk(3, 1)
    tensors_["transformer.h.1.attn.c_attn.weight"] = torch.cat([v, k, q], 1)
    save_file(tensors_, path, metadata={"format": "pt"})
    seen = convert._against_transformers(state, tmp_path / "theirs", torch.float32)
    assert not seen["same"] and seen["differs_at"].startswith("decoder.layers.1 ")


def test_cpm1_has_the_published_shapes() -> None:
    config = CPMConfig("cpm", 30000, 2560, 32, 32, 80, 10240, 1024)
    rules = cpm1.rules(config, 2)
    check(rules, config)
    whole = {t.name: torch.empty(shape(config, t), device="meta") for t in tensors(config)}
    made = {}
    for rule in rules:
        for name, piece in zip(
            rule.foreign, rule.out([whole[n] for n in rule.native]), strict=True
        ):
            made[name] = list(piece.shape)
    at = "transformer.layers.31"
    published = {  # CPM-1-Generate, change_mp.py; SHA1 71d6b6ad and 42aa247a
        "word_embeddings.weight": [15000, 2560],
        "position_embeddings.weight": [1024, 2560],
        "transformer.final_layernorm.weight": [2560],
        "transformer.final_layernorm.bias": [2560],
        f"{at}.input_layernorm.weight": [2560],
        f"{at}.input_layernorm.bias": [2560],
        f"{at}.attention.query_key_value.weight": [3840, 2560],
        f"{at}.attention.query_key_value.bias": [3840],
        f"{at}.attention.dense.weight": [2560, 1280],
        f"{at}.attention.dense.bias": [2560],
        f"{at}.post_attention_layernorm.weight": [2560],
        f"{at}.post_attention_layernorm.bias": [2560],
        f"{at}.mlp.dense_h_to_4h.weight": [5120, 2560],
        f"{at}.mlp.dense_h_to_4h.bias": [5120],
        f"{at}.mlp.dense_4h_to_h.weight": [2560, 5120],
        f"{at}.mlp.dense_4h_to_h.bias": [2560],
    }
    for rank in (0, 1):
        assert {k: made[f"{rank}:{k}"] for k in published} == published
    assert len(made) == 2 * (4 + 12 * 32)


def test_a_rank_of_cpm1_holds_its_queries_then_its_keys_then_its_values() -> None:
    config = CPMConfig("cpm", 8, 4, 1, 2, 2, 8, 4)
    rule = next(
        r
        for r in cpm1.rules(config, 2)
        if "0:transformer.layers.0.attention.query_key_value.weight" in r.foreign
    )
    q, k, v = (torch.full((4, 4), float(n)) + torch.arange(4.0)[:, None] / 10 for n in range(3))
    first, second = rule.out([q, k, v])
    assert torch.equal(first, torch.cat([q[:2], k[:2], v[:2]]))
    assert torch.equal(second, torch.cat([q[2:], k[2:], v[2:]]))


def test_megatron_goes_head_by_head_and_pads_the_vocabulary() -> None:
    config = CPMConfig("cpm", 30000, 8, 1, 2, 4, 8, 4)
    rules = {name: rule for rule in megatron.rules(config, 1) for name in rule.foreign}
    q, k, v = (torch.full((8, 8), float(n)) for n in range(3))
    (made,) = rules["0:decoder.layers.0.self_attention.linear_qkv.weight"].out([q, k, v])
    assert made[:, 0].tolist() == [*[0.0] * 4, *[1.0] * 4, *[2.0] * 4] * 2
    (words,) = rules["0:embedding.word_embeddings.weight"].out([torch.ones(30000, 8)])
    assert len(words) == 30080 and not words[30000:].any()
    two = {name: rule for rule in megatron.rules(config, 2) for name in rule.foreign}
    pieces = two["1:embedding.word_embeddings.weight"].out([torch.ones(30000, 8)])
    assert [len(piece) for piece in pieces] == [15104, 15104]  # 30,208: 128 x 2 divides it


def test_megatrons_own_arguments_are_read_without_megatron(tmp_path: Path) -> None:
    """A pickle with classes of a framework that is not imported: their names become stubs."""
    saved(CPM, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "theirs", "megatron")
    (path,) = megatron.files_in(tmp_path / "theirs")
    with torch.serialization.safe_globals([Namespace]):
        page = torch.load(path, weights_only=True)  # not mapped: it is written over
    page["args"].backend = Backend("flash")  # a class that torch would not load
    torch.save(page, path)
    convert_to(tmp_path / "theirs", tmp_path / "back", "native")
    assert same_weights(checkpoint.read(tmp_path / "ours"), checkpoint.read(tmp_path / "back"))


class Backend:
    """Stands for an enum of Megatron's."""

    def __init__(self, name: str) -> None:
        self.name = name


class Harm:
    """A pickle that would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (shutil.copy, (__file__, str(self.mark)))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "in/1").mkdir(parents=True)
    page = {"module": {"word_embeddings.weight": torch.ones(4, 4)}, "x": Harm(tmp_path / "mark")}
    torch.save(page, tmp_path / "in/1/mp_rank_00_model_states.pt")
    (tmp_path / "in/latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(ConversionError):
        convert.read(tmp_path / "in", None, [], None)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda page: page.pop("transformer.h.1.ln_1.bias"), "1 tensors are missing"),
        (lambda page: page.update({"transformer.h.3.x": torch.ones(1)}), "have no place"),
        (
            lambda page: page.update({"transformer.ln_f.bias": torch.ones(33)}),
            r"gives decoder.final_norm.bias the shape \[33\], the config says \[32\]",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(change: Any, sentence: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(CPM, tmp_path / "ours")
    convert_to(tmp_path / "ours", tmp_path / "theirs", "hf")
    path = tmp_path / "theirs/model.safetensors"
    page = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(page)
    save_file(page, path)
    with pytest.raises(ConversionError, match=sentence):
        convert.main([str(tmp_path / "theirs"), str(tmp_path / "back"), "--to", "native"])
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("config", "to", "sentence"),
    [
        (T5PegasusConfig("t5_pegasus", 96, 32, 1, 3, 8, 48), "hf", "cross_position_bias is true"),
        (RoFormerConfig("roformer", 2, 96, 32, 1, 4, 8, 64), "hf", "model.version is 2"),
        (CPMConfig("cpm", 96, 32, 1, 3, 8, 64, 16), "hf", "heads x head_dim is 24"),
        (CPMConfig("cpm", 96, 32, 1, 4, 8, 64, 16, log_n=512), "hf", "log_n is 512"),
        (CPMConfig("cpm", 96, 32, 1, 4, 8, 64, 16, words_said=90), "hf", "words_said=96"),
        (CPMConfig("cpm", 96, 32, 1, 4, 8, 64, 16, words_said=90), "cpm1", "words_said is 90"),
        (RoFormerConfig("roformer", 2, 96, 32, 1, 4, 8, 64, words_said=90), "bert4keras", "is 90"),
        (dataclasses.replace(PUBLISHED, buckets=48, bucket_spans=2), "bert4keras", "spans is 2"),
        (ROFORMER, "cpm1", "is a format of CPM"),
        (CPMConfig("cpm", 95, 32, 1, 4, 8, 64, 16), "cpm1", "does not divide vocab, 95"),
    ],
)
def test_what_a_format_cannot_say_is_refused(
    config: ModelConfig, to: str, sentence: str, tmp_path: Path
) -> None:
    checkpoint.write_state(tmp_path / "ours", fresh(config, 1))
    with pytest.raises(ConversionError, match=sentence):
        convert.main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", to])
    assert not (tmp_path / "theirs").exists()


def test_a_file_that_tensorflow_wrote_comes_in(tmp_path: Path) -> None:
    """tests/data/tensorflow: TensorFlow 2.21's Saver over numpy's default_rng(3), in rules' order,
    and a global step beside the model."""
    config, rules, foreign = bert4keras.read(TENSORFLOW)
    assert config == T5PegasusConfig("t5_pegasus", 11, 4, 2, 3, 2, 5)
    draw = np.random.default_rng(3)
    for rule in rules:
        (name,) = rule.foreign
        drawn = draw.standard_normal(tuple(foreign[name]().shape)).astype(np.float32)
        assert np.array_equal(foreign[name]().numpy(), drawn), name
    convert_to(TENSORFLOW, tmp_path / "ours", "native")
    state = checkpoint.read(tmp_path / "ours")
    bias = foreign["encoder/block_000/layer_000/SelfAttention/relative_attention_bias"]()
    assert torch.equal(state.read("weights/encoder.position_bias.weight"), bias.t())
    convert_to(tmp_path / "ours", tmp_path / "again", "bert4keras")
    one, other = TENSORFLOW / DATA, tmp_path / "again" / DATA
    ours = {n: t() for n, t in bundle.read(other.with_name("model.ckpt")).items()}
    assert all(torch.equal(ours[n], t()) for n, t in foreign.items() if n != "global_step")
    assert len(ours) == len(foreign) - 1 and one.exists()


def test_mt5s_own_names_mean_mt5s_own_model(tmp_path: Path) -> None:
    """The other naming scheme: layer_norm, tanh, no bias in cross-attention, no scale."""
    state = saved(T5, tmp_path / "ours")
    rules = bert4keras.rules(T5, "layer_norm")
    (tmp_path / "tf").mkdir()
    named = exported(rules, lambda name: state.read(f"weights/{name}"))
    bundle.write(tmp_path / "tf/model.ckpt", named)
    (tmp_path / "tf/config.json").write_text(json.dumps(bert4keras.page_of(T5)), "utf-8")
    convert_to(tmp_path / "tf", tmp_path / "back", "native")
    back = checkpoint.read(tmp_path / "back")
    assert same_weights(state, back)
    model = back.record["model"]
    assert (model["activation"], model["cross_position_bias"]) == ("gelu_tanh", False)
    assert "encoder/final_layer_norm/scale" in bundle.places(tmp_path / "tf/model.ckpt")


@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
def test_a_flipped_bit_of_a_tensorflow_file_is_found(suffix: str, tmp_path: Path) -> None:
    shutil.copytree(TENSORFLOW, tmp_path / "tf")
    path = tmp_path / f"tf/model.ckpt{suffix}"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="CRC"):
        convert_to(tmp_path / "tf", tmp_path / "ours", "native")


def test_a_crc_is_castagnolis() -> None:
    crc = bundle.masked_crc(b"123456789")
    assert crc == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF  # RFC 3720


def test_a_folder_of_nothing_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="holds no checkpoint of ours"):
        convert.main([str(tmp_path), str(tmp_path / "x"), "--to", "hf"])
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert.main([str(tmp_path), str(tmp_path / "x"), "--to", "hf"])


def test_every_shipped_size_has_rules_that_own_each_tensor_once() -> None:
    from launch.grow import _ModelPage

    for path in sorted((Path(convert.__file__).parent.parent / "configs/sizes").rglob("*.yaml")):
        config: ModelConfig = load(path, _ModelPage).model
        if not (isinstance(config, RoFormerConfig) and config.version == 2):
            check(hf.rules(config), config)
