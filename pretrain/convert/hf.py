"""Hugging Face's folders: config.json and safetensors (or pytorch_model.bin when read).

    CPM         GPT2LMHeadModel                [in, out] kernels, q | k | v in one
    T5 PEGASUS  MT5ForConditionalGeneration    the scale of the head folded into lm_head
    RoFormer v1 RoFormerForMaskedLM            decoder tied to the embedding, its bias twice
    BERT        BertForMaskedLM                the same; v1 with learned positions (WoBERT, SimBERT)
    with labels ..ForSequenceClassification    of either; BERT's pooler is in its head

What the other side cannot say is refused in a sentence, never dropped: a bias in cross-attention
(T5 PEGASUS as trained), log-n attention, RoFormer v2, a width that is not heads x head_dim. What it
says otherwise is folded into weights: a logit scale that is no power of two is undone to half a
unit in the last place, everything else to the last bit.

transformers is imported by `reference` only, for the proof.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from pretrain.convert import files
from pretrain.convert.hf_config import sines
from pretrain.convert.rules import (
    ConversionError,
    Foreign,
    Rule,
    derived,
    same,
    scaled,
    stacked,
    tied,
)

TOKENIZER = "bajie_tokenizer"


# ---- rules


def rules(config: ModelConfig, positions: int | None = None) -> list[Rule]:
    """Native tensors <-> those of the Hugging Face model of the family; positions: rows of the
    table of sines, where a file has another number than would be written."""
    if isinstance(config, CPMConfig):
        return list(_gpt2(config))
    if isinstance(config, T5PegasusConfig):
        return list(_mt5(config))
    return list(_roformer(config, positions or sines(config)))


def _gpt2(config: CPMConfig) -> Iterator[Rule]:
    yield same("embed.tokens.weight", "transformer.wte.weight")
    yield _table(config, "transformer.wpe.weight")
    for i in range(config.layers):
        ours, theirs = f"decoder.layers.{i}", f"transformer.h.{i}"
        for end in ("weight", "bias"):
            yield same(f"{ours}.self_norm.{end}", f"{theirs}.ln_1.{end}")
            yield same(f"{ours}.ffn_norm.{end}", f"{theirs}.ln_2.{end}")
            qkv = [f"{ours}.self.{part}.{end}" for part in "qkv"]
            yield stacked(qkv, f"{theirs}.attn.c_attn.{end}", transposed=True)
            kernel = end == "weight"
            yield same(f"{ours}.self.o.{end}", f"{theirs}.attn.c_proj.{end}", kernel)
            yield same(f"{ours}.ffn.up.{end}", f"{theirs}.mlp.c_fc.{end}", kernel)
            yield same(f"{ours}.ffn.down.{end}", f"{theirs}.mlp.c_proj.{end}", kernel)
    for end in ("weight", "bias"):
        yield same(f"decoder.final_norm.{end}", f"transformer.ln_f.{end}")


def _mt5(config: T5PegasusConfig) -> Iterator[Rule]:
    yield same("embed.tokens.weight", "shared.weight")
    for stack in ("encoder", "decoder"):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield same(f"{stack}.position_bias.weight", table)
        for i in range(config.layers):
            ours, theirs = f"{stack}.layers.{i}", f"{stack}.block.{i}.layer"
            parts = [("self", "SelfAttention")]
            parts += [("cross", "EncDecAttention")] if stack == "decoder" else []
            for at, (name, their_name) in enumerate(parts):
                yield same(f"{ours}.{name}_norm.weight", f"{theirs}.{at}.layer_norm.weight")
                for part in "qkvo":
                    foreign = f"{theirs}.{at}.{their_name}.{part}.weight"
                    yield same(f"{ours}.{name}.{part}.weight", foreign)
            last = len(parts)
            yield same(f"{ours}.ffn_norm.weight", f"{theirs}.{last}.layer_norm.weight")
            for name, their_name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
                foreign = f"{theirs}.{last}.DenseReluDense.{their_name}.weight"
                yield same(f"{ours}.ffn.{name}.weight", foreign)
        yield same(f"{stack}.final_norm.weight", f"{stack}.final_layer_norm.weight")
    scale = config.hidden**-0.5 if config.logit_scale is None else config.logit_scale
    if scale == 1.0:
        yield same("head.weight", "lm_head.weight")
    else:
        yield scaled("head.weight", "lm_head.weight", scale)


def _roformer(config: RoFormerConfig, positions: int) -> Iterator[Rule]:
    head, top = "cls.predictions", "roformer" if config.positions is None else "bert"
    words = (f"{top}.embeddings.word_embeddings.weight", f"{head}.decoder.weight")
    yield tied("embed.tokens.weight", words[:1] if config.labels else words)
    yield same("embed.segments.weight", f"{top}.embeddings.token_type_embeddings.weight")
    if config.positions is None:
        yield derived(f"{top}.encoder.embed_positions.weight", lambda: _sines(config, positions))
    else:
        yield _table(config, f"{top}.embeddings.position_embeddings.weight")
    for end in ("weight", "bias"):
        yield same(f"embed.norm.{end}", f"{top}.embeddings.LayerNorm.{end}")
    parts = {
        "self.q": "attention.self.query",
        "self.k": "attention.self.key",
        "self.v": "attention.self.value",
        "self.o": "attention.output.dense",
        "self_norm": "attention.output.LayerNorm",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }
    for i in range(config.layers):
        for ours, theirs in parts.items():
            for end in ("weight", "bias"):
                foreign = f"{top}.encoder.layer.{i}.{theirs}.{end}"
                yield same(f"encoder.layers.{i}.{ours}.{end}", foreign)
    for end in ("weight", "bias"):
        if config.labels:
            pooler, classes = ("classifier.dense", "classifier.out_proj")
            if config.positions is not None:
                pooler, classes = f"{top}.pooler.dense", "classifier"
            yield same(f"head.pooler.{end}", f"{pooler}.{end}")
            yield same(f"head.classifier.{end}", f"{classes}.{end}")
            continue
        yield same(f"head.dense.{end}", f"{head}.transform.dense.{end}")
        yield same(f"head.norm.{end}", f"{head}.transform.LayerNorm.{end}")
    if not config.labels:
        yield tied("head.bias", (f"{head}.bias", f"{head}.decoder.bias"))


def _sines(config: RoFormerConfig, positions: int) -> torch.Tensor:
    """The table that transformers saves: sines in the first half, cosines in the second, fp32."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    scale, rope = 1.0, config.rope
    if rope is not None:  # static: one table serves all lengths
        pairs = rope.pairs(config.head_dim, config.rope_base)
        turns = [p * (kept + (1 - kept) * rope.factor**-e) for p, e, kept in pairs]
        frequency = torch.tensor(turns, dtype=torch.float64)
        scale = 0.1 * math.log(rope.factor) + 1 if rope.method == "yarn" else 1.0
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return (torch.cat([angle.sin(), angle.cos()], dim=1) * scale).float()


def _table(config: CPMConfig | RoFormerConfig, foreign: str) -> Rule:
    """Learned positions: a row for each, those of a decomposition written out."""
    native, how = "embed.positions.weight", config.position_table
    if how is None:
        return same(native, foreign)
    reach = int(config.positions or 0)

    def written(x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = how.written_out(x.double(), reach)
        return rows.to(x.dtype)

    def back(x: list[torch.Tensor]) -> list[torch.Tensor]:
        first = x[0][: how.rows]
        if x[0].is_meta:
            return [first]
        if not torch.allclose(written(first.float()), x[0].float(), 0.02, 0.02):
            raise ConversionError(
                f"{foreign}: is not the decomposition that config.json tells of; if it was trained "
                "on there, take bajie_position_table out of config.json (位置表已改变)"
            )
        return [first]

    return Rule((native,), (foreign,), lambda x: [written(x[0])], back)


# ---- folders


def ignored(name: str) -> bool:
    """Buffers that old files hold and copies of the embedding, which follow from the rest; BERT's
    pooler and next-sentence head, which are beside it (see `dropped`)."""
    if name.endswith((".attn.bias", ".attn.masked_bias")) or dropped([name]):
        return True
    return name in (
        "lm_head.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "roformer.embeddings.position_ids",
        "bert.embeddings.position_ids",
    )


def read(folder: Path) -> tuple[dict[str, Any], Foreign]:
    """config.json and the tensors of a folder, read when asked for."""
    try:
        page = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise ConversionError(f"{folder}/config.json: is missing or no JSON (缺少配置)") from None
    found = _with_prefix(page, files.read(folder))
    if page.get("model_type") == "bert":  # as Google named them, in files from before 2019
        ends = {".gamma": ".weight", ".beta": ".bias"}
        found = {_ending(name, ends): read_it for name, read_it in found.items()}
    if page.get("model_type") == "mt5" and "shared.weight" in found:
        found.setdefault("lm_head.weight", found["shared.weight"])  # left out where it is a copy
    return page, found


def _with_prefix(page: dict[str, Any], found: Foreign) -> dict[str, Callable[[], torch.Tensor]]:
    """Files of a bare model (GPT2Model) lack the prefix of the whole one."""
    prefixes = {"gpt2": "transformer.", "roformer": "roformer.", "bert": "bert."}
    prefix = prefixes.get(str(page.get("model_type")))
    heads = ("lm_head.", "cls.")
    if prefix is None or any(name.startswith(prefix) for name in found):
        return dict(found)
    return {n if n.startswith(heads) else prefix + n: read_it for n, read_it in found.items()}


def _ending(name: str, ends: dict[str, str]) -> str:
    for old, new in ends.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def dropped(names: Iterable[str]) -> list[str]:
    """What of a file is read by nobody: the pooler, the next-sentence head; in words."""
    beside = {".pooler.": "the pooler", "cls.seq_relationship.": "the next-sentence head"}
    names = list(names)
    return [words for part, words in beside.items() if any(part in name for name in names)]


def write(
    folder: Path,
    page: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    """config.json and the tensors."""
    page = page | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(page, indent=2) + "\n", "utf-8")
    files.write(folder, tensors, dtype)


WORDS_NOTE = (
    "no tokenizer of transformers makes these ids: none lowers and decomposes a text before jieba "
    "cuts it; use bajie_tokenizer/ with bajie (transformers 没有等价的分词器)"
)


def carry_tokenizer(folder: Path, frozen: Path | None) -> list[str]:
    """The frozen tokenizer in bajie_tokenizer/; returns what a user must know."""
    if frozen is None:
        return ["no tokenizer was at hand; give --tokenizer to export one (未附分词器)"]
    shutil.copytree(frozen, folder / TOKENIZER)
    return []


def write_tokenizer(folder: Path, frozen: Path | None) -> list[str]:
    """The tokenizer's files for transformers where it has that tokenizer, and in bajie_tokenizer/
    as they are; returns what a user must know."""
    missing = carry_tokenizer(folder, frozen)
    if frozen is None:
        return missing
    kind = json.loads((frozen / "tokenizer.json").read_text("utf-8"))
    vocabulary = next(iter(sorted(frozen.glob("vocab.txt"))), None)
    if vocabulary is not None and not kind.get("word"):
        shutil.copy(vocabulary, folder / "vocab.txt")
        page = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(page, indent=2), "utf-8")
        return ["AutoTokenizer gives the same ids (BertTokenizer)"]
    return [WORDS_NOTE]


def reference(folder: Path, dtype: torch.dtype) -> Any:
    """The model of transformers that the folder makes, in `dtype`, dropout off."""
    import transformers

    page = json.loads((folder / "config.json").read_text("utf-8"))
    kind = getattr(transformers, page["architectures"][0])
    model, found = kind.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    wrong = {k: v for k, v in found.items() if v and k != "error_msgs"}
    if any(wrong.values()):
        raise ConversionError(f"{folder}: transformers loads it with {wrong} (加载有误)")
    return model.eval()


BLOCKS = {
    "gpt2": {"decoder.layers": "transformer.h"},
    "mt5": {"encoder.layers": "encoder.block", "decoder.layers": "decoder.block"},
    "roformer": {"encoder.layers": "roformer.encoder.layer"},
    "bert": {"encoder.layers": "bert.encoder.layer"},
}
"""Our blocks -> theirs."""


def outputs(folder: Path, tokens_BT: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What leaves each block of transformers' model, by our names, and "logits"; an encoder-decoder
    reads the tokens on both sides."""
    model = reference(folder, dtype)
    kind = model.config.model_type
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    for ours_, theirs_ in BLOCKS[kind].items():
        for i, block in enumerate(model.get_submodule(theirs_)):
            block.register_forward_hook(keep(f"{ours_}.{i}"))
    sides = {"input_ids": tokens_BT}
    if kind == "mt5":
        sides["decoder_input_ids"] = tokens_BT
    with torch.inference_mode():
        if kind in ("roformer", "bert") and hasattr(model, "classifier"):
            top = getattr(model, kind)
            hidden = top(tokens_BT).last_hidden_state
            pool = top.pooler if kind == "bert" else torch.nn.Identity()
            # it looks at the first place of what it gets: each place is made the first
            at = [model.classifier(pool(hidden[:, t:])) for t in range(hidden.shape[1])]
            return seen | {"logits": torch.stack(at, 1)}
        logits = model(**sides).logits
    return seen | {"logits": logits}
