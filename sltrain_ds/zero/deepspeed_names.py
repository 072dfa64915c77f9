"""DeepSpeed's private names that we override or read, in one table; checked before an engine is made.

A hook that DeepSpeed renames would never be called, and nothing would say so. `check_names` raises instead.
"""

import inspect
import re
from functools import cache
from importlib import import_module
from typing import NamedTuple

import deepspeed

from sltrain_ds.errors import UserError

VERSIONS = "0.19.8 up to 0.19.x"  # as setup.py has them


class Names(NamedTuple):
    """What we use of one class. Numbers are lines of DeepSpeed 0.19.8."""

    where: str  # "module:Class"
    overridden: dict[str, int]  # methods that a subclass of ours replaces or extends
    read: dict[str, int]  # methods that we call and attributes that its methods set on `self`


TABLE = (
    Names(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
        {
            "_lazy_init_hp_params_optimizer_state": 852, "_load_global_state": 3667, "clear_backward_seen_flag": 1129,
            "flatten_dense_tensors_aligned": 1390, "independent_gradient_partition_epilogue": 1016,
            "initialize_optimizer_states": 934, "reduce_independent_p_g_buckets_and_remove_grads": 1414,
            "setup_buckets": 3256, "state_dict": 3358, "step": 3013,
        },
        {
            "_epilogue_ran_this_backward": 1068, "_global_grad_norm": 307, "_optimizer_step": 2967,
            "allgather_bucket_size": 597, "averaged_gradients": 687, "bit16_groups": 354, "bit16_groups_flat": 355,
            "clip_grad": 319, "communication_data_type": 320, "device": 278, "dp_process_group": 280, "dtype": 394,
            "gradient_accumulation_steps": 324, "groups_padding": 421, "ipg_buckets": 616,
            "nccl_start_alignment_factor": 387, "optimizer": 260, "overflow": 318, "overlap_comm": 274,
            "parallel_partitioned_bit16_groups": 360, "param_names": 251, "real_dp_process_group": 293,
            "reduction_stream": 599, "round_robin_bit16_groups": 413, "round_robin_bit16_meta": 415,
            "round_robin_bit16_offsets": 417, "single_partition_of_fp32_groups": 364,
        },
    ),
    Names(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        {
            "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads": 1912,
            "_create_fp16_partitions_with_defragmentation": 913, "_create_fp32_partitions": 1081,
            "_optimizer_step": 1235, "_set_fp16_partitioned_groups_flat": 1292,
            "_set_fp32_optimizer_param_groups": 3403, "_setup_for_real_optimizer": 761,
            "clear_backward_seen_flag": 2394, "independent_gradient_partition_epilogue": 1407,
            "load_state_dict": 3589, "reduce_independent_p_g_buckets_and_remove_grads": 1569, "state_dict": 3449,
            "step": 2873,
        },
        {
            "_create_next_swappable_fp32_groups": 1042, "_epilogue_ran_this_backward": 1434,
            "_get_param_partition_group": 643, "_get_param_partition_rank": 646, "_global_grad_norm": 240,
            "_partition_all_parameters": 3322, "_post_step": 2835, "_pre_step": 2539, "clip_grad": 379,
            "communication_data_type": 380, "device": 333, "dp_process_group": 364, "dtype": 238, "flatten": 236,
            "fp16_groups": 401, "fp16_partitioned_groups_flat": 407, "fp32_partitioned_groups_flat": 416,
            "grad_partitions_flat_buffer": 786, "gradient_accumulation_steps": 383, "optimizer": 232, "overflow": 378,
            "param_names": 233, "parameter_offload": 275, "reduce_and_partition_stream": 340,
            "sub_group_to_group_id": 435, "unflatten": 237,
        },
    ),
    Names(
        "deepspeed.runtime.zero.partition_parameters:Init",
        {"_convert_to_deepspeed_param": 1270, "_padding_size": 1693},
        {"_partition_world_size": 1701, "get_partition_dp_group": 2320},
    ),
    Names("deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload", {}, {"__allgather_stream": 195}),
    Names(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        {},
        {"basic_optimizer": 560, "checkpoint_engine": 558, "get_global_grad_norm": 1357, "lr_scheduler": 561,
         "monitor": 610, "optimizer": 559},
    ),
    Names("deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine", {}, {"load": 35}),
)  # fmt: skip

MODULES = {  # module variables that are swapped while an engine is made, or read
    "deepspeed.runtime.engine": ("DeepSpeedZeroOptimizer",),
    "deepspeed.runtime.zero.stage3": ("DeepSpeedZeroOptimizer_Stage3", "defragment"),
    "deepspeed.runtime.utils": ("all_gather_dp_groups",),
    "deepspeed.utils.groups": ("_WORLD_GROUP",),
}


def missing(names: Names, kind: type) -> list[str]:
    """The names of an entry that a class lacks: methods, and attributes that no method in its file sets."""
    source = inspect.getsource(inspect.getmodule(kind))
    lost = [name for name in names.overridden if not hasattr(kind, name)]
    for name in names.read:
        if not hasattr(kind, name) and not re.search(rf"\bself\.{name}\b[^=\n]*=[^=]", source):
            lost.append(name)
    return lost


@cache
def check_names() -> None:
    """Raise `UserError` naming what this DeepSpeed lacks, and the versions that have it; looks once a process."""
    lost = []
    for names in TABLE:
        module, _, kind = names.where.partition(":")
        found = getattr(import_module(module), kind, None)
        lost += [names.where] if found is None else [f"{kind}.{name}" for name in missing(names, found)]
    for module, variables in MODULES.items():
        lost += [f"{module}.{name}" for name in variables if not hasattr(import_module(module), name)]
    if lost:
        raise UserError(
            f"deepspeed {deepspeed.__version__}: has no {', '.join(lost)}, which sltrain_ds needs; "
            f"install deepspeed {VERSIONS}"
        )
