"""The true global gradient norm of a step, before clipping, at every ZeRO stage."""

import torch


class GradNorm:
    """ZeRO computes it in `step()`; plain fp32 data parallelism (stage 0) does not, and drops the gradients there."""

    def __init__(self, engine):
        self.engine = engine
        self._own = not engine.zero_optimization()
        self._value = None

    def before_step(self) -> None:
        """Call it between each `backward` and `step`."""
        if self._own and self.engine.is_gradient_accumulation_boundary():
            norms = [p.grad.float().norm() for p in self.engine.module.parameters() if p.grad is not None]
            self._value = torch.stack(norms).norm()

    def of_last_step(self) -> torch.Tensor | float:
        """The norm, () on the device or a number, without waiting for the device."""
        norm = self._value if self._own else self.engine.get_global_grad_norm()
        return norm.detach().clone() if torch.is_tensor(norm) else norm
