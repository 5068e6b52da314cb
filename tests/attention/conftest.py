"""The kernel tests' fixtures: a backend test runs on the GPU where there is one, else on the CPU."""

from __future__ import annotations

from tests.kernels.conftest import device, generator

__all__ = ["device", "generator"]
