"""The per-layer update under ZeRO-2: reduce, step on the owner and free, unit by unit, inside the backward pass.

A unit (zero/units.py) is done when the last of its gradients has arrived: they are averaged over the ranks, every rank
steps the slice that it owns with DeepSpeed's own `_optimizer_step`, and the gradients are gone before the block below
begins. `step()` is left with gathering the updated weights. Gradients of the whole model never exist at once.

Where the gradients are:

* One rank: in `.grad` and nowhere else. The optimizer's parameters are views of the masters, one for each model
  parameter, so `.grad` itself is stepped.
* Several ranks: copied into a bucket of the unit's size that lies like the flat partitions, one reduce-scatter for each
  group, in place. A parameter alone in its group (embedding, head) needs no bucket: its `.grad` is reduced in place.
* Gradient accumulation: several ranks add what they own of each micro-batch into a shard, 1/N of the gradients, which
  lives until the step; one rank lets autograd add in `.grad`. Without accumulation there is neither.

With weights that need no masters (fp32, bf16 without masters) the masters are the partitions themselves.
Follows runtime/zero/stage_1_and_2.py of DeepSpeed 0.19.8.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.overrides import TorchFunctionMode

from sltrain_ds.zero.clipping import UnitClipping
from sltrain_ds.zero.units import adopt, unit_of

LAST_NORM = "sltrain_last_grad_norm"  # its key in the checkpoint


@dataclass
class Segment:
    """The part of a parameter that this rank owns, and the optimizer's view of its master."""

    parameter: torch.nn.Parameter
    start: int  # in the flattened parameter
    offset: int  # in the partition
    master: torch.Tensor  # (n,), a leaf


@dataclass
class Unit:
    """The groups (indices into `optimizer.param_groups`) that are stepped together, and where a step stands."""

    name: str
    groups: list[int] = field(default_factory=list)
    missing: set[torch.nn.Parameter] = field(default_factory=set)  # no gradient yet in this micro-batch
    bucket: torch.Tensor | None = None
    stepped: bool = False


class PerLayerZero2(DeepSpeedZeroOptimizer):
    """`DeepSpeedZeroOptimizer` whose groups were split by `split_by_unit`; `clipping` as `UnitClipping` knows it.

    A gradient that is not finite has been stepped by when `step()` sees the norm: there is no skipping a step here.
    """

    def __init__(self, *args, clipping: str = "global", **kwargs):
        with _NoMasterCopies():
            super().__init__(*args, **kwargs)
        self.world = dist.get_world_size(group=self.dp_process_group)
        self.rank = dist.get_rank(group=self.dp_process_group)
        self.overlap_comm = self.overlap_comm and self.world > 1
        self.clipping = UnitClipping(clipping, self.clip_grad, self.dp_process_group, self.device)
        self.segments = [self._segments(i) for i in range(len(self.bit16_groups))]
        self.reduced: dict[int, torch.Tensor] = {}  # group -> averaged gradient of this rank's partition
        self.shards: dict[int, torch.Tensor] = {}  # group -> the same, summed over micro-batches so far
        self.units = self._units()
        self._unit_of_group = {i: unit for unit in self.units for i in unit.groups}

    def _segments(self, group: int) -> list[Segment]:
        """This rank's segments of a group, put in the flat partition's place as the optimizer's parameters."""
        partition, size = self.single_partition_of_fp32_groups[group], int(self.partition_size[group])
        first, found = self.rank * size, []
        for parameter, begin in zip(
            self.round_robin_bit16_groups[group], self.round_robin_bit16_offsets[group], strict=True
        ):
            low, high = max(begin, first), min(begin + parameter.numel(), first + size)
            if low < high:
                master = partition.detach()[low - first : high - first].requires_grad_()
                adopt(self.optimizer, self.optimizer.param_groups[group], master, parameter, low - begin)
                found.append(Segment(parameter, low - begin, low - first, master))
        self.optimizer.param_groups[group]["params"] = [segment.master for segment in found]
        return found

    def _units(self) -> list[Unit]:
        units: dict[str, Unit] = {}
        for i, group in enumerate(self.optimizer.param_groups):
            unit = units.setdefault(unit_of(group), Unit(unit_of(group)))
            unit.groups.append(i)
            unit.missing.update(self.bit16_groups[i])
        return list(units.values())

    # -- backward: DeepSpeed's hook on every parameter ends here ---------------------------------------------------

    def reduce_independent_p_g_buckets_and_remove_grads(self, param, i):
        unit = self._unit_of_group[i]
        if param not in unit.missing:
            raise RuntimeError(f"{self.param_names[param]}: a second gradient in one backward pass")
        if self.world > 1 and not self._bypasses(i):
            with self._reduction_stream(param.grad):
                self._slot(unit, i, param).copy_(param.grad.reshape(-1))
            param.grad = None
        unit.missing.remove(param)
        if not unit.missing:
            self._finish(unit, update=self.is_gradient_accumulation_boundary())

    def _bypasses(self, i) -> bool:
        parameter = self.bit16_groups[i][0]
        return len(self.bit16_groups[i]) == 1 and parameter.dtype == self.communication_data_type

    def _finish(self, unit: Unit, update: bool) -> None:
        """Reduce a micro-batch's gradients of a unit, and step it."""
        if self.world > 1:
            self._reduce(unit)
        if update:
            self._update(unit)

    def independent_gradient_partition_epilogue(self):
        """After backward: units with parameters that got no gradient are for `step()`, or the next micro-batch."""
        self._wait_for_updates()
        self._epilogue_ran_this_backward = True

    def clear_backward_seen_flag(self):
        """Before every forward: the next micro-batch begins."""
        self._close_micro_batch()
        super().clear_backward_seen_flag()

    def _close_micro_batch(self) -> None:
        for unit in self.units:
            if unit.missing and self.world > 1 and self._has_gradients(unit):
                self._reduce(unit)  # the gradients that did come
            unit.missing = {p for i in unit.groups for p in self.bit16_groups[i]}

    def _has_gradients(self, unit: Unit) -> bool:
        return unit.bucket is not None or any(p.grad is not None for i in unit.groups for p in self.bit16_groups[i])

    def setup_buckets(self):
        """Buckets are made unit by unit."""

    # -- average over ranks ----------------------------------------------------------------------------------------

    def _slot(self, unit: Unit, i: int, param) -> torch.Tensor:
        """The place of a parameter's gradient in its unit's bucket."""
        if unit.bucket is None:
            size = sum(self.bit16_groups_flat[j].numel() for j in unit.groups if not self._bypasses(j))
            unit.bucket = param.new_empty(size, dtype=self.communication_data_type)
        index = next(j for j, other in enumerate(self.round_robin_bit16_groups[i]) if other is param)
        return self._lane(unit, i)[self.round_robin_bit16_offsets[i][index] :][: param.numel()]

    def _lane(self, unit: Unit, i: int) -> torch.Tensor:
        """A group's part of its unit's bucket, laid out as its flat weights are."""
        before = sum(self.bit16_groups_flat[j].numel() for j in unit.groups if j < i and not self._bypasses(j))
        return unit.bucket[before : before + self.bit16_groups_flat[i].numel()]

    def _reduce(self, unit: Unit) -> None:
        """Average a unit's gradients over the ranks, in place; what this rank owns of it goes to `reduced`."""
        with self._reduction_stream():
            for param, i in ((p, i) for i in unit.groups for p in self.bit16_groups[i] if p in unit.missing):
                if not self._bypasses(i):
                    self._slot(unit, i, param).zero_()
            for i in unit.groups:
                if not self._bypasses(i):
                    self.reduced[i] = self._scatter(self._lane(unit, i), int(self.partition_size[i]))
                elif (param := self.bit16_groups[i][0]).grad is not None:
                    self._record(param.grad)
                    self.reduced[i] = self._scatter(param.grad.reshape(-1), int(self.partition_size[i]))
                    param.grad = None
            unit.bucket = None
            if self.gradient_accumulation_steps > 1:
                self._accumulate(unit)

    def _scatter(self, gradient: torch.Tensor, size: int) -> torch.Tensor:
        """This rank's slice, `size` long unless it reaches the end, of a gradient averaged in place."""
        gradient.div_(self.world)
        own = gradient[self.rank * size : (self.rank + 1) * size]
        if gradient.numel() == size * self.world:
            dist.reduce_scatter_fn(own, gradient, group=self.dp_process_group)
        else:  # a lone parameter without the padding of its flat group
            dist.all_reduce(gradient, group=self.dp_process_group)
        return own

    def _accumulate(self, unit: Unit) -> None:
        """Move what was reduced into the shard, so that the bucket is free."""
        for i in unit.groups:
            if i in self.reduced:
                new = self.reduced.pop(i)
                self.shards[i] = self.shards[i].add_(new) if i in self.shards else new.to(self.dtype, copy=True)

    # -- step a unit -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update(self, unit: Unit) -> None:
        with self._reduction_stream():
            gradients = {i: self._gradients(i) for i in unit.groups}
            scale = self.clipping.coefficient([gradient for i in unit.groups for gradient in gradients[i]])
            for i in unit.groups:
                for segment, gradient in zip(self.segments[i], gradients.pop(i), strict=True):
                    segment.master.grad = gradient.to(segment.master.dtype)
                    if scale is not None:
                        segment.master.grad.mul_(scale)
                self._optimizer_step(i)
                self._release(i)
        unit.stepped = True

    def _gradients(self, i: int) -> list[torch.Tensor]:
        """The gradient of each of a group's segments; zeros, as stock ZeRO has them, where none came."""
        if self.world == 1:
            found = [segment.parameter.grad for segment in self.segments[i]]
            return [
                torch.zeros_like(segment.master, dtype=self.dtype) if gradient is None else gradient.reshape(-1)
                for segment, gradient in zip(self.segments[i], found, strict=True)
            ]
        whole = self.shards.pop(i, None) if self.gradient_accumulation_steps > 1 else self.reduced.pop(i, None)
        if whole is None:
            return [torch.zeros_like(segment.master, dtype=self.dtype) for segment in self.segments[i]]
        return [whole[segment.offset :][: segment.master.numel()] for segment in self.segments[i]]

    def _release(self, i: int) -> None:
        """Free a group's gradients, and round its masters into the weights where those are apart."""
        for segment in self.segments[i]:
            segment.master.grad = None
        for parameter in self.bit16_groups[i]:
            if parameter.grad is not None:
                self._record(parameter.grad)
            parameter.grad = None
        own, partition = self.parallel_partitioned_bit16_groups[i][self.rank], self.single_partition_of_fp32_groups[i]
        if own.data_ptr() != partition.data_ptr():
            own.copy_(partition)

    def _lazy_init_hp_params_optimizer_state(self):
        """States belong to segments here, not to whole partitions."""

    def step(self, closure=None):
        """Step the units in which some parameter got no gradient, gather the weights, note the gradient norm."""
        self.overflow = False
        self._close_micro_batch()
        for unit in self.units:
            if not unit.stepped:
                self._update(unit)
            unit.stepped = False
        self._wait_for_updates()
        self._global_grad_norm = self.clipping.end_step()
        all_gather_dp_groups(
            groups_flat=self.bit16_groups_flat, partitioned_param_groups=self.parallel_partitioned_bit16_groups,
            dp_process_group=self.real_dp_process_group, start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )  # fmt: skip

    # -- streams (overlap_comm on CUDA): reductions and steps run beside the backward pass ---------------------------

    @contextmanager
    def _reduction_stream(self, *used: torch.Tensor):
        """Inside, work is queued behind what the current stream has been given so far, but beside what follows."""
        accelerator = get_accelerator()
        if not self.overlap_comm or accelerator.is_synchronized_device():
            yield
            return
        self.reduction_stream.wait_stream(accelerator.current_stream())
        self._record(*used)
        with accelerator.stream(self.reduction_stream):
            yield

    def _record(self, *tensors: torch.Tensor) -> None:
        """Their memory, which the backward pass's stream gave, stays taken until the reduction stream is through."""
        if self.overlap_comm and not get_accelerator().is_synchronized_device():
            for tensor in tensors:
                tensor.record_stream(self.reduction_stream)

    def _wait_for_updates(self) -> None:
        if self.overlap_comm and not get_accelerator().is_synchronized_device():
            get_accelerator().current_stream().wait_stream(self.reduction_stream)

    # -- construction and checkpoints --------------------------------------------------------------------------------

    def initialize_optimizer_states(self):
        """Stock fills a zero gradient for every partition here, only to drop it: states come with the first step."""

    def state_dict(self):
        """DeepSpeed's, and the norm that "lagged" clips the next step by."""
        state = super().state_dict()
        if self.world > 1:  # a slice of the flat weights would be saved with all of them
            key = "single_partition_of_fp32_groups"
            state[key] = [partition.detach().clone() for partition in state[key]]
        return state | {LAST_NORM: self.clipping.last_norm}

    def _load_global_state(self, sd):
        super()._load_global_state(sd)
        self.clipping.last_norm = sd[LAST_NORM]


class _NoMasterCopies(TorchFunctionMode):
    """While the optimizer is constructed, `partition.detach().clone().to(dtype)` makes no copy before the cast.

    The one clone there is of the masters: those of the weights' own dtype become the partitions themselves.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.clone else func(*args, **(kwargs or {}))
