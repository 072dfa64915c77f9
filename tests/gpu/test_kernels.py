"""The CUDA kernels on a GPU, against PyTorch and bit for bit against the CPU kernels."""

import pytest
import torch

from sltrain_ds.ops import adam4bit, adam8bit, builder, support
from sltrain_ds.optim.blockwise_adam import BlockwiseAdam

FLOATS = [torch.float32, torch.bfloat16]
SHAPES = [((1, 1), 1.0), ((64, 512), 0.03), ((1376, 512), 0.03), ((300, 4096), 0.05), ((3, 70000), 0.01)]
SHAPES += [((40, 33), 0.0)]


@pytest.mark.parametrize("shape, density", SHAPES)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("value_dtype", FLOATS)
def test_scatter_and_gather(kernels, shape, density, weight_dtype, value_dtype):
    rows, columns = support.sample(*shape, support.nnz_of(density, *shape), 7, "layer")
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator).to(weight_dtype)
    values = torch.randn(columns.numel(), generator=generator).to(value_dtype)
    index = support.to_flat_index(rows, columns, shape[1])
    expected = W.clone().view(-1)
    expected[index] = (expected[index].float() + values.float()).to(weight_dtype)
    on_gpu, rows, columns = W.cuda(), rows.cuda(), columns.cuda()
    kernels.scatter_add_(on_gpu, rows, columns, values.cuda())
    assert torch.equal(on_gpu.cpu(), expected.view(shape))
    read = torch.full((columns.numel(),), float("nan"), dtype=value_dtype, device="cuda")
    kernels.gather(read, on_gpu, rows, columns)
    assert torch.equal(read.cpu(), expected[index].to(value_dtype))


@pytest.mark.parametrize("p_dtype", FLOATS)
@pytest.mark.parametrize("g_dtype", FLOATS)
@pytest.mark.parametrize("numel, shift", [(1, 0), (257, 0), (256 * 5000 + 13, 0), (256 * 3000 + 8, 1)])
@pytest.mark.parametrize("adam", [adam8bit, adam4bit])
def test_adam_equals_the_cpu(kernels, p_dtype, g_dtype, numel, shift, adam):
    generator = torch.Generator().manual_seed(numel)
    p = torch.randn(numel, generator=generator).to(p_dtype)
    cpu = [p, *adam.new_states(p)]
    # `shift` elements off the start of their allocations
    gpu = [torch.cat([tensor[:shift], tensor]).cuda()[shift:] for tensor in cpu]
    for step in range(1, 6):
        g = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator) ** 6
        g = g.to(g_dtype)
        options = {"lr": 0.01, "weight_decay": 0.1, "decoupled": step % 2 == 0, "grad_scale": 0.3}
        options |= {"stochastic": step % 3 > 0, "seed": 11, "key": 2**61, "offset": 256 * (2**32 - 1)}
        adam.step_(cpu[0], g, *cpu[1:], step=step, **options)
        adam.step_(gpu[0], g.cuda(), *gpu[1:], step=step, **options)
        for found, expected in zip(gpu, cpu, strict=True):
            assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("states", ["8bit", "4bit", "32bit"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_optimizer_steps_many_tensors_as_each_alone(kernels, states, dtype):
    """`BlockwiseAdam` in one launch for up to 31 tensors, its scale read on the device, against the CPU's codes."""
    generator = torch.Generator().manual_seed(3)
    sizes = [256 * 40 + 8, 1, 1000, 129, 4096, 256] * 12
    start = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    options = {"lr": 0.01, "weight_decay": 0.1, "stochastic": True, "seed": 11}
    options["states"] = states if states != "32bit" else "8bit"
    optimizers = []
    for device in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(p.to(device)) for p in start]
        group = {"params": parameters, "states": states}
        optimizers.append(BlockwiseAdam([group], **options))
    scale = torch.tensor(0.7)
    optimizers[1].gradient_scale = scale.cuda()
    for _ in range(3):
        for pair in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
            g = torch.randn(pair[0].numel(), generator=generator).to(dtype)
            for p in pair:
                p.grad = g.to(p.device)
        cpu, gpu = optimizers
        for p in cpu.param_groups[0]["params"]:
            cpu.update(p, p.grad, cpu.param_groups[0], grad_scale=float(scale))
        gpu.step()
    for p, q in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        if states == "32bit":  # the CPU's is torch's own formula, whose roundings differ
            torch.testing.assert_close(q.cpu(), p, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        else:
            assert torch.equal(q.cpu(), p)


def test_positions_past_two_to_the_31(kernels):
    """64-bit addressing: W of 2^31 + 2^20 bfloat16 elements, 4.3 GB."""
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB of free GPU memory")
    out_features, in_features = 32784, 65536
    W = torch.zeros(out_features, in_features, dtype=torch.bfloat16, device="cuda")
    rows = torch.zeros(out_features + 1, dtype=torch.int32)
    rows[-1], rows[-2] = 3, 1
    rows[1:-2] = 1
    columns = torch.tensor([5, 0, 65535], dtype=torch.uint16).cuda()
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, device="cuda")
    kernels.scatter_add_(W, rows.cuda(), columns, values)
    assert W[0, 5] == 1 and W[-1, 0] == 2 and W[-1, -1] == 3 and float(W.sum()) == 6
    read = torch.zeros(3, device="cuda")
    kernels.gather(read, W, rows.cuda(), columns)
    assert read.tolist() == [1, 2, 3]


def test_kernels_run_on_the_current_stream(kernels):
    """On a side stream that is still busy, the kernel waits its turn."""
    p = torch.zeros(1 << 20, device="cuda")
    states = adam8bit.new_states(p)
    adam8bit.tables(p.device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        g = torch.ones_like(p)
        adam8bit.adam8bit_step_(p, g, *states, step=1, lr=1.0)
    stream.synchronize()
    torch.testing.assert_close(p, torch.full_like(p, -1.0))


def test_a_graph_captures_them(kernels):
    rows, columns = support.sample(64, 512, 900, 0, "x")
    rows, columns, values = rows.cuda(), columns.cuda(), torch.ones(900, device="cuda")
    W = torch.zeros(64, 512, device="cuda")
    graph = torch.cuda.CUDAGraph()
    kernels.scatter_add_(W, rows, columns, values)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        kernels.scatter_add_(W, rows, columns, values)
    W.zero_()
    graph.replay()
    graph.replay()
    assert float(W.sum()) == 1800


def test_the_dispatcher_reaches_them(kernels):
    if not builder.load():
        pytest.skip(f"needs the C++ ops, which bring the schema: {builder.status()[1]}")
    rows, columns = support.sample(8, 16, 20, 0, "x")
    W, values = torch.zeros(8, 16, device="cuda"), torch.ones(20, device="cuda")
    torch.ops.sltrain.scatter_add_(W, rows.cuda(), columns.cuda(), values)
    out = torch.zeros(20, device="cuda")
    torch.ops.sltrain.gather(out, W, rows.cuda(), columns.cuda())
    assert float(W.sum()) == 20 and bool((out == 1).all())


def test_states_are_bitsandbytes_on_the_gpu(kernels):
    """bitsandbytes' fused kernel, 200 steps from the same states: neighbouring codes at most."""
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator("cuda").manual_seed(0)
    numel = 4096 * 4
    theirs = torch.nn.Parameter(torch.randn(numel, generator=generator, device="cuda"))
    optimizer = bnb.optim.AdamW8bit([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    p = theirs.detach().clone()
    states = adam8bit.new_states(p)
    for step in range(1, 201):
        g = torch.randn(numel, generator=generator, device="cuda") * 1e-2 + 1e-3 * p
        theirs.grad = g.clone()
        optimizer.step()
        adam8bit.adam8bit_step_(p, g, *states, step=step, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
        state = optimizer.state[theirs]
        for signed, ours, other in ((True, states[0], state["state1"]), (False, states[1], state["state2"])):
            values = torch.from_numpy(adam8bit.dynamic_map(signed)).cuda()
            step_up = torch.cat([values.diff(), values[-1:]])
            apart = (values[ours.long()] - values[other.long()]).abs()
            assert (apart <= step_up[torch.minimum(ours, other).long()] + 1e-6).all()
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-4, atol=1e-5)
        p.copy_(theirs.detach())
        for ours, name in zip(states, ("state1", "state2", "absmax1", "absmax2"), strict=True):
            ours.copy_(state[name])
