"""Every mistake gets one line that names the key and what would work."""

import json

import pytest

from sltrain_ds.cli import main
from sltrain_ds.config import load
from sltrain_ds.errors import UserError

OWN_MODEL = {
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def put(path, value):
    """A change of the good config: set the dotted key, or remove it where the value is `...`."""

    def change(config):
        *parents, last = path.split(".")
        for name in parents:
            config = config.setdefault(name, {})
        if value is ...:
            config.pop(last)
        else:
            config[last] = value

    return change


# name: (dotted key, value or ... to remove it, what the line must say)
BAD = {
    # unknown keys, at every level
    "typo at the top": ("train_batchsize", 512, ["train_batchsize: unknown key; did you mean train_batch_size?"]),
    "typo in ZeRO": ("zero_optimization.stages", 2, ["zero_optimization.stages: unknown key; did you mean", "stage?"]),
    "typo three levels down": (
        "zero_optimization.offload_optimizer",
        {"devise": "none"},
        ["zero_optimization.offload_optimizer.devise", "did you mean zero_optimization.offload_optimizer.device?"],
    ),
    "typo in bf16": ("bf16.enable", True, ["bf16.enable: unknown key; did you mean bf16.enabled?"]),
    "typo in optimizer params": ("optimizer.params.learn_rate", 1, ["optimizer.params.learn_rate: unknown key"]),
    "typo in scheduler params": (
        "scheduler.params.warmup_steps",
        9,
        ["did you mean scheduler.params.warmup_num_steps?"],
    ),
    "typo in the block": ("sltrain.stpes", 9, ["sltrain.stpes: unknown key; did you mean sltrain.steps?"]),
    "typo in the method": ("sltrain.method.densty", 0.1, ["did you mean sltrain.method.density?"]),
    "typo in lr_scale": (
        "sltrain.method.lr_scale",
        {"factor": 1},
        ["lr_scale.factor: unknown key", "lr_scale.factors?"],
    ),
    "typo in data": ("sltrain.data.seq_length", 9, ["did you mean sltrain.data.sequence_length?"]),
    "typo in the model's fields": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "hidden_dim": 48}},
        ["sltrain.model.config.hidden_dim: unknown key", "sltrain.model.config.hidden_size?"],
    ),
    "key in the wrong place": ("steps", 9, ["steps: unknown key here; it belongs at sltrain.steps"]),
    "DeepSpeed's key in the block": ("sltrain.gradient_clipping", 1, ["here; it belongs at gradient_clipping"]),
    "top-level key in ZeRO": ("zero_optimization.train_batch_size", 1, ["here; it belongs at train_batch_size"]),
    "method's key in the block": ("sltrain.density", 0.1, ["sltrain.density: unknown key", "sltrain.method.density"]),
    "key of another method": (
        "sltrain.method",
        {"name": "full_rank", "rank": 8},
        ["sltrain.method.rank: method full_rank does not take it", "--set 'sltrain.method="],
    ),
    "removed by DeepSpeed": ("elasticity", {"enabled": True}, ["elasticity: DeepSpeed has removed", "remove the key"]),
    "removed from ZeRO": ("zero_optimization.mics_shard_size", 8, ["mics_shard_size: DeepSpeed has removed"]),
    # types and ranges
    "string for a number": ("sltrain.method.rank", "128", ["sltrain.method.rank", "whole number", "drop the quotes"]),
    "true for a number": ("sltrain.steps", True, ["sltrain.steps: must be a whole number; got true"]),
    "fraction for a whole number": ("sltrain.steps", 10.5, ["sltrain.steps: must be a whole number; got 10.5"]),
    "number for a flag": ("sltrain.deterministic", 1, ["sltrain.deterministic: must be true or false; got 1"]),
    "density above one": ("sltrain.method.density", 3, ["sltrain.method.density: must be at most 1", "got 3"]),
    "density zero": ("sltrain.method.density", 0, ["sltrain.method.density: must be above 0"]),
    "alpha negative": ("sltrain.method.alpha", -1, ["sltrain.method.alpha: must be above 0"]),
    "rank zero": ("sltrain.method.rank", 0, ["sltrain.method.rank: must be at least 1"]),
    "negative multiplier": ("sltrain.method.lr_scale", {"sparse": -0.3}, ["lr_scale.sparse: must be at least 0"]),
    "huge size": ("sltrain.data.sequence_length", 2**31, ["sequence_length: must be at most 2147483647"]),
    "huge rank": ("sltrain.method.rank", 2**31, ["sltrain.method.rank: must be at most 2147483647"]),
    "huge batch": ("train_batch_size", 2**31, ["train_batch_size", "<= 2147483647"]),
    "huge number of steps": ("sltrain.steps", 2**53 + 1, ["sltrain.steps: must be at most 9007199254740992"]),
    "huge budget": ("sltrain.eval", {"tokens": 10**20}, ["sltrain.eval.tokens: must be at most 9007199254740992"]),
    "huge count": ("zero_optimization.sub_group_size", 2**63, ["sub_group_size", "<= 9223372036854775807"]),
    "targets as a string": ("sltrain.method.target_modules", "mlp", ["target_modules: must be a list [...]"]),
    "empty tokenizer": ("sltrain.tokenizer", "", ["sltrain.tokenizer: must not be empty"]),
    "ZeRO stage 4": ("zero_optimization.stage", 4, ["zero_optimization.stage: must be one of 0, 1, 2, 3; got 4"]),
    "ZeRO as a flag": ("zero_optimization", True, ["zero_optimization: must be an object"]),
    "lr zero": ("optimizer.params.lr", 0, ["optimizer.params.lr: must be a number > 0"]),
    "lr a string": ("optimizer.params.lr", "3e-3", ["optimizer.params.lr", "drop the quotes"]),
    "beta one": ("optimizer.params.betas", [0.9, 1.0], ["optimizer.params.betas", "[0, 1)", "[0.9, 0.999]"]),
    "one beta": ("optimizer.params.betas", [0.9], ["optimizer.params.betas: must be two numbers"]),
    "clipping negative": ("gradient_clipping", -1, ["gradient_clipping: must be a number >= 0"]),
    "flag as a string": ("bf16.enabled", "true", ["bf16.enabled: must be true or false", "drop the quotes"]),
    "warm-up by an unknown curve": ("scheduler.params.warmup_type", "cosine", ["warmup_type", '"linear" or "log"']),
    "auto where nothing resolves it": ("steps_per_print", "auto", ['steps_per_print: "auto" is not resolved here']),
    "auto in the block": (
        "sltrain.steps",
        "auto",
        ["sltrain.steps: must be a whole number", '"auto" is not known here'],
    ),
    "unknown preset": ("sltrain.model.preset", "llama_60", ['"llama_7b"', 'did you mean "llama_60m"?']),
    "unknown method": (
        "sltrain.method.name",
        "sltran",
        ["sltrain.method.name: unknown method", 'did you mean "sltrain"?'],
    ),
    "mixture weight zero": ("sltrain.data.dir", {"a": 1, "b": 0}, ["sltrain.data.dir", "positive weights"]),
    "empty mixture": ("sltrain.data.dir", {}, ["sltrain.data.dir: must be a prepared directory"]),
    # missing
    "no block": ("sltrain", ..., ["sltrain: the block is missing; add"]),
    "no optimizer": ("optimizer", ..., ["optimizer: is missing; write", '"AdamW"']),
    "no lr": ("optimizer.params.lr", ..., ["optimizer.params.lr: is missing", "0.003"]),
    "no clipping": ("gradient_clipping", ..., ["gradient_clipping: is missing", "1.0", "0.0 (off)"]),
    "no steps": ("sltrain.steps", ..., ["sltrain.steps: is missing; write it (optimizer steps of the run)"]),
    "no tokenizer": ("sltrain.tokenizer", ..., ["sltrain.tokenizer: is missing"]),
    "no method name": ("sltrain.method.name", ..., ['sltrain.method.name: is missing; write one of "sltrain"']),
    "no density": ("sltrain.method.density", ..., ["sltrain.method.density: is missing"]),
    "no model": ("sltrain.model", {}, ["sltrain.model: needs exactly one of preset, config and path; it has none"]),
    "half a model": (
        "sltrain.model",
        {"config": {"vocab_size": 384}},
        ["sltrain.model.config.hidden_size: is missing"],
    ),
    "no total_num_steps": ("scheduler.params.total_num_steps", ..., ["total_num_steps: is missing", 'or "auto"']),
    # the batch triangle
    "triangle": ("train_batch_size", 500, ["500 is not", "32 x", "works with", "480 or 512"]),
    "triangle with accumulation": (
        "gradient_accumulation_steps",
        7,
        ["leave gradient_accumulation_steps out", "(here 16)"],
    ),
    "micro-batch that cannot be derived": (
        "train_micro_batch_size_per_gpu",
        "auto",
        ["cannot be derived", "for example 8"],
    ),
    "global batch that cannot be derived": ("train_batch_size", ..., ["train_batch_size", "cannot be derived"]),
    # what this version does not do
    "stochastic rounding of others": (
        "sltrain.precision",
        {"weights": "bf16_stochastic"},
        ["bf16_stochastic", 'not by "torch"', "states"],
    ),
    "lagged clipping": ("sltrain.clipping", "lagged", ["sltrain.clipping", 'set it to "global"']),
    "unknown mode of a shape": ("sltrain.op_mode", {"512x512": "dense"}, ["sltrain.op_mode", '"factored"']),
    "mode of no shape": ("sltrain.op_mode", {"mlp": "keep"}, ["sltrain.op_mode", '"mlp"', "OUTxIN"]),
    "mode of a shape that is not there": ("sltrain.op_mode", {"7x8": "keep"}, ["sltrain.op_mode", "7x8", "512x512"]),
    "memory below zero": ("sltrain.op_memory", -1, ["sltrain.op_memory", "at least 0"]),
    "file of the cost model that was": (
        "sltrain.op_constants",
        "c.json",
        ["sltrain.op_constants", "gone", '"auto"', "remove it"],
    ),
    "unknown mode": ("sltrain.op_mode", "dense", ["sltrain.op_mode", '"factored"', ' {"OUTxIN": mode, ...}, not']),
    "unknown states": ("sltrain.precision.states", "2bit", ["sltrain.precision.states", '"8bit"']),
    "4-bit of bitsandbytes": (
        "sltrain.precision",
        {"states": "4bit", "backend": "bitsandbytes"},
        ['precision.backend: "bitsandbytes" has no states "4bit"', '"auto"'],
    ),
    "our 32-bit": ("sltrain.precision", {"backend": "ours"}, ['precision.backend: "ours" is for states "8bit"']),
    "unscattered aligned gradients": (
        "zero_optimization",
        {"stage": 3, "reduce_scatter": False},
        ["zero_optimization.reduce_scatter: false", "precision.states", "remove the key"],
    ),
    "fp16": ("fp16", {"enabled": True}, ["fp16.enabled", "bf16.enabled true"]),
    "old bf16 spelling": ("bfloat16", {"enabled": True}, ["bfloat16: is the old spelling", '"bf16"']),
    "optimizer offload": ("zero_optimization.offload_optimizer", {"device": "cpu"}, ["offload_optimizer", '"8bit"']),
    "old offload": ("zero_optimization.cpu_offload", True, ["zero_optimization.cpu_offload", '"8bit"']),
    "parameter offload": ("zero_optimization.offload_param", {"device": "nvme"}, ["offload_param", "nvme"]),
    "pipeline": ("pipeline", {"stages": 2}, ["pipeline: needs a PipelineModule", "stage 3"]),
    "tensor parallel": ("tensor_parallel", {"autotp_size": 2}, ["tensor_parallel", "stage 3"]),
    "curriculum": ("data_efficiency", {"enabled": True}, ["data_efficiency", "(seed, step)"]),
    "deepcompile": ("compile", {"deepcompile": True}, ["compile.deepcompile", "remove it"]),
    "DeepSpeed's checkpointing": (
        "activation_checkpointing",
        {"partition_activations": True},
        ["activation_checkpointing", "sltrain.model.activation_checkpointing"],
    ),
    "Adam8bit": ("optimizer.type", "Adam8bit", ["optimizer.type", '"Adam"', 'precision.states "8bit"']),
    "misspelt optimizer": ("optimizer.type", "AdmaW", ["optimizer.type", "did you mean AdamW?"]),
    "other optimizer": ("optimizer.type", "Lamb", ["optimizer.type", "Adam, AdamW"]),
    "misspelt scheduler": ("scheduler.type", "WarmupCosine", ["scheduler.type", "did you mean WarmupCosineLR?"]),
    "clipping as an optimizer's": ("optimizer.params.max_grad_norm", 1.0, ["max_grad_norm", "gradient_clipping"]),
    # what cannot be combined
    "bf16 at stage 0": (
        "zero_optimization.stage",
        0,
        ["zero_optimization.stage: 0", "bf16.enabled", "stage 1, 2 or 3"],
    ),
    "fp32 weights under bf16": ("sltrain.precision.weights", "fp32", ["precision.weights", "bf16.enabled"]),
    "our key turned off": ("zero_allow_untested_optimizer", False, ["zero_allow_untested_optimizer", "remove the key"]),
    "our bf16 flag": ("bf16.bf16_optimizer_states", False, ["bf16.bf16_optimizer_states", "precision.weights"]),
    "accumulation by the caller": ("managed_gradient_accumulation", False, ["managed_gradient_accumulation", "remove"]),
    "elastic checkpoints": ("zero_optimization.elastic_checkpoint", True, ["elastic_checkpoint: true", "remove it"]),
    "the first stage 1": ("zero_optimization.legacy_stage1", True, ["legacy_stage1: true", "remove it"]),
    "leaves by size": (
        "zero_optimization.stage3_module_granularity_threshold",
        1000,
        ["stage3_module_granularity_threshold: 1000", "remove it"],
    ),
    "masters from rounded weights": (
        "zero_optimization.load_from_fp32_weights",
        False,
        ["load_from_fp32_weights: false", "remove it"],
    ),
    "odd bucket": ("zero_optimization.allgather_bucket_size", 5001, ["allgather_bucket_size: 5001 is odd", "add 1"]),
    "prescaled gradients": ("prescale_gradients", True, ["prescale_gradients", "stage 2", "remove it"]),
    "predivided gradients": ("gradient_predivide_factor", 2.0, ["gradient_predivide_factor", "stage 2", "remove it"]),
    # what would break later, or has no test
    "checkpoint writer": ("checkpoint", {"writer": {}}, ["checkpoint.writer: {} writes files", "remove it"]),
    "universal checkpoints": ("checkpoint", {"load_universal": True}, ["checkpoint.load_universal: true is not"]),
    "checkpoints spread over nodes": (
        "checkpoint",
        {"use_node_local_storage": True},
        ["checkpoint.use_node_local_storage: true", "sltrain.checkpoint.dir"],
    ),
    "torch's old file format": (
        "checkpoint",
        {"checkpoint_serialization": False},
        ["checkpoint.checkpoint_serialization: false", "zip", "remove it"],
    ),
    "summed gradients": ("gradient_allreduce_op", "sum", ['gradient_allreduce_op: "sum"', 'set "mean"']),
    "quantised weights": ("zero_optimization.zero_quantized_weights", True, ["zero_quantized_weights: true", "remove"]),
    "quantised frozen weights": (
        "zero_optimization.zero_quantized_nontrainable_weights",
        True,
        ["zero_optimization.zero_quantized_nontrainable_weights: true", "remove it"],
    ),
    "quantised gradients": (
        "zero_optimization.zero_quantized_gradients",
        True,
        ["zero_optimization.zero_quantized_gradients: true", "remove it"],
    ),
    "hpZ": ("zero_optimization.zero_hpz_partition_size", 2, ["zero_hpz_partition_size: 2", "set 1"]),
    "gradients accumulated in fp32": (
        "data_types",
        {"grad_accum_dtype": "fp32"},
        ['data_types.grad_accum_dtype: "fp32" is not tested', "remove it"],
    ),
    "buffers of another type": ("data_types", {"buffer_dtype": "bf16"}, ["data_types.buffer_dtype", "remove it"]),
    "no pattern": ("data_types", {"keep_in_fp32_modules": ["a", "("]}, ['keep_in_fp32_modules: "(" is no regular']),
    "patterns that do not go together": (
        "data_types",
        {"keep_in_fp32_modules": ["(?P<x>a)", "(?P<x>b)"]},
        ["keep_in_fp32_modules", "is no regular expression (redefinition"],
    ),
    "one setting, two names": (
        "zero_optimization",
        {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2},
        ["zero_optimization.prefetch_bucket_size: is stage3_prefetch_bucket_size", "keep one"],
    ),
    "parameters of another type": (
        "data_types",
        {"param_dtype": "fp32"},
        ["data_types.param_dtype", "bf16.enabled decides"],
    ),
    "compiler typo": ("compile", {"pases": ["z1"]}, ["compile.pases: unknown key; did you mean compile.passes?"]),
    "schema that is no path": ("$schema", 1, ["$schema: must be a string"]),
    "names that are none": (
        "zero_optimization.leaf_module",
        {"names": [1]},
        ["leaf_module.names: must be a list of strings"],
    ),
    "no norm": ("zero_optimization.compute_grad_norm", False, ["compute_grad_norm", "remove the key"]),
    "torch's 8-bit": ("sltrain.precision.backend", "torch", ["precision.backend", '"auto"']),
    "AdamW without decoupling": ("optimizer.params.adam_w_mode", False, ["adam_w_mode", 'set type "Adam"']),
    "steps past the schedule": ("sltrain.steps", 12000, ["sltrain.steps: 12000", "total_num_steps 11000"]),
    "warm-up longer than the schedule": ("scheduler.params.warmup_num_steps", 11000, ["warmup_num_steps", "10999"]),
    "absolute rate in a ratio schedule": ("scheduler.params.warmup_max_lr", 0.01, ["WarmupCosineLR", "ratios"]),
    "two peaks": (
        "scheduler",
        {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01}},
        ["scheduler.params.warmup_max_lr: 0.01", "optimizer.params.lr 0.003", '"auto"'],
    ),
    "DeepSpeed's default peak": (
        "scheduler",
        {"type": "WarmupDecayLR", "params": {"total_num_steps": 11000}},
        ["scheduler.params.warmup_max_lr: is missing"],
    ),
    "OneCycle's own momentum": (
        "scheduler",
        {"type": "OneCycle", "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01}},
        ["scheduler.params.cycle_momentum: is missing", "optimizer.params.betas", "write false"],
    ),
    "OneCycle upside down": (
        "scheduler",
        {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.01, "cycle_momentum": False}},
        ["scheduler.params.cycle_min_lr: 0.1 is above cycle_max_lr 0.01"],
    ),
    # against the model
    "rank above min(in, out)": (
        "sltrain.method.rank",
        513,
        ["sltrain.method.rank: 513", "model.layers.0.self_attn.q_proj (512 x 512)", "at most 512"],
    ),
    "no non-zero": ("sltrain.method.density", 1e-7, ["sltrain.method.density", "without one non-zero", "at least"]),
    "target that matches nothing": (
        "sltrain.method.target_modules",
        ["attention"],
        ['"attention" matches no', "self_attn"],
    ),
    "two models": ("sltrain.model.path", "somewhere", ["sltrain.model", "it has preset and path"]),
    "model directory that is not there": (
        "sltrain.model",
        {"path": "nowhere"},
        ["sltrain.model.path: nowhere/config.json"],
    ),
    "sequence too long": (
        "sltrain.data.sequence_length",
        4097,
        ["sequence_length: 4097", "max_position_embeddings 4096"],
    ),
    "heads": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "num_attention_heads": 5}},
        ["hidden_size 48", "num_attention_heads 5"],
    ),
    "unknown activation": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "hidden_act": "swiglu"}},
        ["sltrain.model.config.hidden_act", "did you mean", '"silu"'],
    ),
    "token beyond the vocabulary": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "pad_token_id": 384}},
        ["sltrain.model.config: pad_token_id 384 is beyond vocab_size 384; set at most 383"],
    ),
    "unknown rope": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "rope_parameters": {"rope_type": "ntk"}}},
        ['rope_parameters rope_type "ntk" is not known', '"yarn"'],
    ),
    "rope without a type": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "rope_parameters": {"factor": 2}}},
        ["rope_parameters has no rope_type", '"linear"'],
    ),
    "rope without its factor": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "rope_parameters": {"rope_type": "linear"}}},
        ['rope_parameters of rope_type "linear" need factor'],
    ),
    "rope of words": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}},
        ['rope_parameters.rope_theta must be a number above 0; got "1e4"'],
    ),
    "rope factors of another width": (
        "sltrain.model",
        {
            "config": {
                **OWN_MODEL,
                "rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]},
            }
        },
        ["rope_parameters.short_factor must be a list of 6 numbers"],
    ),
    "key and value heads": (
        "sltrain.model",
        {"config": {**OWN_MODEL, "num_key_value_heads": 3}},
        ["num_key_value_heads 3", "set it to 4"],
    ),
}


@pytest.fixture
def line(good, tmp_path):
    """What `load` says about the good config after a change."""

    def of(change, **options):
        change(good)
        path = tmp_path / "run.json"
        path.write_text(json.dumps(good))
        with pytest.raises(UserError) as caught:
            load(path, check_files=False, **options)
        return str(caught.value)

    return of


@pytest.mark.parametrize("key, value, says", BAD.values(), ids=BAD)
def test_one_clear_line(line, key, value, says):
    message = line(put(key, value))
    assert "\n" not in message and len(message) < 400
    for part in says:
        assert part in message, message


@pytest.mark.parametrize("key, value, says", BAD.values(), ids=BAD)
def test_exit_code_2_and_no_traceback(good, tmp_path, capsys, key, value, says):
    put(key, value)(good)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(good))
    assert main(["config", "check", str(path), "--no-files"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("sltrain-ds: error: ") and err.count("\n") == 1


def test_masters_without_bf16(line, good):
    good["bf16"]["enabled"] = False
    message = line(put("sltrain.precision.weights", "fp32_master"))
    assert 'sltrain.precision.weights: "fp32_master" needs bf16.enabled true' in message


def test_bitsandbytes_without_8bit(line):
    message = line(put("sltrain.precision", {"backend": "bitsandbytes"}))
    assert 'sltrain.precision.backend: "bitsandbytes" has no states "32bit"' in message


def test_a_tied_head_as_a_target(line, good):
    good["sltrain"]["model"] = {"config": {**OWN_MODEL, "tie_word_embeddings": True}}
    good["sltrain"]["method"] |= {"rank": 8, "density": 0.1}
    message = line(put("sltrain.method.target_modules", ["mlp", "lm_head"]))
    assert "target_modules: lm_head shares the embedding's weight" in message and "leave lm_head out" in message


@pytest.mark.parametrize("world", [3, 32])
def test_triangle_of_another_world(line, world):
    message = line(put("sltrain.seed", 1), world_size=world)
    assert f"x {world} GPUs" in message and "works on" in message and "\n" not in message


@pytest.mark.parametrize(
    "text, says",
    [
        ("", ["line 1, column 1", "the file is empty"]),
        ("{\n  // batch\n}", ["line 2, column 3", "no comments"]),
        ("{'a': 1}", ["line 1, column 2", "double quotes"]),
        ('{\n  "steps": 1,\n}', ["line", "comma before the closing bracket"]),
        ('{"a": 1 "b": 2}', ["column 9", "comma"]),
        ('{"a": True}', ["column 7", "lower case"]),
        ('{"a": 1', ["line 1", "missing just before"]),
        ('{"a": NaN}', ["NaN is not JSON", "finite number"]),
        ('{\n"bf16": {},\n"bf16": {}\n}', ['key "bf16" is written twice', "(lines 2, 3)"]),
        ("[1, 2]", ["top level must be an object", "a list"]),
        ("{}", ["sltrain: the block is missing"]),
        ('{"a": ' + "9" * 5000 + "}", ["write a smaller number"]),
        ("[" * 100_000, ["nested too deeply"]),
    ],
)
def test_not_json(tmp_path, text, says):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and (text == "{}" or message.startswith(str(path)))
    for part in says:
        assert part in message, message


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file; ds_configs/"):
        load(tmp_path / "missing.json")
    with pytest.raises(UserError, match="is a directory"):
        load(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8 text at byte 7"):
        load(tmp_path / "latin.json")
