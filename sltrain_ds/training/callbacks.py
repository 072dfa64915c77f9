"""The hooks of a run: what a callback can do, and how a config's own are made."""

from typing import Any

from sltrain_ds.errors import UserError
from sltrain_ds.extensions import load_class


class Callback:
    """One concern of the training loop. Every rank calls every hook, in the order of the run's callbacks.

    `training` is the loop's `Training`: engine, run, step (optimizer steps done), tokens, `say(text)`, `evaluate()`,
    `save()`. A subclass overrides what it needs.
    """

    def start(self, training) -> None:
        """Before the first step, after a resume."""

    def due(self, step: int) -> bool:
        """Whether `step_end` of this step must run before the next step begins, since it reads or writes the weights.

        Other steps' numbers are handed over one step late, so that the device never waits for a log.
        """
        return False

    def step_end(self, training, step: int, numbers: dict[str, Any]) -> None:
        """After optimizer step `step`, counted from 1: loss, lr, grad_norm, tokens, tokens_per_second, memory."""

    def evaluated(self, training, step: int, result) -> None:
        """After a validation at `step`: an `Evaluation` with loss, perplexity and tokens."""

    def saving(self, training, step: int) -> None:
        """Before a checkpoint of `step` is written."""

    def end(self, training) -> None:
        """After the last step; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: JSON values, the same on every rank (rank 0's are written)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


def name_of(callback: Callback) -> str:
    """The key of its state in a checkpoint."""
    return f"{type(callback).__module__}:{type(callback).__qualname__}"


def own_callbacks(run) -> list[Callback]:
    """The callbacks that `sltrain.callbacks` of a `RunConfig` names; `UserError` for one that cannot be made."""
    found = []
    for i, entry in enumerate(run.sltrain.callbacks):
        kind = load_class(entry.name, Callback, f"sltrain.callbacks[{i}]")
        try:
            found.append(kind(**entry.options))
        except TypeError as error:
            raise UserError(f"sltrain.callbacks[{i}].options: {entry.name} does not take them ({error})") from None
    names = [name_of(callback) for callback in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(
                f"sltrain.callbacks[{i}]: {name} is listed twice; remove one (both have one key in a checkpoint)"
            )
    return found


def resume_callbacks(own: list[Callback], checkpoint: dict) -> None:
    """Give each callback its state of a checkpoint's sltrain.json; one that was added since starts anew."""
    states = checkpoint.get("callbacks", {})
    for callback in own:
        if name_of(callback) in states:
            callback.load_state_dict(states[name_of(callback)])
