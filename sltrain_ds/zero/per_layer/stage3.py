"""The per-layer update under ZeRO-3; zero/per_layer/update.py describes it.

Stock ZeRO-3 holds a gradient of every partition from construction on, 1/N of the weights, and a bucket; neither is made
here. Its masters alias bf16 partitions only under autocast, since it compares a device with a string; here they do
wherever the dtypes agree. Follows runtime/zero/stage3.py of DeepSpeed 0.19.8.
"""

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from sltrain_ds.zero.per_layer.update import LAST_SUMS, UnitUpdate
from sltrain_ds.zero.swapped import swapped


class PerLayerZero3(UnitUpdate, DeepSpeedZeroOptimizer_Stage3):
    """`DeepSpeedZeroOptimizer_Stage3` with the per-layer update; `clipping` is a mode of `UnitClipping`.

    A group here is one of DeepSpeed's sub-groups, of which a parameter group has one unless sub_group_size cuts it.
    """

    def __init__(self, *args, clipping: str = "global", **kwargs):
        super().__init__(*args, **kwargs)
        self.groups, self.partitions = self.fp16_groups, self.fp32_partitioned_groups_flat
        self.owned = self.fp16_partitioned_groups_flat
        self._where = {}  # parameter -> (group, offset of its slice in the partition)
        for i, group in enumerate(self.groups):
            offset = 0
            for parameter in group:
                self._where[parameter] = i, offset
                offset += parameter.partition_numel()
        self.start_units(clipping)
        if self.world > 1 and not get_accelerator().is_synchronized_device():
            self.side_stream = self.reduce_and_partition_stream

    def group_of(self, i: int) -> int:
        return self.sub_group_to_group_id[i]

    def cut(self, i: int):
        """(parameter, start in it, offset in the partition, length) of what this rank owns of a group."""
        for parameter in self.groups[i]:
            size = parameter.partition_numel()
            start = self.rank * size
            if start < parameter.ds_numel:
                yield parameter, start, self._where[parameter][1], min(size, parameter.ds_numel - start)

    def place(self, lane: Tensor, i: int, parameter, gradient: Tensor) -> None:
        """Write a gradient (n,) or () slice by slice, one a rank, to where their partitions have them."""
        size, offset = parameter.partition_numel(), self._where[parameter][1]
        slices = lane.view(self.world, -1)[:, offset : offset + size]
        whole, rest = divmod(parameter.ds_numel, size)
        if gradient.dim() == 0:
            slices.copy_(gradient.expand_as(slices))
            return
        slices[:whole].copy_(gradient[: whole * size].view(whole, size))
        if rest:
            slices[whole, :rest].copy_(gradient[whole * size :])

    # -- what DeepSpeed calls ------------------------------------------------------------------------------------------

    def _setup_for_real_optimizer(self):
        """At construction. Stock also makes the bucket and a gradient of every partition."""
        self._create_fp32_partitions()
        self._create_next_swappable_fp32_groups()
        self.grad_partitions_flat_buffer = None

    def _create_fp16_partitions_with_defragmentation(self, fp16_param_groups):
        with swapped(stage3, "defragment", lambda partitions: None):  # done group by group, below
            super()._create_fp16_partitions_with_defragmentation(fp16_param_groups)

    def _set_fp16_partitioned_groups_flat(self):
        """Stock moves all partitions into one buffer, which is allocated before the first of them is free."""
        for group in self.fp16_groups:
            flat = self.flatten([parameter.ds_tensor for parameter in group])
            for parameter, part in zip(group, self.unflatten(flat, [p.ds_tensor for p in group]), strict=True):
                parameter.ds_tensor.data = part
            self.fp16_partitioned_groups_flat.append(flat)

    def _create_fp32_partitions(self):
        device, self.device = self.device, torch.device(self.device)  # so that the branch with the aliases is found
        super()._create_fp32_partitions()
        self.device = device

    def reduce_independent_p_g_buckets_and_remove_grads(self, param):
        """When a gradient has arrived."""
        self.arrived(param, self._where[param][0])

    def _optimizer_step(self, sub_group_id):
        group = self.optimizer.param_groups[self.group_of(sub_group_id)]
        group["params"] = [piece.master for piece in self.pieces[sub_group_id]]
        self.optimizer.step()
        group["params"] = []

    def step(self, closure=None):
        self._pre_step()
        self._partition_all_parameters()
        self.overflow = False
        self._global_grad_norm = self.step_units()
        self._post_step(set())

    def _set_fp32_optimizer_param_groups(self):
        """Around saving and loading the inner optimizer's states."""
        for i, pieces in enumerate(self.pieces):
            self.optimizer.param_groups[self.group_of(i)]["params"] += [piece.master for piece in pieces]

    def state_dict(self):
        return super().state_dict() | {LAST_SUMS: self.clipping.last_sums}

    def load_state_dict(self, state_dict_list, *args, **kwargs):
        self.resume_units(state_dict_list[self.rank])
        super().load_state_dict(state_dict_list, *args, **kwargs)
