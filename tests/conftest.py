"""Without a GPU, Triton kernels run in its interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

# The models here are small: more threads only wait for one another, above all beside other processes.
torch.set_num_threads(1)

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are deselected, and counted as such, where there is none."""
    if HAS_GPU:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
