"""Small integers packed into int32 words, and groups of inputs in any order: what several formats have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanovllm.errors import ModelLoadError
from nanovllm.quantization.fields import Fields
from nanovllm.quantization.matrix import MatrixPart, QuantizedMatrix

INT32 = ("I32",)
NIBBLES = 8  # 4-bit integers of a word
SYMMETRIC_ZERO = 8
_MAX_GROUP = 1 << 20  # inputs; no published model has as many


def unpack(words: torch.Tensor, dim: int, num_bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Returns the unsigned integers in int32 words, 32 / num_bits along `dim` for each word, as int32.

    order: the position in the word, from the lowest bits up, of each integer; None: one after another.
    """
    positions = range(32 // num_bits) if order is None else order
    shifts = torch.tensor([num_bits * position for position in positions], dtype=torch.int32, device=words.device)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = -1
    return ((words.unsqueeze(dim + 1) >> shifts.view(shape)) & ((1 << num_bits) - 1)).flatten(dim, dim + 1)


def grouped(
    part: MatrixPart,
    values: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    group_index: torch.Tensor | None = None,
) -> QuantizedMatrix:
    """Returns a matrix of INT4 values [outputs, inputs] with scales and zeros [outputs, groups].

    group_index [inputs]: the group of each input, and the groups are those of the whole matrix; None: groups are
    neighbouring inputs, and those that are on this rank were read.
    """
    values, zeros = values.to(torch.int8), None if zeros is None else zeros.to(torch.uint8)
    if group_index is None:
        scale, block = part.align(scale, (1, group_size))
        zeros = None if zeros is None else part.align(zeros, (1, group_size))[0]
        return QuantizedMatrix(values, scale, block, zeros)
    _check_groups(part, group_index, scale.shape[1])
    if part.inputs.is_cut:
        each = None if zeros is None else zeros[:, group_index]
        return QuantizedMatrix(values, scale[:, group_index], (1, 1), each)
    order = group_index.argsort(stable=True)
    if not torch.equal(group_index[order], torch.arange(len(order), device=order.device) // group_size):
        raise ModelLoadError(f"{part.name}: the groups of its g_idx do not have group_size={group_size} inputs each.")
    in_order = torch.equal(order, torch.arange(len(order), device=order.device))
    return QuantizedMatrix(values[:, order], scale, (1, group_size), zeros, order=None if in_order else order)


def _check_groups(part: MatrixPart, group_index: torch.Tensor, num_groups: int) -> None:
    if int(group_index.min()) < 0 or int(group_index.max()) >= num_groups:
        raise ModelLoadError(f"{part.name}: its g_idx names groups from 0 to {num_groups - 1} only.")


def read_group_size(fields: Fields) -> int | None:
    """Returns the inputs that share a scale; None: all."""
    value = fields.get("group_size")
    if value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 32 <= value <= _MAX_GROUP or value % 32:
        raise fields.unsupported("group_size", "32, 64, 128 or another multiple of 32, or -1 for one group")
    return value


def check_divides(part: MatrixPart, group_size: int) -> None:
    """Raises ModelLoadError unless a matrix has whole groups."""
    if part.inputs.total % group_size:
        raise ModelLoadError(
            f"{part.name} has {part.inputs.total} inputs, which groups of {group_size} (group_size in config.json's "
            "quantization_config) do not divide."
        )
