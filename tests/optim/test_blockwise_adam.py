import pytest
import torch
from bounds import close, of_sum

from sltrain_ds.errors import UserError
from sltrain_ds.ops import adam4bit, adam8bit
from sltrain_ds.optim.bitsandbytes_states import from_bitsandbytes, to_bitsandbytes
from sltrain_ds.optim.blockwise_adam import BlockwiseAdam, Segment

KINDS = {"8bit": adam8bit, "4bit": adam4bit}


def parameters(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(optimizer, steps, first=0, scale=1e-2):
    """Steps on gradients that are a function of step, place and shape."""
    for step in range(first, first + steps):
        for i, group in enumerate(optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                generator = torch.Generator().manual_seed(1000 * step + 10 * i + j)
                p.grad = (torch.randn(p.shape, generator=generator) * scale + 1e-3 * p.detach().float()).to(p.dtype)
        optimizer.step()


def groups(matrices, norms):
    return [{"params": matrices, "name": "dense", "lr": 1e-2}, {"params": norms, "name": "norms", "weight_decay": 0.0}]


@pytest.mark.parametrize("states", KINDS)
@pytest.mark.parametrize("decoupled", [True, False])
def test_it_is_the_step_of_its_format(states, decoupled):
    p, q = parameters((70, 9), (70, 9))
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    run(BlockwiseAdam([p], **options, decoupled=decoupled, states=states), 3)
    values = KINDS[states].new_states(q)
    q.data.copy_(parameters((70, 9))[0])
    for step in range(3):
        generator = torch.Generator().manual_seed(1000 * step)
        g = torch.randn(q.shape, generator=generator) * 1e-2 + 1e-3 * q.detach()
        KINDS[states].step_(q.detach(), g, *values, step=step + 1, **options, decoupled=decoupled)
    assert torch.equal(p, q)


@pytest.mark.parametrize("decoupled", [True, False])
def test_norms_are_stepped_as_torch_does(decoupled):
    """32-bit states and torch's own formula, as its single-tensor Adam(W) computes it."""
    mine, theirs = parameters((300,)), parameters((300,))
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours = BlockwiseAdam([{"params": mine, "name": "norms"}], **options, decoupled=decoupled)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(theirs, **options, foreach=False)
    run(ours, 5)
    run(optimizer, 5)
    bound = of_sum(torch.float32, 5 * 8)  # five steps of some eight roundings
    close(mine[0], theirs[0], bound)
    state = ours.state[mine[0]]
    assert state["step"] == 5 and state["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(state["exp_avg_sq"], optimizer.state[theirs[0]]["exp_avg_sq"], rtol=bound, atol=0.0)


@pytest.mark.parametrize("states", KINDS)
@pytest.mark.parametrize("norms", [False, True])
def test_a_tensor_of_pieces_is_stepped_as_the_parameters_are(states, norms):
    """Pieces of three parameters and padding in one flat tensor, none at a whole block's place."""
    whole = parameters((700,), (256,), (5, 60), dtype=torch.bfloat16)
    flat = torch.nn.Parameter(torch.full((1300,), 7.0, dtype=torch.bfloat16))
    places = [(0, 256, 700, 3), (1, 0, 256, 450), (2, 0, 300, 900)]  # parameter, from, to, where in the flat tensor
    name = "norms" if norms else "dense"
    options = {"lr": 1e-2, "states": states, "stochastic": True, "seed": 5}
    ours = BlockwiseAdam([{"params": whole, "name": name}], **options, names={p: f"p{i}" for i, p in enumerate(whole)})
    pieces = BlockwiseAdam([{"params": [flat], "name": name}], **options)
    pieces.segments[flat] = [
        Segment(adam8bit.parameter_key(f"p{i}"), at, at + stop - start, start) for i, start, stop, at in places
    ]
    for i, start, stop, at in places:
        flat.data[at : at + stop - start] = whole[i].data.view(-1)[start:stop]
    for step in range(3):
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16() for p in whole]
        flat.grad = torch.full_like(flat, float("nan"))  # padding must not be looked at
        for i, start, stop, at in places:
            flat.grad[at : at + stop - start] = gradients[i].view(-1)[start:stop]
        for p, g in zip(whole, gradients, strict=True):
            p.grad = g
        ours.step()
        pieces.step()
    found = dict(zip((i for i, *_ in places), pieces.segment_states(flat), strict=True))
    for i, start, stop, at in places:
        assert torch.equal(flat[at : at + stop - start], whole[i].view(-1)[start:stop])
        if start == 0:
            ((_, expected),) = ours.segment_states(whole[i])
            assert all(torch.equal(a.view(-1), b) for a, b in zip(expected, found[i][1], strict=True))
    inside = torch.zeros(1300, dtype=torch.bool)
    for _, start, stop, at in places:
        inside[at : at + stop - start] = True
    assert (flat[~inside] == 7.0).all()


def test_an_update_takes_any_gradient_and_scales_it():
    p, q = parameters((300,), (300,))
    q.data.copy_(p.data)
    ours = BlockwiseAdam([p, q], lr=1e-2, names={p: "same", q: "same"})
    g = torch.randn(300).bfloat16()
    ours.update(p, g, ours.param_groups[0], grad_scale=0.5)
    ours.update(q, g.float() * 0.5, ours.param_groups[0])
    assert torch.equal(p, q)


@pytest.mark.parametrize("states", KINDS)
def test_it_goes_on_from_its_state_dict_bit_for_bit(states, tmp_path):
    shapes = ((40, 30), (8,))
    first, second = (parameters(*shapes, dtype=torch.bfloat16) for _ in range(2))
    options = {"states": states, "stochastic": True, "seed": 3}
    ours = BlockwiseAdam(groups(first[:1], first[1:]), **options)
    run(ours, 3)
    torch.save({"optimizer": ours.state_dict(), "p": [p.detach() for p in first]}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    for p, value in zip(second, saved["p"], strict=True):
        p.data.copy_(value)
    other = BlockwiseAdam(groups(second[:1], second[1:]), **options)
    other.load_state_dict(saved["optimizer"])
    assert other.state[second[0]]["exp_avg"].dtype == torch.uint8
    run(ours, 2, first=3)
    run(other, 2, first=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_states_of_another_format_are_refused():
    ours, other = (BlockwiseAdam(parameters((40, 30)), states=states) for states in KINDS)
    run(ours, 1)
    with pytest.raises(UserError, match=r"precision.states: 4bit, but the checkpoint holds 8bit"):
        other.load_state_dict(ours.state_dict())
    with pytest.raises(UserError, match="'2bit' are not known"):
        BlockwiseAdam(parameters((4,)), states="2bit")


def test_bytes_of_the_states():
    (p,) = parameters((256 * 40,))
    for states, expected in (("8bit", 2 * 256 * 40 + 2 * 4 * 40), ("4bit", 256 * 40 + 2 * 4 * 80)):
        ours = BlockwiseAdam([p], states=states)
        run(ours, 1)
        assert sum(v.nbytes for v in ours.state[p].values() if torch.is_tensor(v)) == expected


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_run_goes_on_with_bitsandbytes_and_back(ours_first):
    """Half of it with the one, half with the other, against all of it with one; small tensors change format."""
    bnb = pytest.importorskip("bitsandbytes")
    shapes = ((80, 70), (30, 20), (64,))

    def build(own):
        ps = parameters(*shapes)
        if own:
            return ps, BlockwiseAdam(groups(ps[:2], ps[2:]), lr=1e-2, weight_decay=0.1)
        optimizer = bnb.optim.AdamW8bit(groups(ps[:2], ps[2:]), lr=1e-2, weight_decay=0.1)
        optimizer.mng.index2config.clear()
        return ps, optimizer

    straight, one = build(ours_first)
    run(one, 60)
    mixed, one = build(ours_first)
    run(one, 30)
    _, other = build(not ours_first)
    for group, source in zip(other.param_groups, one.param_groups, strict=True):
        group["params"] = source["params"]
    if ours_first:
        to_bitsandbytes(one, other)
    else:
        other.names = {p: str(i) for i, p in enumerate(mixed)}
        from_bitsandbytes(one, other)
    assert {state["step"] for state in other.state.values()} == {30}
    run(other, 30, first=30)
    start = parameters(*shapes)
    for a, b, c in zip(straight, mixed, start, strict=True):
        assert (a - b).norm() < 0.02 * (a - c).norm()


def test_the_bytes_pass_unchanged_there_and_back():
    bnb = pytest.importorskip("bitsandbytes")
    ps = parameters((80, 70))
    ours, theirs = BlockwiseAdam(ps, lr=1e-2), bnb.optim.AdamW8bit(ps, lr=1e-2)
    run(ours, 5)
    to_bitsandbytes(ours, theirs)
    back = BlockwiseAdam(ps, lr=1e-2)
    from_bitsandbytes(theirs, back)
    for (_, a), (_, b) in zip(ours.segment_states(ps[0]), back.segment_states(ps[0]), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_does_not_convert():
    bnb = pytest.importorskip("bitsandbytes")
    ps = parameters((80, 70))
    narrow, cut = BlockwiseAdam(ps, states="4bit"), BlockwiseAdam(ps)
    cut.segments[ps[0]] = [Segment(1, 0, 5000, 0), Segment(2, 5000, 5600, 0)]
    for ours, says in ((narrow, '"4bit" do not convert'), (cut, "ZeRO partition")):
        run(ours, 1)
        with pytest.raises(UserError, match=says):
            to_bitsandbytes(ours, bnb.optim.AdamW8bit(ps))
