"""config.json of GPT2, MT5, RoFormer and BERT <-> the configs of our families.

What the other side cannot say is refused in a sentence that names the key; what it says under
another name is told apart there (the erf form of GELU in a gated layer is "gated-gelu_python").
"""

import re
from collections.abc import Sequence
from typing import Any

from configs.load import from_dict, override, to_dict
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from configs.positions import PositionTable, Rope
from pretrain.convert.rules import ConversionError, masked

ROFORMER_POSITIONS = 1536
"""Rows of the table of sines that transformers saves; it limits no length of ours."""


def theirs(
    config: ModelConfig, tokenizer: Any = None, labels: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json of a model. ConversionError, all reasons at once, if it cannot be said there.

    `tokenizer` (.eod_id, .pad_id) gives the ids of special tokens, `labels` the names of classes.
    """
    found = _unsayable(config)
    if found:
        raise ConversionError(
            f"--to hf: {'; '.join(found)}: transformers has no such model (对方没有这种模型)"
        )
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in ("eod", "pad", "bos")}
    if isinstance(config, CPMConfig):
        return _as_gpt2(config, ids) | _extended(config)
    if isinstance(config, T5PegasusConfig):
        return _as_mt5(config, ids)
    return _as_roformer(config, ids, labels) | _extended(config)


def sines(config: RoFormerConfig) -> int:
    """Rows of the table of sines that is written for a RoFormer."""
    reach = config.rope.known * config.rope.factor if config.rope is not None else 0
    return max(ROFORMER_POSITIONS, round(reach))


def _extended(config: ModelConfig) -> dict[str, Any]:
    """What config.json tells us, and nobody else, of tables that were written out."""
    found = {f"bajie_{key}": getattr(config, key, None) for key in ("position_table", "rope")}
    return {key: to_dict(section) for key, section in found.items() if section is not None}


def _sections(page: dict[str, Any]) -> dict[str, Any]:
    """The sections of _extended() that a config.json has."""
    kinds: dict[str, Any] = {"position_table": PositionTable, "rope": Rope}
    return {
        key: from_dict(kind, page[f"bajie_{key}"], f"bajie_{key}")
        for key, kind in kinds.items()
        if f"bajie_{key}" in page
    }


Ids = dict[str, int | None]


def _as_gpt2(config: CPMConfig, ids: Ids) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_embd": config.hidden,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.ffn,
        "n_positions": config.positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
        "bos_token_id": ids["eod"],
        "eos_token_id": ids["eod"],
        "pad_token_id": ids["pad"],
    }


def _as_mt5(config: T5PegasusConfig, ids: Ids) -> dict[str, Any]:
    # "gated-gelu" means the tanh form there; the erf form goes by another name.
    form = "gated-gelu" if config.activation == "gelu_tanh" else "gated-gelu_python"
    return {
        "architectures": ["MT5ForConditionalGeneration"],
        "model_type": "mt5",
        "vocab_size": config.vocab,
        "d_model": config.hidden,
        "d_kv": config.head_dim,
        "d_ff": config.ffn,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": form,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "decoder_start_token_id": ids["bos"] or 0,
        "eos_token_id": ids["eod"],
        "pad_token_id": ids["pad"],
    }


def _as_roformer(config: RoFormerConfig, ids: Ids, labels: Sequence[str]) -> dict[str, Any]:
    page: dict[str, Any] = {
        "architectures": ["RoFormerForMaskedLM"],
        "model_type": "roformer",
        "vocab_size": config.vocab,
        "embedding_size": config.hidden,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
        "max_position_embeddings": sines(config),
        "type_vocab_size": config.segments,
        "layer_norm_eps": config.norm_eps,
        "rotary_value": False,
        "tie_word_embeddings": True,
        "pad_token_id": ids["pad"] or 0,
    }
    if config.labels:
        page["architectures"] = ["RoFormerForSequenceClassification"]
        names = labels or [f"LABEL_{number}" for number in range(config.labels)]
        page["id2label"] = {str(number): name for number, name in enumerate(names)}
        page["label2id"] = {name: int(number) for number, name in page["id2label"].items()}
    if config.positions is None:
        return page
    page |= {"architectures": [f"Bert{page['architectures'][0][8:]}"], "model_type": "bert"}
    page["max_position_embeddings"] = config.positions
    return {key: page[key] for key in page if key not in ("embedding_size", "rotary_value")}


def _unsayable(config: ModelConfig) -> list[str]:
    found = masked(config)
    if config.log_n:
        found.append(f"model.log_n is {config.log_n}")
    table, rope = getattr(config, "position_table", None), getattr(config, "rope", None)
    if table is not None and table.method != "hierarchical":
        found.append(f"model.position_table.method is {table.method}, which follows the length")
    if rope is not None and rope.windowed:
        found.append(f"model.rope.method is {rope.method}, which changes distances")
    if rope is not None and rope.dynamic:
        found.append("model.rope.dynamic is true, it has one table of sines for all lengths")
    if getattr(config, "bucket_spans", 1) > 1:
        found.append(f"model.bucket_spans is {config.bucket_spans}, must be 1")  # type: ignore[union-attr]
    usual = 1.0 if isinstance(config, T5PegasusConfig) else config.head_dim**-0.5
    if config.softmax_scale not in (None, usual):
        found.append(f"model.softmax_scale is {config.softmax_scale}, must be {usual:g}")
    if isinstance(config, T5PegasusConfig):
        if config.cross_position_bias:
            found.append("model.cross_position_bias is true (as T5 PEGASUS was trained)")
        return found
    if config.heads * config.head_dim != config.hidden:
        width = config.heads * config.head_dim
        found.append(f"heads x head_dim is {width}, must be hidden, {config.hidden}")
    if config.logit_scale != 1.0:
        found.append(f"model.logit_scale is {config.logit_scale}, must be 1")
    if isinstance(config, RoFormerConfig):
        if config.version == 2:
            found.append("model.version is 2")
        if config.rope_base != 10000.0 and config.positions is None:
            found.append(f"model.rope_base is {config.rope_base:g}, must be 10000")
    return found


def ours(page: dict[str, Any]) -> ModelConfig:
    """The model of a config.json. ConversionError for one that our families do not have."""
    kind = page.get("model_type")
    try:
        if kind == "gpt2":
            return _from_gpt2(page)
        if kind == "mt5" or (kind == "t5" and page.get("tie_word_embeddings") is False):
            return _from_mt5(page)
        if kind in ("roformer", "bert"):
            return _from_roformer(page, learned=kind == "bert")
    except KeyError as error:
        raise ConversionError(f"config.json: has no {error} (缺少配置项)") from None
    raise ConversionError(
        f"config.json: model_type is {kind!r}, must be gpt2, mt5, untied t5, roformer "
        "or bert (不支持)"
    )


def known(page: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse settings under which the same tensors mean something else. ConversionError."""
    wrong = [
        f"{key} is {page[key]!r}, must be {value!r}"
        for key, value in wanted.items()
        if key in page and page[key] != value
    ]
    if wrong:
        raise ConversionError(f"config.json: {'; '.join(wrong)} (不支持的设置)")


def _from_gpt2(page: dict[str, Any]) -> CPMConfig:
    wanted = {"activation_function": "gelu_new", "scale_attn_weights": True}
    wanted |= {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    known(page, wanted | {"tie_word_embeddings": True})
    hidden, heads = page["n_embd"], page["n_head"]
    return CPMConfig(
        "cpm",
        vocab=page["vocab_size"],
        hidden=hidden,
        layers=page["n_layer"],
        heads=heads,
        head_dim=hidden // heads,
        ffn=page.get("n_inner") or 4 * hidden,
        positions=page.get("n_positions", 1024),
        norm_eps=page.get("layer_norm_epsilon", 1e-5),
        dropout=page.get("resid_pdrop", 0.1),
        attention_dropout=page.get("attn_pdrop", 0.1),
        init_std=page.get("initializer_range", 0.02),
        **_sections(page),
    )


def _from_mt5(page: dict[str, Any]) -> T5PegasusConfig:
    forms = {"gated-gelu": "gelu_tanh", "gated-gelu_new": "gelu_tanh"}
    forms["gated-gelu_python"] = "gelu_erf"
    form = page.get("feed_forward_proj", "gated-gelu")
    if form not in forms:
        raise ConversionError(
            f"config.json: feed_forward_proj is {form!r}, must be gated-gelu (不支持)"
        )
    if page.get("num_decoder_layers", page["num_layers"]) != page["num_layers"]:
        raise ConversionError(
            f"config.json: the encoder has {page['num_layers']} layers, the decoder "
            f"{page['num_decoder_layers']}; they must be equal (层数须相同)"
        )
    return T5PegasusConfig(
        "t5_pegasus",
        vocab=page["vocab_size"],
        hidden=page["d_model"],
        layers=page["num_layers"],
        heads=page["num_heads"],
        head_dim=page["d_kv"],
        ffn=page["d_ff"],
        buckets=page.get("relative_attention_num_buckets", 32),
        max_distance=page.get("relative_attention_max_distance", 128),
        norm_eps=page.get("layer_norm_epsilon", 1e-6),
        dropout=page.get("dropout_rate", 0.1),
        attention_dropout=page.get("dropout_rate", 0.1),
        activation="gelu_tanh" if forms[form] == "gelu_tanh" else "gelu_erf",
        cross_position_bias=False,
        logit_scale=1.0,
    )


def _from_roformer(page: dict[str, Any], learned: bool) -> RoFormerConfig:
    hidden, heads = page["hidden_size"], page["num_attention_heads"]
    wanted = {"hidden_act": "gelu", "rotary_value": False, "is_decoder": False}
    wanted["position_embedding_type"] = "absolute"
    known(page, wanted | {"embedding_size": hidden, "tie_word_embeddings": True})
    return RoFormerConfig(
        "roformer",
        version=1,
        vocab=page["vocab_size"],
        hidden=hidden,
        layers=page["num_hidden_layers"],
        heads=heads,
        head_dim=hidden // heads,
        ffn=page["intermediate_size"],
        segments=page.get("type_vocab_size", 2),
        positions=page.get("max_position_embeddings", 512) if learned else None,
        labels=_labels_of(page),
        norm_eps=page.get("layer_norm_eps", 1e-12),
        dropout=page.get("hidden_dropout_prob", 0.1),
        attention_dropout=page.get("attention_probs_dropout_prob", 0.1),
        init_std=page.get("initializer_range", 0.02),
        **_sections(page),
    )


def _labels_of(page: dict[str, Any]) -> int:
    """The classes of a model for classification; 0 for one over words."""
    kinds = page.get("architectures") or [""]
    if not str(kinds[0]).endswith("ForSequenceClassification"):
        return 0
    if page.get("problem_type") not in (None, "single_label_classification"):
        raise ConversionError(
            f"config.json: problem_type is {page['problem_type']!r}, a text has one label here "
            "(仅支持单标签分类)"
        )
    return len(page["id2label"]) if "id2label" in page else int(page.get("num_labels", 2))


def label_names(page: dict[str, Any]) -> list[str]:
    """What the classes of a config.json are called; empty where it only numbers them."""
    said = page.get("id2label") if _labels_of(page) else None
    names = [str(said[key]) for key in sorted(said, key=int)] if said else []
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def with_options(config: ModelConfig, options: Sequence[str]) -> ModelConfig:
    """A config with some keys changed (`activation=gelu_erf`): what config.json cannot say of how a
    checkpoint was trained."""
    values = to_dict(config)
    for option in options:
        override(values, option)
    changed: ModelConfig = from_dict(type(config), values, "--set")
    return changed
