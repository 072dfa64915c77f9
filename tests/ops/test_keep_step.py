"""W built once a step, dW summed over its micro-batches and projected once: the gradients stay the same."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sltrain_ds.methods.sltrain_layer import SLTrainLinear
from sltrain_ds.ops import keep_step, sltrain_linear
from sltrain_ds.ops.keep_step import micro_batches


class Net(nn.Module):
    """Two SLTrain layers, the second used twice, after a dense one; optionally checkpointed."""

    def __init__(self, kind=None):
        super().__init__()
        torch.manual_seed(0)
        options = {"rank": 4, "density": 0.2, "alpha": 8, "bias": True}
        self.dense, self.kind = nn.Linear(20, 24), kind
        self.first, self.second = SLTrainLinear(24, 32, **options), SLTrainLinear(32, 32, **options)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.B)

    def forward(self, x):
        x = self.dense(x)
        body = lambda x: self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))  # noqa: E731
        return body(x) if self.kind is None else checkpoint(body, x, use_reentrant=self.kind == "reentrant")

    def set_mode(self, mode):
        self.first.op_mode = self.second.op_mode = mode
        return self


def draw(parts, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 20, generator=g).to(dtype) for _ in range(parts)]


def gradients(net, batches):
    """Of one optimizer step, and how many gradients each hook saw."""
    net.zero_grad(set_to_none=True)
    seen = dict.fromkeys([name for name, _ in net.named_parameters()], 0)

    def count(name):
        seen[name] += 1

    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: count(name)) for name, p in net.named_parameters()
    ]
    for batch in micro_batches(net, batches):
        net(batch).square().mean().backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad.clone() for name, p in net.named_parameters()}, seen


@pytest.mark.parametrize("kind", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)])
def test_gradients_of_a_step_equal_the_plain_ones(kind, parts, dtype, bound):
    net = Net(kind).to(dtype).set_mode("keep_step")
    exact = Net().double().set_mode("compose")
    exact.load_state_dict(net.state_dict())
    for step in range(2):  # the second step begins anew, with other weights
        batches = draw(parts + step, dtype)
        found, seen = gradients(net, batches)
        if dtype == torch.bfloat16:  # two roundings against none
            plain, _ = gradients(exact, [batch.double() for batch in batches])
        else:
            plain, _ = gradients(copy.deepcopy(net).set_mode("compose"), batches)
        for name, wanted in plain.items():
            error = (found[name].double() - wanted.double()).norm() / wanted.double().norm()
            assert error <= bound, (name, float(error))
        assert seen["first.A"] == seen["second.S_values"] == 1 and seen["dense.weight"] == parts + step
        with torch.no_grad():
            for one, other in zip(net.parameters(), exact.parameters(), strict=True):
                one.mul_(1.1)
                other.copy_(one)


def test_weights_are_built_once_a_step(monkeypatch):
    net, built, compose = Net().set_mode("keep_step"), [], sltrain_linear.compose
    monkeypatch.setattr(sltrain_linear, "compose", lambda *args: built.append(args[-1]) or compose(*args))
    for _ in range(2):
        gradients(net, draw(4))
    assert len(built) == 4 and len({W.data_ptr() for W in built}) == 2  # a layer and step; the memory is kept
    built.clear()
    with torch.no_grad():
        for batch in micro_batches(net, draw(2)):
            net(batch)
    assert len(built) == 2


def test_outside_of_a_step_it_is_keep():
    net = Net().set_mode("keep_step")
    keep = copy.deepcopy(net).set_mode("keep")
    x = draw(1)[0]
    for one in (net, keep):
        one(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), keep.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(net(x), keep(x))
    assert net.first.held.W is None


def test_an_x_without_gradient_loses_nothing():
    layer = Net().first
    layer.op_mode = "keep_step"
    xs = [torch.randn(3, 24) for _ in range(3)]
    for x in micro_batches(layer, xs):
        layer(x).square().sum().backward()
    found = [p.grad for p in layer.parameters()]
    plain = copy.deepcopy(layer)
    plain.op_mode = "compose"
    plain.zero_grad(set_to_none=True)
    for x in xs:
        plain(x).square().sum().backward()
    for one, p in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_autocast_and_frozen_parameters():
    net = Net().set_mode("keep_step")
    net.first.A.requires_grad_(False)
    net.second.bias.requires_grad_(False)
    for batch in micro_batches(net, draw(2)):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(batch)
        assert y.dtype == torch.bfloat16 and net.first.held.W.dtype == torch.bfloat16
        y.float().square().mean().backward()
    assert net.first.A.grad is None and net.second.bias.grad is None
    assert net.first.B.grad.dtype == torch.float32 and net.first.B.grad.isfinite().all()


def test_a_backward_pass_after_the_step_is_refused():
    net = Net().set_mode("keep_step")
    outputs = [net(batch) for batch in micro_batches(net, draw(1))]
    with pytest.raises(RuntimeError, match="within the step"):
        outputs[0].sum().backward()


def test_another_mode_lets_the_memory_go():
    net = Net().set_mode("keep_step")
    gradients(net, draw(2))
    assert len(keep_step.holders(net)) == 2
    assert not keep_step.holders(net.set_mode("compose"))
