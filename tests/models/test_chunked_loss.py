"""The chunked loss is transformers' own, in value and gradient; what it cannot be is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sltrain_ds import formats
from sltrain_ds.data.dataset import IGNORED
from sltrain_ds.errors import UserError
from sltrain_ds.models import chunked_loss as loss

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model(kind, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more))


def result(of, **inputs):
    of.zero_grad()
    value = of(**inputs).loss
    value.backward()
    return value.detach(), [p.grad.clone() for p in of.parameters()]


@pytest.mark.parametrize("kind", ["llama", "phi"])  # phi's head has a bias: chunks by checkpoints
@pytest.mark.parametrize("count", [None, 17])
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_value_and_gradients_are_those_of_the_full_loss(monkeypatch, kind, count, as_on_a_gpu):
    monkeypatch.setattr(formats, "CHUNK_BYTES", 4 * 300 * 7)  # 7 tokens a chunk, the last one shorter
    monkeypatch.setattr(loss, "_at_once", lambda hidden: as_on_a_gpu)
    monkeypatch.setattr(formats, "CUDA_MULTIPLE", 7)
    monkeypatch.setattr(formats, "CUDA_MOST", 7)
    ids = torch.randint(300, (2, 16))
    labels = ids.clone()
    labels[0, 3:12] = IGNORED  # a whole chunk without a target
    inputs = {"input_ids": ids, "labels": labels, "num_items_in_batch": count}
    chunked = model(kind)
    expected, gradients = result(chunked, **inputs)
    loss.use_chunked_loss(chunked)
    found, ours = result(chunked, **inputs)
    torch.testing.assert_close(found, expected)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert chunked(input_ids=ids).logits.shape == (2, 16, 300)


def test_chunks_on_a_gpu_are_whole_tiles():
    found = [formats.chunk_tokens(vocabulary, "cuda") for vocabulary in (300, 32_000, 128_256, 1_000_000)]
    assert found == [1024, 1024, 256, 256]


def test_gradients_formed_in_forward_serve_once_and_cost_nothing_without_a_backward(monkeypatch):
    monkeypatch.setattr(loss, "_at_once", lambda hidden: True)
    chunked = model("llama")
    loss.use_chunked_loss(chunked)
    ids = torch.randint(300, (2, 16))
    with torch.no_grad(), monkeypatch.context() as without:
        without.setattr(torch, "mm", lambda *args, **options: pytest.fail("a gradient is formed in an evaluation"))
        evaluated = chunked(input_ids=ids, labels=ids).loss
    value = chunked(input_ids=ids, labels=ids).loss
    assert torch.equal(evaluated, value)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        value.backward()


REFUSED = {
    "gemma2": {"final_logit_softcapping": 30.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "mixtral": {"output_router_logits": True},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_changes_its_logits_is_refused(kind):
    ((key, value),) = REFUSED[kind].items()
    with pytest.raises(UserError, match=rf'sltrain.loss: "chunked" .* has {key} {value}; set "full"'):
        loss.use_chunked_loss(model(kind, **REFUSED[kind]))


def test_a_mask_given_by_place_is_not_taken_for_labels():
    chunked = model("llama")
    loss.use_chunked_loss(chunked)
    ids = torch.randint(300, (2, 16))
    with pytest.raises(TypeError, match="positional"):
        chunked(ids, torch.ones_like(ids))
