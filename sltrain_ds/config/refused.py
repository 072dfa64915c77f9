"""What this version does not do or must not be combined: one line each, naming the keys and what to set instead."""

import re

from sltrain_ds.errors import UserError

from .deepspeed_keys import REMOVED, REMOVED_ZERO
from .jsonfile import shown

# DeepSpeed blocks that do what sltrain_ds does itself, or that replace its engine
_BLOCKS = {
    "bfloat16": 'is the old spelling; write "bf16": {"enabled": true}',
    "autotuning": "starts runs of its own; remove it and use `sltrain-ds estimate` to choose the micro-batch",
    "data_efficiency": "replaces the data order, which is a function of (seed, step) here; remove it",
    "datastates_ckpt": "replaces the checkpoint engine; remove it",
    "expert_parallel": "needs mixture-of-experts layers, which are not converted; remove it",
    "hybrid_engine": "is for RLHF generation; remove it",
    "pipeline": "needs a PipelineModule; remove it and shard with zero_optimization.stage 3",
    "tensor_parallel": "splits nn.Linear layers, which the method replaces; remove it, and shard with ZeRO stage 3",
    "weight_quantization": "is for inference; remove it",
    "sequence_parallel_size": "is not supported; remove it and set sltrain.model.activation_checkpointing",
    "data_parallel_size": "goes with sequence_parallel_size, which is not supported; remove it",
}

# keys that DeepSpeed takes and that break later or that no test covers: path -> (values that pass, what to do)
_KEPT_DEFAULTS = {
    "checkpoint.writer": ((), "writes files that resume cannot read without unpickling them; remove it"),
    "checkpoint.load_universal": (
        (False,),
        "is not supported: checkpoints are read as the run's own ranks wrote them; remove it",
    ),
    "checkpoint.use_node_local_storage": (
        (False,),
        "spreads a checkpoint over the nodes, and only rank 0's part has sltrain.json; remove it, and put "
        "sltrain.checkpoint.dir on a shared file system",
    ),
    "checkpoint.checkpoint_serialization": (
        (True,),
        "is not the zip format that is read back without unpickling; remove it",
    ),
    "gradient_allreduce_op": (("mean",), 'makes gradients grow with the number of GPUs; remove it or set "mean"'),
    "zero_optimization.elastic_checkpoint": (
        (False,),
        "writes checkpoints that DeepSpeed 0.19.8 cannot resume from with this optimizer; remove it",
    ),
    "zero_optimization.load_from_fp32_weights": (
        (True,),
        "would resume from weights rounded to bf16, not from where the run stood; remove it",
    ),
    "zero_optimization.zero_quantized_weights": ((False,), "is not tested with converted layers; remove it"),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), "is not tested here; remove it"),
    "zero_optimization.zero_quantized_gradients": ((False,), "is not tested with converted layers; remove it"),
    "zero_optimization.zero_hpz_partition_size": ((0, 1), "is not tested with converted layers; remove it or set 1"),
    "zero_optimization.legacy_stage1": ((False,), "was dropped by DeepSpeed 0.5.9, which stops at it; remove it"),
    "zero_optimization.module_granularity_threshold": ((0,), "is not tested with converted layers; remove it"),
    "zero_optimization.stage3_module_granularity_threshold": ((0,), "is not tested with converted layers; remove it"),
    "data_types.grad_accum_dtype": ((None,), "is not tested here (at stage 1 it brings another optimizer); remove it"),
    "data_types.param_dtype": ((None,), "is what bf16.enabled decides; remove it"),
    "data_types.buffer_dtype": ((None,), "would cast the rotary frequencies, which stay fp32; remove it"),
}

# of the sltrain block: key -> (what it was by default, why it is gone)
_REMOVED_OF_BLOCK = {
    "op_constants": (
        None,
        'is gone, since op_mode "auto" measures on the machine itself; remove it, or set op_mode to a mode',
    ),
}

# of zero_optimization, what the per-layer update leaves no choice of
_PER_LAYER_ZERO = {"reduce_scatter": True, "contiguous_gradients": True, "ignore_unused_parameters": True}


def refuse_removed(data):
    """Keys that DeepSpeed itself has dropped."""
    zero = data.get("zero_optimization")
    for prefix, keys, block in (("", REMOVED, data), ("zero_optimization.", REMOVED_ZERO, zero)):
        for key in keys:
            if isinstance(block, dict) and key in block:
                raise UserError(f"{prefix}{key}: DeepSpeed has removed this feature; remove the key")


def without_removed(block):
    """The `sltrain` block without the keys that it had once, where they stand at what they were by default, as in the
    files of older runs; UserError where they say anything else.
    """
    for key, (default, why) in _REMOVED_OF_BLOCK.items():
        if key in block and block[key] != default:
            raise UserError(f"sltrain.{key}: {why}")
    return {key: value for key, value in block.items() if key not in _REMOVED_OF_BLOCK}


def refuse_combinations(data, block):
    """DeepSpeed keys, checked and resolved, against each other and against the typed block."""
    for key, why in _BLOCKS.items():
        value = data.get(key)
        trivial = value in (1, False) or (isinstance(value, dict) and value.get("enabled") is False)
        if key in data and (key == "bfloat16" or not trivial):
            raise UserError(f"{key}: {why}")
    for line in _kept_defaults(data):
        raise UserError(line)
    for line in _combinations(data, block):
        raise UserError(line)


def _kept_defaults(data):
    for path, (allowed, advice) in _KEPT_DEFAULTS.items():
        *parents, last = path.split(".")
        node = data
        for name in parents:
            node = node.get(name, {})
        if last in node and node[last] not in allowed:
            yield f"{path}: {shown(node[last])} {advice}"
    yield from _patterns(data.get("data_types", {}).get("keep_in_fp32_modules", []))


def _patterns(names):
    """Patterns as DeepSpeed compiles them (runtime/keep_in_fp32.py): each with * for .*, then all as one."""
    if names == "auto":
        return
    patterns = [name.replace("*", ".*") for name in names]
    for name, pattern in [*zip(names, patterns, strict=True), (names, "|".join(sorted(set(patterns))))]:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield (
                f"data_types.keep_in_fp32_modules: {shown(name)} is no regular expression ({error}); write name "
                'patterns such as "rotary_emb.*", or remove it'
            )


def _combinations(data, block):
    zero, bf16 = data.get("zero_optimization", {}), data.get("bf16", {})
    stage, precision = zero.get("stage", 0), block.precision
    if "gradient_clipping" not in data:
        yield "gradient_clipping: is missing, and DeepSpeed would clip at 1.0 unasked; write 0.0 (off) or a bound"
    if data.get("fp16", {}).get("enabled"):
        yield "fp16.enabled: true is not supported; set bf16.enabled true, or neither for fp32"
    if data.get("torch_autocast", {}).get("enabled"):
        yield "torch_autocast.enabled: true is not supported; set bf16.enabled true, or neither for fp32"
    if data.get("compile", {}).get("deepcompile"):
        yield "compile.deepcompile: true replaces the engine's hooks; remove it"
    yield from _per_layer(data, zero, stage, block)
    if stage in (2, 3) and zero.get("reduce_scatter", True):
        for key, plain in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if data.get(key, plain) != plain:
                yield f"{key}: is refused by DeepSpeed 0.19.8 at zero_optimization.stage {stage}; remove it"
    if stage in (1, 2) and zero.get("allgather_bucket_size", 0) % 2:
        yield (
            f"zero_optimization.allgather_bucket_size: {zero['allgather_bucket_size']} is odd, and DeepSpeed 0.19.8 "
            "takes even numbers alone at stages 1 and 2; add 1"
        )
    if bf16.get("enabled") and stage == 0:
        yield (
            "zero_optimization.stage: 0 with bf16.enabled true is wrong in DeepSpeed 0.19.8 (it takes an optimizer "
            "step on zero gradients at the start); set stage 1, 2 or 3, or bf16.enabled false"
        )
    yield from _masters(bf16, precision)
    for key in zero:
        if f"stage3_{key}" in zero:
            yield f"zero_optimization.{key}: is stage3_{key} by another name; keep one of them"
    if data.get("zero_allow_untested_optimizer") is False:
        yield (
            "zero_allow_untested_optimizer: false contradicts the optimizer sltrain_ds builds; remove the key, it is "
            "set to true"
        )
    if data.get("managed_gradient_accumulation") is False:
        yield "managed_gradient_accumulation: false is not supported, the loop counts on true; remove the key"
    yield from _offload(zero)
    if zero.get("zenflow"):
        yield "zero_optimization.zenflow: needs DeepSpeed's own offloaded optimizer; remove it"
    if stage == 3 and precision.backend == "ours":
        for key, value in {
            "reduce_scatter": False,
            "stage3_allgather_sequential": True,
            "allgather_sequential": True,
        }.items():
            if zero.get(key) is value:
                yield (
                    f"zero_optimization.{key}: {shown(value)} computes the size of partitions by itself, and those of "
                    f'precision.states "{precision.states}" are padded; remove the key'
                )
    if zero.get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm: false leaves no gradient norm to log and to check; remove the key"
    if data.get("activation_checkpointing") and any(data["activation_checkpointing"].values()):
        yield (
            "activation_checkpointing: configures DeepSpeed's own checkpoint(), which the model does not call; remove "
            'it and set sltrain.model.activation_checkpointing "reentrant" or "non_reentrant"'
        )


def _masters(bf16, precision):
    weights, states, backend = precision.weights, precision.states, precision.backend
    without_masters = weights in ("bf16", "bf16_stochastic")
    if weights == "fp32" and bf16.get("enabled"):
        yield 'sltrain.precision.weights: "fp32" contradicts bf16.enabled true; set "auto", or bf16.enabled false'
    if weights in ("fp32_master", "bf16", "bf16_stochastic") and not bf16.get("enabled"):
        yield f'sltrain.precision.weights: "{weights}" needs bf16.enabled true; set "auto", or enable bf16'
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if key in bf16 and bf16[key] != without_masters:
            yield (
                f'bf16.{key}: {shown(bf16[key])} contradicts sltrain.precision.weights "{weights}", which sets it; '
                "remove the key"
            )
    if backend == "bitsandbytes" and states != "8bit":
        yield (
            f'sltrain.precision.backend: "bitsandbytes" has no states "{states}"; set backend "auto", or states "8bit"'
        )
    if backend == "torch" and states != "32bit":
        yield f'sltrain.precision.backend: "torch" has no states "{states}"; set backend "auto", or states "32bit"'
    if backend == "ours" and states == "32bit":
        yield 'sltrain.precision.backend: "ours" is for states "8bit" and "4bit"; set backend "auto", or states "8bit"'
    if weights == "bf16_stochastic" and backend != "ours" and states in ("32bit", "8bit"):
        yield (
            f'sltrain.precision.weights: "bf16_stochastic" is rounded by our own Adam, not by "{backend}"; set states '
            '"8bit" or "4bit" with backend "auto", or weights "bf16"'
        )


def _per_layer(data, zero, stage, block):
    if not block.per_layer_update:
        if block.clipping != "global":
            yield (
                f'sltrain.clipping: "{block.clipping}" is how sltrain.per_layer_update clips; set it to "global", or '
                "per_layer_update true"
            )
        return
    if stage not in (2, 3):
        yield (
            f"sltrain.per_layer_update: true needs zero_optimization.stage 2 or 3, which partition gradients; set it "
            f"to 2 (got {stage}), also on one GPU"
        )
    if block.clipping == "global" and data.get("gradient_clipping"):
        yield (
            f'sltrain.clipping: "global" cannot bound gradient_clipping {data["gradient_clipping"]:g} with '
            "sltrain.per_layer_update true, since the whole gradient never exists at once; set clipping "
            '"lagged" or "per_layer", or gradient_clipping 0.0'
        )
    if "keep_step" in ([block.op_mode] if isinstance(block.op_mode, str) else block.op_mode.values()):
        yield (
            'sltrain.op_mode: "keep_step" holds the gradient of every W, which sltrain.per_layer_update true is to '
            'avoid; set "keep", "factored" or "auto"'
        )
    if data.get("bf16", {}).get("check_grad_overflow"):
        yield (
            "bf16.check_grad_overflow: true is to skip steps, and with sltrain.per_layer_update true a layer has been "
            "stepped before the others are known; remove it (a run stops where the gradient norm is not finite)"
        )
    for key, value in _PER_LAYER_ZERO.items():
        if key in zero and zero[key] != value:
            yield (
                f"zero_optimization.{key}: {shown(zero[key])} does not go with sltrain.per_layer_update true; remove it"
            )


def _offload(zero):
    for key in ("offload_optimizer", "offload_param"):
        device = zero.get(key, {}).get("device", "none")
        if device != "none":
            yield (
                f'zero_optimization.{key}: device "{device}" needs DeepSpeed\'s own CPU Adam, not the optimizer with a '
                'group per role that sltrain_ds builds; remove the key and set sltrain.precision.states "8bit"'
            )
    for key in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"):
        if zero.get(key):
            instead = 'sltrain.precision.states "8bit"'
            yield f"zero_optimization.{key}: offload is not supported; remove it and set {instead}"
