"""SLTrain (NeurIPS 2024) as a DeepSpeed-integrated training stack."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["SLTrainConfig", "SLTrainLinear", "convert", "initialize"]

_HOMES = {
    "SLTrainConfig": "sltrain_ds.methods.sltrain",
    "SLTrainLinear": "sltrain_ds.methods.sltrain_layer",
    "convert": "sltrain_ds.methods.convert",
    "initialize": "sltrain_ds.zero.initialize",
}


def __getattr__(name):
    # lazy: `sltrain-ds --help` and config checks should not pay for importing torch and DeepSpeed
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
