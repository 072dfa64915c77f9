"""Put a method's layers in place of a transformers model's ``nn.Linear`` modules, by name."""

from collections import Counter

from torch import nn

from sltrain_ds.errors import UserError
from sltrain_ds.methods.layer import MethodLinear
from sltrain_ds.methods.options import DEFAULT_TARGETS

# the attention and MLP blocks by the names that transformers gives them; LLaMA's serve most architectures
TARGETS = {"gpt_neox": ("attention", "mlp"), "opt": ("self_attn", "fc1", "fc2")}


def convert(model: nn.Module, config) -> nn.Module:
    """Replace every targeted ``nn.Linear`` of ``model`` in place by the layer of ``config`` (a `Method`); return it.

    A module is a target if one of ``target_modules`` is a component of its dotted name ("mlp"; "mlp.down_proj" works
    too). Layers keep the weight's device and dtype, the meta device too, and start from the default generator. What
    cannot be converted is refused by name.
    """
    if config.layer is None:
        return model
    patterns = config.target_modules or TARGETS.get(_model_type(model), DEFAULT_TARGETS)
    if isinstance(patterns, str):
        raise UserError(f"target_modules must be a list of names, not the string {patterns!r}")
    targets = _targets(model, patterns)
    for name, linear in targets.items():
        config.check(linear, name)  # all of them before the first is replaced
    for name, linear in targets.items():
        parent, _, child = name.rpartition(".")
        layer = config.make(linear, canonical(name), device=linear.weight.device, dtype=linear.weight.dtype)
        setattr(model.get_submodule(parent), child, layer.train(linear.training))
    return model


def canonical(name: str) -> str:
    """A module's dotted name without what wrappers put in between (torch.compile, FSDP, activation checkpointing)."""
    wrappers = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _model_type(model):
    return getattr(getattr(model, "config", None), "model_type", None)


def _targets(model, patterns):
    modules = dict(model.named_modules(remove_duplicate=False))
    converted = next((name for name, module in modules.items() if isinstance(module, MethodLinear)), None)
    if converted is not None:
        raise UserError(f"{converted} is a {type(modules[converted]).__name__} already; convert a model once")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    targets, missed = {}, set(patterns)
    for name, module in modules.items():
        matched = {pattern for pattern in patterns if f".{pattern}." in f".{name}."}
        if not matched:
            continue
        _refuse_unfit(name, module, uses)
        if type(module) is nn.Linear:
            targets[name] = module
            missed -= matched
    if missed:
        linears = sorted({name.rpartition(".")[2] for name, module in modules.items() if type(module) is nn.Linear})
        raise UserError(
            f"target_modules {sorted(missed)} match no nn.Linear; this model has {', '.join(linears) or 'none at all'}"
        )
    return targets


def _refuse_unfit(name, module, uses):
    kind = type(module).__name__
    if kind == "Conv1D" and hasattr(module, "nf"):
        raise UserError(
            f"{name} is a Conv1D (GPT-2's transposed linear), which cannot be converted; choose a model with nn.Linear"
        )
    fused = next((key for key, p in module.named_parameters(recurse=False) if p.dim() == 3), None)
    if fused:
        raise UserError(
            f"{name}.{fused} holds fused experts in one 3-D parameter, which cannot be converted; "
            "leave it out of target_modules"
        )
    if (isinstance(module, nn.Linear) and type(module) is not nn.Linear) or hasattr(module, "qweight"):
        raise UserError(f"{name} is a {kind}: quantised or special linears cannot be converted; convert a plain model")
    if type(module) is nn.Linear and uses[id(module.weight)] > 1:
        raise UserError(
            f"{name}.weight is tied to another parameter, which cannot be converted; "
            "untie it or leave it out of target_modules"
        )
