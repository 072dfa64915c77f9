"""The training loop: what it leaves on the screen, when it hands over a step's numbers, and the user's callbacks."""

from types import SimpleNamespace

import pytest
import torch

from sltrain_ds.errors import UserError
from sltrain_ds.training import loop
from sltrain_ds.training.callbacks import Callback, own_callbacks, resume_callbacks
from sltrain_ds.training.evaluate import Evaluation, on_device

NORMS = {0: 1.0, 1: 1.0, 2: 1.0, 3: float("nan"), 4: 1.0}


class Log(Callback):
    """Writes down what it is called with."""

    def __init__(self, at=()):
        self.at, self.calls = at, []

    def due(self, step):
        return step in self.at

    def step_end(self, training, step, numbers):
        self.calls.append((step, training.queued, numbers["loss"]))

    def evaluated(self, training, step, result):
        self.calls.append(("evaluated", step))

    def saving(self, training, step):
        self.calls.append(("saving", step))

    def end(self, training):
        self.calls.append("end")

    def state_dict(self):
        return {"seen": len(self.calls)}

    def load_state_dict(self, state):
        self.calls = [None] * state["seen"]


@pytest.fixture
def training(monkeypatch, tmp_path):
    """A function of (steps, own callbacks) that gives a `Training` without an engine; `saved` are its checkpoints."""
    saved = []

    class Stepper:
        def __init__(self, engine, run, source, meter):
            self.source = source

        def step(self, number):
            self.source.micro_batch(number, 0, 0, 1)
            found.queued = number + 1
            return SimpleNamespace(loss=float(number), grad_norm=NORMS[number])

    monkeypatch.setattr(loop, "Stepper", Stepper)
    monkeypatch.setattr(loop, "evaluate", lambda *_: Evaluation(1.0, 2))
    monkeypatch.setattr(loop, "save", lambda *arguments: saved.append(arguments[2:]))
    every = SimpleNamespace(every=2, keep=1)

    def make(steps, own=(), start=0, source=None):
        nonlocal found
        block = SimpleNamespace(steps=steps, seed=0, eval=SimpleNamespace(every=100), checkpoint=every)
        run = SimpleNamespace(sltrain=block, world_size=1, accumulation=1, run_dir=tmp_path, tokens_per_step=8)
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
        monitor = SimpleNamespace(enabled=False)
        engine = SimpleNamespace(global_rank=0, optimizer=optimizer, device="cpu", monitor=monitor)
        meter = SimpleNamespace(read=lambda: {"peak": 1}, reserved=None)
        source = source or SimpleNamespace(micro_batch=lambda *place: None)
        found = loop.Training(engine, run, source, lambda: [], meter, start, own=own)
        found.saved = saved
        return found

    found = None
    return make


def test_an_error_begins_a_line_of_its_own(training, capsys):
    def lost(*place):
        raise UserError("a shard is gone")

    with pytest.raises(UserError) as error:
        training(9, start=1, source=SimpleNamespace(micro_batch=lost)).train()
    err = capsys.readouterr().err  # while the error, and with it the bar, is held, as where it is printed
    assert "1/9" in err and err.endswith("\n"), error


def test_numbers_come_one_step_late_unless_something_is_due(training):
    log = Log(at=(1,))
    run = training(3, [log])
    run.train()
    steps = [call for call in log.calls if isinstance(call[0], int)]
    # step 1 is due for the callback itself, 2 for the checkpoint, 3 is the last
    assert steps == [(1, 1, 0.0), (2, 2, 1.0), (3, 3, 2.0)]
    assert log.calls[0] == ("evaluated", 0) and log.calls[-1] == "end"
    assert [step for step, *_ in run.saved] == [2, 3]
    late = Log()
    training(3, [late]).train()
    assert [call[:2] for call in late.calls if isinstance(call[0], int)] == [(1, 2), (2, 2), (3, 3)]


def test_a_step_that_is_not_finite_stops_before_the_next_checkpoint(training):
    run = training(5)
    with pytest.raises(loop.NonFiniteLoss, match=r"step 4: loss 3\.0, gradient norm nan"):
        run.train()
    assert [step for step, *_ in run.saved] == [2]


def test_a_callback_has_its_state_in_the_checkpoint(training):
    log, key = Log(), f"{__name__}:Log"
    run = training(2, [log])
    run.train()
    (step, _tokens, states), *_ = run.saved
    assert step == 2 and states == {key: {"seen": 5}}  # evaluated twice, two steps, saving
    other = Log()
    resume_callbacks([other], {"callbacks": states})
    assert other.state_dict() == states[key]
    resume_callbacks([other], {})  # a checkpoint from before there were callbacks
    assert other.state_dict() == states[key]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "no_such_module:Log"}, "no_such_module cannot be imported"),
        ({"name": "sltrain_ds.training.callbacks:Nothing"}, "has no Nothing"),
        ({"name": "pathlib:Path"}, "pathlib:Path is not a subclass of sltrain_ds.training.callbacks.Callback"),
        ({"name": "sltrain_ds.training.callbacks:Callback", "options": {"x": 1}}, "does not take them"),
    ],
)
def test_a_callback_that_cannot_be_made_is_an_error_of_its_key(entry, words):
    made = SimpleNamespace(**{"options": {}, **entry})
    with pytest.raises(UserError, match=words) as error:
        own_callbacks(SimpleNamespace(sltrain=SimpleNamespace(callbacks=[made])))
    assert str(error.value).startswith("sltrain.callbacks[0]")


def test_a_tensor_under_two_keys_is_sent_once():
    tokens, mask = torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
    sent = on_device({"input_ids": tokens, "labels": tokens, "attention_mask": mask}, "meta")
    assert sent["labels"] is sent["input_ids"] and sent["attention_mask"] is not sent["input_ids"]
    assert all(value.device.type == "meta" and value.shape == (1, 2) for value in sent.values())
