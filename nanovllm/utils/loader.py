"""Loads safetensors files into a model's parameters, and refuses files that do not fit exactly.

A model is built on the meta device: its parameters have shapes and no memory. Each layer says with `weight_parts`
which tensors of the checkpoint fill which rows of its parameters on this rank. `load_weights` first compares that
plan with the files, then allocates the parameters on the device and copies each element exactly once. It reads only
what this rank needs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from nanovllm.errors import ModelLoadError
from nanovllm.layers.parameter import HasWeightParts, WeightPart

_DTYPES = ("BF16", "F16", "F32")  # as safetensors spells them
_MOST_LISTED = 10  # names in an error


@dataclass(frozen=True)
class LoadReport:
    """The result of loading, for the log."""

    num_tensors: int  # parameters filled
    num_bytes: int  # their size on the device
    num_files: int
    seconds: float


def load_weights(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    redundant: frozenset[str] = frozenset(),
    check: Callable[[], None] = lambda: None,
) -> LoadReport:
    """Fills every parameter of `model` from the safetensors files in `folder`.

    `redundant`: checkpoint tensors that may be present and are not needed (lm_head.weight of a tied model).
    `check`: called before each tensor; an exception that it raises ends the loading.
    Raises ModelLoadError, before anything is allocated, when tensors are missing, unknown, in two files, or of
    another shape or dtype than the model's.
    """
    started = time.perf_counter()
    plan = weight_plan(model)
    with ExitStack() as stack:
        paths = checkpoint_files(folder)
        files = {path: stack.enter_context(_open(path)) for path in paths}
        tensors = _locate(files)
        _compare(plan, tensors, redundant, folder)
        parameters = materialise(model, device)
        for parameter_name, parts in plan.items():
            for part in parts:
                check()
                rows = parameters[parameter_name][part.row : part.row + part.num_rows]
                if part.name is None:
                    rows.zero_()
                elif part.num_rows:
                    rows.copy_(tensors[part.name].get_slice(part.name)[part.source])
    return _report(parameters, len(paths), started)


def load_dummy_weights(model: nn.Module, device: torch.device, seed: int = 0) -> LoadReport:
    """Fills every parameter with random values for benchmarks, which depend only on seed, device and shape.

    Matrices have a standard deviation of 1/√fan-in, which keeps their outputs, logits included, of order 1; norms are
    1, biases 0.
    """
    started = time.perf_counter()
    parameters = materialise(model, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in parameters.items():
        if parameter.dim() > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return _report(parameters, 0, started)


def materialise(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Replaces the meta parameters by uninitialised ones on `device`; parameters that have memory keep it.

    Buffers, which are computed, stay (`nn.Module.to_empty` would discard their values).
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))
    return dict(model.named_parameters())


def weight_plan(model: nn.Module) -> dict[str, Sequence[WeightPart]]:
    """Returns the parts that fill each parameter, by its name. Verifies that they fill every row exactly once."""
    plan: dict[str, Sequence[WeightPart]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, HasWeightParts):
            plan.update(module.weight_parts(module_name))
    for name, parameter in model.named_parameters():
        row = 0
        for part in plan.get(name, ()):
            if part.row != row or part.shape_read[1:] != tuple(parameter.shape[1:]):
                raise ModelLoadError(f"{name}: {part} does not continue at row {row} of {tuple(parameter.shape)}.")
            row += part.num_rows
        if row != parameter.shape[0]:
            raise ModelLoadError(f"{name}: weight_parts fill {row} rows of {parameter.shape[0]}.")
    return plan


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: those that its index names, or all if it has none."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelLoadError(f"{folder} has no *.safetensors files (load_format='dummy' runs without weights).")
        return paths
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not a safetensors index: {error!r}.") from error
    paths = sorted(folder / name for name in names)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelLoadError(f"{folder}: the index names files that are not there: {_listed(missing)}.")
    return paths


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # the library's own exception type, or OSError
        raise ModelLoadError(f"{path} cannot be read as safetensors: {error}.") from error


def _locate(files: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns the open file that holds each tensor, by the tensor's name."""
    located: dict[str, tuple[Path, Any]] = {}
    for path, file in files.items():
        names: list[str] = file.keys()  # a method that returns a list: the file is no mapping
        for name in names:
            if name in located:
                raise ModelLoadError(f"{name} is in two files: {located[name][0].name} and {path.name}.")
            located[name] = (path, file)
    return {name: file for name, (_, file) in located.items()}


def _compare(
    plan: Mapping[str, Sequence[WeightPart]], tensors: Mapping[str, Any], redundant: frozenset[str], folder: Path
) -> None:
    """Raises one ModelLoadError that lists every difference between the files and what the model needs."""
    wanted = {part.name: part for part in _parts(plan) if part.name is not None}
    wrong: list[str] = []
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted and name not in redundant]
    for name, part in wanted.items():
        if name in tensors:
            found = tensors[name].get_slice(name)
            if tuple(found.get_shape()) != part.shape:
                wrong.append(f"{name} has shape {found.get_shape()} and needs {list(part.shape)}")
            if found.get_dtype() not in _DTYPES:
                wrong.append(f"{name} has dtype {found.get_dtype()} and needs one of {_DTYPES}")
    faults = {"missing from the checkpoint": missing, "unknown to the model": unknown, "of another form": wrong}
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise ModelLoadError(f"{folder} does not fit the model: {listed}.")


def _parts(plan: Mapping[str, Sequence[WeightPart]]) -> Iterator[WeightPart]:
    for parts in plan.values():
        yield from parts


def _listed(names: Sequence[str]) -> str:
    names, more = sorted(names), len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _report(parameters: Mapping[str, nn.Parameter], num_files: int, started: float) -> LoadReport:
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    return LoadReport(len(parameters), num_bytes, num_files, time.perf_counter() - started)
