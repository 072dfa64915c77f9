"""`RunConfig`: the checked JSON as one object."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .block import SLTrainBlock


@dataclass(frozen=True)
class RunConfig:
    """A checked config with every "auto" resolved, for `world_size` ranks. Batch sizes are in sequences.

    `deepspeed` is handed to `deepspeed.initialize`; `resolved` maps the keys that were filled in to their values;
    `model_fields` are the `LlamaConfig` fields of the model (a preset's, the file's own, or its directory's).
    """

    sltrain: SLTrainBlock
    deepspeed: dict[str, Any]
    world_size: int
    train_batch_size: int
    micro_batch_size: int
    accumulation: int
    model_fields: dict[str, Any]
    path: Path | None = field(default=None, compare=False)
    resolved: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def run_dir(self) -> Path:
        return Path(self.sltrain.run_dir)

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self.sltrain.checkpoint.dir)

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    @property
    def bf16(self) -> bool:
        return self.deepspeed.get("bf16", {}).get("enabled", False)

    @property
    def gradient_clipping(self) -> float:
        """Bound of the global gradient norm; 0.0: no clipping."""
        return self.deepspeed["gradient_clipping"]

    @property
    def weights(self) -> str:
        """ "fp32", "fp32_master" (bf16 with fp32 masters) or "bf16" (bf16 without)."""
        return self.sltrain.precision.weights

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.sltrain.data.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.train_batch_size * self.sequence_length

    def to_json(self) -> dict[str, Any]:
        """The resolved config in the file's own form.

        Accumulation is left out, since every start derives it anew; checkpoints in the run directory stay "auto", so
        that they move with a run_dir set later.
        """
        data = copy.deepcopy(self.deepspeed)
        data.pop("gradient_accumulation_steps", None)
        block = self.sltrain.model_dump()
        block["model"] = {key: value for key, value in block["model"].items() if value is not None}
        if self.checkpoint_dir == self.run_dir / "checkpoints":
            block["checkpoint"]["dir"] = "auto"
        return {**data, "sltrain": block}
