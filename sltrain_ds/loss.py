"""Cross-entropy of a causal language model, whole or in chunks of tokens."""

import types

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from sltrain_ds.data.dataset import IGNORED

CHUNK_BYTES = 32 << 20  # fp32 logits alive at once


def use_chunked_loss(model) -> None:
    """Make `model(..., labels=)` compute its loss without the logits of all tokens in fp32 at once.

    `model` is a `transformers` causal LM. A chunk holds CHUNK_BYTES of fp32 logits and is recomputed in backward.
    The call and the value stay those of transformers' own loss; logits are returned only where no labels are given.
    """
    whole = model.forward

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return whole(input_ids=input_ids, **inputs)
        hidden = self.get_decoder()(input_ids=input_ids, **inputs).last_hidden_state
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        tokens = max(1, CHUNK_BYTES // (4 * self.config.vocab_size))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, target in zip(hidden.flatten(0, 1).split(tokens), targets.flatten().split(tokens), strict=True):
            total = total + checkpoint(_chunk_loss, self.get_output_embeddings(), part, target, use_reentrant=False)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    model.forward = types.MethodType(forward, model)


def _chunk_loss(head, hidden, targets):
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED, reduction="sum")
