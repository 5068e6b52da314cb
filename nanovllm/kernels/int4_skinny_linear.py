"""Matrix products of one row with 4-bit weights, in integers, in Gluon.

With four bits a weight there is time for three instructions from one weight to the next, and converting a weight to
multiply it as a float takes that many. So the input is converted instead: each 128 inputs share a scale and become
integers of 16 bits, which is more exact than bf16, and an instruction multiplies four weights by four halves of such
integers.

A program converts the input once, into shared memory, and then takes one group of outputs after another. Each warp
computes outputs of its own, so that warps wait for each other once, when the input is converted, and no sum crosses
them. A warp loads the next weights while it multiplies. What is fused, and what precedes the end of the kernel ahead,
is as in `skinny_linear`.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.int4_packing import BLOCK_SIZE, NUM_PLANES, PLANE_SIZE
from nanovllm.kernels.triton_support import (
    HAS_GLUON,
    block_barrier,
    constant,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon_jit,
    multiprocessor_count,
    next_power_of_2,
    pdl_options,
)

_MAX_INPUTS = 32768  # whose integers fit in shared memory
_BLOCK = constant(BLOCK_SIZE)
_BLOCK_WORDS = constant(BLOCK_SIZE // 8)  # of 32 bits in a block: each has two neighbouring inputs of each plane
_PLANE = constant(PLANE_SIZE // 2)  # words of two inputs in a plane
_BLOCKS_OF_CHUNK = 8  # that a warp reads at once, 16 bytes a lane: four lanes have a block
_CHUNK_BLOCKS = constant(_BLOCKS_OF_CHUNK)
_LARGEST = constant(32512.0)  # the largest integer whose upper byte, rounded, is a signed byte
_MAGIC = constant(12582912.0)  # 1.5 · 2²³: the sum with a small number has the nearest integer in its lowest bits
_REGISTERS = 65536  # of a multiprocessor
_MAX_REGISTERS = 255  # of a thread
_ADD_PRODUCTS = constant("dp4a.s32.s32 $0, $1, $2, $3;")


@gluon_jit()
def _add_products(a: gl.tensor, b: gl.tensor, acc: gl.tensor) -> gl.tensor:
    """Returns acc + the sum of the products of a's and b's four signed bytes."""
    return gl.inline_asm_elementwise(_ADD_PRODUCTS, "=r,r,r,r", [a, b, acc], dtype=gl.int32, is_pure=True, pack=1)


@gluon_jit()
def _load_numbers(ptr: gl.tensor, pair: gl.tensor, INPUT_SIZE: gl.constexpr, dtype: gl.constexpr) -> gl.tuple:
    """Loads eight 16-bit numbers, a pair of neighbours from each plane, in float32.

    ptr counts words of two numbers; pair: the word of plane 0.
    """
    numbers: gl.tuple = ()
    for plane in gl.static_range(4):
        place = pair + plane * _PLANE
        word = gl.load(ptr + place, mask=place < INPUT_SIZE // 2, other=0)
        first = (word & 0xFFFF).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        second = (word >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        numbers = numbers + (first, second)
    return numbers


@gluon_jit()
def _sum_eight(x: gl.tuple) -> gl.tensor:
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@gluon_jit()
def _to_bytes(x_0: gl.tensor, x_1: gl.tensor, x_2: gl.tensor, x_3: gl.tensor, inverse: gl.tensor) -> gl.tuple:
    """Rounds four numbers times `inverse` to integers. Returns words of their lower and of their upper bytes."""
    n_0 = (x_0 * inverse + _MAGIC).to(gl.int32, bitcast=True)
    n_1 = (x_1 * inverse + _MAGIC).to(gl.int32, bitcast=True)
    n_2 = (x_2 * inverse + _MAGIC).to(gl.int32, bitcast=True)
    n_3 = (x_3 * inverse + _MAGIC).to(gl.int32, bitcast=True)
    lower = (n_0 & 255) | ((n_1 & 255) << 8) | ((n_2 & 255) << 16) | (n_3 << 24)
    # The lower byte is signed, so that the upper one is rounded.
    n_0, n_1, n_2, n_3 = n_0 + 128, n_1 + 128, n_2 + 128, n_3 + 128
    upper = ((n_0 >> 8) & 255) | (n_1 & 0xFF00) | ((n_2 & 0xFF00) << 8) | ((n_3 & 0xFF00) << 16)
    return lower, upper


@gluon_jit()
def _convert_input(x: gl.tuple, norm_weight: gl.tuple, words: gl.tuple, sums: gl.tuple, HAS_NORM: gl.constexpr) -> None:
    """Stores the input as integers.

    words, each [blocks · 16]: the lower and upper bytes that belong to the lower four bits of a byte of weights, then
    those that belong to the upper four. sums, each [blocks]: a quarter of the sum, the scale, the sum of squares.
    """
    if HAS_NORM:
        squares: gl.tuple = ()
        normed: gl.tuple = ()
        for index in gl.static_range(8):
            squares = squares + (x[index] * x[index],)
            normed = normed + (x[index] * norm_weight[index],)
        sums[2].store(gl.sum(_sum_eight(squares), axis=1))
        x = normed
    largest = gl.abs(x[0])
    for index in gl.static_range(1, 8):
        largest = gl.maximum(largest, gl.abs(x[index]))
    largest = gl.maximum(gl.max(largest, axis=1), 1e-30)  # [blocks]; more than 0, which has no inverse
    inverse = gl.expand_dims(1.0 / largest * _LARGEST, 1)
    # A word's bytes, from the lowest: planes 0 and 1, planes 2 and 3, and both for the next input.
    lower_a, upper_a = _to_bytes(x[0], x[4], x[1], x[5], inverse)
    lower_b, upper_b = _to_bytes(x[2], x[6], x[3], x[7], inverse)
    ones = gl.full_like(lower_a, 0x01010101)
    upper = _add_products(upper_b, ones, _add_products(upper_a, ones, gl.zeros_like(ones)))
    lower = _add_products(lower_b, ones, _add_products(lower_a, ones, gl.zeros_like(ones)))
    total = gl.sum(upper * 256 + lower, axis=1).to(gl.float32)
    scale = largest / _LARGEST
    if not HAS_NORM:  # NaN and infinity, which integers lose and the sum of squares keeps
        scale += 0.0 * gl.sum(_sum_eight(x), axis=1)
    NUM_WORDS: gl.constexpr = words[0].shape[0]
    words[0].store(gl.reshape(lower_a, [NUM_WORDS]))
    words[1].store(gl.reshape(upper_a, [NUM_WORDS]))
    words[2].store(gl.reshape(lower_b, [NUM_WORDS]))
    words[3].store(gl.reshape(upper_b, [NUM_WORDS]))
    sums[0].store(total * 0.25)  # each of a block's four lanes subtracts it; exact in float32
    sums[1].store(scale)


@gluon_jit()
def _load_piece(
    weight: gl.tuple,
    first_row: gl.tensor,
    first_chunk: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    IS_GATED: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    PIECE_CHUNKS: gl.constexpr,
    WORD_LAYOUT: gl.constexpr,
    LANE_LAYOUT: gl.constexpr,
    ROWS: gl.constexpr,
) -> gl.tuple:
    """Loads PIECE_CHUNKS chunks of rows, and then of up rows: of each, words [rows, 128], scale and zero [rows, 32].

    weight: the pointers of words, scales and zeros, and the scales' strides.
    """
    weight_ptr, scale_ptr, zero_ptr, row_stride, group_stride = weight
    row = gl.expand_dims(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, WORD_LAYOUT)), 1)
    word = gl.expand_dims(gl.arange(0, _CHUNK_BLOCKS * _BLOCK_WORDS, gl.SliceLayout(0, WORD_LAYOUT)), 0)
    lane_row = gl.expand_dims(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LANE_LAYOUT)), 1)
    lane = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, LANE_LAYOUT)), 0)
    loaded: gl.tuple = ()
    for side in gl.static_range(1 + IS_GATED):
        for chunk in gl.static_range(first_chunk, first_chunk + PIECE_CHUNKS):
            place = chunk * _CHUNK_BLOCKS * _BLOCK_WORDS + word
            block = chunk * _CHUNK_BLOCKS + lane // 4
            mask, lane_mask = row < OUTPUT_SIZE, lane_row < OUTPUT_SIZE
            if (chunk + 1) * _CHUNK_BLOCKS > NUM_BLOCKS:
                mask, lane_mask = mask & (place < NUM_BLOCKS * _BLOCK_WORDS), lane_mask & (block < NUM_BLOCKS)
            row_ptr = weight_ptr + (side * OUTPUT_SIZE + row).to(gl.int64) * (NUM_BLOCKS * _BLOCK_WORDS)
            words = gl.load(row_ptr + place, mask=mask, other=0)
            position = (side * OUTPUT_SIZE + lane_row) * row_stride + (block * _BLOCK // GROUP_SIZE) * group_stride
            scale = gl.load(scale_ptr + position, mask=lane_mask, other=0.0)
            zero = gl.full_like(scale, 8.0)
            if HAS_ZEROS:
                zero = gl.load(zero_ptr + position, mask=lane_mask, other=0.0)
            loaded = loaded + ((words, scale, zero),)
    return loaded


@gluon_jit()
def _load_inputs(
    words: gl.tuple,
    sums: gl.tuple,
    chunk: gl.constexpr,
    WORD_LAYOUT: gl.constexpr,
    LANE_LAYOUT: gl.constexpr,
) -> gl.tuple:
    """Loads what `_convert_input` has stored of a chunk: four tensors [1, 128], and a lane's sum and scale [1, 32]."""
    OF_BLOCKS: gl.constexpr = gl.BlockedLayout([1, 1], [_CHUNK_BLOCKS, 4], [gl.num_warps(), 1], [1, 0])
    CHUNK_WORDS: gl.constexpr = _CHUNK_BLOCKS * _BLOCK_WORDS
    loaded: gl.tuple = ()
    for part in gl.static_range(4):
        values = words[part].slice(chunk * CHUNK_WORDS, CHUNK_WORDS).load(gl.SliceLayout(0, WORD_LAYOUT))
        loaded = loaded + (gl.expand_dims(values, 0),)
    for part in gl.static_range(2):
        values = sums[part].slice(chunk * _CHUNK_BLOCKS, _CHUNK_BLOCKS).load(gl.SliceLayout(1, OF_BLOCKS))
        values = gl.reshape(gl.expand_dims(values, 1).broadcast_to([_CHUNK_BLOCKS, 4]), [32])
        values = gl.convert_layout(values, gl.SliceLayout(0, LANE_LAYOUT), assert_trivial=True)
        loaded = loaded + (gl.expand_dims(values, 0),)
    return loaded


@gluon_jit()
def _multiply(weights: gl.tuple, inputs: gl.tuple, LANE_LAYOUT: gl.constexpr) -> gl.tensor:
    """Returns each lane's part of the products of a chunk [rows, lanes]."""
    words, scale, zero = weights
    lower_a, upper_a, lower_b, upper_b, total, x_scale = inputs
    low, high = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
    upper = _add_products(high, upper_b, _add_products(low, upper_a, gl.zeros_like(words)))
    lower = _add_products(high, lower_b, _add_products(low, lower_a, gl.zeros_like(words)))
    dot = gl.sum(gl.reshape(upper * 256 + lower, [words.shape[0], 32, 4]), axis=2)
    dot = gl.convert_layout(dot, LANE_LAYOUT, assert_trivial=True).to(gl.float32)
    return (dot - zero * total) * (scale * x_scale)


@gluon_jit()
def _int4_skinny_linear_kernel(
    x_ptr: gl.tensor,
    weight_ptr: gl.tensor,
    scale_ptr: gl.tensor,
    zero_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    norm_weight_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    out_ptr: gl.tensor,
    scale_row_stride: gl.tensor,
    scale_group_stride: gl.tensor,
    eps: gl.tensor,
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_GATED: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
    INPUT_SIZE: gl.constexpr,
    WARP_ROWS: gl.constexpr,
    PIECE_CHUNKS: gl.constexpr,
    PADDED_BLOCKS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """A program takes groups of WARP_ROWS outputs for each warp, and of each output PIECE_CHUNKS chunks at a time.

    x and the norm's weight are read as words of two numbers. PADDED_BLOCKS: a power of two, ≥ 8.
    """
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = WARPS * WARP_ROWS
    NUM_BLOCKS: gl.constexpr = (INPUT_SIZE + _BLOCK - 1) // _BLOCK
    PIECES: gl.constexpr = (NUM_BLOCKS + PIECE_CHUNKS * _CHUNK_BLOCKS - 1) // (PIECE_CHUNKS * _CHUNK_BLOCKS)
    NUM_GROUPS: gl.constexpr = (OUTPUT_SIZE + ROWS - 1) // ROWS
    WORD_LAYOUT: gl.constexpr = gl.BlockedLayout([WARP_ROWS, 4], [1, 32], [WARPS, 1], [1, 0])
    LANE_LAYOUT: gl.constexpr = gl.BlockedLayout([WARP_ROWS, 1], [1, 32], [WARPS, 1], [1, 0])
    # Of the input that is converted: a block's words lie in one warp.
    EACH: gl.constexpr = max(1, min(4, PADDED_BLOCKS * _BLOCK_WORDS // (32 * WARPS)))
    BLOCK_LANES: gl.constexpr = _BLOCK_WORDS // EACH
    INPUT: gl.constexpr = gl.BlockedLayout([1, EACH], [32 // BLOCK_LANES, BLOCK_LANES], [WARPS, 1], [1, 0])
    ALL_BLOCKS: gl.constexpr = gl.BlockedLayout([1, max(1, PADDED_BLOCKS // 32)], [1, 32], [WARPS, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = out_ptr.type.element_ty
    if PDL:
        gdc_launch_dependents()
    # Buffers of their own: the compiler puts a barrier between stores to parts of one.
    words: gl.tuple = ()
    for _part in gl.static_range(4):
        words = words + (gl.allocate_shared_memory(gl.int32, [PADDED_BLOCKS * _BLOCK_WORDS], PLAIN),)
    sums: gl.tuple = ()
    for _part in gl.static_range(3):
        sums = sums + (gl.allocate_shared_memory(gl.float32, [PADDED_BLOCKS], PLAIN),)
    weight = (weight_ptr, scale_ptr, zero_ptr, scale_row_stride, scale_group_stride)
    first_group = gl.program_id(0)
    next_piece = _load_piece(
        weight, first_group * ROWS, 0, HAS_ZEROS, GROUP_SIZE, IS_GATED, OUTPUT_SIZE, NUM_BLOCKS, PIECE_CHUNKS,
        WORD_LAYOUT, LANE_LAYOUT, ROWS,
    )  # fmt: skip
    block = gl.expand_dims(gl.arange(0, PADDED_BLOCKS, gl.SliceLayout(1, INPUT)), 1)
    pair = block * (_BLOCK // 2) + gl.expand_dims(gl.arange(0, _BLOCK_WORDS, gl.SliceLayout(0, INPUT)), 0)
    norm_weight: gl.tuple = ()
    if HAS_NORM:
        norm_weight = _load_numbers(norm_weight_ptr, pair, INPUT_SIZE, dtype)
    if PDL:
        gdc_wait()
    _convert_input(_load_numbers(x_ptr, pair, INPUT_SIZE, dtype), norm_weight, words, sums, HAS_NORM)
    block_barrier()  # the compiler's own may lie in the main loop
    factor = 1.0
    if HAS_NORM:  # every warp adds up all
        square_sum = gl.sum(sums[2].load(gl.SliceLayout(0, ALL_BLOCKS)), axis=0)
        factor = 1.0 / gl.sqrt(square_sum / INPUT_SIZE + eps)

    for group in range(first_group, NUM_GROUPS, gl.num_programs(0)):
        output = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LANE_LAYOUT))
        mask = output < OUTPUT_SIZE
        bias = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LANE_LAYOUT))
        up_bias, addend = bias, bias
        if HAS_BIAS:
            bias = gl.load(bias_ptr + output, mask=mask, other=0.0).to(gl.float32)
            if IS_GATED:
                up_bias = gl.load(bias_ptr + OUTPUT_SIZE + output, mask=mask, other=0.0).to(gl.float32)
        if HAS_RESIDUAL:
            addend = gl.load(residual_ptr + output, mask=mask, other=0.0).to(gl.float32)
        lane_sum = gl.zeros([ROWS, 32], gl.float32, LANE_LAYOUT)
        up_sum = lane_sum
        for piece in gl.static_range(PIECES):
            weights = next_piece
            next_group = group
            if piece + 1 == PIECES:
                next_group = group + gl.num_programs(0)
            next_piece = _load_piece(
                weight, next_group * ROWS, (piece + 1) % PIECES * PIECE_CHUNKS, HAS_ZEROS, GROUP_SIZE, IS_GATED,
                OUTPUT_SIZE, NUM_BLOCKS, PIECE_CHUNKS, WORD_LAYOUT, LANE_LAYOUT, ROWS,
            )  # fmt: skip
            for index in gl.static_range(PIECE_CHUNKS):
                inputs = _load_inputs(words, sums, piece * PIECE_CHUNKS + index, WORD_LAYOUT, LANE_LAYOUT)
                lane_sum += _multiply(weights[index], inputs, LANE_LAYOUT)
                if IS_GATED:
                    up_sum += _multiply(weights[PIECE_CHUNKS + index], inputs, LANE_LAYOUT)
        out = gl.sum(lane_sum, axis=1) * factor + bias
        if IS_GATED:
            up = gl.sum(up_sum, axis=1) * factor + up_bias
            out = out / (1.0 + gl.exp(-out)) * up
        gl.store(out_ptr + output, (out + addend).to(dtype), mask=mask)


def suits_int4_skinny_linear(x: torch.Tensor, group_size: int) -> bool:
    """Returns whether `int4_skinny_linear` can multiply x [num_tokens, inputs]: one token, groups of blocks."""
    num_tokens, input_size = x.shape
    has_pairs = x.is_contiguous() and input_size % 2 == x.stride(0) % 2 == x.storage_offset() % 2 == 0
    has_blocks = group_size % BLOCK_SIZE == 0 or group_size >= input_size
    return HAS_GLUON and num_tokens <= 1 and has_pairs and has_blocks and input_size <= _MAX_INPUTS


def _choose_tile(num_chunks: int, gated: bool) -> tuple[int, int, int, int]:
    """Returns (outputs of a warp, chunks of a piece, warps, programs of a multiprocessor).

    As measured with 1, 4 and 5 chunks if gated, otherwise 1 to 5, 8, 12 and 25.
    """
    if gated:
        return (2, 1, 8, 2) if num_chunks <= 4 else (2, 1, 16, 1) if num_chunks <= 8 else (1, 1, 16, 1)
    if num_chunks == 1:
        return 4, 1, 16, 1
    piece = next(size for size in (2, 5, 3, 1) if num_chunks % size == 0)
    if piece == 5:
        return (2, 5, 4, 3) if num_chunks == 5 else (2, 5, 8, 1)
    if num_chunks <= 8:
        return (2, piece, 8, 2) if num_chunks < 8 else (4, piece, 8, 2)
    return 2, piece, 16, 1


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
    """Returns act(rms_norm(x) · weightᵀ + bias) + residual for one token, or none; x [num_tokens, inputs] bf16 or fp16.

    weight [outputs, words] of `pack_int4`; scale and zeros [outputs, groups] float32, of any strides, the same for
    both. → [num_tokens, outputs or half as many], of x's dtype.
    """
    num_tokens, input_size = x.shape
    output_size = weight.shape[0] // (1 + gated)
    out = torch.empty(num_tokens, output_size, dtype=x.dtype, device=x.device)  # [num_tokens, output_size]
    if num_tokens == 0:
        return out
    num_blocks = weight.shape[1] * NUM_PLANES // BLOCK_SIZE
    warp_rows, piece, num_warps, programs = _choose_tile(-(-num_blocks // _BLOCKS_OF_CHUNK), gated)
    num_groups = -(-output_size // (warp_rows * num_warps))
    words = x.view(torch.int32)
    _int4_skinny_linear_kernel[(min(programs * multiprocessor_count(x.device), num_groups),)](
        x_ptr=words,
        weight_ptr=weight.view(torch.int32),
        scale_ptr=scale,
        zero_ptr=scale if zeros is None else zeros,  # parts that are left out are not read
        bias_ptr=x if bias is None else bias,
        norm_weight_ptr=words if norm_weight is None else norm_weight.view(torch.int32),
        residual_ptr=x if residual is None else residual,
        out_ptr=out,
        scale_row_stride=scale.stride(0),
        scale_group_stride=scale.stride(1),
        eps=eps,
        HAS_ZEROS=zeros is not None,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None,
        HAS_RESIDUAL=residual is not None,
        IS_GATED=gated,
        GROUP_SIZE=group_size,
        OUTPUT_SIZE=output_size,
        INPUT_SIZE=input_size,
        WARP_ROWS=warp_rows,
        PIECE_CHUNKS=piece,
        PADDED_BLOCKS=max(next_power_of_2(num_blocks), _BLOCKS_OF_CHUNK),
        num_warps=num_warps,
        maxnreg=min(_REGISTERS // (32 * num_warps * programs) // 8 * 8, _MAX_REGISTERS),
        **pdl_options(x.device),
    )
    return out
