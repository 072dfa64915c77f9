"""What transformers makes of our position_ids: documents in one row do not see each other."""

import numpy as np
import pytest
import torch
from bounds import same_logits
from transformers import LlamaConfig, LlamaForCausalLM

from sltrain_ds.data.dataset import to_batch

EOS = 2
DOCUMENTS = [[5, 6, 7, 8, EOS], [9, EOS], [10, 11, 12, 13, 14, 15, EOS], [16, 17]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def packed(documents):
    return [token for document in documents for token in document]


def alone(model, documents):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in documents])


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_of_a_packed_document_are_those_of_the_document_alone(model, rows):
    *whole, last = DOCUMENTS  # the last one is cut off by the end of the row
    orders = [[*whole[i:], *whole[:i], last] for i in range(rows)]
    batch = to_batch(np.array([packed(order) for order in orders]), EOS)
    with torch.no_grad():
        got = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        plain = model(input_ids=batch["input_ids"], use_cache=False).logits
    for row in range(rows):
        same_logits(got[row], alone(model, orders[row]), model.config.to_dict())
    assert (got - plain).abs().max() > 0.01  # without position_ids they do see each other


def test_loss_is_the_mean_over_tokens_inside_documents(model):
    batch = to_batch(np.array([packed(DOCUMENTS)]), EOS)
    with torch.no_grad():
        got = model(**batch, use_cache=False).loss
    losses = []
    for document in DOCUMENTS:
        logits = alone(model, [document])
        losses += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(document[1:]), reduction="none").tolist()
    assert got.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_gradient_does_not_cross_a_border(model):
    batch = to_batch(np.array([packed(DOCUMENTS)]), EOS)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits
    logits[0, 9].sum().backward()  # a token of the third document, which starts at 7
    seen = embedded.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [7 <= i <= 9 for i in range(16)]
