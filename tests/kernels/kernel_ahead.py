"""The kernel ahead of one that is launched as its dependent: what it writes is NaN until all who touch that wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nanovllm.kernels.add_splits import finishing_arguments
from tests.kernels.gluon_emulator.machine import machine


def run_beside_the_kernel_ahead(
    emulated: Callable[..., Callable[..., torch.Tensor]],
    seed: int,
    written: Sequence[torch.Tensor],
    num_waiting: int,
    *given: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, set[str]]:
    """Returns the product, and which partitions have waited. The kernel ahead ends once `num_waiting` do."""
    values = [tensor.clone() for tensor in written]
    waiting: set[str] = set()

    def wait_for_previous_kernel() -> None:
        waiting.add(machine().running.name.partition(" of ")[0])
        machine().pause(lambda: len(waiting) == num_waiting, "the kernel ahead")
        for tensor, value in zip(written, values, strict=True):
            tensor.copy_(value)

    def finishing_with_pdl(*given: Any, **options: Any) -> dict[str, Any]:
        return finishing_arguments(*given, **options) | {"PDL": True}

    for tensor in written:
        tensor.fill_(torch.nan)
    product = emulated(
        seed,
        1,
        finishing_arguments=finishing_with_pdl,
        pdl_options=lambda device: {"PDL": True},
        gdc_launch_dependents=lambda: None,
        gdc_wait=wait_for_previous_kernel,
    )
    return product(*given, **arguments), waiting
