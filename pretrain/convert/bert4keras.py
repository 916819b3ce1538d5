"""TensorFlow checkpoints of Google's and of Su Jianlin's (bert4keras): BERT, T5 PEGASUS, RoFormer.

    FOLDER/ config.json (BERT's keys, or mT5's)  model.ckpt.index  .data-00000-of-00001  vocab.txt

All kernels are [in, out]. T5 comes under two naming schemes, as mT5 was loaded (`layer_norm`) and
as T5 PEGASUS was released (`rms_norm`); the table of relative positions is [heads, buckets].
RoFormer v2 has the names of v1 without biases and norms. BERT as Google named it (WoBERT, SimBERT)
is v1 with a table of positions; its pooler and next-sentence head are left behind, and said to be.
Names: bert4keras/models.py, google-research/bert.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from configs.model import ModelConfig, RoFormerConfig, T5PegasusConfig
from pretrain.convert import bundle
from pretrain.convert.hf_config import known
from pretrain.convert.rules import ConversionError, Foreign, Rule, masked, same

BESIDE = {"bert/pooler/": "the pooler", "cls/seq_relationship/": "the next-sentence head"}
"""What a file of BERT's may hold beside the model."""
IGNORED = (*BESIDE, "global_step")
POSITIONS = "bert/embeddings/position_embeddings"
SLOTS = ("/adam_m", "/adam_v", "/Adam", "/Adam_1", "/m", "/v")


def rules(config: ModelConfig, norm: str = "rms_norm") -> list[Rule]:
    """Native tensors <-> TensorFlow's variables. `norm`: T5's naming scheme, rms_norm (the release
    of T5 PEGASUS) or layer_norm (mT5)."""
    if isinstance(config, T5PegasusConfig):
        return list(_t5(config, norm))
    if isinstance(config, RoFormerConfig):
        return list(_roformer(config))
    raise ConversionError(
        f"--to bert4keras: is a format of T5 PEGASUS and RoFormer, not of {config.family} (不支持)"
    )


def _t5(config: T5PegasusConfig, norm: str) -> Iterator[Rule]:
    final = "rms_norm" if norm == "rms_norm" else "final_layer_norm"
    yield same("embed.tokens.weight", "shared/embedding")
    for stack in ("encoder", "decoder"):
        table = f"{stack}/block_000/layer_000/SelfAttention/relative_attention_bias"
        yield same(f"{stack}.position_bias.weight", table, transposed=True)
        for i in range(config.layers):
            ours, theirs = f"{stack}.layers.{i}", f"{stack}/block_{i:03d}"
            parts = [("self", "SelfAttention")]
            parts += [("cross", "EncDecAttention")] if stack == "decoder" else []
            for at, (name, their_name) in enumerate(parts):
                layer = f"{theirs}/layer_{at:03d}"
                yield same(f"{ours}.{name}_norm.weight", f"{layer}/{norm}/scale")
                for part in "qkvo":
                    yield same(f"{ours}.{name}.{part}.weight", f"{layer}/{their_name}/{part}", True)
            layer = f"{theirs}/layer_{len(parts):03d}"
            yield same(f"{ours}.ffn_norm.weight", f"{layer}/{norm}/scale")
            for name, their_name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
                foreign = f"{layer}/DenseReluDense/{their_name}/kernel"
                yield same(f"{ours}.ffn.{name}.weight", foreign, True)
        yield same(f"{stack}.final_norm.weight", f"{stack}/{final}/scale")
    yield same("head.weight", "decoder/logits/kernel", True)


def _roformer(config: RoFormerConfig) -> Iterator[Rule]:
    v1 = config.version == 1
    yield same("embed.tokens.weight", "bert/embeddings/word_embeddings")
    yield same("embed.segments.weight", "bert/embeddings/token_type_embeddings")
    if config.positions is not None:
        yield same("embed.positions.weight", POSITIONS)
    if v1:
        yield from _norm("embed.norm", "bert/embeddings/LayerNorm")
    dense = {
        "self.q": "attention/self/query",
        "self.k": "attention/self/key",
        "self.v": "attention/self/value",
        "self.o": "attention/output/dense",
        "ffn.up": "intermediate/dense",
        "ffn.down": "output/dense",
    }
    for i in range(config.layers):
        ours, theirs = f"encoder.layers.{i}", f"bert/encoder/layer_{i}"
        for name, their_name in dense.items():
            yield same(f"{ours}.{name}.weight", f"{theirs}/{their_name}/kernel", True)
            if v1:
                yield same(f"{ours}.{name}.bias", f"{theirs}/{their_name}/bias")
        if v1:
            yield from _norm(f"{ours}.self_norm", f"{theirs}/attention/output/LayerNorm")
            yield from _norm(f"{ours}.ffn_norm", f"{theirs}/output/LayerNorm")
    if v1:
        head = "cls/predictions"
        yield same("head.dense.weight", f"{head}/transform/dense/kernel", True)
        yield same("head.dense.bias", f"{head}/transform/dense/bias")
        yield from _norm("head.norm", f"{head}/transform/LayerNorm")
        yield same("head.bias", f"{head}/output_bias")


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield same(f"{ours}.weight", f"{theirs}/gamma")
    yield same(f"{ours}.bias", f"{theirs}/beta")


def ignored(name: str) -> bool:
    """Whether a variable is beside the model."""
    return name.startswith(IGNORED) or name.endswith(SLOTS)


def dropped(names: Iterable[str]) -> list[str]:
    """What of a file is read by nobody, in words; the optimizer's variables apart."""
    names = list(names)
    return [words for at, words in BESIDE.items() if any(n.startswith(at) for n in names)]


# ---- files


def prefix_in(folder: Path) -> Path | None:
    """The one PREFIX of PREFIX.index in a folder, or None. ConversionError if there are several."""
    found = sorted(folder.glob("*.index"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConversionError(f"{folder}: holds several checkpoints ({names}); keep one (多于一个)")
    return found[0].with_suffix("") if found else None


def read(folder: Path) -> tuple[ModelConfig, list[Rule], Foreign]:
    """The model that a folder's files speak of, its rules, its variables."""
    prefix = prefix_in(folder)
    if prefix is None:
        raise ConversionError(f"{folder}: has no *.index of a TensorFlow checkpoint (没有检查点)")
    foreign = bundle.read(prefix)
    page = _page(folder)
    try:
        if "shared/embedding" in foreign:
            norm = "rms_norm" if "encoder/rms_norm/scale" in foreign else "layer_norm"
            config: ModelConfig = _t5_config(page, foreign, released=norm == "rms_norm")
            return config, rules(config, norm), foreign
        if "bert/embeddings/word_embeddings" in foreign:
            config = _roformer_config(page, foreign)
            return config, rules(config), foreign
    except KeyError as error:
        raise ConversionError(
            f"{prefix}.index: has no {error}, which every T5 PEGASUS, BERT and RoFormer has; is it "
            "another architecture (ALBERT, T5 without a gate)? (缺少变量，架构不符)"
        ) from None
    raise ConversionError(
        f"{prefix}.index: has neither shared/embedding nor bert/embeddings/word_embeddings; it is "
        "no T5 PEGASUS, no BERT and no RoFormer (不支持的模型)"
    )


def _page(folder: Path) -> dict[str, Any]:
    for path in sorted(folder.glob("*config*.json")):
        try:
            page = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            raise ConversionError(f"{path}: is no JSON (配置已损坏)") from None
        if isinstance(page, dict) and "num_attention_heads" in page:
            return page
    raise ConversionError(
        f"{folder}: has no config.json with num_attention_heads; the number of heads does not "
        "follow from the weights (缺少配置)"
    )


def _layers(foreign: Foreign, before: str, after: str) -> int:
    told = (name.removeprefix(before).partition("/")[0] for name in foreign if after in name)
    return 1 + max((int(number) for number in told if number.isdecimal()), default=-1)


def _t5_config(page: dict[str, Any], foreign: Foreign, released: bool) -> T5PegasusConfig:
    vocab, hidden = foreign["shared/embedding"]().shape
    at = "encoder/block_000/layer_00"
    inner = foreign[f"{at}0/SelfAttention/q"]().shape[1]
    heads, buckets = foreign[f"{at}0/SelfAttention/relative_attention_bias"]().shape
    if page["num_attention_heads"] != heads:
        raise ConversionError(
            f"config.json: num_attention_heads is {page['num_attention_heads']}, the table of "
            f"relative positions has {heads} (头数不符)"
        )
    rate = page.get("hidden_dropout_prob", page.get("dropout_rate", 0.1))
    return T5PegasusConfig(
        "t5_pegasus",
        vocab=vocab,
        hidden=hidden,
        layers=_layers(foreign, "encoder/block_", "SelfAttention/q"),
        heads=heads,
        head_dim=inner // heads,
        ffn=foreign[f"{at}1/DenseReluDense/wi_0/kernel"]().shape[1],
        buckets=buckets,
        dropout=rate,
        attention_dropout=page.get("attention_probs_dropout_prob", rate),
        activation="gelu_erf" if released else "gelu_tanh",
        cross_position_bias=released,
        logit_scale=None if released else 1.0,
    )


def _roformer_config(page: dict[str, Any], foreign: Foreign) -> RoFormerConfig:
    vocab, hidden = foreign["bert/embeddings/word_embeddings"]().shape
    v1 = "bert/encoder/layer_0/attention/self/query/bias" in foreign
    known(page, {"use_relative_position": False} | ({"hidden_act": "gelu"} if v1 else {}))
    return RoFormerConfig(
        "roformer",
        version=1 if v1 else 2,
        vocab=vocab,
        hidden=hidden,
        layers=_layers(foreign, "bert/encoder/layer_", "query/kernel"),
        heads=page["num_attention_heads"],
        head_dim=page.get("attention_key_size")
        or page.get("attention_head_size")
        or hidden // page["num_attention_heads"],
        ffn=foreign["bert/encoder/layer_0/intermediate/dense/kernel"]().shape[1],
        segments=foreign["bert/embeddings/token_type_embeddings"]().shape[0],
        positions=foreign[POSITIONS]().shape[0] if POSITIONS in foreign else None,
        dropout=page.get("hidden_dropout_prob", 0.1),
        attention_dropout=page.get("attention_probs_dropout_prob", 0.1),
    )


def page_of(config: ModelConfig) -> dict[str, Any]:
    """config.json as bert4keras reads it."""
    assert isinstance(config, T5PegasusConfig | RoFormerConfig)
    t5 = isinstance(config, T5PegasusConfig)
    act = "relu" if isinstance(config, RoFormerConfig) and config.version == 2 else "gelu"
    page = {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "attention_head_size": config.head_dim,
        "intermediate_size": config.ffn,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
        "hidden_act": ["gelu", "linear"] if t5 else act,
    }
    if not t5:
        page["type_vocab_size"] = config.segments  # type: ignore[union-attr]
        if config.positions is not None:  # type: ignore[union-attr]
            page["max_position_embeddings"] = config.positions  # type: ignore[union-attr]
    return page


def unsayable(config: ModelConfig) -> list[str]:
    """What bert4keras computes otherwise, whatever the file says."""
    found = masked(config) + ([f"model.log_n is {config.log_n}"] if config.log_n else [])
    if isinstance(config, T5PegasusConfig):
        wanted = {"activation": "gelu_erf", "cross_position_bias": True, "logit_scale": None}
        wanted |= {"max_distance": 128, "softmax_scale": 1.0, "buckets": 32, "bucket_spans": 1}
    else:
        wanted = {"logit_scale": 1.0, "softmax_scale": None, "labels": 0}
        if config.positions is None:  # type: ignore[union-attr]
            wanted["rope_base"] = 10000.0
    for key, value in wanted.items():
        if getattr(config, key) != value:
            found.append(f"model.{key} is {getattr(config, key)}, must be {value}")
    return found
