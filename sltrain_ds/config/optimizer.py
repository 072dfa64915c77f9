"""DeepSpeed's optimizer and scheduler blocks: known types, each with its parameters (runtime/lr_schedules.py)."""

from sltrain_ds.errors import UserError

from .deepspeed_keys import OPTIMIZERS, SCHEDULERS
from .jsonfile import shown
from .tree import check, nearest


def check_optimizer(data):
    """The optimizer block, its type in DeepSpeed's spelling; Adam and AdamW only."""
    written = data.get("optimizer")
    if written is None:
        raise UserError('optimizer: is missing; write {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": true}}')
    kind = _type("optimizer", written, OPTIMIZERS, "Adam")
    params = dict(written.get("params", {}))
    if "max_grad_norm" in params:
        raise UserError(
            "optimizer.params.max_grad_norm: DeepSpeed refuses it; write gradient_clipping at the top level"
        )
    params = check(params, OPTIMIZERS[kind], "optimizer.params")
    if "lr" not in params:
        raise UserError(
            "optimizer.params.lr: is missing; write the peak learning rate, for example 0.003 (the paper's)"
        )
    if kind == "AdamW" and params.get("adam_w_mode") is False:
        raise UserError('optimizer.params.adam_w_mode: false contradicts optimizer.type "AdamW"; set type "Adam"')
    betas = params.get("betas", [0.9, 0.999])
    if betas != "auto" and (len(betas) != 2 or not all(_number(beta) and 0 <= beta < 1 for beta in betas)):
        raise UserError(
            f"optimizer.params.betas: must be two numbers in [0, 1), for example [0.9, 0.999]; got {shown(betas)}"
        )
    return {**written, "type": kind, "params": params}


def check_scheduler(data):
    """The scheduler block with its parameters typed, or None where there is none (a constant learning rate)."""
    block = data.get("scheduler")
    if block is None:
        return None
    kind = _type("scheduler", block, SCHEDULERS, "WarmupCosineLR")
    params = block.get("params", {})
    if kind == "WarmupCosineLR":
        for key, ratio in (("warmup_min_lr", "warmup_min_ratio"), ("warmup_max_lr", None)):
            if key in params:
                instead = f"write {ratio}" if ratio else "remove it"
                raise UserError(
                    f"scheduler.params.{key}: WarmupCosineLR scales optimizer.params.lr by ratios; {instead}"
                )
    params = check(params, SCHEDULERS[kind], "scheduler.params")
    required = {"OneCycle": ("cycle_min_lr", "cycle_max_lr")}.get(kind, ())
    if "total_num_steps" in SCHEDULERS[kind]:
        required = ("total_num_steps",)
    if kind == "WarmupDecayLR":
        required = ("total_num_steps", "warmup_max_lr")  # DeepSpeed's default is 0.001, whatever the optimizer's lr
    for key in required:
        if key not in params:
            auto = ' or "auto"' if SCHEDULERS[kind][key].auto else ""
            raise UserError(f"scheduler.params.{key}: is missing, {kind} needs it; write a number{auto}")
    if kind == "OneCycle" and "cycle_momentum" not in params:
        raise UserError(
            "scheduler.params.cycle_momentum: is missing, and DeepSpeed would put its own momentum in the place of "
            "optimizer.params.betas; write false, or true to have that"
        )
    return {**block, "type": kind, "params": params}


def check_schedule(data, steps):
    """Resolved numbers of optimizer and scheduler against each other and against sltrain.steps."""
    lr = data["optimizer"]["params"]["lr"]
    scheduler = data.get("scheduler")
    if scheduler is None:
        return
    params = scheduler["params"]
    total, warmup = params.get("total_num_steps"), params.get("warmup_num_steps", 1000)
    if total is not None and steps > total:
        raise UserError(
            f'sltrain.steps: {steps} runs past scheduler.params.total_num_steps {total}; set it to {steps} or "auto", '
            f"or steps to at most {total}"
        )
    if total is not None and warmup >= total:
        written = "" if "warmup_num_steps" in params else " (DeepSpeed's default)"
        raise UserError(
            f"scheduler.params.warmup_num_steps: {warmup}{written} is not below total_num_steps {total}; "
            f'set "auto" or at most {total - 1}'
        )
    peak, low = params.get("warmup_max_lr"), params.get("warmup_min_lr", 0.0)
    if peak is not None and peak != lr:
        raise UserError(
            f'scheduler.params.warmup_max_lr: {peak:g} overrides optimizer.params.lr {lr:g}; set both alike, or "auto"'
        )
    if peak is not None and low > peak:
        raise UserError(
            f"scheduler.params.warmup_min_lr: {low:g} is above warmup_max_lr {peak:g}; set it lower, for example 0"
        )
    for low_key, high_key in (("cycle_min_lr", "cycle_max_lr"), ("cycle_min_mom", "cycle_max_mom")):
        if low_key in params and high_key in params and params[low_key] > params[high_key]:
            raise UserError(
                f"scheduler.params.{low_key}: {params[low_key]:g} is above {high_key} {params[high_key]:g}; swap them"
            )


def _type(block_name, block, table, example):
    kind = block.get("type")
    if kind is None:
        raise UserError(f"{block_name}.type: is missing; write one of {', '.join(table)}")
    if block_name == "optimizer" and kind.lower().replace("_", "") in ("adam8bit", "adamw8bit"):
        raise UserError(
            f'optimizer.type: "{kind}" is no DeepSpeed optimizer; write "{"AdamW" if "w" in kind.lower() else "Adam"}" '
            'and set sltrain.precision.states "8bit"'
        )
    spelled = {name.lower(): name for name in table} if block_name == "optimizer" else {name: name for name in table}
    found = spelled.get(kind.lower() if block_name == "optimizer" else kind)
    if found is None:
        near = nearest(kind, table)
        hint = f"did you mean {near}?" if near else f"write {example}"
        raise UserError(f"{block_name}.type: {shown(kind)} is not supported; {hint} (known: {', '.join(table)})")
    return found


def _number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)
