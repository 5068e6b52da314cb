"""A driver with which Triton compiles for a Hopper GPU on a machine without one."""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget


class HopperDriver:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
