"""The order of copies, reductions and steps on streams, played by one process as rank 0 of 2 without an engine."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from sltrain_ds.zero.per_layer import clipping
from sltrain_ds.zero.per_layer import update as unit_update
from sltrain_ds.zero.per_layer.update import UnitUpdate

WORLD = 2


class Stream:
    """Writes down what it waits for; `log` is the order in which work is given to streams."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def record_event(self):
        number, self.events = self.events, self.events + 1
        return SimpleNamespace(synchronize=lambda: self.log.append(f"CPU waits for update {number}"))

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Zero(UnitUpdate):
    """One unit of two groups, laid out as ZeRO-2 would; the first holds one parameter and needs no bucket."""

    dtype = communication_data_type = torch.float32
    device, clip_grad, dp_process_group, gradient_accumulation_steps = "cpu", 0.0, None, 1

    def __init__(self, log, note, on_side):
        self.log, self.note = log, note
        self.groups = [[Parameter(torch.ones(6))], [Parameter(torch.ones(3)), Parameter(torch.ones(5))]]
        self.flat = [torch.cat([p.data for p in group]) for group in self.groups]
        self.partitions = self.owned = [flat[: len(flat) // WORLD] for flat in self.flat]
        self.param_names = {p: f"p{i}" for i, p in enumerate(p for group in self.groups for p in group)}
        self.optimizer = torch.optim.SGD(
            [{"params": group, "name": f"unit/{i}"} for i, group in enumerate(self.groups)]
        )
        self.start_units("global")
        self.side_stream = Stream("side", log) if on_side else None
        self.boundary = True

    def group_of(self, i):
        return i

    def cut(self, i):
        begin, size = 0, self.partitions[i].numel()
        for parameter in self.groups[i]:
            if begin < size:
                yield parameter, 0, begin, min(parameter.numel(), size - begin)
            begin += parameter.numel()

    def place(self, lane, i, parameter, gradient):
        self.note("copy")
        begin = 0 if parameter is self.groups[i][0] else self.groups[i][0].numel()
        lane[begin : begin + parameter.numel()].copy_(gradient)

    def is_gradient_accumulation_boundary(self):
        return self.boundary

    def _optimizer_step(self, i):
        self.note("step")
        for piece in self.pieces[i]:
            piece.master.data.sub_(piece.master.grad)

    def _keep(self, *tensors):
        self.log += ["keep"] * len(tensors)


@pytest.fixture
def play(monkeypatch):
    def make(on_side):
        log = []
        streams = [Stream("main", log)]

        @contextmanager
        def stream(other):
            streams.append(other)
            yield
            streams.pop()

        def note(what):
            log.append(f"{what} on {streams[-1].name}")

        accelerator = SimpleNamespace(current_stream=lambda: streams[-1], stream=stream)
        ranks = SimpleNamespace(
            get_world_size=lambda group=None: WORLD, get_rank=lambda group=None: 0,
            all_reduce=lambda tensor, op=None, group=None: (note("reduce"), tensor.mul_(WORLD)),
        )  # fmt: skip
        monkeypatch.setattr(unit_update, "get_accelerator", lambda: accelerator)
        monkeypatch.setattr(unit_update, "dist", ranks)
        monkeypatch.setattr(clipping, "dist", ranks)
        return Zero(log, note, on_side), log

    return make


def backward(zero):
    for i, group in enumerate(zero.groups):
        for parameter in group:
            parameter.grad = torch.full_like(parameter, 0.5)
            zero.arrived(parameter, i)
    zero.wait_for_updates()


def test_work_on_the_side_stream_follows_the_backward_pass(play):
    zero, log = play(on_side=True)
    backward(zero)
    enter = "side waits for main"
    assert log == [
        enter, "keep", "copy on side", enter, "keep", "copy on side",  # each gradient's memory is kept, then copied
        enter, "keep", "reduce on side", "reduce on side",  # the one that is reduced where it is, and the bucket
        enter, "step on side", "step on side",
        "main waits for side",
    ]  # fmt: skip


@pytest.mark.parametrize("on_side", [True, False])
def test_the_rank_steps_what_it_owns_and_frees_the_rest(play, on_side):
    zero, log = play(on_side)
    backward(zero)
    assert all(parameter.grad is None for group in zero.groups for parameter in group)
    assert zero.units[0].bucket is None and not zero.reduced
    for flat in zero.flat:
        half = len(flat) // WORLD
        assert torch.equal(flat, torch.cat([torch.full((half,), 0.5), torch.ones(half)]))
    assert float(zero.step_units()) == pytest.approx((WORLD * 7 * 0.25) ** 0.5)
    assert log.count("step on side" if on_side else "step on main") == 2


def test_a_second_backward_is_told_apart(play):
    zero, _ = play(on_side=False)
    backward(zero)
    with pytest.raises(RuntimeError, match="p0: a second gradient since the last forward"):
        backward(zero)
    zero.close_micro_batch()
    with pytest.raises(RuntimeError, match=r"p0: a gradient after this step's update; .* call engine.step\(\)"):
        backward(zero)
    zero.step_units()
    backward(zero)


def test_micro_batches_add_up_however_many_the_config_says(play):
    """`set_gradient_accumulation_boundary` and `set_train_batch_size` change it under way."""
    zero, _ = play(on_side=False)
    for zero.boundary in (False, False, True):
        zero.close_micro_batch()
        backward(zero)
    for flat in zero.flat:
        assert torch.equal(flat[: len(flat) // WORLD], torch.full((len(flat) // WORLD,), 1 - 3 * 0.5))


def test_what_is_kept_has_the_weights_dtype_however_it_is_sent(play):
    zero, _ = play(on_side=False)
    zero.communication_data_type, zero.boundary = torch.float64, False
    for _ in range(2):
        zero.close_micro_batch()
        backward(zero)
    assert [own.dtype for own in zero.reduced.values()] == [torch.float32] * 2
    assert all(torch.equal(own, torch.ones_like(own)) for own in zero.reduced.values())


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_cpu_runs_no_more_than_two_units_ahead(play, accumulates):
    zero, log = play(on_side=True)
    for i in range(4):
        zero.boundary = not accumulates or i == 3
        backward(zero)
        if zero.boundary:
            zero.step_units()
        else:
            zero.close_micro_batch()
    waits = [line for line in log if line.startswith("CPU")]
    assert waits == ["CPU waits for update 0", "CPU waits for update 1"]
    reduced = [i for i, line in enumerate(log) if line == "reduce on side"]  # two groups of a unit
    assert reduced[3] < log.index(waits[0]) < reduced[4]
