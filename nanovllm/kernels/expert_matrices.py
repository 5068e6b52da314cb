"""ExpertMatrices: one matrix of each expert, with weights of 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.kernels.int4_packing import NUM_PLANES, convert, unpack_int4, unpack_planes
from nanovllm.kernels.triton_support import jit, tl

_SYMMETRIC_ZERO = 8


@dataclass(frozen=True)
class ExpertMatrices:
    """Matrices [outputs, num_inputs], each of which is (weight − zeros) · scale.

    zeros None: 8 for INT4, 0 for weights of 8 bits. Blocks of inputs are 32 · 2ⁿ wide, or as wide as the row.
    """

    weight: torch.Tensor  # [experts, outputs, num_inputs] float8_e4m3fn or int8, or [experts, outputs, words] INT4
    scale: torch.Tensor  # [experts, blocks of outputs, blocks of inputs] float32, INT4 also float16; any strides
    zeros: torch.Tensor | None  # as scale, with the same strides
    num_inputs: int
    block: tuple[int, int]  # outputs and inputs that share a scale
    num_pieces: int = 1  # matrices that are stacked, such as gate and up; blocks begin with each

    @property
    def is_int4(self) -> bool:
        return self.weight.dtype is torch.int16

    @property
    def num_planes(self) -> int:
        """Weights in a number of `weight`, each of another input."""
        return NUM_PLANES if self.is_int4 else 1

    @property
    def has_row_scale(self) -> bool:
        """Whether all inputs of an output share a scale."""
        return self.block[1] >= self.num_inputs

    def __getitem__(self, expert: int) -> torch.Tensor:
        """Returns the matrix of an expert in float32."""
        values, scale = self.weight[expert], self._spread(self.scale[expert])
        if not self.is_int4:
            return values.float() * scale
        zero = torch.full_like(scale, _SYMMETRIC_ZERO) if self.zeros is None else self._spread(self.zeros[expert])
        return (unpack_int4(values, self.num_inputs).float() - zero) * scale

    def _spread(self, entries: torch.Tensor) -> torch.Tensor:
        """Returns an entry for each weight."""
        pieces: torch.Tensor = entries.unflatten(0, (self.num_pieces, -1))
        rows = pieces.repeat_interleave(self.block[0], 1)
        rows = rows[:, : self.weight.shape[1] // self.num_pieces].flatten(0, 1)
        return rows.repeat_interleave(self.block[1], 1)[:, : self.num_inputs]

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of a kernel that reads the matrices."""
        expert_stride, row_stride, group_stride = self.scale.stride()
        return {
            "weight_ptr": self.weight,
            "scale_ptr": self.scale,
            "zero_ptr": self.scale if self.zeros is None else self.zeros,  # not read without zeros
            "scale_expert_stride": expert_stride,
            "scale_row_stride": row_stride,
            "scale_group_stride": group_stride,
            "IS_INT4": self.is_int4,
            "HAS_ZEROS": self.zeros is not None,
            "SCALE_ROWS": self.block[0],
            "GROUP_SIZE": self.block[1],
            "ROW_SIZE": self.weight.shape[2],
        }


@jit
def split_planes(
    weight: tl.tensor, dtype: tl.constexpr, IS_INT4: tl.constexpr
) -> tuple[tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor], float]:
    """Returns the planes of a weight in `dtype`, and what must be subtracted from them; of 8 bits there is one."""
    if IS_INT4:
        w_0, w_1, w_2, w_3, offset = unpack_planes(weight, dtype)
        planes = (w_0, w_1, w_2, w_3)
    else:
        converted = convert(weight, dtype)
        planes = (converted, converted, converted, converted)
        offset = 0.0
    return planes, offset
