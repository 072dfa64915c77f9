"""What a run holds at its peak, by category, on CPU and CUDA, `initialize` included.

A run passes through moments: `initialize` (model and engine are built), `backward` (forward and backward of a
micro-batch), `step` (the optimizer's), `rest` (evaluation, checkpoints). Each moment's peak of tensors is kept; the
categories are those of the largest one and add up to `peak`:

    weights, index, states, masters, gradients, buckets   the engine's tensors, found by walking over them
    workspace      the scratch that W is composed in
    activations    what else lives at the peak of `backward`: saved for backward, being recomputed, passing by
    other          the rest. CUDA: what else lives at the peak of another moment. CPU: the resident set beyond its
                   tensors, so Python, the libraries and their scratch, and what malloc keeps

Walking costs, so it is done while the first steps run: where a parameter's gradient is finished, the tensors alive are
read, and at a new high the engine's are counted. After that a step costs a few reads.
"""

import gc

from torch.multiprocessing.reductions import StorageWeakRef

from sltrain_ds.memory.gauge import Gauge, resident
from sltrain_ds.ops import workspace
from sltrain_ds.zero.held import held_bytes

MOMENTS = ("initialize", "backward", "step", "rest")
LOOKS = 2  # steps in which is looked closely: the states come into being in the first
_NEW_HIGH = 1.005  # walk again where this much more is alive than at the last walk


class Meter:
    """Make it before the model, `watch` the model before the engine is made of it, and `begin` when it is.

    The loop calls `enter(moment)` as it goes on, and `read()` once a step.
    """

    def __init__(self, device):
        self.gauge = Gauge(device)
        self.peaks, self.reserved = dict.fromkeys(MOMENTS, 0), None  # reserved: CUDA's most, of the device, so far
        self.moment, self._engine, self._looks = "initialize", None, 0
        self._last = None  # of the engine's categories: those at the last closer look, and those held between steps
        self._high, self._gradients, self._follows = 0, {}, False  # gradients: storage -> (weak reference, bytes)

    def watch(self, model) -> None:
        """Look where each gradient is finished; before DeepSpeed's own hooks, which take it away."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._look)

    def begin(self, engine) -> None:
        """`initialize` is over; what it left in reference cycles goes now, not at some later step."""
        gc.collect()
        self.enter("rest")
        self._engine, self._looks = engine, LOOKS

    def enter(self, moment: str) -> None:
        """What follows belongs to `moment`."""
        reserved = self.gauge.reserved()
        if reserved is not None:
            self.reserved = max(reserved, self.reserved or 0)
        self.peaks[self.moment] = max(self.peaks[self.moment], self.gauge.most(reset=True))
        self.moment = moment

    def read(self) -> dict[str, int]:
        """The categories, `other`, `peak` (CPU: the process's resident set, CUDA: the allocator's) and `tensors`
        (the most bytes of tensors alive at once), so far. Call it between steps."""
        self.enter("rest")
        if self._looks:
            self._looks -= 1
            at_peak, between = self._last or {}, held_bytes(self._engine)
            self._high, self._gradients, self._follows = 0, {}, False
            # the states of the first step come into being after its backward pass
            self._last = {key: max(size, at_peak.get(key, 0)) for key, size in between.items()}
        tensors = max(self.peaks.values())
        peak = tensors if self.gauge.device.type == "cuda" else resident()[1]
        held = dict(self._last)
        held["workspace"] = min(workspace.nbytes(), max(0, tensors - sum(held.values())))
        beyond = max(0, tensors - sum(held.values()))
        held["activations"] = beyond if self.peaks["backward"] == tensors else 0
        return {**held, "other": peak - sum(held.values()), "peak": peak, "tensors": tensors}

    def _look(self, parameter) -> None:
        if not self._looks:
            return
        storage = parameter.grad.untyped_storage()
        one = StorageWeakRef(storage)
        self._gradients[one.cdata] = one, storage.nbytes()  # one that is added to comes again
        alive, follows = self.gauge.now(), self._follows
        self._follows = alive > _NEW_HIGH * self._high
        if not (self._follows or follows):
            return
        held = held_bytes(self._engine)
        if self._follows:
            self._high = alive
            self._gradients = {key: one for key, one in self._gradients.items() if not one[0].expired()}
            # DeepSpeed's own are among them; those it has let go of but someone still holds are not
            held["gradients"] = max(held["gradients"], sum(size for _, size in self._gradients.values()))
            self._last = held
        else:  # the buckets of the first gradient are made after it was seen
            self._last["buckets"] = max(self._last["buckets"], held["buckets"])
