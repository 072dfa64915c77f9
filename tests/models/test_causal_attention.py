"""Causal attention without the packed-sequence check: the same bits, and only where nothing needs a mask."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from sltrain_ds.models.causal_attention import NAME, use_causal_attention


def llama(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture
def checks(monkeypatch):
    """How often transformers has looked for packed sequences."""
    calls, original = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda positions: calls.append(1) or original(positions)
    )
    return calls


def test_the_same_bits_without_the_check(checks):
    model, tokens = llama(), torch.arange(24).view(2, 12)
    expected = model(input_ids=tokens, labels=tokens)
    assert checks
    checks.clear()
    use_causal_attention(model, mask_documents=False)
    found = model(input_ids=tokens, labels=tokens)
    assert not checks
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize(("attention", "masked"), [("eager", False), ("sdpa", True)])
def test_what_needs_a_mask_keeps_it(attention, masked, checks):
    model = llama(attention)
    use_causal_attention(model, mask_documents=masked)
    assert model.config._attn_implementation == attention != NAME
    tokens, positions = torch.arange(24).view(2, 12), (torch.arange(12) % 5).expand(2, -1)
    packed = model(input_ids=tokens, position_ids=positions).logits
    alone = model(input_ids=tokens[:, 10:]).logits
    assert checks
    torch.testing.assert_close(packed[:, 10:], alone)


def test_other_architectures_are_left_alone():
    model = llama()
    model.config.model_type = "mistral"
    use_causal_attention(model, mask_documents=False)
    assert model.config._attn_implementation == "sdpa"
