"""Full-rank training: every ``nn.Linear`` stays as it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FullRankConfig:
    """Nothing to choose."""
