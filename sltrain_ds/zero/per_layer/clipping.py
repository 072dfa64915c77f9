"""Clipping when the gradients of the whole model never exist at once."""

import torch
from deepspeed import comm as dist

from sltrain_ds.ops import builder

CHUNK = 1 << 20  # elements cast to fp32 at a time on a CPU without the C++ ops; on a GPU the norm casts as it reads


class UnitClipping:
    """Coefficients for the gradients of one unit after another, and the true global norm of a step.

    mode    "global": none (a bound is refused beside the per-layer update)
            "per_layer": each unit's gradient is clipped by its own norm, over all ranks
            "lagged": uses the global norm extrapolated from the units seen so far, in last step's proportions (in
            the first step the units seen so far count as the whole)
    bound   on the norm; 0.0: no clipping

    Norms are of averaged gradients before clipping. `last_sums` belongs in the checkpoint: the squared norm of the
    units so far, after each unit of the step before; the last is the whole gradient's.
    """

    def __init__(self, mode: str, bound: float, process_group, device):
        self.mode, self.bound, self.process_group, self.device = mode, bound, process_group, device
        self.last_sums: list[float] = []
        self._squares: list[torch.Tensor] = []  # of each unit, this rank's part
        self._sums: list[torch.Tensor] = []

    def start_step(self, last_sums: list[float]) -> None:
        """Restore the sums of a checkpoint's step; drop those of a step that was not finished."""
        self.last_sums = last_sums
        self._squares.clear()
        self._sums.clear()

    def coefficient(self, gradients: list[torch.Tensor]) -> torch.Tensor | float | None:
        """What this rank's part of a unit's gradient is to be multiplied by, or None; a collective with a bound."""
        self._squares.append(sum_of_squares(gradients, self.device))
        if self.mode == "global" or not self.bound:
            return None
        counted = self._squares if self.mode == "lagged" else self._squares[-1:]
        square = self._over_ranks(torch.stack(counted).sum())
        self._sums.append(square)
        if self.mode == "lagged":
            square = square / self._share(len(self._sums) - 1)
        return (self.bound / (square.sqrt() + 1e-6)).clamp(max=1.0)

    def _share(self, unit: int) -> float:
        """Of the whole squared norm, what the units up to this one had in the step before."""
        so_far = self.last_sums[unit] if unit < len(self.last_sums) else 0.0
        return so_far / self.last_sums[-1] if so_far > 0 else 1.0

    def end_step(self) -> torch.Tensor:
        """The global norm of the step that ends; one all-reduce."""
        norm = self._over_ranks(torch.stack(self._squares).sum()).sqrt()
        self.last_sums = torch.stack(self._sums).tolist() if self.mode == "lagged" and self._sums else []
        self._squares.clear()
        self._sums.clear()
        return norm

    def _over_ranks(self, square: torch.Tensor) -> torch.Tensor:
        if dist.get_world_size(self.process_group) > 1:
            dist.all_reduce(square, group=self.process_group)
        return square


def sum_of_squares(tensors: list[torch.Tensor], device) -> torch.Tensor:
    """Sum of all their squares, fp32 or bf16, without a copy in fp32 of any whole tensor; fp32 () on `device`."""
    if torch.device(device).type == "cpu":
        if builder.load():
            return torch.tensor(float(sum(torch.ops.sltrain.sum_of_squares(tensor.contiguous()) for tensor in tensors)))
        tensors = [part for tensor in tensors for part in tensor.reshape(-1).split(CHUNK)]
    # on a GPU a few launches for all of them
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32) if tensors else []
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
