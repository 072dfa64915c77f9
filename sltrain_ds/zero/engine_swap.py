"""Puts our ZeRO optimizers in the place of DeepSpeed's while an engine is made."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

from deepspeed.runtime import engine

from sltrain_ds.zero.per_layer import PerLayerZero2


@contextmanager
def per_layer_engine(clipping: str):
    """Inside, `deepspeed.initialize` makes optimizers with the per-layer update; it names its classes itself.

    `runtime/engine.py` of DeepSpeed 0.19.8 takes the class of stages 1 and 2 from its own namespace (:2667), that of
    stage 3 from its module (:2747).
    """
    with mock.patch.object(engine, "DeepSpeedZeroOptimizer", partial(PerLayerZero2, clipping=clipping)):
        yield
