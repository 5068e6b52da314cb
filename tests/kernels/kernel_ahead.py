"""The kernel ahead of one that is launched as its dependent: what it writes is NaN until its readers have waited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from nanovllm.kernels import triton_support
from nanovllm.kernels.add_splits import finishing_arguments
from tests.kernels.gluon_emulator.machine import machine


class Unwritten:
    """What the kernel ahead has yet to write: NaN at first."""

    def __init__(self, written: Sequence[torch.Tensor]) -> None:
        self.written, self.values = written, [tensor.clone() for tensor in written]
        self.hide()

    def hide(self) -> None:
        for tensor in self.written:
            tensor.fill_(torch.nan)

    def write(self) -> None:
        for tensor, value in zip(self.written, self.values, strict=True):
            tensor.copy_(value)


def run_beside_the_kernel_ahead(
    emulated: Callable[..., Callable[..., torch.Tensor]],
    seed: int,
    written: Sequence[torch.Tensor],
    num_waiting: int,
    *given: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, set[str]]:
    """Returns the product, and which partitions have waited. The kernel ahead ends once `num_waiting` do."""
    unwritten = Unwritten(written)
    waiting: set[str] = set()

    def wait_for_previous_kernel() -> None:
        waiting.add(machine().running.name.partition(" of ")[0])
        machine().pause(lambda: len(waiting) == num_waiting, "the kernel ahead")
        unwritten.write()

    def finishing_with_pdl(*given: Any, **options: Any) -> dict[str, Any]:
        return finishing_arguments(*given, **options) | {"PDL": True}

    product = emulated(
        seed,
        1,
        finishing_arguments=finishing_with_pdl,
        pdl_options=lambda device: {"PDL": True},
        gdc_launch_dependents=lambda: None,
        gdc_wait=wait_for_previous_kernel,
    )
    return product(*given, **arguments), waiting


def put_a_kernel_ahead(monkeypatch: pytest.MonkeyPatch, module: Any, written: Sequence[torch.Tensor]) -> None:
    """Lets each program of `module`'s kernels begin before the kernel ahead has written anything; for the interpreter.

    written: views of what that writes. They are NaN from a program's first line to its wait.
    """
    unwritten = Unwritten(written)
    monkeypatch.setattr(module, "pdl_options", lambda device, wanted: {"PDL": wanted})
    monkeypatch.setattr(triton_support, "gdc_launch_dependents", unwritten.hide)
    monkeypatch.setattr(triton_support, "gdc_wait", unwritten.write)
