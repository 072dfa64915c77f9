"""Before the first step, every rank must hold the same supports."""

import torch
from torch import distributed as dist

from sltrain_ds.errors import UserError


def supports(model) -> dict[str, dict]:
    """Layer name -> `support_info()` of every layer that has a support, built where it was not yet."""
    return {module.layer_name: module.support_info() for module in model.modules() if hasattr(module, "support_info")}


def check_supports_agree(model, device) -> None:
    """Compare the checksums of all supports across ranks; `UserError` names the first layer that differs."""
    infos = supports(model)
    if not infos or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = torch.tensor([info["checksum"] for info in infos.values()], dtype=torch.int64, device=device)
    # int64, since collectives refuse the supports' own uint16
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    for name, differs in zip(infos, (low != high).tolist(), strict=True):
        if differs:
            raise UserError(
                f"support of {name} differs between ranks; give every rank the same config (support_seed, density) "
                "and the same version of sltrain_ds"
            )
