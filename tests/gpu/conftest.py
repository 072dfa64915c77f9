"""Everything here needs a CUDA device, and the CUDA kernels: built ahead of time, or nvcc beside torch."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device that torch can use"))


@pytest.fixture
def kernels():
    from sltrain_ds.ops import cuda

    if not cuda.load():
        pytest.skip(f"needs the CUDA kernels: {cuda.status()[1]}")
    return cuda
