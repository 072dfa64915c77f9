"""World sizes, ZeRO stages and the naive formula give the same 20 losses in fp32, within 1e-5 relative."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR
from ranks import launch
from torch import nn

from sltrain_ds.config import from_dict
from sltrain_ds.data.dataset import BatchSource
from sltrain_ds.methods.sltrain_layer import SLTrainLinear
from sltrain_ds.models import build as models
from sltrain_ds.optim.build import build_optimizer
from sltrain_ds.training.evaluate import with_labels

WORKER = Path(__file__).with_name("run_variants.py")
STEPS, STAGES = 20, (0, 1, 2, 3)
pytestmark = pytest.mark.distributed


class NaiveSLTrain(nn.Module):
    """W = scaling B A + S built anew as a dense matrix in plain PyTorch, autograd and all; int64 flat indices."""

    def __init__(self, layer: SLTrainLinear):
        super().__init__()
        layer.ensure_support()
        self.A, self.B, self.S_values = layer.A, layer.B, layer.S_values
        counts = layer.S_rows.long().diff()
        self.rows = torch.repeat_interleave(torch.arange(layer.out_features), counts)
        self.index = self.rows * layer.in_features + layer.S_columns.long()
        self.shape, self.scaling = (layer.out_features, layer.in_features), layer.scaling

    def forward(self, x):
        dense = torch.zeros(self.shape[0] * self.shape[1], dtype=x.dtype).scatter(0, self.index, self.S_values)
        return x @ (self.scaling * (self.B @ self.A) + dense.view(self.shape)).t()


def naive_losses(config) -> list[float]:
    run = from_dict(config, world_size=1)
    masked = run.sltrain.data.mask_documents
    model = models.build(run)
    optimizer = build_optimizer(model, run)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SLTrainLinear):
            model.set_submodule(name, NaiveSLTrain(layer))
    scheduler = WarmupCosineLR(optimizer, **run.deepspeed["scheduler"]["params"])
    source, found = BatchSource.from_parts(BatchSource(run).data, run.sltrain.seed, 8, 8, masked), []
    for step in range(STEPS):
        loss = model(**with_labels(source.micro_batch(step, 0, 0, 1))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        found.append(loss.item())
    return found


def relative(a, b) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def test_every_stage_and_world_gives_the_losses_of_the_naive_formula(tiny_config, tmp_path):
    stages = {f"z{stage}": {"zero_optimization__stage": stage} for stage in STAGES}
    # micro-batches that predict unequal numbers of tokens: every token must still weigh the same
    masked = {"sltrain__data__mask_documents": True, "train_micro_batch_size_per_gpu": 1}
    variants = stages | {"masked": masked, "masked-chunked": masked | {"sltrain__loss": "chunked"}}
    configs = {name: tiny_config(sltrain__steps=STEPS, **settings) for name, settings in variants.items()}
    path = tmp_path / "configs.json"
    path.write_text(json.dumps(configs))
    whole, parts = naive_losses(configs["z2"]), naive_losses(configs["masked"])
    assert whole[-1] < whole[0] - 0.3, "the model must learn, or equal losses say little"
    assert relative(parts, whole) > 1e-3, "documents must have borders inside sequences"
    for world in (1, 2, 4):
        out = tmp_path / f"world{world}.json"
        process = launch(world, WORKER, path, out, cwd=tmp_path)
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        for name, losses in json.loads(out.read_text()).items():
            expected = parts if name.startswith("masked") else whole
            assert relative(losses, expected) < 1e-5, (world, name, losses, expected)


def test_a_wrong_learning_rate_is_seen(tiny_config):
    """The control: 1% off in one group moves the losses by far more than the tolerance above."""
    config = tiny_config(sltrain__steps=STEPS)
    expected = naive_losses(config)
    config["sltrain"]["method"]["lr_scale"] = {"sparse": 1.01}
    assert relative(naive_losses(config), expected) > 1e-5
