"""`initialize`: what `deepspeed.initialize` does, with the optimizer, groups and checks an SLTrain model needs."""

import copy

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from sltrain_ds.config import RunConfig, from_dict
from sltrain_ds.config.jsonfile import read_json
from sltrain_ds.errors import UserError
from sltrain_ds.methods.supports import check_supports_agree
from sltrain_ds.optim.blockwise_adam import BlockwiseAdam
from sltrain_ds.optim.build import build_optimizer
from sltrain_ds.zero.agree_on_modes import agree_on_modes
from sltrain_ds.zero.aligned import AlignedInit, partition_aligned
from sltrain_ds.zero.deepspeed_names import check_names
from sltrain_ds.zero.engine_swap import zero_classes
from sltrain_ds.zero.per_layer.units import split_by_unit
from sltrain_ds.zero.per_layer.update import UnitUpdate
from sltrain_ds.zero.start import start


def initialize(
    args=None, model=None, optimizer=None, model_parameters=None, training_data=None, lr_scheduler=None, *,
    config=None, config_params=None, **rest
):  # fmt: skip
    """Drop-in for `deepspeed.initialize` (deepspeed/__init__.py, 0.19): `(engine, optimizer, dataloader, scheduler)`.

    `config` is a JSON path, a dict or a `RunConfig`. With a "sltrain" block the optimizer is built from the file
    (unless one is given) with a group for each role, and the keys we own are set and printed once; without one
    DeepSpeed sees everything as it is. Models without SLTrain layers pass too. `engine.sltrain_run` is the `RunConfig`
    with `op_mode` settled for every shape, None without the block. Raises `UserError` for what config or ranks get
    wrong.
    """
    check_names()
    start()
    run = _run_config(config or config_params or getattr(args, "deepspeed_config", None))
    if run is not None:
        run = agree_on_modes(model, run, get_accelerator().current_device_name())
        optimizer = optimizer or build_optimizer(model, run)
        if run.sltrain.per_layer_update:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise UserError(
                    "initialize: with sltrain.per_layer_update true, optimizer must be a torch.optim.Optimizer, whose "
                    f"groups are split by layer; got {type(optimizer).__name__}"
                )
            split_by_unit(model, optimizer)
        config = _for_deepspeed(run, getattr(optimizer, "param_groups", []))
        args = config_params = None  # the file itself would be a second config
    aligned = isinstance(optimizer, BlockwiseAdam)
    if aligned and run is not None and run.zero_stage == 3:
        partition_aligned(model, config, _dtype(run))
    clipping = run.sltrain.clipping if run is not None and run.sltrain.per_layer_update else None
    with zero_classes(aligned, clipping):
        result = deepspeed.initialize(
            args=args, model=model, optimizer=optimizer, model_parameters=model_parameters,
            training_data=training_data, lr_scheduler=lr_scheduler, config=config, config_params=config_params, **rest,
        )  # fmt: skip
    if isinstance(result[1], UnitUpdate) and deepspeed.comm.get_rank() == 0:
        print(result[1].describe())
    check_supports_agree(model, result[0].device)
    result[0].sltrain_run = run
    return result


def partitioner(run):
    """What `models.build` calls on each finished module: ZeRO-3 shards it there; None for the other stages."""
    if run.zero_stage != 3:
        return None
    ds_config = copy.deepcopy(run.deepspeed)
    ds_config.pop("optimizer", None)
    kind = AlignedInit if run.sltrain.precision.backend == "ours" else deepspeed.zero.Init

    def partition(module):
        if any(True for _ in module.parameters(recurse=False)):
            kind(module=module, config_dict_or_path=ds_config, dtype=_dtype(run))

    return partition


def _dtype(run):
    return torch.bfloat16 if run.bf16 else torch.float32


def _run_config(config) -> RunConfig | None:
    if isinstance(config, RunConfig):
        return config
    if config is None:
        raise UserError("initialize: no config; pass config, a JSON path, a dict or a RunConfig")
    if not isinstance(config, dict):
        config = read_json(config)
    return from_dict(config, world_size=deepspeed.comm.get_world_size()) if "sltrain" in config else None


def _for_deepspeed(run, groups) -> dict:
    """The config DeepSpeed gets: without the optimizer block, which is built here, and with the keys we own."""
    config = copy.deepcopy(run.deepspeed)
    config.pop("optimizer", None)
    _scale_scheduler(config.get("scheduler", {}).get("params", {}), [group.get("lr_scale", 1.0) for group in groups])
    owned = {"zero_allow_untested_optimizer": True}
    if run.weights in ("bf16", "bf16_stochastic"):
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        owned |= {key: True for key in ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states")}
    config["zero_allow_untested_optimizer"] = True
    if "timers" not in config and not config.get("wall_clock_breakdown"):
        # it waits for the device at every forward and step, and nothing of it is shown
        config["timers"] = {"throughput": {"enabled": False}}
        owned["timers.throughput.enabled"] = False
    if deepspeed.comm.get_rank() == 0:
        print("sltrain_ds sets: " + ", ".join(f"{key} = {str(value).lower()}" for key, value in owned.items()))
    return config


def _scale_scheduler(params: dict, scales: list[float]) -> None:
    """Schedulers that set absolute rates get one a group, so that the multipliers by role survive; in place."""
    for key in ("warmup_max_lr", "warmup_min_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr"):
        if isinstance(params.get(key), int | float) and scales:
            params[key] = [params[key] * scale for scale in scales]
