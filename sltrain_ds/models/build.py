"""LLaMA presets and model directories -> a converted `transformers` model, ready for the engine."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sltrain_ds.config.presets import PRESETS
from sltrain_ds.errors import UserError
from sltrain_ds.methods.convert import convert
from sltrain_ds.methods.layer import MethodLinear
from sltrain_ds.methods.registry import method_of
from sltrain_ds.ops import modes


def build(run, device: str | torch.device = "cpu", partition: Callable[[nn.Module], None] | None = None):
    """The model of a run, converted by its method, with initial or loaded weights on `device`.

    `run` is a `RunConfig`; `partition` is called on every leaf module once its weights are final (ZeRO-3 shards
    them there, so that at most one whole module is alive). Weights are bf16 under bf16, else fp32.
    Raises `UserError` where the config names a model that cannot be built.
    """
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    block = run.sltrain.model
    if block.path is not None:
        model = _load(Path(block.path), run, dtype).to(device)
        for module in _owners(model):
            partition and partition(module)
    else:
        model = skeleton(run)
        materialise(model, run.sltrain.seed, device, dtype, partition)
    _fit_for_training(model, run)
    return model


def skeleton(run) -> PreTrainedModel:
    """The converted model of a run on the meta device: every shape, no bytes."""
    config = model_config(run.sltrain.model)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        return convert(model, method_of(run.sltrain.method))


def model_config(block) -> LlamaConfig:
    """`LlamaConfig` of a `sltrain.model` block: a preset, LlamaConfig fields, or a directory's config.json."""
    if block.path is not None:
        return AutoConfig.from_pretrained(block.path)
    fields = PRESETS[block.preset] if block.preset is not None else block.config
    return LlamaConfig(**{"use_cache": False, **fields})


def materialise(model: PreTrainedModel, seed: int, device, dtype: torch.dtype, partition=None) -> None:
    """Give a meta-device model its initial weights, module by module.

    Each module draws in fp32 from generators keyed by (seed, its dotted name), then is cast to `dtype`: the same
    numbers on the plain path and under ZeRO-3, for any dtype, order and world size.
    """
    for name, module in _named_owners(model):
        module.to_empty(device=device, recurse=False)
        key = _key(seed, name)
        with torch.no_grad():
            if isinstance(module, MethodLinear):
                module.reset_parameters(torch.Generator().manual_seed(key))
            else:
                # the generator of transformers' own initialisers is the global one
                with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
                    torch.manual_seed(key)
                    model._init_weights(module)
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
        if partition is not None:
            partition(module)
    model.tie_weights()


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _named_owners(model):
    """Modules that hold tensors of their own, once each; a tied weight counts where it comes first."""
    seen = set()
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not all(id(tensor) in seen for tensor in own):
            seen.update(map(id, own))
            yield name, module


def _owners(model):
    return [module for _, module in _named_owners(model)]


def _load(path: Path, run, dtype):
    from sltrain_ds.models.converted import is_converted, load_converted

    if not path.is_dir():
        raise UserError(
            f"sltrain.model.path: {path} is not a directory; give a Hugging Face or converted model directory"
        )
    if is_converted(path):
        _check_method(path, run.sltrain.method)
        model = load_converted(path)
        for parameter in model.parameters():  # not .to(dtype), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        return model
    if method_of(run.sltrain.method).layer is not None:
        raise UserError(
            f"sltrain.model.path: {path} is a dense model, which {run.sltrain.method.name} cannot go on from; "
            'use "method": {"name": "full_rank"}, or a directory that holds converted layers'
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def _check_method(path: Path, block) -> None:
    """A converted directory keeps the layers it was converted with: the config must name the same."""
    from sltrain_ds.models.converted import converted_method

    held = converted_method(path)
    for key in ("name", "rank", "density", "alpha", "support_seed"):
        asked = getattr(block, key, None)
        if key in held and held[key] != asked:
            raise UserError(f"sltrain.method.{key}: {asked} does not fit {path}, converted with {held[key]}; set that")


def _fit_for_training(model, run) -> None:
    model.config.use_cache = False
    model.train()
    model.set_attn_implementation(run.sltrain.model.attention)
    modes.set_op_mode(model, run.sltrain.op_mode)
    kind = run.sltrain.model.activation_checkpointing
    if kind != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
    if run.sltrain.norm == "apex":
        _use_apex_norm(model)


def _use_apex_norm(model) -> None:
    try:
        from apex.normalization import FusedRMSNorm
    except ImportError:
        raise UserError(
            'sltrain.norm: "apex" needs NVIDIA apex built with its CUDA extensions (see `sltrain-ds doctor`); '
            'set "torch"'
        ) from None
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            fused = FusedRMSNorm(tuple(module.weight.shape), eps=module.variance_epsilon, memory_efficient=True)
            fused.weight = module.weight
            model.set_submodule(name, fused)
