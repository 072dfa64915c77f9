"""Puts our ZeRO optimizers in the place of DeepSpeed's while an engine is made."""

from contextlib import contextmanager
from functools import partial

import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401  subclasses stage 3's class when imported
from deepspeed.runtime import engine
from deepspeed.runtime.zero import stage3

from sltrain_ds.zero.aligned import Aligned, AlignedStage3, AlignedZeroOptimizer, AlignedZeroOptimizerStage3
from sltrain_ds.zero.per_layer.stage2 import PerLayerZero2
from sltrain_ds.zero.per_layer.stage3 import PerLayerZero3
from sltrain_ds.zero.swapped import swapped


class AlignedPerLayerZero2(Aligned, PerLayerZero2):
    """ZeRO 2 with aligned partitions and the per-layer update."""


class AlignedPerLayerZero3(AlignedStage3, PerLayerZero3):
    """ZeRO 3 with aligned partitions and the per-layer update."""


@contextmanager
def zero_classes(aligned: bool, clipping: str | None):
    """Inside, `deepspeed.initialize` makes ZeRO optimizers with `aligned` partitions (those of a `BlockwiseAdam`) and,
    where `clipping` is not None, with the per-layer update; neither: DeepSpeed's own.

    `runtime/engine.py` of DeepSpeed 0.19.8 names the classes itself: that of stages 1 and 2 in its own namespace
    (:2667), that of stage 3 in its module (:2747).
    """
    if clipping is not None:
        kinds = (AlignedPerLayerZero2, AlignedPerLayerZero3) if aligned else (PerLayerZero2, PerLayerZero3)
        kinds = [partial(kind, clipping=clipping) for kind in kinds]
    elif aligned:
        kinds = AlignedZeroOptimizer, AlignedZeroOptimizerStage3
    else:
        kinds = engine.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3
    with (
        swapped(engine, "DeepSpeedZeroOptimizer", kinds[0]),
        swapped(stage3, "DeepSpeedZeroOptimizer_Stage3", kinds[1]),
    ):
        yield
