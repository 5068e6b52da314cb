"""Matrix products of one row with 4-bit weights, in integers.

With four bits a weight there is time for three instructions from one weight to the next, and converting a weight to
multiply it as a float takes that many. So the input is converted instead: each 128 inputs share a scale and become
integers of 16 bits, which is more exact than bf16, and an instruction multiplies four weights by four halves of such
integers. A program converts the input once and then takes one group of outputs after another; it loads the next
group's weights while it multiplies. Otherwise as in `skinny_linear`.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.int4_packing import BLOCK_SIZE, NUM_PLANES, PLANE_SIZE
from nanovllm.kernels.triton_support import (
    INTERPRETED,
    constant,
    jit,
    let_next_kernel_start,
    multiprocessor_count,
    next_power_of_2,
    pdl_options,
    tl,
    wait_for_previous_kernel,
)

_MAX_TOKENS = 1
_BLOCK_SIZE = constant(BLOCK_SIZE)
_PLANE_SIZE = constant(PLANE_SIZE)
_WORDS = constant(BLOCK_SIZE // 8)  # of 32 bits in a block: each has two neighbouring inputs of each plane
_LARGEST = constant(32512.0)  # the largest integer whose upper byte, rounded, is a signed byte
_MAGIC = constant(12582912.0)  # 1.5 · 2²³: the sum with a small number has the nearest integer in its lowest bits
_IS_INTERPRETED = constant(INTERPRETED)


@jit
def _add_products(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Returns acc + the sum of the products of a's and b's four signed bytes."""
    if _IS_INTERPRETED:
        for byte in tl.static_range(4):
            acc += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    else:
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    return acc


@jit
def _load_pair(ptr: tl.tensor, mask: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Loads two neighbouring 16-bit numbers as one word. Returns them in float32."""
    pair = tl.load(ptr, mask=mask, other=0)
    first = (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    second = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return first, second


@jit
def _to_bytes(
    x_0: tl.tensor, x_1: tl.tensor, x_2: tl.tensor, x_3: tl.tensor, inverse: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Rounds four numbers times `inverse` to integers. Returns words of their lower and of their upper bytes."""
    n_0 = (x_0 * inverse + _MAGIC).to(tl.int32, bitcast=True)
    n_1 = (x_1 * inverse + _MAGIC).to(tl.int32, bitcast=True)
    n_2 = (x_2 * inverse + _MAGIC).to(tl.int32, bitcast=True)
    n_3 = (x_3 * inverse + _MAGIC).to(tl.int32, bitcast=True)
    lower = (n_0 & 255) | ((n_1 & 255) << 8) | ((n_2 & 255) << 16) | (n_3 << 24)
    # The lower byte is signed, so that the upper one is rounded.
    n_0, n_1, n_2, n_3 = n_0 + 128, n_1 + 128, n_2 + 128, n_3 + 128
    upper = ((n_0 >> 8) & 255) | (n_1 & 0xFF00) | ((n_2 & 0xFF00) << 8) | ((n_3 & 0xFF00) << 16)
    return lower, upper


@jit
def _load_rows(
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    row: tl.tensor,
    row_mask: tl.tensor,
    row_stride: tl.tensor,
    group_stride: tl.tensor,
    HAS_ZEROS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Loads the words [rows, blocks, words] of whole rows, and each block's scale and zero point [rows, blocks]."""
    block = tl.arange(0, BLOCKS)
    word = block[:, None] * _WORDS + tl.arange(0, _WORDS)[None, :]
    mask = row_mask[:, None, None] & (block < NUM_BLOCKS)[None, :, None]
    first_word = row.to(tl.int64) * (NUM_BLOCKS * _WORDS)
    words = tl.load(weight_ptr + first_word[:, None, None] + word[None, :, :], mask=mask, other=0)
    position = row[:, None] * row_stride + (block * _BLOCK_SIZE // GROUP_SIZE)[None, :] * group_stride
    mask = row_mask[:, None] & (block < NUM_BLOCKS)[None, :]
    scale = tl.load(scale_ptr + position, mask=mask, other=0.0)
    zero = tl.load(zero_ptr + position, mask=mask, other=0.0) if HAS_ZEROS else tl.full([1, 1], 8.0, tl.float32)
    return words, scale, zero


@jit
def _sum_products(
    words: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    lower_a: tl.tensor,
    upper_a: tl.tensor,
    lower_b: tl.tensor,
    upper_b: tl.tensor,
    total: tl.tensor,
    x_scale: tl.tensor,
) -> tl.tensor:
    """Returns the products of rows of the weight with the input: [rows].

    a: the inputs of the words' lower halves of bytes, b: of the upper ones. total, x_scale [blocks]: the sum of a
    block's inputs, and their scale.
    """
    low, high = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
    zeros = tl.zeros_like(words)
    upper = _add_products(high, upper_b[None, :, :], _add_products(low, upper_a[None, :, :], zeros))
    lower = _add_products(high, lower_b[None, :, :], _add_products(low, lower_a[None, :, :], zeros))
    dot = tl.sum(upper * 256 + lower, axis=2).to(tl.float32)  # [rows, blocks]
    return tl.sum((dot - zero * total[None, :]) * (scale * x_scale[None, :]), axis=1)


@jit
def _int4_skinny_linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    eps: tl.tensor,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (index, token): every NUM_PROGRAMS-th group of BLOCK_N outputs of a token.

    x and the norm's weight are read as words of two numbers; x_stride counts words.
    """
    NUM_BLOCKS: tl.constexpr = (INPUT_SIZE + _BLOCK_SIZE - 1) // _BLOCK_SIZE
    NUM_GROUPS: tl.constexpr = (OUTPUT_SIZE + BLOCK_N - 1) // BLOCK_N
    let_next_kernel_start(PDL)
    first_group = tl.program_id(0)
    next_output = first_group * BLOCK_N + tl.arange(0, BLOCK_N)
    next_words, next_scale, next_zero = _load_rows(
        weight_ptr, scale_ptr, zero_ptr, next_output, next_output < OUTPUT_SIZE, scale_row_stride, scale_group_stride,
        HAS_ZEROS, GROUP_SIZE, NUM_BLOCKS, BLOCKS,
    )  # fmt: skip
    if IS_GATED:
        next_up_words, next_up_scale, next_up_zero = _load_rows(
            weight_ptr, scale_ptr, zero_ptr, OUTPUT_SIZE + next_output, next_output < OUTPUT_SIZE,
            scale_row_stride, scale_group_stride, HAS_ZEROS, GROUP_SIZE, NUM_BLOCKS, BLOCKS,
        )  # fmt: skip
    wait_for_previous_kernel(PDL)

    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(1).to(tl.int64)
    # Pairs of inputs: the first plane's, a plane is PLANE pairs further.
    pair = tl.arange(0, BLOCKS)[:, None] * (_BLOCK_SIZE // 2) + tl.arange(0, _WORDS)[None, :]
    PLANE: tl.constexpr = _PLANE_SIZE // 2
    mask_0 = pair < INPUT_SIZE // 2
    mask_1 = pair + PLANE < INPUT_SIZE // 2
    mask_2 = pair + 2 * PLANE < INPUT_SIZE // 2
    mask_3 = pair + 3 * PLANE < INPUT_SIZE // 2
    row_ptr = x_ptr + token * x_stride + pair
    x_0, x_1 = _load_pair(row_ptr, mask_0, dtype)
    x_2, x_3 = _load_pair(row_ptr + PLANE, mask_1, dtype)
    x_4, x_5 = _load_pair(row_ptr + 2 * PLANE, mask_2, dtype)
    x_6, x_7 = _load_pair(row_ptr + 3 * PLANE, mask_3, dtype)
    if HAS_NORM:
        squares = (x_0 * x_0 + x_1 * x_1) + (x_2 * x_2 + x_3 * x_3)
        squares += (x_4 * x_4 + x_5 * x_5) + (x_6 * x_6 + x_7 * x_7)
        mean_square = tl.sum(tl.sum(squares, axis=1), axis=0) / INPUT_SIZE
        w_0, w_1 = _load_pair(norm_weight_ptr + pair, mask_0, dtype)
        w_2, w_3 = _load_pair(norm_weight_ptr + pair + PLANE, mask_1, dtype)
        w_4, w_5 = _load_pair(norm_weight_ptr + pair + 2 * PLANE, mask_2, dtype)
        w_6, w_7 = _load_pair(norm_weight_ptr + pair + 3 * PLANE, mask_3, dtype)
        x_0, x_1, x_2, x_3 = x_0 * w_0, x_1 * w_1, x_2 * w_2, x_3 * w_3
        x_4, x_5, x_6, x_7 = x_4 * w_4, x_5 * w_5, x_6 * w_6, x_7 * w_7
    largest = tl.maximum(tl.maximum(tl.abs(x_0), tl.abs(x_1)), tl.maximum(tl.abs(x_2), tl.abs(x_3)))
    largest = tl.maximum(largest, tl.maximum(tl.abs(x_4), tl.abs(x_5)))
    largest = tl.maximum(largest, tl.maximum(tl.abs(x_6), tl.abs(x_7)))
    largest = tl.maximum(tl.max(largest, axis=1), 1e-30)  # [BLOCKS]
    inverse = (1.0 / largest * _LARGEST)[:, None]
    # A word's bytes, from the lowest: planes 0 and 1, planes 2 and 3, and both for the next input.
    lower_a, upper_a = _to_bytes(x_0, x_4, x_1, x_5, inverse)
    lower_b, upper_b = _to_bytes(x_2, x_6, x_3, x_7, inverse)
    ones = tl.full([1, 1], 0x01010101, tl.int32)
    upper = _add_products(upper_b, ones, _add_products(upper_a, ones, tl.zeros_like(lower_a)))
    lower = _add_products(lower_b, ones, _add_products(lower_a, ones, tl.zeros_like(lower_a)))
    total = tl.sum(upper * 256 + lower, axis=1).to(tl.float32)  # [BLOCKS]
    x_scale = largest / _LARGEST
    if HAS_NORM:
        x_scale *= 1.0 / tl.sqrt(mean_square + eps)
    else:  # NaN and infinity, which integers lose and the mean square keeps
        x_scale += 0.0 * tl.sum(((x_0 + x_1) + (x_2 + x_3)) + ((x_4 + x_5) + (x_6 + x_7)), axis=1)

    for group in tl.range(first_group, NUM_GROUPS, NUM_PROGRAMS):
        output = group * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = output < OUTPUT_SIZE
        words, scale, zero = next_words, next_scale, next_zero
        next_output = output + NUM_PROGRAMS * BLOCK_N
        next_words, next_scale, next_zero = _load_rows(
            weight_ptr, scale_ptr, zero_ptr, next_output, next_output < OUTPUT_SIZE,
            scale_row_stride, scale_group_stride, HAS_ZEROS, GROUP_SIZE, NUM_BLOCKS, BLOCKS,
        )  # fmt: skip
        if IS_GATED:
            up_words, up_scale, up_zero = next_up_words, next_up_scale, next_up_zero
            next_up_words, next_up_scale, next_up_zero = _load_rows(
                weight_ptr, scale_ptr, zero_ptr, OUTPUT_SIZE + next_output, next_output < OUTPUT_SIZE,
                scale_row_stride, scale_group_stride, HAS_ZEROS, GROUP_SIZE, NUM_BLOCKS, BLOCKS,
            )  # fmt: skip
        out = _sum_products(words, scale, zero, lower_a, upper_a, lower_b, upper_b, total, x_scale)
        if HAS_BIAS:
            out += tl.load(bias_ptr + output, mask=mask, other=0.0).to(tl.float32)
        if IS_GATED:
            up = _sum_products(up_words, up_scale, up_zero, lower_a, upper_a, lower_b, upper_b, total, x_scale)
            if HAS_BIAS:
                up += tl.load(bias_ptr + OUTPUT_SIZE + output, mask=mask, other=0.0).to(tl.float32)
            out = out / (1.0 + tl.exp(-out)) * up
        if HAS_RESIDUAL:
            out += tl.load(residual_ptr + token * residual_stride + output, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * OUTPUT_SIZE + output, out.to(dtype), mask=mask)


def suits_int4_skinny_linear(x: torch.Tensor, group_size: int) -> bool:
    """Returns whether `int4_skinny_linear` can multiply x [num_tokens, inputs]: pairs of numbers, groups of blocks."""
    num_tokens, input_size = x.shape
    whole = group_size % BLOCK_SIZE == 0 or group_size >= input_size
    return num_tokens <= _MAX_TOKENS and input_size % 2 == 0 and x.stride(0) % 2 == 0 and whole


def _choose_tile(num_blocks: int, gated: bool) -> tuple[int, int, int]:
    """Returns (outputs of a group, warps of a program, programs of a multiprocessor), as measured."""
    if num_blocks < 32:
        return 4 if gated else 16, 4, 3
    if num_blocks == 32:
        return 4 if gated else 8, 8, 2
    if num_blocks <= 64:
        return 4, 8, 2
    return 2 if gated else 4, 16, 1


def int4_skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    zeros: torch.Tensor | None = None,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns act(rms_norm(x) · weightᵀ + bias) + residual for few tokens; x bf16 or fp16.

    weight [outputs, words] of `pack_int4`; scale and zeros [outputs, groups] float32, of any strides, the same for
    both. → [num_tokens, outputs or half as many], of x's dtype.
    """
    num_tokens, input_size = x.shape
    output_size = weight.shape[0] // (1 + gated)
    out = torch.empty(num_tokens, output_size, dtype=x.dtype, device=x.device)  # [num_tokens, output_size]
    if num_tokens == 0:
        return out
    num_blocks = weight.shape[1] * NUM_PLANES // BLOCK_SIZE
    block_n, num_warps, programs = _choose_tile(num_blocks, gated)
    num_programs = min(programs * multiprocessor_count(x.device), -(-output_size // block_n))
    words = x.view(torch.int32)
    _int4_skinny_linear_kernel[(num_programs, num_tokens)](
        x_ptr=words,
        weight_ptr=weight.view(torch.int32),
        scale_ptr=scale,
        zero_ptr=scale if zeros is None else zeros,  # parts that are left out are not read
        bias_ptr=x if bias is None else bias,
        norm_weight_ptr=words if norm_weight is None else norm_weight.view(torch.int32),
        residual_ptr=x if residual is None else residual,
        out_ptr=out,
        x_stride=words.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        scale_row_stride=scale.stride(0),
        scale_group_stride=scale.stride(1),
        eps=eps,
        HAS_ZEROS=zeros is not None,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None,
        HAS_RESIDUAL=residual is not None,
        IS_GATED=gated,
        GROUP_SIZE=max(group_size, BLOCK_SIZE),
        OUTPUT_SIZE=output_size,
        INPUT_SIZE=input_size,
        BLOCK_N=block_n,
        BLOCKS=next_power_of_2(num_blocks),
        NUM_PROGRAMS=num_programs,
        num_warps=num_warps,
        num_stages=1,
        **pdl_options(x.device),
    )
    return out
