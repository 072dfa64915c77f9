"""Optimizer of a run: parameter groups by role, torch's fused Adam or 8- and 4-bit states."""

import torch

from sltrain_ds.errors import UserError
from sltrain_ds.methods.layer import MethodLinear
from sltrain_ds.optim.blockwise_adam import BlockwiseAdam

ROLES = ("factors", "sparse", "dense")


def parameter_roles(model) -> dict[str, str]:
    """Dotted parameter name -> "factors", "sparse" or "dense", as the model's layers declare it."""
    roles = {}
    for prefix, module in model.named_modules():
        declared = module.roles if isinstance(module, MethodLinear) else {}
        for name, _ in module.named_parameters(recurse=False):
            roles[f"{prefix}.{name}" if prefix else name] = declared.get(name, "dense")
    return roles


def parameter_groups(model, lr: float, weight_decay: float, lr_scale) -> list[dict]:
    """Groups `factors`, `sparse`, `dense`, `norms`, each with its own lr; the empty ones are left out.

    `norms` are the one-dimensional dense parameters (norms, biases): lr of `dense`, no weight decay, 32-bit states.
    """
    roles = parameter_roles(model)
    groups = {name: [] for name in (*ROLES, "norms")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # under zero.Init the tensor itself is empty
            role = roles[name]
            groups["norms" if role == "dense" and len(shape) < 2 else role].append(parameter)
    scale = {role: getattr(lr_scale, role, 1.0) for role in ROLES}
    scale["norms"] = scale["dense"]
    return [
        {
            "params": parameters,
            "name": name,
            "lr": lr * scale[name],
            "lr_scale": scale[name],
            "weight_decay": 0.0 if name == "norms" else weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def build_optimizer(model, run) -> torch.optim.Optimizer:
    """Adam or AdamW for `run` (a `RunConfig`), over `parameter_groups`.

    `precision.backend`: "torch" is its fused implementation with 32-bit states, "ours" `BlockwiseAdam` with 8- or 4-bit
    ones, "bitsandbytes" its blockwise 8-bit one (tensors under 4,096 values keep 32-bit states). The last two keep
    32-bit states for the `norms` group.
    """
    block = run.deepspeed["optimizer"]
    params = block.get("params", {})
    decoupled = block["type"] == "AdamW" or params.get("adam_w_mode", True)
    lr = params["lr"]
    groups = parameter_groups(model, lr, params.get("weight_decay", 0.0), run.sltrain.method.lr_scale)
    common = {"lr": lr, "betas": tuple(params.get("betas", (0.9, 0.999))), "eps": params.get("eps", 1e-8)}
    precision = run.sltrain.precision
    if precision.backend == "bitsandbytes":
        return _bitsandbytes(groups, common, decoupled)
    if precision.backend == "ours":
        return BlockwiseAdam(
            groups, **common, decoupled=decoupled, states=precision.states, seed=run.sltrain.seed,
            stochastic=precision.weights == "bf16_stochastic",
            names={parameter: name for name, parameter in model.named_parameters()},
        )  # fmt: skip
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(groups, fused=True, **common)


def _bitsandbytes(groups, common, decoupled):
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise UserError(
            f'sltrain.precision.backend: "bitsandbytes" cannot be imported ({error}); install it or set "ours"'
        ) from None

    class ByGroup(bnb.optim.AdamW8bit if decoupled else bnb.optim.Adam8bit):
        # bitsandbytes knows rules by a tensor or by (group, position); ZeRO replaces the tensors and steps groups alone
        def get_config(self, gindex, pindex, group):
            wide = {"optim_bits": 32} if group["name"].rpartition("/")[2] == "norms" else {}
            return super().get_config(gindex, pindex, group) | wide

    return ByGroup(groups, **common)
