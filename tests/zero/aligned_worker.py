"""A rank of the alignment tests: steps a toy model on given gradients and writes states by parameter and offset.

    deepspeed --num_gpus N aligned_worker.py CONFIGS.json OUT_DIR    CONFIGS: {name: config}

OUT_DIR/rank_R.pt: {name: {(parameter key, offset): [the slice's weights, then its states]}}, after 3 steps; under
"NAME resumed" the same with a checkpoint and a new engine between the second step and the third.
"""

import json
import sys
from pathlib import Path

import torch
from deepspeed import comm as dist

from sltrain_ds.checkpoint.safe_load import safe_checkpoint_engine
from sltrain_ds.logs import quiet
from sltrain_ds.zero.initialize import initialize
from sltrain_ds.zero.start import start

# odd sizes, one smaller than a block, one of many; the last pair makes the norms group
SHAPES = {"a": (37, 29), "b": (8, 512), "c": (3, 5), "d": (70, 111), "e": (300,), "f": (7,)}


class Toy(torch.nn.Module):
    """Its loss is the sum of parameter times given gradient, so those are its gradients whatever the parameters are."""

    def __init__(self):
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(i))
            self.register_parameter(name, torch.nn.Parameter(values))

    def forward(self, step):
        loss = 0.0
        for i, (name, shape) in enumerate(SHAPES.items()):
            p = getattr(self, name)
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + i)) * 1e-2
            loss = loss + (p * gradient.to(p.dtype)).sum()
        return loss


def engine_of(config):
    return initialize(model=Toy(), config=config)[0]


def train(engine, steps):
    for step in steps:
        engine.backward(engine(step))
        engine.step()


def states(engine):
    optimizer = engine.optimizer.optimizer
    found = {}
    for tensor in optimizer.state:
        flat = tensor.detach().view(-1)
        for segment, parts in optimizer.segment_states(tensor):
            pieces = [flat[segment.start : segment.stop], *parts]
            found[segment.key, segment.offset] = [piece.clone() for piece in pieces]
    return found


if __name__ == "__main__":
    quiet()
    config_path, out = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    start()
    result = {}
    for name, config in json.loads(config_path.read_text()).items():
        engine = engine_of(config)
        train(engine, (0, 1))
        engine.save_checkpoint(str(out / name), tag="two")
        train(engine, (2,))
        result[name] = states(engine)
        engine.destroy()
        engine = engine_of(config)
        with safe_checkpoint_engine(engine):
            engine.load_checkpoint(str(out / name), tag="two")
        train(engine, (2,))
        result[f"{name} resumed"] = states(engine)
        engine.destroy()
    torch.save(result, out / f"rank_{dist.get_rank()}.pt")
