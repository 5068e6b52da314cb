"""Where a kernel test runs: on the GPU (marker `gpu`) where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)
