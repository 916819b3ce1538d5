"""The DeepSpeed door: our sections -> its JSON; one step; the logical state out and in.

    micro-batches --count all-reduced once--> loss_sum x ranks / count --backward--> fp32 gradients
                                                                                      | ZeRO 0-3
    State --load()--> [masters | moments | Adam steps | scaler] --refresh--> weights  v
    pieces() <------- the same, as runs of logical tensors <---- clip, AdamW <--------+

Every split of a step's samples over ranks and micro-batches gives the same gradient, because each
micro-batch's summed loss is divided by the count of the whole step, known before the first
backward. Gradients accumulate and travel in float32 in every precision. ZeRO 0 is DeepSpeed's plain
data parallelism in fp32; with bf16 or fp16 it runs as ZeRO 1, which computes the same with less
memory (with ZeRO 0 DeepSpeed does not scale the loss of fp16 and cannot accumulate bf16 in fp32).
"""

import contextlib
import gc
import inspect
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.model import ModelConfig, local_shape, tensors
from pretrain import optimizer as optimizers
from pretrain import parallel, sequence
from pretrain.by_source import BySource
from pretrain.ds_config import ds_config, quiet
from pretrain.growth.moments import rewarm as rewarm_groups
from pretrain.parallel import Mesh
from pretrain.partitions import Partitions
from pretrain.state import State, seed_of
from pretrain.step import Step, StepResult

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_alive: "weakref.WeakSet[Engine]" = weakref.WeakSet()


class Engine:
    """A model in DeepSpeed's hands.

    Args:
        model: on the meta device, already cut by parallel.shard() and sequence.share().
        config: its configuration, which names its tensors.
        mesh: from parallel.make_mesh().
        objective: loss(model, batch, token_losses) -> (loss_sum, count).
        optimizer: section with name, lr, beta1, beta2, eps, weight_decay, clip_norm.
        precision: fp32, bf16 or fp16 (fp32 masters and moments in each).
        zero: the ZeRO stage, 0 to 3.
        micro_rows: rows of the largest micro-batch.
        seed: of dropout.
        born: updates before a tensor came into being; 0 where it says nothing.
        scales: factors on lr, decay and eps of tensors that growth changed, as a record keeps them.
        rewarm: from which step on, and over how many, those on lr and decay return to 1.
        overlap: whether gradients travel during the backward pass, on a stream of their own; None:
            as DeepSpeed does by default, under ZeRO 3 only.
        hold: after a gradient that was not finite change nothing any more, until load(): the state
            stays the one before it, for whoever reads of it some steps later.
        sources: corpora of the mixture, whose losses are told apart.

    Raises ValueError for a precision that the device cannot compute. The weights are zero until
    load().
    """

    def __init__(
        self,
        model: nn.Module,
        config: ModelConfig,
        mesh: Mesh,
        *,
        objective: Any,
        optimizer: Any,
        precision: str,
        zero: int,
        micro_rows: int,
        seed: int = 0,
        born: Mapping[str, int] | None = None,
        scales: Mapping[str, Mapping[str, float]] | None = None,
        rewarm: dict[str, int] | None = None,
        hold: bool = False,
        overlap: bool | None = None,
        sources: int = 1,
    ) -> None:
        import deepspeed
        from deepspeed.utils import groups

        _check_precision(precision, mesh.device)
        self.model, self.config, self.mesh = model, config, mesh
        self.precision, self.zero, self.seed = precision, zero, seed
        self.clip_norm = float(optimizer.clip_norm)
        self.micro_rows, self._hold, self._overlap = micro_rows, hold, overlap
        # ranks that share rows draw their own dropout; all others by the first sample alone
        self._apart = (mesh.sequence_rank,) if mesh.sequence > 1 else ()
        self._count_updates(0)
        self.born = {t.name: (born or {}).get(t.name, 0) for t in tensors(config)}
        self._zero_stage = 1 if zero == 0 and precision != "fp32" else zero
        groups.mpu = glue = parallel.Glue(mesh) if mesh.tensor > 1 else None
        json = self._json()
        materialise(model, json, mesh, DTYPES[precision])
        if precision == "fp16" and (keep_in_range := getattr(model, "keep_in_range", None)):
            keep_in_range()
        parallel.mark(model, config, mesh)
        parameters = dict(model.named_parameters())
        self._objective = objective
        self._by_source = BySource(sources, mesh.device)
        losses = parallel.token_losses(mesh, config.vocab)
        self._step = Step(model, objective, losses, self._by_source)
        alike = optimizers.groups(config, self.born, optimizers.recorded(scales), optimizer)
        self._rewarm, self._keys = rewarm, [group.key for group in alike]
        self._deepspeed, *_ = deepspeed.initialize(
            model=self._step,
            optimizer=optimizers.build(alike, parameters, optimizer),
            mpu=glue,
            config=json,
            dist_init_required=False,
        )
        self._zero = self._deepspeed.optimizer
        self._partitions = Partitions(self._zero, parameters, config, mesh, self.born)
        if quiet(self._zero_stage, precision):
            self._partitions.base.judge = self._judge
        _alive.add(self)

    # -- a step --------------------------------------------------------------------------------

    def train_step(
        self,
        batches: Sequence[Any],
        *,
        lr: float,
        step: int,
        first_samples: Sequence[int],
        measure: bool = False,
    ) -> StepResult:
        """One update from this rank's micro-batches.

        Args:
            batches: the same number on every rank; a rank without samples hands in one that selects
                no position. Whole rows, the same on the ranks that share them.
            lr: the learning rate of this update, before the groups' scales.
            step: the step's number; with the run's seed and the first sample of a micro-batch it
                seeds dropout.
            first_samples: the number of each micro-batch's first sample.
            measure: gradients, updates and weights by tensor as well; a copy of the masters lives
                during the update.
        """
        device = self.mesh.device
        self._progress(step + 1)
        batches = [self._taken(batch) for batch in batches]
        count = torch.stack([self._count(batch) for batch in batches]).sum()
        self._reduce(count)
        factor = self.mesh.data / count.clamp(min=1)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for i, (batch, first) in enumerate(zip(batches, first_samples, strict=True)):
            self._deepspeed.set_gradient_accumulation_boundary(i == len(batches) - 1)
            torch.manual_seed(seed_of(self.seed, step, int(first), *self._apart))
            part = self._forward(batch)
            assert part.requires_grad, "the objective returned a constant: no gradient to share"
            loss_sum += part.detach()
            self._deepspeed.backward(part * factor, scale_wrt_gas=False)
        loss_sum, by_source = self._with_sources(loss_sum[None])
        if self._rewarm:
            rewarm_groups(self._partitions.base.param_groups, self._keys, self._rewarm, step)
        base = self._partitions.base
        optimizers.set_lr(base, lr)
        base.measures = measure
        norm, skipped = self._update()
        self._tried += 1
        self._skipped += skipped
        measured = base.measured if measure and skipped is not True else None
        return StepResult(loss_sum[0], count, norm, skipped, by_source, measured)

    def _progress(self, step: int) -> None:
        """Tell a model that changes with the step (RoFormer's ramp) which one it is."""
        if set_progress := getattr(self.model, "set_progress", None):
            set_progress(step)

    def _taken(self, batch: Any) -> Any:
        """What this rank computes of a micro-batch: its tokens of rows that are shared."""
        mesh = self.mesh
        return batch.unmasked().part(mesh.sequence_rank, mesh.sequence).to(mesh.device)

    def _forward(self, batch: Any) -> Tensor:
        self._step.positions = self.micro_rows * batch.tokens_BT.shape[1]
        loss_sum: Tensor = self._deepspeed(batch)[0]
        return loss_sum

    def _count(self, batch: Any) -> Tensor:
        """Positions of this rank's micro-batch, 0-d int64 on the device; no waiting for it."""
        if counted := getattr(self._objective, "count", None):
            return counted(batch).to(torch.int64)
        if batch.counted is not None:
            return torch.tensor(batch.counted, dtype=torch.int64).to(
                self.mesh.device, non_blocking=True
            )
        return batch.loss_mask_BT.sum()

    def _reduce(self, value: Tensor) -> None:
        """Sum over the ranks that see different tokens, in place."""
        if self.mesh.data > 1:
            dist.all_reduce(value, group=self.mesh.data_group)

    def _with_sources(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Some sums [n], and those by corpus, over all ranks in one message."""
        mine = self._by_source.take()
        together = torch.cat([sums, mine.flatten()])
        self._reduce(together)
        return together[: len(sums)], together[len(sums) :].view_as(mine)

    @property
    def updates(self) -> int:
        """Updates that the weights have had; asking may wait for the device."""
        return self._tried - int(self._skipped)

    def _count_updates(self, updates: int) -> None:
        self._tried: int = updates
        self._skipped: Tensor = torch.zeros((), device=self.mesh.device)
        self._sick: Tensor = torch.zeros((), device=self.mesh.device)

    def _update(self) -> tuple[Tensor | float, Tensor | bool]:
        base = self._partitions.base
        if base.judge is None:
            self._deepspeed.step()  # waits for the device, and changes nothing if it is sick
            skipped, norm = bool(self._zero.overflow), base.norm
            return (float("inf") if skipped or norm is None else norm), skipped
        self._deepspeed.step()
        assert base.norm is not None
        return base.norm, self._sick.bool()

    def _judge(self, norm: Tensor) -> Tensor:
        """Not 0 where an update must change nothing; 0-d float32, and nobody waits for it."""
        sick = (~torch.isfinite(norm)).float()
        self._sick = torch.maximum(sick, self._sick) if self._hold else sick
        return self._sick

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """(summed loss, count) over the batches of all ranks, without dropout.

        The same number of batches on every rank.
        """
        return self.evaluate_by_source(batches)[:2]

    @torch.no_grad()
    def evaluate_by_source(self, batches: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and summed losses and positions of each corpus (StepResult.by_source)."""
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        with self._still():
            for batch in batches:
                batch = self._taken(batch)
                loss_sum = self._forward(batch)
                total += torch.stack([loss_sum.double(), self._count(batch).double()])
        total, by_source = self._with_sources(total)
        return total[0], total[1].round().to(torch.int64), by_source

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model for looking, not learning: no gradient, no dropout, whole rows on every rank.

        Under ZeRO 3 and tensor parallelism all ranks must make the same calls.
        """
        with self._still(), sequence.whole_rows(self.model):
            yield self.model

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        self._step.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._step.train()
            self._partitions.end_inference()

    # -- the logical state ---------------------------------------------------------------------

    def load(self, state: State) -> None:
        """Take over a state: weights, buffers, moments, Adam's steps, loss scaler.

        A state without any moment starts with none; a tensor as young as the run's last update may
        lack its own. Each tensor is read once and this rank's ranges of it are kept. Raises
        ValueError if tensors are missing, unknown or of another shape.
        """
        updates = int(state.record.get("updates", 0))
        self._partitions.load(state, updates)
        self._count_updates(updates)
        self._progress(int(state.record.get("step", 0)))
        buffers = dict(self.model.named_buffers())
        for name in state.names("buffers"):
            if name not in buffers:
                raise ValueError(
                    f"buffers/{name}: is unknown to this model; change the model section to the "
                    "one it was trained with (检查点与模型不符)"
                )
            buffers[name].copy_(state.read(f"buffers/{name}"))

    def entries(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Key -> (logical shape, dtype) of all that pieces() covers; the same on every rank."""
        return self._partitions.entries()

    def pieces(self) -> Iterator[tuple[str, Tensor, np.ndarray]]:
        """(key, flat values, runs) of what this rank hands out.

        runs: int64 [n, 3] rows (offset in the logical flat tensor, offset in the values, length).
        Over all ranks every value of every key comes exactly once.
        """
        return self._partitions.pieces()

    def progress(self) -> dict[str, Any]:
        """What the state's record says of the optimizer."""
        scaler = self._partitions.scaler()
        return {"updates": self.updates, "born": dict(self.born), "scaler": scaler}

    # -- the end -------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Give the memory and DeepSpeed's global names back; the engine is of no use afterwards.

        Weights, masters and gradients go at once, not when Python next looks for rings of
        references: at the border of two stages the next engine needs their place.
        """
        from deepspeed.utils import groups

        _alive.discard(self)
        if not hasattr(self, "_deepspeed"):
            return
        self._deepspeed.destroy()
        groups.mpu = None
        for p in self.model.parameters():
            p.grad = None
            vars(p).clear()  # methods that DeepSpeed bound to it: each is a ring of its own
        del p
        self._partitions.base.state.clear()
        del self._deepspeed, self._zero, self._partitions, self._step, self.model
        if self._zero_stage == 3:
            _forget_modules()
        gc.collect()
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    def _json(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        local = [local_shape(self.config, t, self.mesh.tensor) for t in tensors(self.config)]
        sizes = [int(np.prod(one)) for one in local]
        stage, device = self._zero_stage, self.mesh.device.type
        return ds_config(stage, self.precision, sizes, self.config.hidden, device, self._overlap)


def materialise(model: nn.Module, json: dict[str, Any], mesh: Mesh, dtype: torch.dtype) -> None:
    """Give a model on the meta device memory, module by module; zeros.

    Under ZeRO 3 a parameter is partitioned before the next one exists, so that no rank ever holds
    more than one whole.
    """
    scatter = None
    if json["zero_optimization"]["stage"] == 3:
        import deepspeed

        scatter = deepspeed.zero.Init(
            data_parallel_group=mesh.data_group,
            config_dict_or_path=json,
            mpu=parallel.Glue(mesh) if mesh.tensor > 1 else None,
        )
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            real = nn.Parameter(
                torch.zeros(parameter.shape, dtype=dtype, device=mesh.device),
                requires_grad=parameter.requires_grad,
            )
            module.register_parameter(name, real)
            if scatter is not None:
                scatter._convert_to_zero_parameters([real])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, torch.zeros_like(buffer, device=mesh.device))
            else:
                module.register_buffer(name, buffer.to(mesh.device))


def _forget_modules() -> None:
    """Clear what ZeRO 3 remembers for the life of the process, an engine's parameters with it: a
    stack of modules that begins with the whole model, a cache of what to release behind each."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    kind = partitioned_param_coordinator.PartitionedParameterCoordinator
    for method in filter(inspect.isfunction, vars(kind).values()):
        inner = inspect.getclosurevars(method).nonlocals.get("func")  # behind a decorator
        if clear := getattr(inner, "cache_clear", None):
            clear()


def reset() -> None:
    """Destroy the engines that are left in this process."""
    for engine in list(_alive):
        engine.destroy()


def log_to(path: str | Path) -> None:
    """Send what DeepSpeed and its guests say to a file instead of the terminal."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("DeepSpeed", "megatron", "torch.distributed"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False


def _check_precision(precision: str, device: torch.device) -> None:
    from deepspeed.accelerator import get_accelerator

    known = {"fp16": "is_fp16_supported", "bf16": "is_bf16_supported"}
    if precision not in known:
        return
    computes = getattr(get_accelerator(), known[precision])()
    if precision == "bf16" and device.type == "cuda":  # else cards that only emulate it say yes
        computes = torch.cuda.is_bf16_supported(including_emulation=False)
    if not computes:
        others = {"fp16": "bf16 or fp32", "bf16": "fp16 or fp32"}[precision]
        raise ValueError(
            f"precision: is {precision}, which this device ({device.type}) does not compute; "
            f"take {others} (该设备不支持 {precision})"
        )
