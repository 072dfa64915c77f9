"""The table of DeepSpeed's private names: complete, up to date, and a missing name is one clear error."""

import inspect
from importlib import import_module

import pytest
from deepspeed.runtime import engine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from sltrain_ds.errors import UserError
from sltrain_ds.zero import deepspeed_names
from sltrain_ds.zero.aligned import AlignedInit
from sltrain_ds.zero.engine_swap import AlignedPerLayerZero2, AlignedPerLayerZero3
from sltrain_ds.zero.swapped import swapped

OURS = {
    "DeepSpeedZeroOptimizer": AlignedPerLayerZero2,
    "DeepSpeedZeroOptimizer_Stage3": AlignedPerLayerZero3,
    "Init": AlignedInit,
}


def stock(names):
    module, _, kind = names.where.partition(":")
    return getattr(import_module(module), kind)


@pytest.mark.parametrize("names", deepspeed_names.TABLE, ids=lambda names: names.where.rpartition(":")[2])
def test_this_deepspeed_has_every_name(names):
    assert deepspeed_names.missing(names, stock(names)) == []


@pytest.mark.parametrize("kind", OURS)
def test_every_override_is_in_the_table(kind):
    (names,) = [names for names in deepspeed_names.TABLE if names.where.endswith(f":{kind}")]
    mine = [vars(base) for base in OURS[kind].__mro__ if base.__module__.startswith("sltrain_ds")]
    overrides = {name for space in mine for name in space if not name.startswith("__") and hasattr(stock(names), name)}
    assert overrides <= {*names.overridden, *names.read}
    assert set(names.overridden) <= overrides


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def test_a_name_that_is_gone_from_a_copy_of_the_class_is_found(kind):
    (names,) = [names for names in deepspeed_names.TABLE if names.where.endswith(f":{kind.__name__}")]
    for name in names.overridden:
        if name in vars(kind):
            space = {key: value for key, value in vars(kind).items() if key not in (name, "__dict__", "__weakref__")}
            copy = type(kind.__name__, kind.__bases__, space)
            found = deepspeed_names.missing(names, copy)
            assert found == ([] if any(hasattr(base, name) for base in kind.__bases__) else [name])
    source = inspect.getsource(inspect.getmodule(kind))
    with swapped(deepspeed_names.inspect, "getsource", lambda _: source.replace("self.clip_grad", "self.clipped")):
        assert deepspeed_names.missing(names, kind) == ["clip_grad"]


def test_what_is_missing_is_one_line_with_the_versions_that_work():
    deepspeed_names.check_names.cache_clear()
    renamed = type("DeepSpeedZeroOptimizer", (), {})
    renamed.__module__ = DeepSpeedZeroOptimizer.__module__
    module = import_module(DeepSpeedZeroOptimizer.__module__)
    with swapped(module, "DeepSpeedZeroOptimizer", renamed), pytest.raises(UserError) as error:
        deepspeed_names.check_names()
    line = str(error.value)
    assert "DeepSpeedZeroOptimizer.setup_buckets" in line and deepspeed_names.VERSIONS in line and "\n" not in line
    deepspeed_names.check_names()


def test_swapped_puts_back_what_was_there():
    before = engine.DeepSpeedZeroOptimizer
    with pytest.raises(KeyError), swapped(engine, "DeepSpeedZeroOptimizer", 1):
        assert engine.DeepSpeedZeroOptimizer == 1
        raise KeyError
    assert engine.DeepSpeedZeroOptimizer is before
    with pytest.raises(AttributeError), swapped(engine, "no_such_name", 1):
        pass
