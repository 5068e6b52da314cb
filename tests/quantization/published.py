"""Checkpoints as published formats define them, written here from the definitions, and the weights they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.qwen3_checkpoints import make_qwen3_checkpoint

Tensors = dict[str, torch.Tensor]
# Returns the tensors that stand for a matrix, by the ends of their names, and the matrix that they stand for.
Quantize = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}  # whole blocks of 128


def make_quantized(
    folder: Path,
    quantize: Quantize,
    config: dict[str, Any],
    *,
    make: Callable[..., object] = make_qwen3_checkpoint,
    keep: Callable[[str], bool] = lambda name: False,
    with_head: bool = False,
    sharded: bool = False,
    **shape: Any,
) -> tuple[Path, Path]:
    """Returns a quantised checkpoint, and one with the weights that it stands for.

    make: saves the unquantised checkpoint. keep: matrices that stay.
    """
    plain, quantized = folder / "plain", folder / "quantized"
    make(plain, **shape)
    shutil.copytree(plain, quantized)
    content = load_file(plain / "model.safetensors")
    stored = dict(content)
    for name, tensor in content.items():
        if name.endswith(("_proj.weight", "lm_head.weight" if with_head else " ")) and not keep(name):
            tensors, content[name] = quantize(tensor)
            del stored[name]
            stored |= {name.removesuffix("weight") + end: each.contiguous() for end, each in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, plain / "model.safetensors")
    (quantized / "model.safetensors").unlink()
    save(quantized, stored, sharded)
    change_config(quantized, quantization_config=config)
    return plain, quantized


def save(folder: Path, tensors: Tensors, sharded: bool = False) -> None:
    """Writes one file, or two files between which the tensors of each matrix are divided."""
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    files = {f"model-{index + 1:05}-of-00002.safetensors": names[index::2] for index in range(2)}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---- FP8


def to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the values, and what they stand for."""
    values = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, values.float() * scale


def fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As in Qwen3-…-FP8: `weight_scale_inv` has a scale for each block of 128 × 128, the last ones smaller."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.empty(rows, columns)
    spread = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            scales[row, column] = spread[block] = weight[block].abs().max() / 448
    values, dense = to_fp8(weight, spread)
    return {"weight": values, "weight_scale_inv": scales}, dense


def fp8_tensor(weight: torch.Tensor, shape: tuple[int, ...] = (), input_scale: bool = False) -> tuple[Tensors, Any]:
    scale = weight.abs().max() / 448
    values, dense = to_fp8(weight, scale)
    static = {"input_scale": torch.full(shape, 0.02)} if input_scale else {}
    return {"weight": values, "weight_scale": scale.reshape(shape)} | static, dense


def fp8_channels(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(dtype)
    values, dense = to_fp8(weight, scale.float())
    return {"weight": values, "weight_scale": scale}, dense


# ---- INT8 and INT4


def int8_channels(weight: torch.Tensor, input_scale: bool = False) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round()
    static = {"input_scale": torch.tensor([0.02])} if input_scale else {}
    return {"weight": values.to(torch.int8), "weight_scale": scale} | static, values * scale


@dataclass(frozen=True)
class Groups:
    """A matrix as integers from 0 to 15, with scales and zero points for groups of inputs."""

    values: torch.Tensor  # [outputs, inputs]
    scale: torch.Tensor  # [outputs, groups] float16
    zeros: torch.Tensor  # [outputs, groups]
    group_of: torch.Tensor  # [inputs]

    @property
    def dense(self) -> torch.Tensor:
        return (self.values - self.zeros[:, self.group_of]).float() * self.scale[:, self.group_of].float()


def to_groups(weight: torch.Tensor, size: int, *, symmetric: bool, order: torch.Tensor | None = None) -> Groups:
    """order: the inputs of the first group, then those of the second, and so on."""
    outputs, inputs = weight.shape
    order = torch.arange(inputs) if order is None else order
    group_of = torch.empty(inputs, dtype=torch.int64)
    group_of[order] = torch.arange(inputs) // size
    groups = weight[:, order].view(outputs, -1, size)
    if symmetric:
        scale = (groups.abs().amax(-1) / 7).half()
        zeros = torch.full(scale.shape, 8)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).half()
        zeros = (-low / scale.float()).round().long().clamp(0, 15)
    values = (weight / scale[:, group_of].float()).round().long() + zeros[:, group_of]
    return Groups(values.clamp(0, 15), scale, zeros, group_of)


def pack(values: torch.Tensor, order: Sequence[int] = range(8)) -> torch.Tensor:
    """Packs eight neighbours of the last dimension into a word; `order[i]` of them is the i-th from the lowest bits."""
    words = torch.zeros(*values.shape[:-1], values.shape[-1] // 8, dtype=torch.int64)
    for position, neighbour in enumerate(order):
        words |= values[..., neighbour::8].long() << 4 * position
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def awq(weight: torch.Tensor, size: int = 32) -> tuple[Tensors, torch.Tensor]:
    """AutoAWQ's version "gemm": words along the outputs, whose eight numbers are interleaved."""
    groups = to_groups(weight, weight.shape[1] if size == -1 else size, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": pack(groups.values.T, order),
        "qzeros": pack(groups.zeros.T, order),
        "scales": groups.scale.T,
    }, groups.dense


def gptq(
    weight: torch.Tensor, size: int = 32, *, symmetric: bool = True, version: int = 1, desc_act: bool = False
) -> tuple[Tensors, torch.Tensor]:
    """AutoGPTQ's words along the inputs. The first version stores zero points minus 1."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) if desc_act else None
    groups = to_groups(weight, inputs if size == -1 else size, symmetric=symmetric, order=order)
    return {
        "qweight": pack(groups.values).T,
        "qzeros": pack((groups.zeros.T - int(version == 1)) % 16),
        "scales": groups.scale.T,
        "g_idx": groups.group_of.int(),
    }, groups.dense


def packed_groups(weight: torch.Tensor, size: int = 32) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' pack-quantized with zero points and `actorder` "group"."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    groups = to_groups(weight, size, symmetric=False, order=order)
    return {
        "weight_packed": pack(groups.values),
        "weight_zero_point": pack(groups.zeros.T).T,
        "weight_scale": groups.scale,
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": groups.group_of.int(),
    }, groups.dense


# ---- activations


def fp8_rows(hidden: torch.Tensor) -> torch.Tensor:
    scale = hidden.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 448  # padding is attended by nothing: zeros
    return to_fp8(hidden, scale)[1]


def fp8_groups(hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([fp8_rows(group) for group in hidden.split(128, dim=-1)], dim=-1)


def fp8_static(hidden: torch.Tensor) -> torch.Tensor:
    return to_fp8(hidden, torch.tensor(0.02))[1]


def int8_rows(hidden: torch.Tensor) -> torch.Tensor:
    scale = hidden.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    return (hidden / scale).round() * scale


@contextmanager
def rounded_inputs(rounding: Callable[[torch.Tensor], torch.Tensor] | None) -> Iterator[None]:
    """Rounds the inputs of the layers' products in every model of transformers."""

    def round_inputs(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        is_layer = isinstance(module, nn.Linear) and module.out_features != 320  # the head has the vocabulary's size
        return (rounding(inputs[0]), *inputs[1:]) if rounding is not None and is_layer else None

    handle = nn.modules.module.register_module_forward_pre_hook(round_inputs)
    try:
        yield
    finally:
        handle.remove()
