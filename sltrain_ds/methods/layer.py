"""The base class of the layers that methods put in place of ``nn.Linear``."""

from typing import ClassVar

import torch
from torch import nn

from sltrain_ds.errors import UserError


class MethodLinear(nn.Module):
    """A layer that a method puts in place of an ``nn.Linear``.

    Attributes: in_features, out_features, bias (Parameter (out,) or None), layer_name (canonical dotted name, kept at
    convert). ``roles`` maps a parameter's own name to "factors", "sparse" or "dense"; what is not named is "dense".
    ``index`` names the integer buffers that say where sparse values belong.
    """

    roles: ClassVar[dict[str, str]] = {}
    index: ClassVar[tuple[str, ...]] = ()

    in_features: int
    out_features: int
    layer_name: str

    def dense_weight(self) -> torch.Tensor:
        """Merged W (out, in), without gradient, in the parameters' dtype; built anew at every call."""
        raise UserError(
            f"{self.layer_name or 'a layer'}: {type(self).__name__} does not define dense_weight, so it has no W to "
            "export; keep the checkpoints, or define it"
        )

    def dense_sparse(self) -> torch.Tensor | None:
        """S alone as (out, in), without gradient, or None where the method has no sparse part."""
        return None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initial values, from the (CPU) generator alone: drawn in fp32, then cast, so device and dtype do not change
        them.
        """
        raise TypeError(f"{type(self).__name__} does not define reset_parameters")

    def flops_per_token(self) -> int:
        """Forward multiply-adds x 2 of one token."""
        return 2 * self.in_features * self.out_features


def uniform(shape, bound: float, generator: torch.Generator | None) -> torch.Tensor:
    """fp32 CPU values in U(-bound, bound). Made without torch's factories, which ``deepspeed.zero.Init`` patches to
    cast.
    """
    import numpy as np

    return torch.from_numpy(np.empty(shape, dtype=np.float32)).uniform_(-bound, bound, generator=generator)


def normal(shape, std: float, generator: torch.Generator | None) -> torch.Tensor:
    """fp32 CPU values in N(0, std^2), made as ``uniform`` makes them."""
    import numpy as np

    return torch.from_numpy(np.empty(shape, dtype=np.float32)).normal_(0.0, std, generator=generator)
