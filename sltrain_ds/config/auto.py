"""Resolves "auto" where Hugging Face users expect it (transformers/integrations/deepspeed.py), from this file alone."""

from sltrain_ds.errors import UserError

# the paper's recipe, where transformers would take its TrainingArguments
_ADAM = {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}


def resolve(data, steps, model_fields):
    """Replace "auto" in ``data`` (changed in place); returns {key: value} of all that was filled in."""
    done = {}

    def fill(block, key, value, path):
        if block.get(key) == "auto":
            block[key] = done[path] = value() if callable(value) else value

    fill(data, "gradient_clipping", 1.0, "gradient_clipping")
    fill(data.get("bf16", {}), "enabled", True, "bf16.enabled")
    fill(data.get("fp16", {}), "enabled", False, "fp16.enabled")
    fill(data.get("checkpoint", {}), "use_node_local_storage", False, "checkpoint.use_node_local_storage")
    params = data.get("optimizer", {}).get("params", {})
    for key, value in _ADAM.items():
        fill(params, key, value, f"optimizer.params.{key}")
    schedule = data.get("scheduler", {}).get("params", {})
    for key, value in {
        "total_num_steps": steps,
        "warmup_num_steps": max(1, round(0.1 * steps)),
        "warmup_min_lr": 0.0,
        "warmup_max_lr": lambda: params["lr"],
        "warmup_min_ratio": 0.0,
        "cos_min_ratio": 0.1,
    }.items():
        fill(schedule, key, value, f"scheduler.params.{key}")
    zero = data.get("zero_optimization", {})
    for key, value in {
        "reduce_bucket_size": lambda h: h * h,
        "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
        "stage3_param_persistence_threshold": lambda h: 10 * h,
    }.items():
        if zero.get(key) == "auto" and "hidden_size" not in model_fields:
            raise UserError(
                f'zero_optimization.{key}: "auto" needs hidden_size, which the model does not name; write a number'
            )
        fill(zero, key, lambda value=value: value(model_fields["hidden_size"]), f"zero_optimization.{key}")
    if zero.get("stage", 0) > 0 and "reduce_bucket_size" not in zero and "hidden_size" in model_fields:
        # DeepSpeed allocates its 5e8 elements whole, whatever the model: one transformer block is enough
        hidden, inner = (
            model_fields["hidden_size"],
            model_fields.get("intermediate_size", 4 * model_fields["hidden_size"]),
        )
        zero["reduce_bucket_size"] = done["zero_optimization.reduce_bucket_size"] = hidden * (4 * hidden + 3 * inner)
    return done
