"""Batches of random tokens, for measurements that do not depend on the token values."""

import torch


class RandomTokens:
    """Replaces `BatchSource` where there is no prepared data."""

    def __init__(self, run):
        self.shape = (run.micro_batch_size, run.sequence_length)
        self.vocab_size = run.model_fields["vocab_size"]

    def micro_batch(self, step, micro, rank, world):
        generator = torch.Generator().manual_seed(1000 * step + micro)
        return {"input_ids": torch.randint(0, self.vocab_size, self.shape, generator=generator)}
