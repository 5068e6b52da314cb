"""A pytest plugin that compiles the kernels that tests launch, for a Hopper GPU, on a machine without one.

Triton's interpreter accepts code that the compiler refuses. Here a launch compiles its kernel and runs nothing, so the
results of most tests are wrong and do not matter. COMPILED names the file for the outcome: a JSON object with the names
of all kernels, of those that were compiled, and the error of each that was not.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import nanovllm.kernels
from tests.kernels.hopper_driver import HopperDriver

_VARIANTS = 1  # compiled of each kernel, and tests that run of each function

_tried: Counter[str] = Counter()
_errors: dict[str, str] = {}


_launch = JITFunction.run


def _compile(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    name = self.fn.__name__
    _tried[name] += 1
    if _tried[name] > _VARIANTS:
        return
    if "PDL" in options:  # as there; a device that is a CPU has no dependent launch
        options |= {"PDL": True, "launch_pdl": True}
    try:
        _launch(self, *args, grid=grid, warmup=True, **options)
    except Exception as error:
        _errors.setdefault(name, f"{type(error).__name__}: {error}")


driver.set_active(HopperDriver())  # type: ignore[no-untyped-call]
JITFunction.run = _compile  # type: ignore[method-assign, assignment]

# Defined here, since later the suite's conftest asks for the interpreter.
_KERNELS = {
    name
    for module in pkgutil.iter_modules(nanovllm.kernels.__path__)
    for name, value in vars(importlib.import_module(f"nanovllm.kernels.{module.name}")).items()
    if type(value) is JITFunction and name.startswith("_") and name.endswith("_kernel")
}
# So that tests launch kernels with tensors of the CPU.
importlib.import_module("nanovllm.kernels.triton_support").INTERPRETED = True  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    functions: Counter[str] = Counter()
    kept = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        functions[function] += 1
        if functions[function] <= _VARIANTS:
            kept.append(item)
    items[:] = kept


def pytest_sessionfinish() -> None:
    outcome = {"kernels": sorted(_KERNELS), "compiled": sorted(set(_tried) - set(_errors)), "errors": _errors}
    Path(os.environ["COMPILED"]).write_text(json.dumps(outcome))
