"""The per-layer update that ZeRO-2 and ZeRO-3 share: reduce, step on the owner and free, unit by unit, in backward.

A unit (zero/per_layer/units.py) is done when the last of its gradients has arrived: they are averaged over the
ranks, every rank steps the slice that it owns with DeepSpeed's own `_optimizer_step`, and the gradients are gone before
the block below begins. Gradients of the whole model never exist at once. Where they are until then:

* One rank: in `.grad` and nowhere else. The optimizer's parameters are views of the masters, one for each model
  parameter, so `.grad` itself is stepped.
* Several ranks: copied into a bucket of the unit's size, with the layout of the partitions: one reduce-scatter for each
  group, in place. A parameter alone in its group (embedding, head) needs no bucket: its `.grad` is reduced in place.
* Gradient accumulation: several ranks add what they own of each micro-batch into a shard, 1/N of the gradients, which
  lives until the step; one rank lets autograd add in `.grad`. Without accumulation there is neither. What counts is
  whether a step ends with this backward pass, not the config's number: the engine's may be changed.
"""

from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import ReduceOp
from torch.nn import Parameter

from sltrain_ds.errors import UserError
from sltrain_ds.optim.blockwise_adam import BlockwiseAdam
from sltrain_ds.zero.per_layer.clipping import UnitClipping
from sltrain_ds.zero.per_layer.units import adopt, unit_of

LAST_SUMS = "sltrain_last_sums_of_squares"  # of `UnitClipping`, its key in the checkpoint


@dataclass(frozen=True)
class Piece:
    """What this rank owns of a parameter: elements `start`.. of it, at `offset` in its group's partition."""

    parameter: Parameter
    start: int
    offset: int
    master: torch.Tensor  # (n,), a leaf: what the inner optimizer steps


@dataclass(eq=False)
class Unit:
    """The groups that are stepped together, and where a step stands."""

    name: str
    groups: list[int] = field(default_factory=list)
    missing: set[Parameter] = field(default_factory=set)  # no gradient yet in this micro-batch
    bucket: torch.Tensor | None = None
    stepped: bool = False


class UnitUpdate:
    """A mixin for DeepSpeed's ZeRO optimizers, whose groups were split by `split_by_unit`.

    The class it is mixed into says what there is: `groups`, `partitions`, `owned`, `group_of(i)` (a group's index among
    the inner optimizer's), `cut(i)` (what this rank owns of a group) and `place` (writes a gradient into a bucket).
    It calls `start_units` at the end of its construction, `arrived` when a gradient has and `step_units` in `step()`.
    Put this before DeepSpeed's class.

    No step can be skipped: when the norm is known, a gradient that is not finite has been applied.
    """

    groups: list[list[Parameter]]
    partitions: list[torch.Tensor]  # (partition,), float32 or as the weights
    owned: list[torch.Tensor]  # (partition,), as the weights
    side_stream = None  # where reductions and steps run beside the backward pass
    AHEAD = 2  # units that may be queued: what they hold is not given back before the side stream has come by

    def start_units(self, clipping: str) -> None:
        """Cut the partitions into pieces, which the optimizer steps, and group the groups into units."""
        self.world = dist.get_world_size(group=self.dp_process_group)
        self.rank = dist.get_rank(group=self.dp_process_group)
        self.clipping = UnitClipping(clipping, self.clip_grad, self.dp_process_group, self.device)
        self.pieces = [self._pieces(i) for i in range(len(self.groups))]
        # group -> averaged gradient of this rank's partition, summed over the step's micro-batches so far
        self.reduced: dict[int, torch.Tensor] = {}
        units: dict[str, Unit] = {}
        for i in range(len(self.groups)):
            name = unit_of(self.optimizer.param_groups[self.group_of(i)])
            units.setdefault(name, Unit(name)).groups.append(i)
        self.units = list(units.values())
        self._queued = deque()  # an event after each unit's work on the side stream
        for unit in self.units:
            self._await_all(unit)
        self._unit_of = {i: unit for unit in self.units for i in unit.groups}

    def resume_units(self, saved: dict) -> None:
        """What a checkpoint has for the update; and nothing stays of a step that was begun and not finished."""
        if LAST_SUMS not in saved:
            raise UserError(
                "sltrain.per_layer_update: true, but the checkpoint was written without it; set it to false, or load "
                "the weights alone (load_module_only=True)"
            )
        self.clipping.start_step(saved[LAST_SUMS])
        self.reduced.clear()
        for unit in self.units:
            unit.bucket, unit.stepped = None, False
            self._await_all(unit)
            for parameter in unit.missing:
                parameter.grad = None

    def describe(self) -> str:
        """A line for the start of a run: what gradients will take."""
        sizes = [self.world * sum(self.partitions[i].numel() for i in unit.groups) for unit in self.units]
        line = f"per-layer update: {len(sizes)} units, the largest of {max(sizes):,} values"
        if self.gradient_accumulation_steps > 1:
            kept = sum(sizes) // self.world * self.dtype.itemsize
            line += f"; gradient accumulation keeps {kept / 1e6:,.1f} MB of gradients a rank until the step"
        return line

    def _pieces(self, i: int) -> list[Piece]:
        found = []
        for parameter, start, offset, length in self.cut(i):
            master = self.partitions[i].detach()[offset : offset + length].requires_grad_()
            adopt(self.optimizer, master, parameter, start)
            found.append(Piece(parameter, start, offset, master))
        return found

    # -- in backward -----------------------------------------------------------------------------------------------

    def arrived(self, parameter: Parameter, i: int) -> None:
        """The gradient of a parameter of group i is in `.grad`."""
        unit = self._unit_of[i]
        if parameter not in unit.missing:
            raise RuntimeError(
                f"{self.param_names[parameter]}: a second gradient since the last forward; with "
                "sltrain.per_layer_update each forward pass has one backward pass, before the next forward"
            )
        if unit.stepped:
            raise RuntimeError(
                f"{self.param_names[parameter]}: a gradient after this step's update; with sltrain.per_layer_update "
                "call engine.step() after each backward pass, and accumulate by gradient_accumulation_steps"
            )
        if self.world > 1 and not self._bypasses(i):
            with self._beside(parameter.grad):
                self.place(self._lane(unit, i), i, parameter, parameter.grad.reshape(-1))
            parameter.grad = None
        unit.missing.remove(parameter)
        if not unit.missing:
            if len(self._queued) == self.AHEAD:
                self._queued.popleft().synchronize()
            if self.world > 1:
                self._reduce(unit)
            if self.is_gradient_accumulation_boundary():
                self._update(unit)
            if self.side_stream is not None:
                self._queued.append(self.side_stream.record_event())

    def close_micro_batch(self) -> None:
        """Before the next forward: reduce what came of units in which not every parameter got a gradient."""
        for unit in self.units:
            some = unit.bucket is not None or any(p.grad is not None for i in unit.groups for p in self.groups[i])
            if unit.missing and self.world > 1 and some:
                self._reduce(unit)
            self._await_all(unit)

    def _await_all(self, unit: Unit) -> None:
        unit.missing = {parameter for i in unit.groups for parameter in self.groups[i]}

    def step_units(self) -> torch.Tensor:
        """What is left to the step: units with parameters that got no gradient (stepped with zeros, as stock ZeRO
        does), and the global gradient norm, which is returned.
        """
        self.close_micro_batch()
        for unit in self.units:
            if not unit.stepped:
                self._update(unit)
            unit.stepped = False
        self.wait_for_updates()
        return self.clipping.end_step()

    # -- what DeepSpeed calls, at either stage -----------------------------------------------------------------------

    def independent_gradient_partition_epilogue(self):
        """After backward."""
        self.wait_for_updates()
        self._epilogue_ran_this_backward = True

    def clear_backward_seen_flag(self):
        """Before every forward."""
        self.close_micro_batch()
        super().clear_backward_seen_flag()

    # -- average over the ranks ------------------------------------------------------------------------------------

    def _bypasses(self, i: int) -> bool:
        return len(self.groups[i]) == 1 and self.groups[i][0].dtype == self.communication_data_type

    def _lane(self, unit: Unit, i: int) -> torch.Tensor:
        """A group's part (partition x ranks,) of its unit's bucket."""
        sizes = {j: self.world * self.partitions[j].numel() for j in unit.groups if not self._bypasses(j)}
        if unit.bucket is None:
            unit.bucket = self.owned[i].new_empty(sum(sizes.values()), dtype=self.communication_data_type)
        before = sum(size for j, size in sizes.items() if j < i)
        return unit.bucket[before : before + sizes[i]]

    def _reduce(self, unit: Unit) -> None:
        """Average a unit's gradients in place; what this rank owns of them is added to `reduced`."""
        with self._beside():
            for i in unit.groups:
                if self._bypasses(i):
                    parameter = self.groups[i][0]
                    if parameter.grad is not None:
                        self._keep(parameter.grad)
                        self._add(i, self._scatter(parameter.grad.reshape(-1), self.partitions[i].numel()))
                        parameter.grad = None
                    continue
                lane = self._lane(unit, i)
                for parameter in self.groups[i]:
                    if parameter in unit.missing:
                        self.place(lane, i, parameter, lane.new_zeros(()))
                self._add(i, self._scatter(lane, self.partitions[i].numel()))
            unit.bucket = None

    def _add(self, i: int, new: torch.Tensor) -> None:
        """Add this rank's slice of a gradient to what is there; one that outlives backward is no slice of a bucket."""
        new = new.to(self.dtype)  # communication_data_type may be another
        if i in self.reduced:
            self.reduced[i].add_(new)
        else:
            self.reduced[i] = new if self.is_gradient_accumulation_boundary() else new.clone()

    def _scatter(self, gradient: torch.Tensor, size: int) -> torch.Tensor:
        """This rank's slice, `size` long unless it reaches the end, of a gradient that is averaged in place."""
        average = gradient.device.type != "cpu"  # NCCL divides as it sums; gloo cannot
        if not average:
            gradient.div_(self.world)
        op = ReduceOp.AVG if average else ReduceOp.SUM
        own = gradient[self.rank * size : (self.rank + 1) * size]
        padded = gradient.numel() == size * self.world  # a lone parameter comes without the padding of its partitions
        if padded and gradient.device.type != "cpu":
            dist.reduce_scatter_fn(own, gradient, op=op, group=self.dp_process_group)
        else:  # gloo makes a reduce-scatter of copies and all-reduces
            dist.all_reduce(gradient, op=op, group=self.dp_process_group)
        return own

    # -- step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update(self, unit: Unit) -> None:
        """Clip, step and free a unit, group by group."""
        with self._beside():
            gradients = {i: self._gradients(i) for i in unit.groups}
            scale = self.clipping.coefficient([gradient for i in unit.groups for gradient in gradients[i]])
            if isinstance(self.optimizer, BlockwiseAdam) and scale is not None and scale.device.type == "cuda":
                # the kernel multiplies as it reads: no pass over the gradients, and no rounding, for the scale alone
                self.optimizer.gradient_scale, scale = scale, None
            for i in unit.groups:
                left = gradients.pop(i)
                for piece in self.pieces[i]:
                    _hand_over(piece, left.pop(0), scale)
                self._optimizer_step(i)
                for piece in self.pieces[i]:
                    piece.master.grad = None
                if self.owned[i].data_ptr() != self.partitions[i].data_ptr():
                    self.owned[i].copy_(self.partitions[i])
            if isinstance(self.optimizer, BlockwiseAdam):
                self.optimizer.gradient_scale = None
        unit.stepped = True

    def _gradients(self, i: int) -> list[torch.Tensor]:
        """The averaged gradient of each of a group's pieces, zeros where none came."""
        if self.world == 1:
            whole = [piece.parameter.grad for piece in self.pieces[i]]
            return [
                torch.zeros_like(piece.master, dtype=self.dtype) if gradient is None else gradient.reshape(-1)
                for piece, gradient in zip(self.pieces[i], whole, strict=True)
            ]
        own = self.reduced.pop(i, None)
        if own is None:
            return [torch.zeros_like(piece.master, dtype=self.dtype) for piece in self.pieces[i]]
        return [own[piece.offset :][: piece.master.numel()] for piece in self.pieces[i]]

    # -- streams (overlap_comm on CUDA) --------------------------------------------------------------------------------

    @contextmanager
    def _beside(self, *used: torch.Tensor):
        """Inside, work is queued behind what the current stream has been given so far, and beside what follows.

        `used` is memory that the current stream's work allocated and that is read or written inside.
        """
        if self.side_stream is None:
            yield
            return
        self.side_stream.wait_stream(get_accelerator().current_stream())
        self._keep(*used)
        with get_accelerator().stream(self.side_stream):
            yield

    def _keep(self, *tensors: torch.Tensor) -> None:
        """Their memory is not given to anyone else before the side stream has come this far."""
        if self.side_stream is not None:
            for tensor in tensors:
                tensor.record_stream(self.side_stream)

    def wait_for_updates(self) -> None:
        """Whatever the current stream is given next comes after every reduction and step so far."""
        if self.side_stream is not None:
            get_accelerator().current_stream().wait_stream(self.side_stream)


def _hand_over(piece: Piece, gradient: torch.Tensor, scale) -> None:
    """Give the optimizer a piece's gradient; the model's own goes, so that what is cast is freed at once."""
    piece.parameter.grad = None
    piece.master.grad = gradient.to(piece.master.dtype)
    if scale is not None:
        piece.master.grad.mul_(scale)
