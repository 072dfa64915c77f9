"""A callback from outside the package, as docs/extending.md builds it: it keeps the lowest loss."""

from sltrain_ds.training.callbacks import Callback


class BestLoss(Callback):
    """Says when a step's loss is the lowest so far, `margin` nats below the one before."""

    def __init__(self, margin: float = 0.0):
        self.margin, self.best, self.steps = margin, float("inf"), 0

    def step_end(self, training, step, numbers):
        self.steps += 1
        if numbers["loss"] < self.best - self.margin:
            self.best = numbers["loss"]

    def end(self, training):
        training.say(f"best loss {self.best!r} of {self.steps} steps")

    def state_dict(self):
        return {"best": self.best, "steps": self.steps}

    def load_state_dict(self, state):
        self.best, self.steps = state["best"], state["steps"]
