"""Every key that DeepSpeed 0.19.8 reads, with its type: what is not here is a typo, which DeepSpeed would swallow.

Written down so that checking a file imports neither torch nor DeepSpeed; tests/config/test_deepspeed_keys.py compares
the list with the installed package (runtime/config.py, runtime/zero/config.py, runtime/lr_schedules.py, monitor/...).
"""

from sltrain_ds.formats import SIZE_LIMIT, STEP_LIMIT

from .tree import ANY, BOOL, COUNT, NAMES, SIZE, TEXT, Key

VERSION = "0.19.8"

_POSITIVE, _NONNEGATIVE = Key("number", gt=0), Key("number", ge=0)
_OPTIONAL_TEXT = Key("string", null=True)
_DTYPE = Key("string", choices=("fp32", "bf16"), null=True)
_BLOCK = Key("object")  # passed on or refused as a whole, see refused.py

_OFFLOAD = {
    "device": Key("string", choices=("none", "cpu", "nvme")),
    "nvme_path": _OPTIONAL_TEXT,
    "buffer_count": COUNT,
    "pin_memory": BOOL,
}

ZERO = {
    "stage": Key("int", choices=(0, 1, 2, 3)),
    "contiguous_gradients": BOOL,
    "reduce_scatter": BOOL,
    "reduce_bucket_size": Key("int", ge=1, le=STEP_LIMIT, auto=True),
    "use_multi_rank_bucket_allreduce": BOOL,
    "allgather_partitions": BOOL,
    "allgather_bucket_size": COUNT,
    "overlap_comm": Key("bool", null=True),
    "compute_grad_norm": BOOL,
    "load_from_fp32_weights": BOOL,
    "elastic_checkpoint": BOOL,
    "offload_param": {**_OFFLOAD, "buffer_size": COUNT, "max_in_cpu": COUNT},
    "offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": BOOL,
        "pipeline_write": BOOL,
        "fast_init": BOOL,
        "ratio": Key("number", ge=0, le=1),
        "super_offload": BOOL,
        "cpuadam_cores_perc": Key("number", ge=0, le=1),
    },
    "zenflow": _BLOCK,
    "sub_group_size": COUNT,
    "cpu_offload_param": BOOL,
    "cpu_offload_use_pin_memory": BOOL,
    "cpu_offload": BOOL,
    # each of these is known by two names: the field and its stage-3 alias
    "prefetch_bucket_size": COUNT,
    "stage3_prefetch_bucket_size": Key("int", ge=0, le=STEP_LIMIT, auto=True),
    "param_persistence_threshold": COUNT,
    "stage3_param_persistence_threshold": Key("int", ge=0, le=STEP_LIMIT, auto=True),
    "model_persistence_threshold": COUNT,
    "stage3_model_persistence_threshold": COUNT,
    "max_live_parameters": COUNT,
    "stage3_max_live_parameters": COUNT,
    "max_reuse_distance": COUNT,
    "stage3_max_reuse_distance": COUNT,
    "gather_16bit_weights_on_model_save": BOOL,
    "stage3_gather_16bit_weights_on_model_save": BOOL,
    "module_granularity_threshold": COUNT,
    "stage3_module_granularity_threshold": COUNT,
    "use_all_reduce_for_fetch_params": BOOL,
    "stage3_use_all_reduce_for_fetch_params": BOOL,
    "allgather_sequential": BOOL,
    "stage3_allgather_sequential": BOOL,
    "stage3_gather_fp16_weights_on_model_save": BOOL,
    "ignore_unused_parameters": BOOL,
    "legacy_stage1": BOOL,
    "round_robin_gradients": BOOL,
    "parameter_alignment": BOOL,
    "zero_hpz_partition_size": COUNT,
    "zero_quantized_weights": BOOL,
    "zero_quantized_nontrainable_weights": BOOL,
    "zero_quantized_gradients": BOOL,
    "memory_efficient_linear": BOOL,
    "pipeline_loading_checkpoint": BOOL,
    "override_module_apply": BOOL,
    "log_trace_cache_warnings": BOOL,
    "enable_sanity_checks": BOOL,
    "save_muon_momentum_buffer_in_memory": BOOL,
    "leaf_module": {"classes": NAMES, "names": NAMES, "name_suffixes": NAMES},
}

ADAM = {
    "lr": Key("number", gt=0, auto=True),
    "betas": Key("list", auto=True),
    "eps": Key("number", gt=0, auto=True),
    "weight_decay": Key("number", ge=0, auto=True),
    "adam_w_mode": BOOL,
    "torch_adam": BOOL,
}
OPTIMIZERS = {"Adam": ADAM, "AdamW": ADAM}

_WARMUP = {
    "warmup_num_steps": Key("int", ge=1, le=STEP_LIMIT, auto=True),
    "warmup_type": Key("string", choices=("linear", "log")),
}
_WARMUP_LR = {
    **_WARMUP,
    "warmup_min_lr": Key("number", ge=0, auto=True),
    "warmup_max_lr": Key("number", gt=0, auto=True),
}
_TOTAL = {"total_num_steps": Key("int", ge=1, le=STEP_LIMIT, auto=True)}
_RATIO = Key("number", ge=0, le=1, auto=True)
SCHEDULERS = {
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": {**_TOTAL, **_WARMUP_LR},
    "WarmupCosineLR": {**_TOTAL, **_WARMUP, "warmup_min_ratio": _RATIO, "cos_min_ratio": _RATIO},
    "OneCycle": {
        "cycle_min_lr": _NONNEGATIVE,
        "cycle_max_lr": _POSITIVE,
        "decay_lr_rate": _NONNEGATIVE,
        "cycle_first_step_size": SIZE,
        "cycle_second_step_size": Key("int", ge=0, le=STEP_LIMIT, null=True),
        "cycle_first_stair_count": COUNT,
        "cycle_second_stair_count": Key("int", ge=0, le=STEP_LIMIT, null=True),
        "decay_step_size": COUNT,
        "cycle_momentum": BOOL,
        "cycle_min_mom": Key("number", ge=0, le=1),
        "cycle_max_mom": Key("number", ge=0, le=1),
        "decay_mom_rate": _NONNEGATIVE,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": _POSITIVE,
        "lr_range_test_step_size": SIZE,
        "lr_range_test_step_rate": _NONNEGATIVE,
        "lr_range_test_staircase": BOOL,
    },
}

DEEPSPEED = {
    "train_batch_size": Key("int", ge=1, le=SIZE_LIMIT, auto=True),
    "train_micro_batch_size_per_gpu": Key("int", ge=1, le=SIZE_LIMIT, auto=True),
    "gradient_accumulation_steps": Key("int", ge=1, le=SIZE_LIMIT, auto=True),
    "managed_gradient_accumulation": BOOL,
    # `params` is checked by type afterwards, against OPTIMIZERS and SCHEDULERS
    "optimizer": {"type": TEXT, "params": _BLOCK, "legacy_fusion": BOOL},
    "scheduler": {"type": TEXT, "params": _BLOCK},
    "gradient_clipping": Key("number", ge=0, auto=True),
    "bf16": {
        "enabled": Key("bool", auto=True),
        "immediate_grad_update": BOOL,
        "check_grad_overflow": BOOL,
        "bf16_master_weights_and_grads": BOOL,
        "bf16_optimizer_states": BOOL,
    },
    "bfloat16": _BLOCK,
    "fp16": {
        "enabled": Key("bool", auto=True),
        "auto_cast": BOOL,
        "loss_scale": _NONNEGATIVE,
        "initial_scale_power": COUNT,
        "loss_scale_window": COUNT,
        "hysteresis": COUNT,
        "consecutive_hysteresis": BOOL,
        "min_loss_scale": COUNT,
        "fp16_master_weights_and_grads": BOOL,
    },
    "zero_optimization": ZERO,
    "zero_allow_untested_optimizer": BOOL,
    "zero_force_ds_cpu_optimizer": BOOL,
    "activation_checkpointing": {
        "partition_activations": BOOL,
        "number_checkpoints": Key("int", ge=1, le=STEP_LIMIT, null=True),
        "contiguous_memory_optimization": BOOL,
        "synchronize_checkpoint_boundary": BOOL,
        "profile": BOOL,
        "cpu_checkpointing": BOOL,
    },
    "steps_per_print": Key("int", ge=1, le=STEP_LIMIT, null=True),
    "dump_state": BOOL,
    "disable_python_gc": BOOL,
    "disable_allgather": BOOL,
    "communication_data_type": _DTYPE,
    "seq_parallel_communication_data_type": _DTYPE,
    "prescale_gradients": BOOL,
    "gradient_predivide_factor": _POSITIVE,
    "gradient_allreduce_op": Key("string", choices=("mean", "sum")),
    "wall_clock_breakdown": BOOL,
    "memory_breakdown": BOOL,
    "vocabulary_size": Key("int", ge=1, le=STEP_LIMIT, null=True),
    "dataloader_drop_last": BOOL,
    "log_level": Key("string", choices=("debug", "info", "warning", "error", "critical"), null=True),
    "flops_profiler": {
        "enabled": BOOL,
        "recompute_fwd_factor": _NONNEGATIVE,
        "profile_step": SIZE,
        "module_depth": Key("int", ge=-1, le=SIZE_LIMIT),
        "top_modules": SIZE,
        "detailed": BOOL,
        "output_file": _OPTIONAL_TEXT,
    },
    "tensorboard": {"enabled": BOOL, "output_path": TEXT, "job_name": TEXT},
    "csv_monitor": {"enabled": BOOL, "output_path": TEXT, "job_name": TEXT},
    "wandb": {"enabled": BOOL, "group": _OPTIONAL_TEXT, "team": _OPTIONAL_TEXT, "project": TEXT},
    "comet": {
        "enabled": BOOL,
        "samples_log_interval": SIZE,
        "project": _OPTIONAL_TEXT,
        "workspace": _OPTIONAL_TEXT,
        "api_key": _OPTIONAL_TEXT,
        "experiment_name": _OPTIONAL_TEXT,
        "experiment_key": _OPTIONAL_TEXT,
        "online": Key("bool", null=True),
        "mode": _OPTIONAL_TEXT,
    },
    "comms_logger": {"enabled": BOOL, "prof_all": BOOL, "prof_ops": NAMES, "verbose": BOOL, "debug": BOOL},
    "timers": {"throughput": {"enabled": BOOL, "synchronized": BOOL}},
    "checkpoint": {
        "tag_validation": Key("string", choices=("Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL")),
        "load_universal": BOOL,
        "use_node_local_storage": Key("bool", auto=True),
        "parallel_write": {"pipeline_stage": BOOL},
        "checkpoint_serialization": BOOL,
        "writer": {
            "type": Key("string", choices=("mock", "python", "fast")),
            "decoupled": BOOL,
            "io_buffer_size": COUNT,
            "io_buffer_double": BOOL,
            "show_statistics": BOOL,
            "data_parallel": Key("string", choices=("replica", "socket", "machine"), null=True),
            "io_multiplier": SIZE,
        },
    },
    "data_types": {
        "grad_accum_dtype": _DTYPE,
        "param_dtype": _DTYPE,
        "buffer_dtype": _DTYPE,
        "keep_in_fp32_modules": Key("names", auto=True),
    },
    "torch_autocast": {"enabled": BOOL, "dtype": _OPTIONAL_TEXT, "lower_precision_safe_modules": NAMES},
    "aio": {
        "block_size": SIZE,
        "queue_depth": SIZE,
        "intra_op_parallelism": SIZE,
        "single_submit": BOOL,
        "overlap_events": BOOL,
        "use_gds": BOOL,
    },
    "compile": {
        "deepcompile": BOOL,
        "autoep_non_moe": BOOL,
        "free_activation": BOOL,
        "free_activation_threshold": COUNT,
        "offload_activation": BOOL,
        "offload_activation_pin_memory": BOOL,
        "offload_opt_states": BOOL,
        "double_buffer": BOOL,
        "symmetric_memory": BOOL,
        "debug_log": BOOL,
        "offload_parameters": BOOL,
        "sync_before_reduce": BOOL,
        "sync_after_reduce": BOOL,
        "sync_before_allgather": BOOL,
        "sync_after_allgather": BOOL,
        "keep_int_input_tensors": BOOL,
        "keep_all_input_tensors": BOOL,
        "passes": Key("names", null=True),
    },
    # engines and features that replace what sltrain_ds does itself: known, and refused by name
    "autotuning": _BLOCK,
    "data_efficiency": _BLOCK,
    "datastates_ckpt": ANY,
    "expert_parallel": _BLOCK,
    "hybrid_engine": _BLOCK,
    "pipeline": _BLOCK,
    "tensor_parallel": _BLOCK,
    "weight_quantization": _BLOCK,
    "sequence_parallel_size": SIZE,
    "data_parallel_size": SIZE,
    "use_data_before_expert_parallelism": BOOL,
}

# top-level and ZeRO keys that DeepSpeed once had; it raises on them, so do we, earlier
REMOVED = (
    "nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
    "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
)  # fmt: skip
REMOVED_ZERO = ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")
