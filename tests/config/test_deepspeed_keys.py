"""The key list against the installed DeepSpeed: what it reads is known, and what is known is read."""

import inspect
from importlib.metadata import version

import deepspeed
import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import lr_schedules, precision_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from sltrain_ds.config.deepspeed_keys import DEEPSPEED, REMOVED, REMOVED_ZERO, SCHEDULERS, VERSION, ZERO

MODELS = {
    "bf16": precision_config.DeepSpeedBF16Config,
    "fp16": precision_config.DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "zero_optimization": DeepSpeedZeroConfig,
}


class Recorder(dict):
    """A config that notes every key DeepSpeed asks it for, at every level."""

    def __init__(self, data, log, path=()):
        super().__init__({k: Recorder(v, log, (*path, k)) if isinstance(v, dict) else v for k, v in data.items()})
        self.log, self.path = log, path

    def get(self, key, default=None):
        self.log.add((*self.path, key))
        return super().get(key, default)

    def __getitem__(self, key):
        self.log.add((*self.path, key))
        return super().__getitem__(key)

    def __contains__(self, key):
        self.log.add((*self.path, key))
        return super().__contains__(key)

    def keys(self):
        return _Keys(self)

    def __copy__(self):
        return self


class _Keys:
    def __init__(self, recorder):
        self.recorder = recorder

    def __contains__(self, key):
        return key in self.recorder

    def __iter__(self):
        return iter(dict.keys(self.recorder))


def test_the_version_is_the_one_listed():
    assert version("deepspeed").split("+")[0] == VERSION == deepspeed.__version__.split("+")[0]


def test_what_deepspeed_reads_is_what_we_know():
    log = set()
    empty = {"checkpoint": {"writer": {}, "parallel_write": {}}, "timers": {}, "torch_autocast": {"dtype": "bf16"}}
    empty |= {key: {} for key in ("flops_profiler", "activation_checkpointing", "data_types", "aio", "comms_logger")}
    empty |= {"optimizer": {"type": "AdamW", "params": {}}, "scheduler": {"type": "WarmupLR", "params": {}}}
    ds_config.DeepSpeedConfig(Recorder({"train_batch_size": 8, **empty}, log))
    read = {".".join(path) for path in log} - set(REMOVED) - {"optimizer.params.max_grad_norm"}

    def known(node, prefix=""):
        for key, child in node.items():
            yield prefix + key
            if isinstance(child, dict) and prefix + key not in MODELS:
                yield from known(child, f"{prefix}{key}.")

    # read by deepspeed.initialize itself; the first also here once the ranks of an earlier test have met
    elsewhere = {
        "sequence_parallel_size",
        "data_parallel_size",
        "timers.throughput.enabled",
        "timers.throughput.synchronized",
    }
    assert set(known(DEEPSPEED)) - elsewhere == read - elsewhere


@pytest.mark.parametrize("key", MODELS)
def test_typed_blocks(key):
    _same_fields(DEEPSPEED[key], MODELS[key])


def test_nested_typed_blocks():
    _same_fields(ZERO["offload_param"], DeepSpeedZeroOffloadParamConfig)
    _same_fields(ZERO["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig)
    _same_fields(ZERO["leaf_module"], DeepSpeedZeroLeafModuleConfig)
    _same_fields(DEEPSPEED["timers"]["throughput"], DeepSpeedThroughputTimerConfig)


def _same_fields(node, model):
    names = {alias: field for name, field in model.model_fields.items() for alias in (name, field.alias) if alias}
    assert set(node) == set(names)
    for name, key in node.items():
        kind = str(names[name].annotation)
        if not isinstance(key, dict) and key.type in ("bool", "int", "number"):
            words = {"bool": ("bool",), "int": ("int", "Enum"), "number": ("float", "int")}[key.type]
            assert any(word in kind for word in words), (name, kind)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    parameters = dict(inspect.signature(getattr(lr_schedules, name).__init__).parameters)
    assert set(SCHEDULERS[name]) == set(parameters) - {"self", "optimizer", "last_batch_iteration"}
    assert set(SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)


def test_removed_keys():
    assert set(REMOVED) == set(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(REMOVED_ZERO) == set(ds_config._REMOVED_ZERO_CONFIG_KEYS)


def test_the_default_that_must_be_written():
    assert ds_config.GRADIENT_CLIPPING_DEFAULT == 1.0
