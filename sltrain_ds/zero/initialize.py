"""`initialize`: what `deepspeed.initialize` does, with the optimizer, groups and checks an SLTrain model needs."""

import copy

import deepspeed
import torch
from deepspeed.utils import logger

from sltrain_ds.config import RunConfig, from_dict, load
from sltrain_ds.optim import build_optimizer
from sltrain_ds.zero.support_check import check_supports_agree


def initialize(*, model, config, optimizer=None, lr_scheduler=None, **rest):
    """Drop-in for `deepspeed.initialize` (deepspeed/__init__.py, 0.19): `(engine, optimizer, dataloader, scheduler)`.

    `config` is a JSON path, a dict or a `RunConfig`. With a "sltrain" block the optimizer is built from the file with
    a group for each role, and the keys we own are set and printed once; without one DeepSpeed sees the config as it
    is. Models without SLTrain layers pass too. Raises `UserError` for what the config or the ranks get wrong.
    """
    run = _run_config(config)
    if run is None:
        result = deepspeed.initialize(
            model=model, config=config, optimizer=optimizer, lr_scheduler=lr_scheduler, **rest
        )
    else:
        ds_config = copy.deepcopy(run.deepspeed)
        if optimizer is None:
            optimizer = build_optimizer(model, run)
        # DeepSpeed would build its own from this block: ours is built from the same numbers
        ds_config.pop("optimizer", None)
        _scale_scheduler(ds_config, optimizer)
        _set_owned_keys(ds_config, run)
        result = deepspeed.initialize(
            model=model, config=ds_config, optimizer=optimizer, lr_scheduler=lr_scheduler, **rest
        )
    check_supports_agree(model, result[0].device)
    return result


def partitioner(run):
    """What `models.build` calls on each finished module: ZeRO-3 shards it there; None for the other stages."""
    if run.zero_stage != 3:
        return None
    ds_config = copy.deepcopy(run.deepspeed)
    ds_config.pop("optimizer", None)
    dtype = torch.bfloat16 if run.bf16 else torch.float32

    def partition(module):
        if any(True for _ in module.parameters(recurse=False)):
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config, dtype=dtype)

    return partition


def _run_config(config) -> RunConfig | None:
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, dict):
        return from_dict(config, world_size=_world_size()) if "sltrain" in config else None
    return load(config, world_size=_world_size(), check_files=False)


def _world_size() -> int:
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()
    return deepspeed.comm.get_world_size()


def _scale_scheduler(ds_config, optimizer) -> None:
    """The Warmup schedulers set absolute rates: give them one a group, so that the role multipliers survive."""
    params = ds_config.get("scheduler", {}).get("params", {})
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    for key in ("warmup_max_lr", "warmup_min_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr"):
        if isinstance(params.get(key), int | float):
            params[key] = [params[key] * scale for scale in scales]


def _set_owned_keys(ds_config, run) -> None:
    owned = {"zero_allow_untested_optimizer": True}
    if run.weights == "bf16":
        owned["bf16"] = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    for key, value in owned.items():
        if isinstance(value, dict):
            ds_config.setdefault(key, {}).update(value)
        else:
            ds_config[key] = value
    if deepspeed.comm.get_rank() == 0:
        logger.info("sltrain_ds sets: " + ", ".join(f"{key} = {value}" for key, value in owned.items()))


