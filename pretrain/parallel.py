"""The Megatron door: who stands where, and how a plain model is cut over several devices.

    8 ranks, tensor = 2
       data 0: [0 1]      a matrix with heads, ffn or vocab is cut over a row of the mesh,
       data 1: [2 3]      samples and ZeRO's partitions over a column
       data 2: [4 5]
       data 3: [6 7]      x --copy--> [column-cut q k v, up] -> [row-cut o, down] --sum--> y

shard() swaps modules by the table of tensors: a matrix cut in its outputs becomes Megatron's
ColumnParallelLinear, one cut in its inputs its RowParallelLinear, the token table its
VocabParallelEmbedding; the swapped module is called like the plain one, y = module(x). The loss
over a split vocabulary is Megatron's too. megatron-core costs 5 s to import, so it is imported only
when parallel.tensor is above 1.

Random numbers: the generators of a tensor group are seeded alike, so what is drawn on the residual
stream is the same on all its ranks; what is drawn inside the cut region (dropout of the attention
probabilities and of a gated layer's inner values) differs, because split_dropout() draws it from a
seed of its own.

Legend: N positions whose loss counts, D hidden, V vocabulary (this rank's part where it is cut).
"""

import contextlib
import functools
import gc
import importlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.model import ModelConfig, local_shape, split_dim, split_problems, tensors
from configs.parallel import Parallel, problems_on
from pretrain.objectives.losses import token_losses_plain
from pretrain.transient import turns

LogitsFn = Callable[[Tensor], Tensor]
TokenLosses = Callable[..., Tensor]
AFTER_STALL_S = 600.0
"""A collective outlives the watch's patience by so much."""
FOR_EVER = timedelta(days=1)
"""Where no watch looks, which is also how long a start waits for a machine that never comes."""


@dataclass(frozen=True)
class Mesh:
    """Where this process stands."""

    rank: int
    world: int
    tensor: int
    """Devices that share each matrix."""
    tensor_rank: int
    data: int
    """Devices that hold the same part of each matrix: ZeRO's."""
    data_rank: int
    device: torch.device
    tensor_group: Any = field(default=None, repr=False)
    data_group: Any = field(default=None, repr=False)
    """None where all ranks are one data group."""
    sequence: int = 1
    """Devices of a data group, neighbours, that share each row (pretrain/sequence.py)."""
    sequence_group: Any = field(default=None, repr=False)
    """None where all ranks are one such group."""

    @property
    def sequence_rank(self) -> int:
        """Place among the devices that share a row."""
        return self.data_rank % self.sequence

    @property
    def readers(self) -> int:
        """Groups of devices that see samples of their own."""
        return self.data // self.sequence

    @property
    def reader(self) -> int:
        """This one's number among them."""
        return self.data_rank // self.sequence


class Glue:
    """What DeepSpeed asks a Megatron about; the names are DeepSpeed's."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        """Place among the devices that share a matrix."""
        return self.mesh.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """How many share a matrix."""
        return self.mesh.tensor

    def get_model_parallel_group(self) -> Any:
        """Those devices."""
        return self.mesh.tensor_group

    def get_data_parallel_rank(self) -> int:
        """Place among the devices whose gradients are added up."""
        return self.mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self.mesh.data

    def get_data_parallel_group(self) -> Any:
        """Those devices."""
        return self.mesh.data_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def patience(stall_s: float) -> timedelta:
    """How long a collective may wait: longer than the watch, which says whom it waits for."""
    return timedelta(seconds=stall_s + AFTER_STALL_S) if stall_s else FOR_EVER


def init_distributed(waits: timedelta | None = None) -> None:
    """Join the process group: NCCL where there is a GPU, gloo on a CPU; alone without a launcher.

    Its collectives wait for `waits` at most; None: DeepSpeed's ten minutes.
    DeepSpeed would compile a shared-memory operation on every CPU start, for inference only: it is
    switched off first, so that no compiler is needed (and no stale lock of one can hang the start).
    """
    if dist.is_initialized():
        return
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before the first collective: NCCL takes the current device, and two ranks on one GPU hang.
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    told = {"timeout": waits} if waits else {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, **told)
    if waits:  # DeepSpeed trains on a copy of the world, which it would make without a timeout
        everyone = list(range(dist.get_world_size()))
        deepspeed.utils.groups._WORLD_GROUP = dist.new_group(everyone, timeout=waits)
    # What was imported lives for ever: collections pass it over from here on. DeepSpeed asks for up
    # to six when it makes an engine, Python for one in the middle of a step, each 0.4 s otherwise.
    importlib.import_module("torch._dynamo")  # half of it, which the first engine would import
    gc.collect()
    gc.freeze()


def make_mesh(tensor: int = 1, sequence: int = 1, waits: timedelta | None = None) -> Mesh:
    """The mesh of this job with `tensor` devices to a matrix and `sequence` to a row; joins the
    process group if need be. Collectives wait as init_distributed() says.

    Raises ValueError if the number of processes is not a multiple of their product.
    """
    init_distributed(waits)
    from deepspeed.accelerator import get_accelerator

    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    if problems := problems_on(Parallel(tensor=tensor, sequence=sequence), world):
        raise ValueError("\n".join(problems))
    tensor_group = data_group = None
    if tensor > 1:
        from megatron.core import parallel_state

        # Megatron makes some thirty groups and never ends one; under gloo each is a thread that
        # wakes a hundred times a second. A second run in one process takes those that are there.
        there = parallel_state.model_parallel_is_initialized()
        if there and parallel_state.get_tensor_model_parallel_world_size() != tensor:
            parallel_state.destroy_model_parallel()
            there = False
        if not there:
            minutes = ceil(waits.total_seconds() / 60) if waits else 30
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor,
                create_gloo_process_groups=False,
                distributed_timeout_minutes=minutes,
            )
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        data_group = parallel_state.get_data_parallel_group()
    return Mesh(
        rank, world, tensor, rank % tensor, world // tensor, rank // tensor, device, tensor_group,
        data_group, sequence, _sequence_group(world, tensor, sequence, waits),
    )  # fmt: skip


@functools.cache
def _sequence_group(world: int, tensor: int, sequence: int, waits: timedelta | None) -> Any:
    """This rank's group of those that share a row; made once, like Megatron's, and by all ranks."""
    if sequence in (1, world):
        return None
    mine = None
    for first in range(0, world, tensor * sequence):
        for place in range(first, first + tensor):
            ranks = list(range(place, place + tensor * sequence, tensor))
            group = dist.new_group(ranks, timeout=waits)
            mine = group if dist.get_rank() in ranks else mine
    return mine


def cpu_threads() -> int:
    """CPU threads of this process: the cores it may use, shared with its neighbours."""
    said = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")  # torchrun's, DeepSpeed's, anybody's
    here = next((int(os.environ[name]) for name in said if os.environ.get(name)), 1)
    return max(1, len(os.sched_getaffinity(0)) // here)


def shard(model: nn.Module, config: ModelConfig, mesh: Mesh) -> None:
    """Cut a model that is still on the meta device for this rank, in place; nothing for tensor = 1.

    Raises ValueError, a line for each of heads, ffn and vocab that parallel.tensor does not divide.
    """
    if mesh.tensor == 1:
        return
    if problems := split_problems(config, mesh.tensor):
        raise ValueError("\n".join(problems))
    cut: set[str] = set()
    for tensor in tensors(config):
        where, _, leaf = tensor.name.rpartition(".")
        if split_dim(tensor) is None or where in cut:
            continue
        old = model.get_submodule(where)
        assert all(p.is_meta for p in old.parameters()), f"{where} must be cut on the meta device"
        if tensor.op in ("linear", "lookup"):
            kind = "tokens" if tensor.op == "lookup" else ("column", "row")[split_dim(tensor) or 0]
            parent, _, name = where.rpartition(".")
            new = _layers()[kind](old)
            new.train(old.training)
            setattr(model.get_submodule(parent), name, new)
            cut.add(where)
        else:
            whole = old.get_parameter(leaf)
            local = torch.empty(local_shape(config, tensor, mesh.tensor), device="meta")
            setattr(old, leaf, nn.Parameter(local.to(whole.dtype)))
    model.first_word = mesh.tensor_rank * config.vocab // mesh.tensor  # type: ignore[assignment]
    for module in model.modules():
        if callable(attention := vars(module).get("attention")):
            vars(module)["attention"] = split_dropout(attention, mesh)
        if callable(drop := vars(module).get("drop_within")):
            vars(module)["drop_within"] = split_dropout(drop, mesh)
    _check(model, config, mesh)


def mark(model: nn.Module, config: ModelConfig, mesh: Mesh) -> None:
    """Say on each parameter whether it is a cut one; DeepSpeed's gradient norm asks for it."""
    parameters = dict(model.named_parameters())
    for tensor in tensors(config):
        is_cut = mesh.tensor > 1 and split_dim(tensor) is not None
        parameters[tensor.name].tensor_model_parallel = is_cut  # type: ignore[attr-defined]


def split_dropout(function: Callable[..., Tensor], mesh: Mesh) -> Callable[..., Tensor]:
    """function(..., dropout) whose dropout differs on the ranks of a tensor group.

    Its seed is drawn from the common CPU generator, so that recomputation repeats it and the common
    stream goes on alike on all ranks.
    """

    @functools.wraps(function)
    def apart(*given: Any) -> Tensor:
        if not given[-1]:
            return function(*given)
        seed = int(torch.randint(0, 2**62, ())) + mesh.tensor_rank
        on_gpu = mesh.device.type != "cpu"
        devices = [mesh.device] if on_gpu else []
        with torch.random.fork_rng(devices, device_type=mesh.device.type if on_gpu else "cuda"):
            torch.manual_seed(seed)
            return function(*given)

    return apart


@contextlib.contextmanager
def whole_logits(model: Any, mesh: Mesh) -> Iterator[Any]:
    """Inside, model.logits gives the whole vocabulary on every rank: what sampling needs.

    All ranks of a tensor group must make the same calls.
    """
    if mesh.tensor == 1:
        yield model
        return

    def gathered(hidden: Tensor) -> Tensor:
        mine = local(hidden).contiguous()
        parts = [torch.empty_like(mine) for _ in range(mesh.tensor)]
        dist.all_gather(parts, mine, group=mesh.tensor_group)
        return torch.cat(parts, dim=-1)

    local = model.logits
    model.logits = gathered
    try:
        yield model
    finally:
        del model.logits


def token_losses(mesh: Mesh, vocab: int) -> TokenLosses:
    """The function (logits_fn, hidden_ND, targets_N, positions=None) -> losses_N in float32.

    logits_fn gives the local logits_NV of a part of hidden_ND. `positions` is the most that any
    rank can have in this micro-batch: the number of turns follows from it and not from N, because
    under ZeRO 3 every turn gathers the head's weight and all ranks must gather equally often.
    """
    part_losses = _split_cross_entropy if mesh.tensor > 1 else token_losses_plain

    def losses(
        logits_fn: LogitsFn, hidden_ND: Tensor, targets_N: Tensor, positions: int | None = None
    ) -> Tensor:
        logits = (positions or len(targets_N)) * vocab / mesh.tensor
        if (count := turns(logits, mesh.device.type)) == 1:
            return part_losses(logits_fn, hidden_ND, targets_N)
        parts = zip(hidden_ND.tensor_split(count), targets_N.tensor_split(count), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([part_losses(logits_fn, h, t) for h, t in parts])
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(part_losses, logits_fn, h, t) for h, t in parts])

    return losses


def _split_cross_entropy(logits_fn: LogitsFn, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    losses_N: Tensor = vocab_parallel_cross_entropy(logits_fn(hidden_ND).float(), targets_N)
    return losses_N


def _check(model: nn.Module, config: ModelConfig, mesh: Mesh) -> None:
    have = {name: tuple(p.shape) for name, p in model.named_parameters()}
    want = {t.name: local_shape(config, t, mesh.tensor) for t in tensors(config)}
    wrong = {n: (have.get(n), want.get(n)) for n in have | want if have.get(n) != want.get(n)}
    assert not wrong, f"after the cut, (have, table) differ: {wrong}"


@functools.cache
def _layers() -> dict[str, Callable[[Any], nn.Module]]:
    """Constructors plain module -> Megatron's layer, called like the plain one."""
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
    )

    config = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)

    def nothing(weight: Tensor) -> None:
        """Values come from a state, never from here."""

    class Column(ColumnParallelLinear):  # type: ignore[misc]
        def __init__(self, plain: nn.Linear) -> None:
            with torch.device("meta"):
                super().__init__(
                    plain.in_features, plain.out_features, config=config, init_method=nothing,
                    bias=plain.bias is not None, gather_output=False,
                )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class Row(RowParallelLinear):  # type: ignore[misc]
        def __init__(self, plain: nn.Linear) -> None:
            with torch.device("meta"):
                super().__init__(
                    plain.in_features, plain.out_features, config=config, init_method=nothing,
                    bias=plain.bias is not None, input_is_parallel=True, skip_bias_add=False,
                )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class Tokens(VocabParallelEmbedding):  # type: ignore[misc]
        """Token ids -> hidden by the cut table, or hidden -> local logits by the same table."""

        def __init__(self, plain: nn.Module) -> None:
            vocab, hidden = plain.get_parameter("weight").shape
            with torch.device("meta"):
                super().__init__(vocab, hidden, init_method=nothing, config=config)

        def forward(self, x: Tensor, project: bool = False, bias_V: Tensor | None = None) -> Tensor:
            if project:
                return F.linear(copy_to_tensor_model_parallel_region(x), self.weight, bias_V)
            return super().forward(x)

    return {"column": Column, "row": Row, "tokens": Tokens}
