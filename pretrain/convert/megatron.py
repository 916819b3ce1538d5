"""megatron-core's GPT checkpoint (`model_optim_rng.pt`), for CPM: without Megatron's code at hand.

    DIR/latest_checkpointed_iteration.txt
    DIR/iter_0000100/mp_rank_00/model_optim_rng.pt     {"model": {...}, "args": ..., "iteration": N}
                    /mp_rank_01/ ...                   one a tensor-parallel rank

linear_qkv goes head by head, [q_h; k_h; v_h]; the vocabulary is padded with rows of zeros to a
multiple of 128 x ranks, which must not join the softmax. Names are those of the local layer spec.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from configs.model import CPMConfig
from pretrain.convert.files import pickled
from pretrain.convert.rules import (
    ConversionError,
    Foreign,
    Rule,
    interleaved,
    over_ranks,
    padded,
    same,
)

VOCAB_MULTIPLE = 128


def rules(config: CPMConfig, ranks: int) -> list[Rule]:
    """Native tensors <-> "RANK:NAME", the pieces of `ranks` files."""
    return list(_rules(config, ranks))


def _rules(config: CPMConfig, ranks: int) -> Iterator[Rule]:
    def cut(rule: Rule, dim: int | None) -> Rule:
        return over_ranks(rule, ranks, dim)

    words = "embedding.word_embeddings.weight"
    yield cut(padded("embed.tokens.weight", words, config.vocab, VOCAB_MULTIPLE * ranks), 0)
    yield cut(same("embed.positions.weight", "embedding.position_embeddings.weight"), None)
    for i in range(config.layers):
        ours, theirs = f"decoder.layers.{i}", f"decoder.layers.{i}"
        for end in ("weight", "bias"):
            inward = 1 if end == "weight" else None
            yield cut(same(f"{ours}.self_norm.{end}", f"{theirs}.input_layernorm.{end}"), None)
            yield cut(same(f"{ours}.ffn_norm.{end}", f"{theirs}.pre_mlp_layernorm.{end}"), None)
            qkv = [f"{ours}.self.{part}.{end}" for part in "qkv"]
            name = f"{theirs}.self_attention.linear_qkv.{end}"
            yield cut(interleaved(qkv, name, config.heads), 0)
            name = f"{theirs}.self_attention.linear_proj.{end}"
            yield cut(same(f"{ours}.self.o.{end}", name), inward)
            yield cut(same(f"{ours}.ffn.up.{end}", f"{theirs}.mlp.linear_fc1.{end}"), 0)
            yield cut(same(f"{ours}.ffn.down.{end}", f"{theirs}.mlp.linear_fc2.{end}"), inward)
    for end in ("weight", "bias"):
        yield cut(same(f"decoder.final_norm.{end}", f"decoder.final_layernorm.{end}"), None)


def place(folder: Path) -> Path:
    """The folder of the newest iteration."""
    newest = folder / "latest_checkpointed_iteration.txt"
    if not newest.is_file():
        return folder
    named = newest.read_text("utf-8").strip()
    if not named.isdecimal():
        raise ConversionError(f"{newest}: says {named!r}, must be a number (内容不合法)")
    return folder / f"iter_{int(named):07d}"


def files_in(folder: Path) -> list[Path]:
    """The ranks' files, in order."""
    return sorted(place(folder).glob("mp_rank_[0-9][0-9]/model_optim_rng.pt"))


def read(folder: Path) -> tuple[CPMConfig, int, Foreign]:
    """The model, how many ranks there are, and "RANK:NAME" -> tensor."""
    paths = files_in(folder)
    if not paths:
        raise ConversionError(
            f"{place(folder)}: has no mp_rank_00/model_optim_rng.pt (找不到 Megatron 权重)"
        )
    found: dict[str, Callable[[], torch.Tensor]] = {}
    config = None
    for rank, path in enumerate(paths):
        page = pickled(path)
        config = config or _config(path, page.get("args"))
        for name, tensor in page.get("model", {}).items():
            if isinstance(tensor, torch.Tensor):
                found[f"{rank}:{name}"] = _given(tensor)
    assert config is not None
    return config, len(paths), found


def _given(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def ignored(name: str) -> bool:
    """What Megatron keeps beside the weights."""
    return name.endswith("_extra_state")


def _config(path: Path, given: object) -> CPMConfig:
    """Megatron's args (argparse.Namespace, read as plain values) as a model."""
    values = given if isinstance(given, dict) else vars(given) if given is not None else {}
    keys = {
        "hidden": "hidden_size",
        "layers": "num_layers",
        "heads": "num_attention_heads",
        "head_dim": "kv_channels",
        "ffn": "ffn_hidden_size",
        "positions": "max_position_embeddings",
        "vocab": "vocab_size",
    }
    missing = [name for name in keys.values() if not isinstance(values.get(name), int)]
    if missing:
        raise ConversionError(
            f"{path}: its args lack {', '.join(missing)}; the size of the model follows from them "
            "(缺少模型参数)"
        )
    sizes: dict[str, Any] = {ours: int(values[theirs]) for ours, theirs in keys.items()}
    if values.get("untie_embeddings_and_output_weights") or values.get("swiglu"):
        raise ConversionError(f"{path}: is no GPT-2: an untied head or SwiGLU (不是 GPT-2 结构)")
    return CPMConfig("cpm", norm_eps=float(values.get("norm_epsilon", 1e-5)), **sizes)


def write(
    folder: Path,
    config: CPMConfig,
    named: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    ranks: int,
    dtype: torch.dtype,
    step: int,
) -> None:
    """The ranks' files; `named` gives ("RANK:NAME", tensor) of all, and is asked once a rank."""
    args = {
        "hidden_size": config.hidden,
        "num_layers": config.layers,
        "num_attention_heads": config.heads,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.ffn,
        "max_position_embeddings": config.positions,
        "seq_length": config.positions,
        "vocab_size": config.vocab,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "norm_epsilon": config.norm_eps,
        "tensor_model_parallel_size": ranks,
        "pipeline_model_parallel_size": 1,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
    }
    inside = folder / f"iter_{step:07d}"
    for rank in range(ranks):
        mine = f"{rank}:"
        model = {
            name.removeprefix(mine): tensor.to(dtype).clone()
            for name, tensor in named()
            if name.startswith(mine)
        }
        path = inside / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        page = {"model": model, "args": Namespace(**args), "checkpoint_version": 3.0}
        torch.save(page | {"iteration": step}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{step}\n", "utf-8")
