"""Units of the per-layer update: what is reduced, stepped and freed together."""

from torch import nn

from sltrain_ds.ops.adam8bit import parameter_key
from sltrain_ds.optim.blockwise_adam import BlockwiseAdam, Segment


def split_by_unit(model, optimizer) -> None:
    """Split the optimizer's parameter groups by unit, in place: "factors" becomes "layers.0/factors", and so on.

    A unit is a transformer block (a child of an `nn.ModuleList`), the embedding, or the rest (final norm and head).
    Inside a unit the groups stay apart, with their rates, weight decay and state format.
    """
    units = _units(model)
    found = []
    for unit in dict.fromkeys(units.values()):
        for index, group in enumerate(optimizer.param_groups):
            parameters = [parameter for parameter in group["params"] if units[parameter] == unit]
            if parameters:
                found.append({**group, "params": parameters, "name": f"{unit}/{group.get('name', index)}"})
    optimizer.param_groups = found


def unit_of(group: dict) -> str:
    """The unit of a group that `split_by_unit` made."""
    return group["name"].rpartition("/")[0]


def _units(model) -> dict[nn.Parameter, str]:
    """Parameter -> unit, in the order of `model.named_parameters()`; a tied one belongs to its first unit."""
    blocks = {
        f"{prefix}.{index}": f"{prefix.rpartition('.')[2]}.{index}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    }
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    embedded = set(embedding.parameters()) if embedding is not None else set()
    units = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        heads = (".".join(parts[:length]) for length in range(1, len(parts)))  # outermost first: blocks may nest lists
        block = next((blocks[head] for head in heads if head in blocks), None)
        units[parameter] = "embedding" if parameter in embedded else block or "head"
    return units


def adopt(optimizer, piece, parameter, offset: int) -> None:
    """Register `piece` (n,) with the inner optimizer as elements `offset`.. of `parameter`."""
    if isinstance(optimizer, BlockwiseAdam):
        optimizer.segments[piece] = [Segment(parameter_key(optimizer.names[parameter]), 0, piece.numel(), offset)]
