"""Puts our ZeRO optimizers in the place of DeepSpeed's while an engine is made."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401  subclasses stage 3's class when imported
from deepspeed.runtime import engine
from deepspeed.runtime.zero import stage3

from sltrain_ds.zero.per_layer import PerLayerZero2
from sltrain_ds.zero.per_layer_stage3 import PerLayerZero3


@contextmanager
def per_layer_engine(clipping: str):
    """Inside, `deepspeed.initialize` makes optimizers with the per-layer update; it names its classes itself.

    `runtime/engine.py` of DeepSpeed 0.19.8 takes the class of stages 1 and 2 from its own namespace (:2667), that of
    stage 3 from its module (:2747).
    """
    with (
        mock.patch.object(engine, "DeepSpeedZeroOptimizer", partial(PerLayerZero2, clipping=clipping)),
        mock.patch.object(stage3, "DeepSpeedZeroOptimizer_Stage3", partial(PerLayerZero3, clipping=clipping)),
    ):
        yield
