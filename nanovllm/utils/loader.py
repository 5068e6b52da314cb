"""Loads safetensors files into a model's parameters, and refuses files that do not fit exactly.

A model is built on the meta device: its parameters have shapes and no memory. Each layer says with `weight_parts`
which tensors of the checkpoint fill which rows of its parameters on this rank. `load_weights` first compares that
plan with the files, then allocates the parameters on the device and copies each element exactly once. It reads only
what this rank needs. The parameters of a quantised layer are computed instead of copied, one layer after another, by
its method (`ConvertsWeights`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import nn

from nanovllm.errors import ModelLoadError, shown
from nanovllm.layers.parameter import HasWeightParts, WeightPart
from nanovllm.utils.model_files import ADAPTER_CONFIG, check_file, other_format, read_json
from nanovllm.utils.torch_files import TorchFile

FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors spells them
_COMPUTED = ".rotary_emb.inv_freq"  # older transformers saved this buffer, which every model computes itself
_HEAD = "lm_head.weight"
_QUANTIZED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")  # ends of names
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_MOST_LISTED = 10  # names in an error
_MAX_TEXT = 300  # characters of another library's error


@dataclass(frozen=True)
class LoadReport:
    """The result of loading, for the log."""

    num_tensors: int  # parameters filled
    num_bytes: int  # their size on the device
    num_files: int
    seconds: float


@dataclass(frozen=True)
class Source:
    """Indices `start` … `stop` along `dim` of a checkpoint tensor that is converted, not copied, into parameters."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # that the whole tensor may have
    dtypes: tuple[str, ...] = FLOATS  # that it may have
    dim: int = 0
    start: int = 0
    stop: int | None = None  # None: to the end
    optional: bool = False  # it may be absent

    @property
    def index(self) -> tuple[slice, ...]:
        """Index of what is read in the checkpoint tensor."""
        return (*(slice(None),) * self.dim, slice(self.start, self.stop))


@runtime_checkable
class ConvertsWeights(Protocol):
    """A linear method that computes the parameters of a module's weight from other tensors, as quantisation does."""

    def sources(self, module: Any, prefix: str) -> Sequence[Source]:
        """Returns what is read from the checkpoint. `prefix` is the module's name in the model."""
        ...

    def store(self, module: Any, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fills the parameters from what was read of each source, by its name; all are on the module's device."""
        ...

    def empty_unquantized(self, module: Any) -> torch.Tensor:
        """Returns an unquantised weight [outputs, inputs] of this rank without values, on the module's device."""
        ...

    def store_unquantized(self, module: Any, weight: torch.Tensor) -> None:
        """Fills the parameters from such a weight."""
        ...


@runtime_checkable
class StacksLayers(Protocol):
    """A method of a module whose parameters stack those of several layers. Each layer's method converts its weights."""

    def layers(self, module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yields each layer with its name. Its parameters are views of the module's, valid until the next layer."""
        ...


@dataclass(frozen=True)
class CheckpointForm:
    """How the files of a model differ from the usual: safetensors whose tensors are named as the modules are."""

    # Prefix of a tensor's name → what the model has instead. None: the model does not need the tensor.
    prefixes: Mapping[str, str | None] = field(default_factory=dict)
    # Suffix of a tensor [experts, outputs, inputs] → the matrices, of each expert, that its outputs are in equal parts.
    # The model takes them one by one: "experts.gate_up_proj" has what it calls "experts.7.up_proj.weight".
    stacked: Mapping[str, Sequence[str]] = field(default_factory=dict)
    torch_files: bool = False  # pytorch_model*.bin are read where there are no safetensors

    def name_in_model(self, name: str) -> str | None:
        """Returns the model's name of a tensor in the checkpoint; None if the model does not need it."""
        for prefix, instead in self.prefixes.items():
            if name.startswith(prefix):
                return None if instead is None else instead + name.removeprefix(prefix)
        return name


_USUAL_FORM = CheckpointForm()


def load_weights(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    redundant: frozenset[str] = frozenset(),
    check: Callable[[], None] = lambda: None,
    form: CheckpointForm = _USUAL_FORM,
) -> LoadReport:
    """Fills every parameter of `model` from the safetensors files in `folder`.

    `redundant`: checkpoint tensors that may be present and are not needed (lm_head.weight of a tied model).
    `check`: called before each tensor; an exception that it raises ends the loading.
    Raises ModelLoadError, before anything is allocated, when tensors are missing, unknown, in two files, or of
    another shape or dtype than the model's.
    """
    started = time.perf_counter()
    with _open_checkpoint(model, folder, redundant, form) as checkpoint:
        tensors = checkpoint.tensors
        parameters = materialise(model, device)
        for parameter_name, parts in checkpoint.plan.items():
            for part in parts:
                check()
                rows = parameters[parameter_name][part.row : part.row + part.num_rows]
                if part.name is None:
                    rows.zero_()
                elif part.num_rows:
                    rows.copy_(tensors[part.name].slice[part.source])
                    if part.plus:
                        rows.add_(part.plus)
        for prefix, module, method in _converted(model):
            check()
            method.store(module, prefix, checkpoint.read(method.sources(module, prefix), device))
    return _report(parameters, checkpoint.num_files, started)


def check_weights(
    model: nn.Module,
    folder: Path,
    redundant: frozenset[str] = frozenset(),
    form: CheckpointForm = _USUAL_FORM,
) -> None:
    """Raises what `load_weights` would raise, from the names, shapes and dtypes of the tensors alone."""
    with _open_checkpoint(model, folder, redundant, form):
        pass


def load_dummy_weights(model: nn.Module, device: torch.device, seed: int = 0) -> LoadReport:
    """Fills every parameter with random values for benchmarks, which depend only on seed, device and shape.

    Matrices have a standard deviation of 1/√fan-in, which keeps their outputs, logits included, of order 1; norms are
    1, biases 0.
    """
    started = time.perf_counter()
    parameters = materialise(model, device)
    generator = torch.Generator(device).manual_seed(seed)
    computed = _computed_names(model)
    for name, parameter in parameters.items():
        if name in computed:
            continue
        if parameter.dim() > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for _, module, method in _converted(model):
        weight = method.empty_unquantized(module)  # [outputs, inputs]
        method.store_unquantized(module, weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator))
    return _report(parameters, 0, started)


def materialise(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Replaces the meta parameters by uninitialised ones on `device`; parameters that have memory keep it.

    Buffers, which are computed, stay (`nn.Module.to_empty` would discard their values).
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                # Not `empty_like`: on a meta tensor it imports sympy and much of torch, which takes a second.
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
    return dict(model.named_parameters())


def _converted(model: nn.Module) -> Iterator[tuple[str, Any, ConvertsWeights]]:
    """Yields the name, the module and the method of each layer whose method computes the parameters of its weight."""
    for prefix, module in model.named_modules():
        method = getattr(module, "method", None)
        if isinstance(method, StacksLayers):
            yield from ((name, layer, layer.method) for name, layer in method.layers(module, prefix))
        elif isinstance(method, ConvertsWeights):
            yield prefix, module, method


def _computed_names(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that are computed: of a converted layer all but the bias."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(getattr(module, "method", None), (ConvertsWeights, StacksLayers))
        for name, _ in module.named_parameters(recurse=False)
        if name != "bias"
    }


def weight_plan(model: nn.Module) -> dict[str, Sequence[WeightPart]]:
    """Returns the parts that are copied into each parameter, by its name. Verifies that they fill each row once."""
    plan: dict[str, Sequence[WeightPart]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, HasWeightParts):
            plan.update(module.weight_parts(module_name))
    computed = _computed_names(model)
    plan = {name: parts for name, parts in plan.items() if name not in computed}
    for name, parameter in model.named_parameters():
        if name in computed:
            continue
        row = 0
        for part in plan.get(name, ()):
            if part.row != row or part.shape_read[1:] != tuple(parameter.shape[1:]):
                raise ModelLoadError(f"{name}: {part} does not continue at row {row} of {tuple(parameter.shape)}.")
            row += part.num_rows
        if row != parameter.shape[0]:
            raise ModelLoadError(f"{name}: weight_parts fill {row} rows of {parameter.shape[0]}.")
    return plan


def checkpoint_files(folder: Path, torch_files: bool = False) -> list[Path]:
    """Returns the files that hold a folder's weights, chosen as transformers does: safetensors.

    They are model.safetensors; without it, the files that the index names; without an index, all shards, or else all
    safetensors files. Copies in other precisions, adapters and the like beside them are left alone. torch_files: where
    there are none, pytorch_model.bin, or the files that its index names.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(whole):
        return [whole]
    if os.path.lexists(index):
        return _files_of_index(index)
    paths = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if not paths and torch_files:
        whole, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
        if os.path.lexists(whole):
            return [whole]
        if os.path.lexists(index):
            return _files_of_index(index)
    if not paths or (folder / ADAPTER_CONFIG).exists():
        what = other_format(folder) or "has no *.safetensors files (load_format='dummy' runs without weights)"
        raise ModelLoadError(f"{folder} {what}.")
    return [path for path in paths if _SHARD.fullmatch(path.name)] or paths


def _files_of_index(index: Path) -> list[Path]:
    """Returns the files that an index names. They must lie beside it: no name leads to another folder.

    A file itself may be a link to anywhere, as in the caches of huggingface_hub.
    """
    try:
        weight_map = read_json(index).get("weight_map")
    except ModelLoadError as error:
        raise ModelLoadError(f"{index.parent}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} is not an index of weights: it has no weight_map from tensors to files.")
    names: dict[str, None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or name == ".." or PureWindowsPath(name).name != name or "\0" in name:
            raise ModelLoadError(
                f"{index}: the file of {_short(tensor)} is {shown(name)}: it must be the name of a file in the "
                "same folder."
            )
        names[name] = None
    missing = [_short(name) for name in names if not os.path.exists(index.parent / name)]
    if missing:
        raise ModelLoadError(
            f"{index.parent}: the index names files that are not there: {_listed(missing)}. Download them."
        )
    return sorted(index.parent / name for name in names)


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in an open file."""

    name: str
    path: Path
    file: Any
    expert: int | None = None  # of a stacked tensor, one matrix of one expert
    outputs: range = range(0)

    @property
    def slice(self) -> Any:
        """What reads a part of the tensor when it is indexed."""
        whole = self.file.get_slice(self.name)
        return whole if self.expert is None else _ExpertMatrix(whole, self.expert, self.outputs)

    def matrices(self, name: str, stacked: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, _StoredTensor]]:
        """Yields the matrices of a stacked tensor that the model calls `name`; any other tensor as it is."""
        suffix = next((suffix for suffix in stacked if name.endswith(suffix)), "")
        shape, parts = self.slice.get_shape(), stacked.get(suffix, ())
        if not parts or len(shape) != 3 or shape[1] % len(parts):
            yield name, self
            return
        prefix, size = name.removesuffix(suffix) + suffix.rpartition(".")[0], shape[1] // len(parts)
        for expert in range(shape[0]):
            for index, part in enumerate(parts):
                outputs = range(index * size, (index + 1) * size)
                yield f"{prefix}.{expert}.{part}.weight", replace(self, expert=expert, outputs=outputs)


@dataclass(frozen=True)
class _ExpertMatrix:
    """A slice of an expert's matrix in a stacked tensor, as of a tensor of its own."""

    stacked: Any
    expert: int
    outputs: range

    def get_shape(self) -> list[int]:
        return [len(self.outputs), self.stacked.get_shape()[2]]

    def get_dtype(self) -> str:
        return str(self.stacked.get_dtype())

    def __getitem__(self, source: tuple[slice, ...]) -> torch.Tensor:
        rows = self.outputs[source[0]]
        part: torch.Tensor = self.stacked[(self.expert, slice(rows.start, rows.stop), *source[1:])]
        return part


@dataclass(frozen=True)
class _Checkpoint:
    """The open files of a checkpoint that fits a model."""

    plan: Mapping[str, Sequence[WeightPart]]
    tensors: Mapping[str, _StoredTensor]  # by the model's names
    num_files: int

    def read(self, sources: Sequence[Source], device: torch.device) -> dict[str, torch.Tensor]:
        """Returns what `sources` name, on the device; optional tensors only if they are there."""
        return {source.name: self._part(source).to(device) for source in sources if source.name in self.tensors}

    def _part(self, source: Source) -> torch.Tensor:
        stored = self.tensors[source.name].slice
        part: torch.Tensor = stored[source.index] if stored.get_shape() else stored[...]
        return part


@contextmanager
def _open_checkpoint(
    model: nn.Module, folder: Path, redundant: frozenset[str], form: CheckpointForm
) -> Iterator[_Checkpoint]:
    """Opens the files of `folder`. Raises ModelLoadError unless they fit the model exactly."""
    plan = weight_plan(model)
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in checkpoint_files(folder, form.torch_files)}
        tensors = _locate(files, form)
        _compare(_needs(model, plan), tensors, redundant, folder)
        yield _Checkpoint(plan, tensors, len(files))


def _open(path: Path) -> Any:
    if path.suffix == ".bin":
        return TorchFile(path)
    check_file(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # the library's own exception type, or OSError
        raise ModelLoadError(
            f"{path} cannot be read as safetensors: {str(error)[:_MAX_TEXT]}. If it is not complete, download it again."
        ) from error


def _locate(files: Mapping[Path, Any], form: CheckpointForm) -> dict[str, _StoredTensor]:
    """Returns the tensors that the model may need, by the model's names."""
    located: dict[str, _StoredTensor] = {}
    for path, file in files.items():
        names: list[str] = file.keys()  # a method that returns a list: the file is no mapping
        for stored_name in names:
            name_in_model = form.name_in_model(stored_name)
            if name_in_model is None:
                continue
            for name, tensor in _StoredTensor(stored_name, path, file).matrices(name_in_model, form.stacked):
                if name in located:
                    raise ModelLoadError(f"{_short(name)} is in two files: {located[name].path.name} and {path.name}.")
                located[name] = tensor
    return located


def _needs(model: nn.Module, plan: Mapping[str, Sequence[WeightPart]]) -> dict[str, Source]:
    """Returns the tensors that fill the model's parameters, by name. Only their whole forms matter here."""
    needs: dict[str, Source] = {}
    for prefix, module, method in _converted(model):
        needs |= {source.name: source for source in method.sources(module, prefix)}
    parts = [part for parts in plan.values() for part in parts]
    return needs | {part.name: Source(part.name, (part.shape,)) for part in parts if part.name is not None}


def _compare(
    needs: Mapping[str, Source],
    tensors: Mapping[str, _StoredTensor],
    redundant: frozenset[str],
    folder: Path,
) -> None:
    """Raises one ModelLoadError that lists every difference between the files and what the model needs."""
    wrong: list[str] = []
    missing = [name for name, need in needs.items() if name not in tensors and not need.optional]
    others = tensors.keys() - needs.keys() - redundant
    unknown = [_short(tensors[name].name) for name in others if not name.endswith(_COMPUTED)]
    for name, need in needs.items():
        if name in tensors:
            found, stored_name = tensors[name].slice, tensors[name].name
            if tuple(found.get_shape()) not in need.shapes:
                shapes = " or ".join(str(list(shape)) for shape in need.shapes)
                wrong.append(f"{stored_name} has shape {shown(found.get_shape())} and needs {shapes}")
            if found.get_dtype() not in need.dtypes:
                wrong.append(f"{stored_name} has dtype {found.get_dtype()} and needs one of {need.dtypes}")
    faults = {"missing from the checkpoint": missing, "unknown to the model": unknown, "of another form": wrong}
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        way_out = ""
        if missing == [_HEAD]:
            way_out = " hf_overrides={'tie_word_embeddings': True} takes the embedding for it."
        elif any(name.endswith(_QUANTIZED) for name in others) and not any(name.endswith(_QUANTIZED) for name in needs):
            way_out = " The weights are quantised: config.json needs a quantization_config that says how."
        raise ModelLoadError(f"{folder} does not fit the model: {listed}.{way_out}")


def _listed(names: Sequence[str]) -> str:
    names, more = sorted(names), len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _short(name: str) -> str:
    """Returns a name from a file as an error shows it."""
    return name if len(name) <= 80 and name.isprintable() else shown(name)


def _report(parameters: Mapping[str, nn.Parameter], num_files: int, started: float) -> LoadReport:
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    return LoadReport(len(parameters), num_bytes, num_files, time.perf_counter() - started)
