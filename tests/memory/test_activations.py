"""The formula of memory/activations.py against the tensors autograd really saves."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from sltrain_ds.formats import CHUNK_BYTES  # noqa: E402
from sltrain_ds.memory.activations import activations, block, head  # noqa: E402
from sltrain_ds.memory.count import Shape, count  # noqa: E402
from sltrain_ds.methods.convert import convert  # noqa: E402
from sltrain_ds.methods.full_rank import FullRankConfig  # noqa: E402
from sltrain_ds.methods.low_rank import LowRankConfig  # noqa: E402
from sltrain_ds.methods.sltrain import SLTrainConfig  # noqa: E402
from sltrain_ds.ops import modes  # noqa: E402

FIELDS = dict(vocab_size=64, hidden_size=96, intermediate_size=272, num_hidden_layers=3, num_attention_heads=4)
BATCH, LENGTH = 2, 128
METHODS = {
    "full_rank": FullRankConfig(),
    "sltrain": SLTrainConfig(rank=24, density=0.03, alpha=8, target_modules=("self_attn", "mlp")),
    "low_rank": LowRankConfig(rank=24, alpha=8, target_modules=("self_attn", "mlp")),
}


def saved_bytes(model, ids):
    """Bytes of the storages that the forward pass saves for backward, weights and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = model(input_ids=ids, labels=ids).loss
    assert value.requires_grad  # holds the graph, and so every storage above, until here
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_formula_matches_saved_tensors(name, dtype, checkpointing, attention):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**FIELDS, use_cache=False, attn_implementation=attention))
    model = convert(model, METHODS[name]).to(dtype).train()
    modes.set_op_mode(model, "compose")  # which is what the formula counts
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    counted = count(Shape.of(FIELDS), type("Block", (), {**getattr(METHODS[name], "__dict__", {}), "name": name})())
    counted = replace(counted, scores=LENGTH if attention == "eager" else 0)
    tokens, compute = BATCH * LENGTH, dtype.itemsize
    a_layer = compute * tokens * FIELDS["hidden_size"] if checkpointing else block(counted, tokens, compute)
    # one T x V array is saved; two more come into being in the backward pass
    expected = 3 * a_layer + head(counted.shape, tokens, compute) + 4 * tokens * FIELDS["vocab_size"]
    found = saved_bytes(model, torch.randint(0, 64, (BATCH, LENGTH)))
    assert found == pytest.approx(expected, rel=0.03)


def test_terms_add_up():
    model = count(Shape.of(FIELDS))
    tokens, vocab = 4096, FIELDS["vocab_size"]
    one, last = block(model, tokens, 2), head(model.shape, tokens, 2)
    assert activations(model, tokens, 2, False, False) == 3 * one + last + 12 * tokens * vocab
    assert activations(model, tokens, 2, True, False) == 3 * 2 * tokens * 96 + max(one, last + 12 * tokens * vocab)
    large = count(Shape.of({**FIELDS, "vocab_size": 32_000}))
    saved = activations(large, tokens, 2, False, False) - activations(large, tokens, 2, False, True)
    assert saved == 12 * 32_000 * tokens - 10 * 32_000 * (CHUNK_BYTES // (4 * 32_000))
