"""Joins the ranks; what has to be compiled is compiled before they meet."""

import deepspeed

from sltrain_ds.ops import builder


def start() -> None:
    """`deepspeed.init_distributed()` (once), after the ops are built and the locks of killed builds are gone.

    DeepSpeed's first start on a CPU compiles `deepspeed_shm_comm`, and fails where there is no compiler although it
    can do without (deepspeed/comm/torch.py:47, 0.19.8): told that the op does not fit, it does.
    """
    if deepspeed.comm.is_initialized():
        return
    builder.load()
    if builder.missing_tools():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with builder.tools_on_path():
        builder.build_deepspeed_ops()
        deepspeed.init_distributed()
