"""Where DeepSpeed keeps each value, and the logical state that these values are.

    logical tensor  --tensor parallelism-->  local parameter  --ZeRO-->  range of a flat fp32 tensor
      [vocab, hidden]      rows or columns        flat order         master | exp_avg | exp_avg_sq

A Fragment is one range of one local parameter and the flat tensors that hold it on this rank;
runs() says which runs of the logical tensor a range is. So tensor parallelism, ZeRO and replication
are one mechanism, and the state that comes out does not know what made it. This is the only file
that knows DeepSpeed's private attributes (0.19); tests/test_zero_state.py has a case for each kind.

    optimizer                        when            master               ranges of a parameter
    the torch optimizer itself       fp32, ZeRO 0    the parameter        whole
    DeepSpeedZeroOptimizer           ZeRO 1, 2       its flat partition   p._hp_mapping
    BF16_Optimizer                   bf16, ZeRO 1    its flat partition   p._hp_mapping
    DeepSpeedZeroOptimizer_Stage3    ZeRO 3          flat, by sub-group   one behind the other
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.model import ModelConfig, shape, split_dim, tensors
from pretrain.optimizers.fragments import Fragment, Logical
from pretrain.optimizers.update import Update
from pretrain.parallel import Mesh
from pretrain.state import State

KINDS = {
    "DeepSpeedZeroOptimizer": "zero12",
    "BF16_Optimizer": "bf16",
    "DeepSpeedZeroOptimizer_Stage3": "zero3",
}
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic loss scaler remembers."""
BESIDE = ("ema", "slow")
"""Averages of the weights (pretrain/optimizers/averages.py); a run may begin or leave one."""


class Partitions:
    """What one rank holds of the logical state: masters, moments, counters.

    Args:
        optimizer: DeepSpeed's, as deepspeed.initialize() made it.
        parameters: by logical name.
        config, mesh: what the tensors are and how they are cut.
        born: updates before each tensor came into being.

    The optimizer that DeepSpeed was given is an Update; it is told here where everything is.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        config: ModelConfig,
        mesh: Mesh,
        born: Mapping[str, int],
    ) -> None:
        self.optimizer, self.config, self.mesh, self.born = optimizer, config, mesh, born
        self.base: Update = getattr(optimizer, "optimizer", optimizer)
        assert isinstance(self.base, Update), f"{type(self.base).__name__}: is no Update"
        self.kind = KINDS.get(type(optimizer).__name__, "torch")
        known = self.kind != "torch" or isinstance(optimizer, torch.optim.Optimizer)
        assert known, f"{type(optimizer).__name__}: no rule where it keeps its values"
        self.tensors = {t.name: t for t in tensors(config)}
        self.slots = self.base.slots_by_name()
        if scaler := getattr(optimizer, "loss_scaler", None):
            scaler.raise_error_at_min_scale = False  # a bare Exception; a run has a sentence
        self.flats = list(self._flats())
        for group, flat in self.flats:
            self.base.fill(self.base.groups[group], flat)
        if self.kind in ("zero12", "bf16"):
            # DeepSpeed links the moments after the first group's first step, when the later groups
            # have none yet; they exist now.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        self.fragments = list(self._fragments({p: name for name, p in parameters.items()}))
        self.base.begin(
            [(self.base.groups[group], flat) for group, flat in self.flats],
            Logical(self.fragments, config, mesh),
            self._hand_on,
        )

    # -- out -----------------------------------------------------------------------------------

    def entries(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Key -> (logical shape, dtype) of all that pieces() covers; the same on every rank."""
        found = {
            key: (shape(self.config, t), "float32")
            for name, t in self.tensors.items()
            for key in self._keys(name)
        }
        found |= {key: (tuple(v.shape), "float32") for key, v in self.base.whole.items()}
        kinds = list(dict.fromkeys(key.rsplit("/", 1)[0] for key in found))
        place = {name: i for i, name in enumerate(self.tensors)}
        return dict(
            sorted(
                found.items(),
                key=lambda item: (
                    kinds.index(item[0].rsplit("/", 1)[0]),
                    place[item[0].rsplit("/", 1)[1]],
                ),
            )
        )

    def pieces(self) -> Iterator[tuple[str, Tensor, np.ndarray]]:
        """(key, flat values, runs) of what this rank hands out; runs as of runs().

        Over all ranks every value of every key comes exactly once: what several ranks hold, they
        share out.
        """
        for f in self.fragments:
            holders = [(self.mesh.data_rank, f.copies)] if f.copies > 1 else []
            if split_dim(self.tensors[f.name]) is None:
                holders.append((self.mesh.tensor_rank, self.mesh.tensor))
            first, length = share(f.length, holders)
            if not length:
                continue
            where = self._runs(f.name, f.start + first, length)
            for key in self._keys(f.name):
                values = self._values(f.flat, key)
                yield key, f.view(values)[first : first + length], where
        for key, values in self.base.whole.items():
            first, length = share(values.numel(), [(self.mesh.rank, self.mesh.world)])
            if length:
                yield key, values[first : first + length], np.array([[first, 0, length]], np.int64)

    def scaler(self) -> dict[str, Any] | None:
        """The dynamic loss scaler's memory, None where there is none."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if scaler is None or not scaler.dynamic:
            return None
        return {name: getattr(scaler, name) for name in SCALER}

    # -- in ------------------------------------------------------------------------------------

    def load(self, state: State, updates: int) -> None:
        """Masters, moments, Adam's steps and the loss scaler of a state; then the weights.

        Reads one tensor at a time and keeps this rank's ranges. Moments that the state lacks are
        zero. Raises ValueError if tensors are missing, unknown or of another shape.
        """
        self._compare(state, updates)
        for _, flat in self.flats:
            for values in (flat, *self.base.state[flat].values()):
                values.detach().zero_()  # padding included
        held: dict[str, list[Fragment]] = {}
        for f in self.fragments:
            held.setdefault(f.name, []).append(f)
        for name, fragments in held.items():
            for key in self._keys(name):
                if key in state.entries:
                    self._read(state.read(key).reshape(-1), key, fragments)
                elif self.slots[name].get(key.split("/")[1]) == "weight":
                    for f in fragments:
                        f.view(self._values(f.flat, key)).copy_(f.view(f.flat))
        for key, values in self.base.whole.items():
            values.zero_()
            if key in state.entries:
                values.copy_(state.read(key))
        for group, flat in self.flats:
            steps = updates - self.base.groups[group]["born"]
            self.base.state[flat]["step"].fill_(steps)
        self.base.updates = updates
        scaler = state.record.get("scaler")
        if scaler and self.scaler() is not None:
            for name in SCALER:
                setattr(self.optimizer.loss_scaler, name, scaler[name])
        self._refresh()

    def _read(self, whole: Tensor, key: str, fragments: list[Fragment]) -> None:
        for f in fragments:
            values = f.view(self._values(f.flat, key))
            for logical, local, length in self._runs(f.name, f.start, f.length).tolist():
                values[local : local + length].copy_(whole[logical : logical + length])

    def _compare(self, state: State, updates: int) -> None:
        want = {key: size for key, (size, _) in self.entries().items()}
        have = {k: tuple(e.shape) for k, e in state.entries.items() if not k.startswith("buffers/")}
        kept = {key.split("/")[1] for key in have if key.startswith("optim/")}
        learnt = bool(kept)
        self._same_rule({key.split("/")[1] for key in want if key.startswith("optim/")}, kept)
        want = {k: v for k, v in want.items() if not _began_now(k, kept)}
        have = {k: v for k, v in have.items() if k in want or not _beside(k)}
        young = {name for name, born in self.born.items() if born == updates}

        def needed(key: str) -> bool:
            return key.startswith("weights/") or (learnt and key.split("/")[-1] not in young)

        found = [f"{k}: is missing" for k in want if k not in have and needed(k)]
        found += [f"{k}: is unknown to this model" for k in have if k not in want]
        found += [
            f"{k}: has shape {list(have[k])}, this model wants {list(want[k])}"
            for k in want
            if k in have and have[k] != want[k]
        ]
        if found:
            more = f"\n... and {len(found) - 8} more" if len(found) > 8 else ""
            raise ValueError(
                "the state is of another model; change the model section to the one it was trained "
                "with, or choose another init.from or run.out (检查点与模型不符):\n"
                + "\n".join(found[:8])
                + more
            )

    def _same_rule(self, wanted: set[str], kept: set[str]) -> None:
        """The state's moments must be those that this rule keeps; averages may come and go."""
        wanted, kept = wanted - set(BESIDE), kept - set(BESIDE)
        if kept and kept != wanted:
            raise ValueError(
                f"optimizer: keeps {', '.join(sorted(wanted)) or 'no moments'}, the state has "
                f"{', '.join(sorted(kept))}; set optimizer.name (and what it needs) to what the "
                "run was trained with, or begin anew with init.what: weights (优化器与检查点不符)"
            )

    @torch.no_grad()
    def _refresh(self) -> None:
        """The masters were written: give the forward pass their values, on all ranks."""
        if self.kind in ("zero12", "bf16"):
            self.optimizer.update_lp_params()
        elif self.kind == "zero3":
            self.optimizer._partition_all_parameters()
            for i in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
            kept = self.optimizer.persistent_parameters
            if kept:
                kept[0].all_gather(kept)
            self.optimizer.invalidate_secondary_tensor()

    def end_inference(self) -> None:
        """Under ZeRO 3: forwards that were run without the engine belong to no training step."""
        if self.kind == "zero3":
            self.optimizer._get_param_coordinator().reset_step()

    def _hand_on(self) -> None:
        """Masters that changed after DeepSpeed copied them: all groups but the last.

        DeepSpeed copies the last one itself, and sends what is copied to the other ranks later.
        """
        if self.kind == "zero12":
            masters = self.optimizer.single_partition_of_fp32_groups
            for i, master in list(enumerate(masters))[:-1]:
                rank = dist.get_rank(group=self.optimizer.real_dp_process_group[i])
                copies = self.optimizer.parallel_partitioned_bit16_groups[i]
                copies[rank].data.copy_(master.data)
        elif self.kind == "zero3":
            for i in range(len(self.optimizer.fp16_groups) - 1):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(i)

    # -- where things are ----------------------------------------------------------------------

    def _keys(self, name: str) -> list[str]:
        """What is kept of a tensor, all of it laid out like the tensor."""
        return [f"weights/{name}", *(f"optim/{slot}/{name}" for slot in self.slots[name])]

    def _values(self, flat: Tensor, key: str) -> Tensor:
        if key.startswith("weights/"):
            return flat
        values: Tensor = self.base.state[flat][key.split("/")[1]]
        return values

    def _runs(self, name: str, start: int, length: int) -> np.ndarray:
        t = self.tensors[name]
        whole, mesh = shape(self.config, t), self.mesh
        return runs(whole, split_dim(t), mesh.tensor_rank, mesh.tensor, start, length)

    def _flats(self) -> Iterator[tuple[int, Tensor]]:
        """(number of its parameter group, flat master) of all that is updated on this rank."""
        if self.kind == "zero3":
            for i, flat in enumerate(self.optimizer.fp32_partitioned_groups_flat):
                yield self.optimizer.sub_group_to_group_id[i], flat
        else:
            for i, group in enumerate(self.base.param_groups):
                yield from ((i, tensor) for tensor in group["params"])

    def _fragments(self, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
        if self.kind == "torch":
            for _, p in self.flats:
                yield Fragment(names[p], 0, p.numel(), p, 0, self.mesh.data)  # type: ignore[index]
        elif self.kind == "zero3":
            groups = zip(self.flats, self.optimizer.fp16_groups, strict=True)
            for (_, flat), parameters in groups:
                yield from _one_behind_the_other(flat, parameters, names)
        else:
            kept = "bit16_groups" if self.kind == "zero12" else "bf16_groups"
            groups = zip(self.flats, getattr(self.optimizer, kept), strict=True)
            for (_, flat), parameters in groups:
                for p in parameters:
                    if (mapping := p._hp_mapping) is not None:
                        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                        yield Fragment(names[p], here.start, here.numel, flat, there.start, 1)


def _beside(key: str) -> bool:
    """Whether a key is of an average of the weights, which no update reads."""
    return key.startswith("optim/") and key.split("/")[1] in BESIDE


def _began_now(key: str, kept: set[str]) -> bool:
    """Whether it is of an average that the state has not: it begins at the weights."""
    return _beside(key) and key.split("/")[1] not in kept


def _one_behind_the_other(
    flat: Tensor, parameters: list[Any], names: dict[nn.Parameter, str]
) -> Iterator[Fragment]:
    offset = 0
    for p in parameters:
        start = p.partition_numel() * p.ds_zero_partition_rank
        length = min(p.partition_numel(), p.ds_numel - start)
        if length > 0:  # the last ranks may hold nothing but padding
            yield Fragment(names[p], start, length, flat, offset, 1)
        offset += p.partition_numel()


def runs(
    whole: tuple[int, ...], cut: int | None, rank: int, ranks: int, start: int, length: int
) -> np.ndarray:
    """Which runs of a logical tensor a range of a local parameter is.

    Args:
        whole: the logical shape.
        cut: the dimension cut over `ranks` tensor-parallel ranks, of which this is `rank`; or None.
        start, length: the range, in the flat order of the local parameter.

    Returns int64 [n, 3]: offset in the logical flat tensor, offset from `start`, length.
    """
    if cut is None or ranks == 1:
        return np.array([[start, 0, length]], np.int64)
    if cut == 0:
        local = int(np.prod(whole)) // ranks
        return np.array([[rank * local + start, 0, length]], np.int64)
    assert cut == 1 and len(whole) == 2, f"no rule for a cut in dimension {cut} of {whole}"
    columns = whole[1] // ranks
    row = np.arange(start // columns, (start + length - 1) // columns + 1, dtype=np.int64)
    begin = np.maximum(row * columns, start)
    end = np.minimum((row + 1) * columns, start + length)
    logical = row * whole[1] + rank * columns + begin - row * columns
    return np.stack([logical, begin - start, end - begin], axis=1)


def share(length: int, holders: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(first, length) of a range that is shared out over (place, of how many), in turn."""
    first = 0
    for place, of in holders:
        low, high = length * place // of, length * (place + 1) // of
        first, length = first + low, high - low
    return first, length
