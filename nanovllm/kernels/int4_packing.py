"""The layout of 4-bit weights: four numbers in a 16-bit word, so that a word's numbers belong to different inputs.

A word's numbers are 32 inputs apart: word j of a block of 128 inputs holds inputs j, j + 32, j + 64 and j + 96, the
first in the lowest bits. One shift and one mask then give a plane of 32 neighbouring inputs in the order in which the
activations lie in memory, and adjacent words are converted in pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels.triton_support import INTERPRETED, constant, jit, tl

BLOCK_SIZE = 128  # inputs
PLANE_SIZE = 32
NUM_PLANES = BLOCK_SIZE // PLANE_SIZE

_IS_INTERPRETED = constant(INTERPRETED)
_UNPACK = """{
    .reg .b32 shifted;
    lop3.b32 $0, $4, 0x000F000F, LARGE, 0xEA;
    shr.u32 shifted, $4, 4;
    lop3.b32 $1, shifted, 0x000F000F, LARGE, 0xEA;
    shr.u32 shifted, $4, 8;
    lop3.b32 $2, shifted, 0x000F000F, LARGE, 0xEA;
    shr.u32 shifted, $4, 12;
    lop3.b32 $3, shifted, 0x000F000F, LARGE, 0xEA;
THEN}"""


def unpacking(large: int, then: str = "") -> tl.constexpr:
    """Returns assembly that adds each four bits of $4 to `large`, two numbers of 16 bits, for $0 … $3, and `then`."""
    return constant(_UNPACK.replace("LARGE", f"0x{large:08x}").replace("THEN", then))


TWO_LARGE_BF16, TWO_LARGE_FP16 = 0x43004300, 0x64006400  # 128 and 1024, whose lowest bits count ones
_UNPACK_TO_BF16, _UNPACK_TO_FP16 = unpacking(TWO_LARGE_BF16), unpacking(TWO_LARGE_FP16)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Returns values [outputs, inputs] of 0 to 15 as words [outputs, blocks · 32] int16.

    Inputs are padded with zeros to whole blocks of 128.
    """
    outputs, inputs = values.shape
    padded = F.pad(values.to(torch.int32), (0, -inputs % BLOCK_SIZE))
    planes = padded.view(outputs, -1, NUM_PLANES, PLANE_SIZE)
    shifts = torch.arange(0, 4 * NUM_PLANES, 4, device=values.device).view(NUM_PLANES, 1)
    words = (planes << shifts).sum(dim=2)  # [outputs, blocks, 32], 0 to 65535
    return torch.where(words < 32768, words, words - 65536).to(torch.int16).flatten(1)


def unpack_int4(words: torch.Tensor, inputs: int) -> torch.Tensor:
    """Returns the values [outputs, inputs] int8 of `pack_int4`'s words."""
    shifts = torch.arange(0, 4 * NUM_PLANES, 4, device=words.device).view(NUM_PLANES, 1)
    blocks = words.view(len(words), -1, 1, PLANE_SIZE).to(torch.int32)
    planes = (blocks >> shifts) & 15  # [outputs, blocks, planes, 32]
    return planes.to(torch.int8).flatten(1)[:, :inputs].contiguous()


@jit
def unpack_planes(words: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, float]:
    """Returns the four planes of int16 words in `dtype`, and what must be subtracted from each of their numbers.

    On a GPU a number's four bits become the lowest of the mantissa of 128 (bf16) or 1024 (fp16), one instruction for
    two numbers; a conversion from integers takes longer.
    """
    if _IS_INTERPRETED or dtype == tl.float32:
        first, second = (words & 15).to(dtype), ((words >> 4) & 15).to(dtype)
        third, fourth = ((words >> 8) & 15).to(dtype), ((words >> 12) & 15).to(dtype)
        offset = 0.0
    elif dtype == tl.bfloat16:
        brain: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
        first, second, third, fourth = tl.inline_asm_elementwise(
            _UNPACK_TO_BF16, "=r,=r,=r,=r,r", [words], dtype=brain, is_pure=True, pack=2
        )
        offset = 128.0
    else:
        half: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
        first, second, third, fourth = tl.inline_asm_elementwise(
            _UNPACK_TO_FP16, "=r,=r,=r,=r,r", [words], dtype=half, is_pure=True, pack=2
        )
        offset = 1024.0
    return first, second, third, fourth, offset


@jit
def convert(weight: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Returns weights of 8 bits in `dtype`."""
    if _IS_INTERPRETED or dtype != tl.bfloat16 or weight.dtype != tl.float8e4nv:
        converted = weight.to(dtype)
    else:
        # The bits of e4m3 lie in bf16 as they are, but for a bias of the exponent that is 120 smaller.
        converted = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, signs, factor;
            mov.b32 factor, 0x7B807B80;
            prmt.b32 bytes, $2, 0, 0x1404;
            and.b32 signs, bytes, 0x80008000;
            shr.u32 bytes, bytes, 4;
            lop3.b32 bytes, bytes, 0x07F007F0, signs, 0xEA;
            mul.rn.bf16x2 $0, bytes, factor;
            prmt.b32 bytes, $2, 0, 0x3424;
            and.b32 signs, bytes, 0x80008000;
            shr.u32 bytes, bytes, 4;
            lop3.b32 bytes, bytes, 0x07F007F0, signs, 0xEA;
            mul.rn.bf16x2 $1, bytes, factor;
            }""",
            "=r,=r,r",
            [weight],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return converted


@jit
def load_group(
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    row: tl.tensor,
    row_mask: tl.tensor,
    column: tl.tensor,
    row_stride: tl.tensor,
    group_stride: tl.tensor,
    offset: tl.constexpr,
    dtype: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Loads the scale of the inputs from `column` on, and what is subtracted from their planes first: of row's shape.

    Padding behind the inputs has the last group's scale; its activations are zero.
    """
    LAST_GROUP: tl.constexpr = (INPUT_SIZE + GROUP_SIZE - 1) // GROUP_SIZE - 1
    position = row * row_stride + tl.minimum(column // GROUP_SIZE, LAST_GROUP) * group_stride
    scale = tl.load(scale_ptr + position, mask=row_mask, other=0.0).to(dtype)
    if HAS_ZEROS:
        zero = (tl.load(zero_ptr + position, mask=row_mask, other=0).to(tl.float32) + offset).to(dtype)
    else:
        zero = (tl.zeros_like(position).to(tl.float32) + (8.0 + offset)).to(dtype)
    return scale, zero
