import pytest
import torch

from sltrain_ds.ops import adam4bit, builder

FLOATS = [torch.float32, torch.bfloat16]
needs_kernel = pytest.mark.skipif(
    builder.status()[0] == "reference", reason=f"needs the C++ ops: {builder.status()[1]}"
)


def run(numel, steps, p_dtype=torch.float32, g_dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(numel)
    p = torch.randn(numel, generator=generator).to(p_dtype)
    states = adam4bit.new_states(p)
    for step in range(1, steps + 1):
        g = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator) ** 6 * 1e-3
        adam4bit.adam4bit_step_(p, g.to(g_dtype), *states, step=step, lr=1e-2, **options)
    return [p, *states]


def same(left, right):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


@needs_kernel
@pytest.mark.parametrize("p_dtype", FLOATS)
@pytest.mark.parametrize("g_dtype", FLOATS)
@pytest.mark.parametrize("numel", [1, 127, 128, 129, 256, 383, 5001])
def test_the_kernel_equals_the_reference_bit_for_bit(monkeypatch, p_dtype, g_dtype, numel):
    for options in (
        {},
        {"weight_decay": 0.1, "stochastic": True, "seed": 3, "key": 2**60 + 1, "offset": 256 * 2**33},
        {"weight_decay": 0.1, "decoupled": False, "grad_scale": 0.37, "betas": (0.0, 0.95), "eps": 1e-6},
    ):
        assert builder.load()
        native = run(numel, 6, p_dtype, g_dtype, **options)
        with monkeypatch.context() as patch:
            patch.setattr(builder, "load", lambda: False)
            patch.setattr(adam4bit, "PIECE", 1024)
            assert same(native, run(numel, 6, p_dtype, g_dtype, **options))


def test_the_maps():
    signed, signed_bounds, unsigned, unsigned_bounds = adam4bit.tables(torch.device("cpu")).split((16, 15, 16, 15))
    positive = torch.tensor([0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0])
    torch.testing.assert_close(signed[8:], positive)
    torch.testing.assert_close(signed[:8], torch.cat([-positive[:-1].flip(0), torch.zeros(1)]))
    torch.testing.assert_close(unsigned, torch.arange(1, 17) / 16)
    for values, bounds in ((signed, signed_bounds), (unsigned, unsigned_bounds)):
        torch.testing.assert_close(bounds, (values[:-1] + values[1:]) / 2)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
def test_two_codes_a_byte_and_the_nearest(monkeypatch, native):
    """betas 0: the moments are g and its square, so their codes can be told beforehand."""
    monkeypatch.setattr(builder, "load", lambda: native)
    g = torch.tensor([1.0, -0.5, 0.25, 0.0, -1.0])
    p = torch.zeros(5)
    states = adam4bit.new_states(p)
    adam4bit.adam4bit_step_(p, g, *states, step=1, lr=0.0, betas=(0.0, 0.0))
    values = adam4bit.tables(p.device)
    expected_m = [int((values[:16] - x).abs().argmin()) for x in g]
    expected_v = [int((values[31:47] - x * x).abs().argmin()) for x in g]
    for codes, expected in zip(states, (expected_m, expected_v), strict=False):
        unpacked = [int(byte) >> shift & 15 for byte in codes for shift in (0, 4)]
        assert unpacked == [*expected, 0]
    assert states[2].tolist() == states[3].tolist() == [1.0]


def test_it_goes_where_adam_goes():
    """To the same minimum as torch's AdamW with fp32 states, later: small moments are lost in 16 codes."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(2048, generator=generator)
    theirs = torch.nn.Parameter(torch.zeros(2048))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    p = torch.zeros(2048)
    states, left = adam4bit.new_states(p), []
    for step in range(1, 1001):
        noise = 0.1 * torch.randn(2048, generator=generator)
        theirs.grad = theirs.detach() - target + noise
        optimizer.step()
        adam4bit.adam4bit_step_(p, p - target + noise, *states, step=step, lr=1e-2, weight_decay=0.1)
        left.append(float((p - target).norm() / target.norm()))
    assert left[199] < 0.45 and left[999] < 0.12  # torch: 0.25 and 0.05
    assert (p - theirs.detach()).norm() < 0.08 * theirs.detach().norm()


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
def test_a_shard_is_the_whole_cut(monkeypatch, native):
    monkeypatch.setattr(builder, "load", lambda: native)
    numel, cut = 256 * 9 + 41, 256 * 4
    p, g = torch.randn(numel).bfloat16(), torch.randn(numel).bfloat16()
    whole = [p.clone(), *adam4bit.new_states(p)]
    options = {"lr": 1e-3, "stochastic": True, "seed": 1, "key": 77, "weight_decay": 0.1}
    parts = [p[:cut].clone(), p[cut:].clone()]
    states = [adam4bit.new_states(part) for part in parts]
    for step in (1, 2, 3):
        adam4bit.adam4bit_step_(whole[0], g, *whole[1:], step=step, **options)
        for part, gradient, state, offset in zip(parts, (g[:cut], g[cut:]), states, (0, cut), strict=True):
            adam4bit.adam4bit_step_(part, gradient, *state, step=step, offset=offset, **options)
    assert same(whole, [torch.cat(parts), *(torch.cat(pair) for pair in zip(*states, strict=True))])


@needs_kernel
def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(256 * 301 + 7, 2, torch.bfloat16, torch.bfloat16, stochastic=True))
    finally:
        torch.set_num_threads(threads)
    assert same(*results)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
def test_non_finite_gradients_show(monkeypatch, native):
    monkeypatch.setattr(builder, "load", lambda: native)
    for bad in (float("nan"), float("inf")):
        p, g = torch.ones(600), torch.full((600,), 0.5)
        g[300] = bad
        states = adam4bit.new_states(p)
        adam4bit.adam4bit_step_(p, g, *states, step=1, lr=1e-3)
        assert not p[300].isfinite() and p[:256].isfinite().all() and p[384:].isfinite().all()
        assert [bool(x) for x in states[3].isfinite()] == [True, True, False, True, True]


@needs_kernel
def test_the_schema_is_sound():
    assert builder.load()
    p = torch.randn(301).bfloat16()
    arguments = (p, torch.randn(301), *adam4bit.new_states(p), adam4bit.tables(p.device), 1e-3, 0.9, 0.999, 1e-8)
    torch.library.opcheck(torch.ops.sltrain.adam4bit_step_.default, (*arguments, 0.1, True, 1, True, 3, 4, 256, 1.0))


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"p": torch.zeros(300).half()}, "must be float32 or bfloat16"),
        ({"g": torch.zeros(299)}, "differ in size"),
        ({"m4": torch.zeros(150)}, r"states must be uint8 \(150,\)"),
        ({"v4": torch.zeros(300, dtype=torch.uint8)}, r"states must be uint8 \(150,\)"),
        ({"absmax_m": torch.zeros(2)}, r"must be float32 \(3,\)"),
        ({"p": torch.zeros(600)[::2]}, "must be contiguous"),
        ({"step": 0}, "steps count from 1, got 0"),
        ({"offset": 128}, "offset must be a multiple of 256, got 128"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch, change, reason, native):
    monkeypatch.setattr(builder, "load", lambda: native)
    p = torch.zeros(300)
    names = ("m4", "v4", "absmax_m", "absmax_v")
    arguments = {"p": p, "g": p.clone(), "step": 1, "lr": 1e-3} | dict(zip(names, adam4bit.new_states(p), strict=True))
    with pytest.raises(RuntimeError, match=reason):
        adam4bit.adam4bit_step_(**{**arguments, **change})
