"""The JSON file as typed, validated objects: `load(path) -> RunConfig`. Imports neither torch nor DeepSpeed."""

from .load import from_dict, load
from .run import RunConfig

__all__ = ["RunConfig", "from_dict", "load"]
