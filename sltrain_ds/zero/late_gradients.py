"""Gradients that come with a step's last micro-batch alone (op_mode keep_step) under ZeRO's accumulation."""

from sltrain_ds.ops import keep_step


def clear_late_gradients(engine) -> None:
    """Before a step's first micro-batch: forget the last step's gradients where ZeRO would add to them.

    Stage 3 copies a gradient shard in a step's first micro-batch and adds in those that follow
    (deepspeed/runtime/zero/stage3.py:2024, 0.19.8), so a parameter whose first gradient comes later would get the last
    step's too. The other stages begin with nothing, or with zeros.
    """
    shards = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if shards is not None and keep_step.holders(engine.module):
        shards.zero_()
