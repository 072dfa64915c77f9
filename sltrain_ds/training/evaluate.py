"""Token-weighted validation loss over a fixed token budget, the same at any world size and batch size."""

import math
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats a predicted token
    tokens: int  # predicted tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond it a double overflows


@torch.no_grad()
def evaluate(model, batches, device) -> Evaluation:
    """Mean loss of `model` (an engine or a transformers model) over `batches`, summed over all ranks.

    `batches` yields (batch, weight): dicts of CPU tensors, and how many predicted tokens the batch's mean loss stands
    for; 0 for a repeat that only keeps ranks in step (ZeRO-3 gathers in every forward pass). Sums are fp64, so neither
    ranks nor batch size show in the result.
    """
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch, weight in batches:
        batch = with_labels(batch)
        loss = model(**on_device(batch, device)).loss
        total += torch.tensor([float(loss) * weight if weight else 0.0, weight], dtype=torch.float64)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        total = total.to(device)
        distributed.all_reduce(total)
    model.train(training)
    loss, tokens = total.tolist()
    return Evaluation(loss / tokens, int(tokens))


def with_labels(batch: dict) -> dict:
    """The batch with "labels" (batch, sequence): its own where documents are masked, else the inputs themselves."""
    return batch if "labels" in batch else {**batch, "labels": batch["input_ids"]}


def on_device(batch: dict, device) -> dict:
    """The batch on the device; a tensor under two keys is sent once, to a GPU from pinned memory and without a wait."""
    gpu, sent = torch.device(device).type == "cuda", {}
    for value in batch.values():
        if id(value) not in sent:
            sent[id(value)] = (value.pin_memory() if gpu else value).to(device, non_blocking=True)
    return {key: sent[id(value)] for key, value in batch.items()}
