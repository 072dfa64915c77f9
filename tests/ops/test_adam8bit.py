import numpy as np
import pytest
import torch
from bounds import of_sum

from sltrain_ds.ops import adam8bit, builder

FLOATS = [torch.float32, torch.bfloat16]
needs_kernel = pytest.mark.skipif(
    builder.status()[0] == "reference", reason=f"needs the C++ ops: {builder.status()[1]}"
)


def run(numel, steps, p_dtype=torch.float32, g_dtype=torch.float32, scale=1e-3, **options):
    """[p, *states] after some steps on gradients of widely spread sizes."""
    generator = torch.Generator().manual_seed(numel)
    p = torch.randn(numel, generator=generator).to(p_dtype)
    states = adam8bit.new_states(p)
    for step in range(1, steps + 1):
        g = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator) ** 6 * scale
        adam8bit.adam8bit_step_(p, g.to(g_dtype), *states, step=step, lr=1e-2, **options)
    return [p, *states]


def same(left, right):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=signed)
    ours = torch.from_numpy(adam8bit.dynamic_map(signed))
    # torch.linspace rounds once where the CPU has FMA, twice elsewhere
    exact = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    torch.testing.assert_close(ours, theirs, rtol=0.0 if exact else of_sum(torch.float32, 2), atol=0.0)


@needs_kernel
@pytest.mark.parametrize("p_dtype", FLOATS)
@pytest.mark.parametrize("g_dtype", FLOATS)
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000])
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
            assert same(native, run(numel, 6, p_dtype, g_dtype, **options))


@needs_kernel
def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(256 * 301 + 7, 2, torch.bfloat16, torch.bfloat16, stochastic=True))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize("signed", [True, False])
def test_quantisation_finds_the_nearest_code(monkeypatch, native, signed):
    """Every code, every bound between two, and the floats on either side of it; ties go down."""
    values = adam8bit.dynamic_map(signed)
    bounds = (values[:-1] + values[1:]) / np.float32(2)
    probes = np.concatenate([values, bounds, np.nextafter(bounds, np.float32(-2)), np.nextafter(bounds, np.float32(2))])
    probes = np.concatenate([probes, np.float32([0.0, -0.0, 1e-9, 1e-38, 1e-45] + [-1.0, -1e-9] * signed)])
    probes = probes[np.abs(probes) <= 1]
    expected = np.searchsorted(bounds, probes, side="left")  # how many bounds lie below
    blocks = np.zeros((-(-len(probes) // 255), 256), dtype=np.float32)
    blocks[:, 0] = 1.0  # the absmax
    blocks[:, 1:].flat[: len(probes)] = probes
    moment = torch.from_numpy(blocks.reshape(-1))
    # one step from zero states makes m = g (betas[0] = 0), or v = g^2: choose g so that the moment is what we probe
    p = torch.zeros_like(moment)
    states = adam8bit.new_states(p)
    monkeypatch.setattr(builder, "load", lambda: native)
    if signed:
        adam8bit.adam8bit_step_(p, moment, *states, step=1, lr=0.0, betas=(0.0, 0.999))
        found = states[0].view(-1, 256)[:, 1:].reshape(-1)[: len(probes)].numpy()
        assert (found == expected).all()
    else:
        g = moment.sqrt()
        adam8bit.adam8bit_step_(p, g, *states, step=1, lr=0.0, betas=(0.9, 0.0))
        v = (g * g).numpy().reshape(blocks.shape)
        assert (states[1].numpy() == np.searchsorted(bounds, v.reshape(-1), side="left")).all()


@pytest.mark.parametrize("kind", ["AdamW8bit", "Adam8bit"])
def test_states_follow_bitsandbytes(kind):
    """200 steps, each from the same states: ours differ by the quantiser's error at most, and almost nowhere."""
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    numel = 4096 + 256 * 3 + 19
    theirs = torch.nn.Parameter(torch.randn(numel, generator=generator))
    optimizer = getattr(bnb.optim, kind)([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    p = theirs.detach().clone()
    states, differing = adam8bit.new_states(p), 0
    for step in range(1, 201):
        g = torch.randn(numel, generator=generator) * (1 + torch.arange(numel) % 97) * 1e-4 + 1e-3 * p
        theirs.grad = g.clone()
        optimizer.step()
        adam8bit.adam8bit_step_(p, g, *states, step=step, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
        state = optimizer.state[theirs]
        for signed, ours, other, absmax, other_absmax in (
            (True, states[0], state["state1"], states[2], state["absmax1"]),
            (False, states[1], state["state2"], states[3], state["absmax2"]),
        ):
            values = torch.from_numpy(adam8bit.dynamic_map(signed))
            step_up = torch.cat([values.diff(), values[-1:]])
            apart = (values[ours.long()] - values[other.long()]).abs()
            # bitsandbytes finds codes on a CPU through 65,536 equal bins of [-1, 1]; ours are the nearest
            assert (apart <= step_up[torch.minimum(ours, other).long()] + 2.0**-15).all()
            differing += int((apart > 0).sum())
            torch.testing.assert_close(absmax, other_absmax, rtol=1e-5, atol=0)
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-5, atol=1e-6)
        p.copy_(theirs.detach())
        for ours, name in zip(states, ("state1", "state2", "absmax1", "absmax2"), strict=True):
            ours.copy_(state[name])
    assert differing < 1e-2 * 200 * 2 * numel


def test_a_whole_run_stays_with_bitsandbytes():
    """200 steps apart from each other end at the same place, up to what single codes can move."""
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(4096, generator=generator)
    theirs = torch.nn.Parameter(torch.zeros(4096))
    optimizer = bnb.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.0)
    p = torch.zeros(4096)
    states = adam8bit.new_states(p)
    for step in range(1, 201):
        noise = 0.1 * torch.randn(4096, generator=generator)
        theirs.grad = theirs.detach() - target + noise
        optimizer.step()
        adam8bit.adam8bit_step_(p, p - target + noise, *states, step=step, lr=1e-2)
    distance, moved = (p - theirs.detach()).norm(), theirs.detach().norm()
    assert distance < 3e-3 * moved


@pytest.mark.parametrize("decoupled", [True, False])
def test_it_is_adam(decoupled):
    """With 8-bit states it stays near torch's Adam(W) in fp32 states."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(2048, generator=generator)
    theirs = torch.nn.Parameter(torch.zeros(2048))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([theirs], lr=1e-2, weight_decay=0.1)
    p = torch.zeros(2048)
    states = adam8bit.new_states(p)
    for step in range(1, 101):
        noise = 0.1 * torch.randn(2048, generator=generator)
        theirs.grad = theirs.detach() - target + noise
        optimizer.step()
        adam8bit.adam8bit_step_(
            p, p - target + noise, *states, step=step, lr=1e-2, weight_decay=0.1, decoupled=decoupled
        )
    assert (p - theirs.detach()).norm() < 0.05 * theirs.detach().norm()


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
def test_a_shard_rounds_like_the_whole(monkeypatch, native):
    monkeypatch.setattr(builder, "load", lambda: native)
    numel, cut = 256 * 9 + 40, 256 * 4
    p = torch.randn(numel).bfloat16()
    g = torch.randn(numel).bfloat16()
    whole = [p.clone(), *adam8bit.new_states(p)]
    options = {"lr": 1e-3, "stochastic": True, "seed": 1, "key": adam8bit.parameter_key("a.b"), "weight_decay": 0.1}
    parts = [p[:cut].clone(), p[cut:].clone()]
    states = [adam8bit.new_states(part) for part in parts]
    for step in (1, 2, 3):
        adam8bit.adam8bit_step_(whole[0], g, *whole[1:], step=step, **options)
        for part, gradient, state, offset in zip(parts, (g[:cut], g[cut:]), states, (0, cut), strict=True):
            adam8bit.adam8bit_step_(part, gradient, *state, step=step, offset=offset, **options)
    assert same(whole, [torch.cat(parts), *(torch.cat(pair) for pair in zip(*states, strict=True))])


def test_noise_depends_on_every_key():
    keys = [(0, 1, 0, 0), (1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 256), (0, 1, 0, 256 << 32), (-1, 1, 0, 0)]
    streams = [adam8bit.rounding_noise(1024, *key) for key in keys]
    for i, stream in enumerate(streams):
        assert stream.min() >= 0 and stream.max() < 2**16
        for other in streams[:i]:
            assert (stream == other).sum() < 10  # 1024 draws of 65,536 values: 0.016 expected
    shifted = adam8bit.rounding_noise(768, 0, 1, 0, 256)
    assert torch.equal(shifted, streams[0][256:])


def test_noise_is_uniform_and_independent():
    draws = adam8bit.rounding_noise(1 << 20, 5, 7, 9).double()
    n = draws.numel()
    counts = torch.bincount((draws / 256).long(), minlength=256).double()
    assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * (2 * 255) ** 0.5  # chi-square, 5 sigma
    low = torch.bincount(draws.long() % 256, minlength=256).double()
    assert ((low - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * (2 * 255) ** 0.5
    centred = draws - draws.mean()
    for lag in (1, 2, 255, 256, 257, 512):  # neighbours share a word, blocks a key
        correlation = (centred[:-lag] * centred[lag:]).mean() / centred.var()
        assert correlation.abs() < 5 / n**0.5
    later = adam8bit.rounding_noise(1 << 20, 5, 8, 9).double()
    assert ((later - later.mean()) * centred).mean().abs() / centred.var() < 5 / n**0.5


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
def test_stochastic_rounding_is_unbiased_and_to_a_neighbour(monkeypatch, native):
    """lr = 0 keeps p but for the decay, so p * (1 - lr * wd) is what gets rounded."""
    monkeypatch.setattr(builder, "load", lambda: native)
    numel = 1 << 16
    decay = 1 - 2.0**-11
    for value in (1.0, -1.5, 3e-39):  # the last one subnormal
        p = torch.full((numel,), value, dtype=torch.bfloat16)
        exact = float(p[0]) * decay
        before = p.clone()
        adam8bit.adam8bit_step_(
            p, torch.zeros(numel), *adam8bit.new_states(p), step=1, lr=2.0**-11, weight_decay=1.0, stochastic=True
        )
        steps = (p.view(torch.int16).int() - before.view(torch.int16).int()).abs()
        assert steps.max() == 1 and steps.min() == 0
        share = float((steps == 1).double().mean())
        one_step = abs(float(before[0]) - float(p[steps == 1][0]))
        expected = abs(float(before[0]) - exact) / one_step
        assert abs(share - expected) < 5 * (expected * (1 - expected) / numel) ** 0.5 + 2.0**-16


def test_small_updates_are_lost_to_nearest_and_kept_by_noise():
    def mean_after(stochastic):
        p = torch.full((8192,), 1.0, dtype=torch.bfloat16)
        states = adam8bit.new_states(p)
        for step in range(1, 51):
            adam8bit.adam8bit_step_(p, torch.ones(8192), *states, step=step, lr=1e-4, stochastic=stochastic)
        return float(p.double().mean())

    assert mean_after(False) == 1.0
    assert abs(mean_after(True) - (1 - 50e-4)) < 2e-4


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_gradients_show(monkeypatch, native, dtype):
    monkeypatch.setattr(builder, "load", lambda: native)
    for bad in (float("nan"), float("inf"), -float("inf")):
        p = torch.ones(600, dtype=dtype)
        g = torch.full((600,), 0.5)
        g[300] = bad
        states = adam8bit.new_states(p)
        adam8bit.adam8bit_step_(p, g, *states, step=1, lr=1e-3, stochastic=True)
        assert not p[300].isfinite() and p[:256].isfinite().all() and p[512:].isfinite().all()
        assert [bool(x) for x in states[3].isfinite()] == [True, False, True]  # and the block stays marked


@needs_kernel
def test_the_schema_is_sound():
    assert builder.load()
    for p in (torch.randn(300), torch.randn(300).bfloat16()):
        arguments = (p, torch.randn(300), *adam8bit.new_states(p), adam8bit.tables(p.device), 1e-3, 0.9, 0.999, 1e-8)
        torch.library.opcheck(
            torch.ops.sltrain.adam8bit_step_.default, (*arguments, 0.1, True, 1, True, 3, 4, 256, 1.0)
        )


@needs_kernel
def test_it_compiles_whole():
    assert builder.load()
    values = [torch.randn(300), torch.randn(300)]
    eager = [values[0].clone(), *adam8bit.new_states(values[0])]
    compiled = [tensor.clone() for tensor in eager]

    tables = adam8bit.tables(torch.device("cpu"))

    def step(p, m8, v8, absmax_m, absmax_v, g):
        rest = (tables, 1e-3, 0.9, 0.999, 1e-8, 0.1, True, 1, False, 0, 0, 0, 1.0)
        torch.ops.sltrain.adam8bit_step_(p, g * 2, m8, v8, absmax_m, absmax_v, *rest)
        return p + 1

    expected = step(*eager, values[1])
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled, values[1])
    assert torch.equal(found, expected) and same(compiled, eager)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"p": torch.zeros(300).half()}, "must be float32 or bfloat16"),
        ({"g": torch.zeros(299)}, "differ in size"),
        ({"m8": torch.zeros(300)}, "must be uint8"),
        ({"absmax_m": torch.zeros(3)}, r"must be float32 \(2,\)"),
        ({"p": torch.zeros(600)[::2]}, "must be contiguous"),
        ({"step": 0}, "steps count from 1, got 0"),
        ({"offset": 255}, "offset must be a multiple of 256, where a block begins, got 255"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch, change, reason, native):
    monkeypatch.setattr(builder, "load", lambda: native)
    p = torch.zeros(300)
    names = ("m8", "v8", "absmax_m", "absmax_v")
    arguments = {"p": p, "g": p.clone(), "step": 1, "lr": 1e-3} | dict(zip(names, adam8bit.new_states(p), strict=True))
    with pytest.raises(RuntimeError, match=reason):
        adam8bit.adam8bit_step_(**{**arguments, **change})


def test_any_shape_and_keys():
    p = torch.randn(7, 3, 11)
    flat = p.clone().view(-1)
    states, flat_states = adam8bit.new_states(p), adam8bit.new_states(flat)
    adam8bit.adam8bit_step_(p, torch.ones_like(p), *states, step=1, lr=0.1)
    adam8bit.adam8bit_step_(flat, torch.ones_like(flat), *flat_states, step=1, lr=0.1)
    assert same([p.view(-1), *states], [flat, *flat_states])
    keys = {adam8bit.parameter_key(name) for name in ("a", "b", "a.b", "")}
    assert len(keys) == 4 and all(0 <= key < 2**63 for key in keys)
    assert adam8bit.parameter_key("model.layers.0.self_attn.q_proj.A") == 6521675175225772453
