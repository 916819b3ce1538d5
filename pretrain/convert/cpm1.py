"""The checkpoint that CPM-1 was published as: one pickle for each of its tensor-parallel ranks.

    DIR/latest_checkpointed_iteration.txt      "80000"
    DIR/80000/mp_rank_00_model_states.pt       {"module": {name: this rank's piece}, ...}
             /mp_rank_01_model_states.pt

query_key_value holds [q_r; k_r; v_r] of rank r. The vocabulary is cut without padding. Shapes as
read from CPM-1-Generate's change_mp.py; the config is not in the files and follows from the shapes,
but for the number of heads (head_dim 64 and 80 as published, or as given).
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from configs.model import CPMConfig
from pretrain.convert.files import pickled
from pretrain.convert.rules import ConversionError, Foreign, Rule, over_ranks, same, stacked

HEAD_DIMS = {768: 64, 1024: 64, 2560: 80}
"""hidden -> head_dim of the three published sizes."""


def rules(config: CPMConfig, ranks: int) -> list[Rule]:
    """Native tensors <-> "RANK:NAME", the pieces of `ranks` files."""
    return list(_rules(config, ranks))


def _rules(config: CPMConfig, ranks: int) -> Iterator[Rule]:
    def cut(rule: Rule, dim: int | None, parts: int = 1) -> Rule:
        return over_ranks(rule, ranks, dim, parts)

    yield cut(same("embed.tokens.weight", "word_embeddings.weight"), 0)
    yield cut(same("embed.positions.weight", "position_embeddings.weight"), None)
    for i in range(config.layers):
        ours, theirs = f"decoder.layers.{i}", f"transformer.layers.{i}"
        for end in ("weight", "bias"):
            inward = 1 if end == "weight" else None  # a bias that is added once is not cut
            yield cut(same(f"{ours}.self_norm.{end}", f"{theirs}.input_layernorm.{end}"), None)
            name = f"{theirs}.post_attention_layernorm.{end}"
            yield cut(same(f"{ours}.ffn_norm.{end}", name), None)
            qkv = [f"{ours}.self.{part}.{end}" for part in "qkv"]
            yield cut(stacked(qkv, f"{theirs}.attention.query_key_value.{end}"), 0, parts=3)
            yield cut(same(f"{ours}.self.o.{end}", f"{theirs}.attention.dense.{end}"), inward)
            yield cut(same(f"{ours}.ffn.up.{end}", f"{theirs}.mlp.dense_h_to_4h.{end}"), 0)
            yield cut(same(f"{ours}.ffn.down.{end}", f"{theirs}.mlp.dense_4h_to_h.{end}"), inward)
    for end in ("weight", "bias"):
        name = f"transformer.final_layernorm.{end}"
        yield cut(same(f"decoder.final_norm.{end}", name), None)


def place(folder: Path) -> Path:
    """The folder of the newest iteration, or the folder itself if it holds the files."""
    newest = folder / "latest_checkpointed_iteration.txt"
    if newest.is_file():
        named = newest.read_text("utf-8").strip()
        if not named.isalnum():
            raise ConversionError(f"{newest}: says {named!r}, must name an iteration (内容不合法)")
        return folder / named
    return folder


def files_in(folder: Path) -> list[Path]:
    """The ranks' files, in order. ConversionError if one is missing."""
    found = sorted(place(folder).glob("mp_rank_*_model_states.pt"))
    for rank, path in enumerate(found):
        if path.name != f"mp_rank_{rank:02d}_model_states.pt":
            raise ConversionError(
                f"{place(folder)}: mp_rank_{rank:02d}_model_states.pt is missing, "
                f"{path.name} is there (缺少一个分片)"
            )
    return found


def read(folder: Path) -> tuple[int, Foreign]:
    """How many ranks there are, and "RANK:NAME" -> tensor."""
    paths = files_in(folder)
    if not paths:
        raise ConversionError(
            f"{place(folder)}: has no mp_rank_00_model_states.pt (找不到 CPM-1 权重)"
        )
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for rank, path in enumerate(paths):
        page = pickled(path)
        module = page.get("module", page)
        for name, tensor in module.items():
            if isinstance(tensor, torch.Tensor):
                found[f"{rank}:{name.removeprefix('module.')}"] = _given(tensor)
    return len(paths), found


def _given(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def ours(ranks: int, foreign: Foreign, heads: int | None = None) -> CPMConfig:
    """The model that the shapes of the pieces speak of."""
    try:
        rows, hidden = foreign["0:word_embeddings.weight"]().shape
        positions = foreign["0:position_embeddings.weight"]().shape[0]
        ffn = foreign["0:transformer.layers.0.mlp.dense_h_to_4h.weight"]().shape[0]
    except KeyError as error:
        raise ConversionError(
            f"mp_rank_00_model_states.pt: has no {error}; it is not CPM-1's (不是 CPM-1 权重)"
        ) from None
    layers = 1 + max(int(n.split(".")[2]) for n in foreign if ":transformer.layers." in n)
    if heads is None and hidden not in HEAD_DIMS:
        raise ConversionError(
            f"the model is {hidden} wide, none of CPM's ({', '.join(map(str, HEAD_DIMS))}); give "
            "its number of heads with --set heads=N (需要注意力头数)"
        )
    heads = heads or hidden // HEAD_DIMS[hidden]
    return CPMConfig(
        "cpm",
        vocab=rows * ranks,
        hidden=hidden,
        layers=layers,
        heads=heads,
        head_dim=hidden // heads,
        ffn=ffn * ranks,
        positions=positions,
    )


def unsayable(config: CPMConfig) -> list[str]:
    """What the format has no place for."""
    plain = CPMConfig(
        "cpm",
        config.vocab,
        config.hidden,
        config.layers,
        config.heads,
        config.head_dim,
        config.ffn,
        config.positions,
    )
    free = ("dropout", "attention_dropout", "init_std")
    found = [
        f"model.{key} is {value}, must be {getattr(plain, key)}"
        for key, value in vars(config).items()
        if value != getattr(plain, key) and key not in free
    ]
    if config.heads * config.head_dim != config.hidden:
        found.append(f"heads x head_dim is {config.heads * config.head_dim}, must be hidden")
    return found


def write(
    folder: Path,
    named: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    ranks: int,
    dtype: torch.dtype,
    step: int,
) -> None:
    """The ranks' files, and the note that names their folder. `named` gives ("RANK:NAME", tensor)
    of all of them, and is asked once a rank: no more than one rank's pieces are held."""
    inside = folder / str(step)
    inside.mkdir(parents=True)
    for rank in range(ranks):
        mine = f"{rank}:"
        module = {
            name.removeprefix(mine): tensor.to(dtype).clone()
            for name, tensor in named()
            if name.startswith(mine)
        }
        page = {"module": module, "iteration": step, "mp_world_size": ranks, "dp_world_size": 1}
        page |= {"global_steps": step, "skipped_steps": 0}
        torch.save(page, inside / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{step}\n", "utf-8")
