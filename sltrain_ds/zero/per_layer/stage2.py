"""The per-layer update under ZeRO-2; zero/per_layer/update.py describes it.

`step()` is left with gathering the updated weights. With weights that need no masters (fp32, bf16 without masters) the
masters are the partitions of the weights themselves. Follows runtime/zero/stage_1_and_2.py of DeepSpeed 0.19.8.
"""

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import SINGLE_PARTITION_OF_FP32_GROUPS, DeepSpeedZeroOptimizer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sltrain_ds.zero.per_layer.update import LAST_SUMS, UnitUpdate


class PerLayerZero2(UnitUpdate, DeepSpeedZeroOptimizer):
    """`DeepSpeedZeroOptimizer` with the per-layer update; `clipping` is a mode of `UnitClipping`."""

    def __init__(self, *args, clipping: str = "global", **kwargs):
        with _NoMasterCopies(self):
            super().__init__(*args, **kwargs)
        self.groups, self.partitions = self.bit16_groups, self.single_partition_of_fp32_groups
        rank = dist.get_rank(group=self.dp_process_group)
        self.owned = [partitions[rank] for partitions in self.parallel_partitioned_bit16_groups]
        self._offset = [
            dict(zip(parameters, offsets, strict=True))  # of a parameter in its group's flat weights
            for parameters, offsets in zip(self.round_robin_bit16_groups, self.round_robin_bit16_offsets, strict=True)
        ]
        self.start_units(clipping)
        for i, pieces in enumerate(self.pieces):
            self.optimizer.param_groups[i]["params"] = [piece.master for piece in pieces]
        if self.overlap_comm and self.world > 1 and not get_accelerator().is_synchronized_device():
            self.side_stream = self.reduction_stream

    def group_of(self, i: int) -> int:
        return i

    def cut(self, i: int):
        """(parameter, start in it, offset in the partition, length) of what this rank owns of a group."""
        size = self.partitions[i].numel()
        first = self.rank * size
        for parameter, begin in self._offset[i].items():
            low, high = max(begin, first), min(begin + parameter.numel(), first + size)
            if low < high:
                yield parameter, low - begin, low - first, high - low

    def place(self, lane: Tensor, i: int, parameter, gradient: Tensor) -> None:
        """Write a gradient (n,) or () at the parameter's offset in the flat weights."""
        begin = self._offset[i][parameter]
        lane[begin : begin + parameter.numel()].copy_(gradient)

    # -- what DeepSpeed calls ------------------------------------------------------------------------------------------

    def initialize_optimizer_states(self):
        """At construction. Stock fills a zero gradient for every partition, only to drop it; states come lazily."""

    def setup_buckets(self):
        """Before every gradient. Buckets are made unit by unit."""

    def reduce_independent_p_g_buckets_and_remove_grads(self, param, i):
        """When a gradient has arrived."""
        self.arrived(param, i)

    def _lazy_init_hp_params_optimizer_state(self):
        """After a group's step. States belong to pieces, so partitions have none to link."""

    def step(self, closure=None):
        self.overflow = False
        self._global_grad_norm = self.step_units()
        all_gather_dp_groups(
            groups_flat=self.bit16_groups_flat, partitioned_param_groups=self.parallel_partitioned_bit16_groups,
            dp_process_group=self.real_dp_process_group, start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )  # fmt: skip

    def state_dict(self):
        state = super().state_dict()
        if self.world > 1:  # a slice of the flat weights would be saved with all of them
            masters = state[SINGLE_PARTITION_OF_FP32_GROUPS]
            state[SINGLE_PARTITION_OF_FP32_GROUPS] = [master.detach().clone() for master in masters]
        return state | {LAST_SUMS: self.clipping.last_sums}

    def _load_global_state(self, sd):
        self.resume_units(sd)
        super()._load_global_state(sd)


class _NoMasterCopies(TorchFunctionMode):
    """While the optimizer is constructed, `partition.detach().clone().to(dtype)` makes no copy before the cast.

    So masters of the weights' own dtype become the partitions themselves. Other tensors are cloned as ever.
    """

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.clone and self._is_partition(args[0]):
            return args[0]
        return func(*args, **(kwargs or {}))

    def _is_partition(self, tensor) -> bool:
        """Whether a tensor is a slice of the flat weights (bit16_groups_flat)."""
        flat = self.optimizer.__dict__.get("bit16_groups_flat", ())
        return any(tensor.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in flat)
