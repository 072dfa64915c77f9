"""Flat partitions in which no optimizer block straddles two parameters or two ranks, for DeepSpeed 0.19's ZeRO 1 to 3.

With them the 8- and 4-bit states of a parameter are the same bytes at every world size and stage. As few of
DeepSpeed's layout decisions as possible are overridden:

* Stages 1 and 2 already know padding behind each parameter (zero_optimization.parameter_alignment, 16 bytes; every
  offset, slice mapping and checkpoint goes through it) and at a group's end. Only its sizes change: to 256 values,
  and to 256 a rank.
* Stage 3 gives each rank ceil(numel / world) values of each parameter. They become ceil(numel / (256 world)) * 256:
  `AlignedInit` says so when a parameter is partitioned, and gradients are padded alike before they are scattered. At
  one rank a partition is the parameter, and nothing changes.

`Aligned` and `AlignedStage3` are mixins: put them before DeepSpeed's class or a subclass of it. Their inner optimizer
is a `BlockwiseAdam`; they set its segments.
"""

import deepspeed
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import AllGatherHandle, ZeroParamStatus, is_zero_param
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.nn.functional import pad

from sltrain_ds.errors import UserError
from sltrain_ds.formats import ALIGNMENT
from sltrain_ds.ops.adam8bit import parameter_key
from sltrain_ds.optim.blockwise_adam import Segment


class Aligned:
    """For `DeepSpeedZeroOptimizer` (stages 1 and 2)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for i, partition in enumerate(self.single_partition_of_fp32_groups):
            first = dist.get_rank(group=self.real_dp_process_group[i]) * partition.numel()
            end = self.round_robin_bit16_offsets[i][-1] + self.round_robin_bit16_meta[i][-1].numel()
            self.groups_padding[i] = min(max(first + partition.numel() - end, 0), partition.numel())
            self.optimizer.segments[partition] = self.segments(i, first, first + partition.numel())

    def segments(self, group: int, start: int, stop: int) -> list[Segment]:
        """The segments in start..stop of a group's flat buffer, both multiples of 256, counted from start."""
        found = []
        pieces = zip(
            self.round_robin_bit16_groups[group], self.round_robin_bit16_meta[group],
            self.round_robin_bit16_offsets[group], strict=True,
        )  # fmt: skip
        for parameter, meta, offset in pieces:
            first, last = max(offset, start), min(offset + meta.numel(), stop)
            if first < last:
                key = parameter_key(self.optimizer.names[parameter])
                found.append(Segment(key, first - start, last - start, first - offset))
        return found

    def flatten_dense_tensors_aligned(self, tensor_list, alignment, use_cpu_data=False, param_padding=None):
        if param_padding is not None:  # construction: the class reads these two lists
            offsets, end = self.round_robin_bit16_offsets[-1], 0
            for i, meta in enumerate(self.round_robin_bit16_meta[-1]):
                offsets[i] = end
                param_padding[i] = 0 if i == len(offsets) - 1 else -meta.numel() % ALIGNMENT
                end += meta.numel() + param_padding[i]
            alignment = ALIGNMENT * dist.get_world_size(group=self.dp_process_group)
        return super().flatten_dense_tensors_aligned(tensor_list, alignment, use_cpu_data, param_padding)


class AlignedInit(deepspeed.zero.Init):
    """`deepspeed.zero.Init` whose partitions are multiples of 256 values."""

    def _padding_size(self, param):
        world = self._partition_world_size(param)
        return 0 if world == 1 else -param.ds_numel % (ALIGNMENT * world)

    def _convert_to_deepspeed_param(self, param):
        super()._convert_to_deepspeed_param(param)
        gather = param.all_gather_coalesced

        def all_gather_coalesced(params, safe_mode=False, quantize=False):
            params = list(params)
            if len(params) > 1 or quantize or not params or self._partition_world_size(params[0]) == 1:
                return gather(params, safe_mode=safe_mode, quantize=quantize)
            return self._gather_one(params[0])

        param.all_gather_coalesced = all_gather_coalesced

    def _gather_one(self, param):
        """What `_all_gather_sequential` does, which computes the buffer's size by itself."""
        if param.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            raise RuntimeError(param.ds_summary())
        param.ds_status = ZeroParamStatus.INFLIGHT
        buffer = param.ds_tensor.new_empty(param.ds_tensor.ds_numel * self._partition_world_size(param))
        handle = dist.allgather_fn(buffer, param.ds_tensor, group=self.get_partition_dp_group(param), async_op=True)
        param.data = buffer.narrow(0, 0, param.ds_numel).view(param.ds_shape)
        return AllGatherHandle(handle, param)


def partition_aligned(model, ds_config, dtype) -> None:
    """Partition what is not partitioned yet of a model, before `deepspeed.initialize` would do it unaligned."""
    whole = [parameter for parameter in model.parameters() if not is_zero_param(parameter)]
    for parameter in whole:
        parameter.data = parameter.data.to(dtype)
    if whole:
        AlignedInit(module=model, config_dict_or_path=ds_config, dtype=dtype)


class _Padded:
    """A parameter with its gradient padded to whole partitions, for the collective that scatters it."""

    def __init__(self, param, world: int):
        self._param, missing = param, param.partition_numel() * world - param.grad.numel()
        self.grad = pad(param.grad.view(-1), (0, missing)) if missing else param.grad

    def __getattr__(self, name):
        return getattr(self._param, name)


class AlignedStage3:
    """For `DeepSpeedZeroOptimizer_Stage3`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for group, partition in zip(self.fp16_groups, self.fp32_partitioned_groups_flat, strict=True):
            self.optimizer.segments[partition] = self.segments(group)

    def segments(self, params) -> list[Segment]:
        """The segments of this rank's partitions of these parameters, in order."""
        found, place = [], 0
        for param in params:
            name, length = self.optimizer.names[param], param.partition_numel()
            offset = self._get_param_partition_rank(param) * length
            if offset % ALIGNMENT:
                raise UserError(
                    f"{name}: was partitioned by deepspeed.zero.Init, whose partitions cut the blocks of 8- and 4-bit "
                    "states; build the model without it, or with sltrain_ds.zero.aligned.AlignedInit"
                )
            real = min(param.ds_numel - offset, length)
            if real > 0:
                found.append(Segment(parameter_key(name), place, place + real, offset))
            place += length
        return found

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(self, params, dtype):
        world = dist.get_world_size(group=self._get_param_partition_group(params[0]))
        return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads([_Padded(p, world) for p in params], dtype)

    def state_dict(self):
        return super().state_dict() | {"partition_alignment": ALIGNMENT}


class AlignedZeroOptimizer(Aligned, DeepSpeedZeroOptimizer):
    """ZeRO 1 and 2 with aligned partitions."""


class AlignedZeroOptimizerStage3(AlignedStage3, DeepSpeedZeroOptimizer_Stage3):
    """ZeRO 3 with aligned partitions."""
