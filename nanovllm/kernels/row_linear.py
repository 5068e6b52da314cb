"""Matrix products of one row with weights of 16, 8 or 4 bits, in Gluon.

Such a product takes the time to read the weight, so nothing else should. A program brings the input into shared memory
once, and then takes one band of outputs after another. Each warp computes outputs of its own, so that warps wait for
each other once, when the input is there, and no sum crosses them. A warp loads the next weights while it multiplies.
What is fused, and what precedes the end of the kernel ahead, is as in `skinny_linear`.

Weights of 16 and 8 bits are converted to float32 in registers. With 4 bits, memory delivers a weight in the time of
three instructions, and converting it takes that many. So the input is converted instead: each 128 inputs share a scale
and become integers of 16 bits, which is more exact than bf16, and an instruction multiplies four weights by the upper
or lower bytes of four such integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.kernels.int4_packing import BLOCK_SIZE, PLANE_SIZE
from nanovllm.kernels.row_tiles import CHUNK_BYTES, RowShape, RowTile
from nanovllm.kernels.skinny_linear import INT8_TO_FLOAT, SCALE_BLOCK, scales_blocks
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
    shared_memory,
)

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
_MAX_INPUTS = 32768  # more were not tried
_SUMS_BYTES = 4096  # of shared memory beside the input, at most
_BLOCK = constant(BLOCK_SIZE)  # inputs: of a scale, and in INT4 of what is packed together
_PLANE = constant(PLANE_SIZE // 2)  # words of two inputs in a plane of such a block
_CHUNK_WORDS = constant(CHUNK_BYTES // 4)
_LARGEST = constant(32512.0)  # the largest integer whose upper byte, rounded, is a signed byte
_MAGIC = constant(12582912.0)  # 1.5 · 2²³: the sum with a small number has the nearest integer in its lowest bits
_ADD_PRODUCTS = constant("dp4a.s32.s32 $0, $1, $2, $3;")
_FP8_TO_FLOAT = constant(
    """{
.reg .b16 low, high, h0, h1, h2, h3;
.reg .b32 pair;
mov.b32 {low, high}, $4;
cvt.rn.f16x2.e4m3x2 pair, low;
mov.b32 {h0, h1}, pair;
cvt.rn.f16x2.e4m3x2 pair, high;
mov.b32 {h2, h3}, pair;
cvt.f32.f16 $0, h0;
cvt.f32.f16 $1, h1;
cvt.f32.f16 $2, h2;
cvt.f32.f16 $3, h3;
}"""
)


class RowTensors(NamedTuple):
    """What the kernel reads and writes. A tensor that the shape does not have is some other one, and is not read."""

    x: torch.Tensor  # as is norm_weight: words of four numbers, but of two with weights of 16 bits or INT4
    weight: torch.Tensor  # words of 32 bits
    scale: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor
    norm_weight: torch.Tensor
    residual: torch.Tensor
    out: torch.Tensor
    scale_row_stride: int
    scale_group_stride: int
    eps: float


@gluon_jit()
def _load_numbers(
    ptr: gl.tensor, place: gl.tensor, COUNT: gl.constexpr, INPUT_SIZE: gl.constexpr, dtype: gl.constexpr
) -> gl.tuple:
    """Loads COUNT neighbouring 16-bit numbers, of which ptr takes COUNT as one word. Returns them in float32."""
    word = gl.load(ptr + place, mask=place < INPUT_SIZE // COUNT, other=0)
    numbers: gl.tuple = ()
    for index in gl.static_range(COUNT):
        number = ((word >> (16 * index)) & 0xFFFF).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        numbers = numbers + (number,)
    return numbers


@gluon_jit()
def _load_row(
    ptr: gl.tensor,
    block: gl.tensor,
    word: gl.tensor,
    SHAPE: gl.constexpr,
    dtype: gl.constexpr,
) -> gl.tuple:
    """Loads the inputs that belong to words of the weight: two or four neighbours, or of INT4 a pair of each plane."""
    numbers: gl.tuple = ()
    if SHAPE.is_int4:
        for plane in gl.static_range(4):
            place = block * (_BLOCK // 2) + plane * _PLANE + word
            numbers = numbers + _load_numbers(ptr, place, 2, SHAPE.input_size, dtype)
    else:
        COUNT: gl.constexpr = SHAPE.num_parts
        numbers = _load_numbers(ptr, block * (_BLOCK // COUNT) + word, COUNT, SHAPE.input_size, dtype)
    return numbers


@gluon_jit()
def _add_products(a: gl.tensor, b: gl.tensor, acc: gl.tensor) -> gl.tensor:
    """Returns acc + the sum of the products of a's and b's four signed bytes."""
    return gl.inline_asm_elementwise(_ADD_PRODUCTS, "=r,r,r,r", [a, b, acc], dtype=gl.int32, is_pure=True, pack=1)


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
def _to_integers(x: gl.tuple, total: gl.tensor, x_scale: gl.tensor, HAS_NORM: gl.constexpr) -> gl.tuple:
    """Converts the input to integers, for INT4. x: eight tensors [blocks, 16], a pair of each plane.

    Returns the lower and upper bytes that belong to the lower four bits of a byte of weights, then those that belong to
    the upper four. Stores a quarter of each block's sum, and its scale, in `total` and `x_scale` [blocks].
    """
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
    scale = largest / _LARGEST
    if not HAS_NORM:  # NaN and infinity, which integers lose and the sum of squares keeps
        scale += 0.0 * gl.sum(_sum_eight(x), axis=1)
    total.store(gl.sum(upper * 256 + lower, axis=1).to(gl.float32) * 0.25)  # each of four lanes subtracts it; exact
    x_scale.store(scale)
    return lower_a, upper_a, lower_b, upper_b


@gluon_jit()
def _load_piece(
    given: gl.tuple,
    first_row: gl.tensor,
    first_chunk: gl.constexpr,
    SHAPE: gl.constexpr,
    TILE: gl.constexpr,
    WORD_LAYOUT: gl.constexpr,
    LANE_LAYOUT: gl.constexpr,
) -> gl.tuple:
    """Loads a tile's chunks of rows, and then of up rows: of each, words [rows, 128] and what scales them.

    With scales of groups, a lane has the scale and zero of its words [rows, 32].
    """
    ROWS: gl.constexpr = gl.num_warps() * TILE.outputs
    SIDES: gl.constexpr = 1 + SHAPE.is_gated
    END: gl.constexpr = first_chunk + TILE.chunks
    CHUNK_BLOCKS: gl.constexpr = _CHUNK_WORDS // SHAPE.block_words
    row = gl.expand_dims(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, WORD_LAYOUT)), 1)
    word = gl.expand_dims(gl.arange(0, _CHUNK_WORDS, gl.SliceLayout(0, WORD_LAYOUT)), 0)
    lane_row = gl.expand_dims(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LANE_LAYOUT)), 1)
    lane = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, LANE_LAYOUT)), 0)
    loaded: gl.tuple = ()
    for side in gl.static_range(SIDES):
        for chunk in gl.static_range(first_chunk, END):
            place = chunk * _CHUNK_WORDS + word
            block = chunk * CHUNK_BLOCKS + lane // (32 // CHUNK_BLOCKS)
            mask, lane_mask = row < SHAPE.output_size, lane_row < SHAPE.output_size
            if (chunk + 1) * _CHUNK_WORDS > SHAPE.num_words:
                mask, lane_mask = mask & (place < SHAPE.num_words), lane_mask & (block * _BLOCK < SHAPE.input_size)
            row_ptr = given.weight + (side * SHAPE.output_size + row).to(gl.int64) * SHAPE.num_words
            words = gl.load(row_ptr + place, mask=mask, other=0)
            if SHAPE.has_group_scale:
                position = (side * SHAPE.output_size + lane_row) // SHAPE.scale_rows * given.scale_row_stride
                position = position + (block * _BLOCK // SHAPE.group_size) * given.scale_group_stride
                scale = gl.load(given.scale + position, mask=lane_mask, other=0.0)
                zero = gl.full_like(scale, 8.0)
                if SHAPE.has_zeros:
                    zero = gl.load(given.zeros + position, mask=lane_mask, other=0.0)
                loaded = loaded + ((words, scale, zero),)
            else:
                loaded = loaded + ((words,),)
    return loaded


@gluon_jit()
def _load_inputs(
    inputs: gl.tuple,
    sums: gl.tuple,
    chunk: gl.constexpr,
    SHAPE: gl.constexpr,
    WORD_LAYOUT: gl.constexpr,
    LANE_LAYOUT: gl.constexpr,
) -> gl.tuple:
    """Loads a chunk of the input from shared memory: tensors [1, 128]; of INT4 a lane's sum and scale [1, 32]."""
    loaded: gl.tuple = ()
    for part in gl.static_range(len(inputs)):
        values = inputs[part].slice(chunk * _CHUNK_WORDS, _CHUNK_WORDS).load(gl.SliceLayout(0, WORD_LAYOUT))
        loaded = loaded + (gl.expand_dims(values, 0),)
    if SHAPE.is_int4:
        OF_BLOCKS: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [gl.num_warps(), 1], [1, 0])
        for part in gl.static_range(2):
            values = sums[part].slice(chunk * 8, 8).load(gl.SliceLayout(1, OF_BLOCKS))
            values = gl.reshape(gl.expand_dims(values, 1).broadcast_to([8, 4]), [32])
            values = gl.convert_layout(values, gl.SliceLayout(0, LANE_LAYOUT), assert_trivial=True)
            loaded = loaded + (gl.expand_dims(values, 0),)
    return loaded


@gluon_jit()
def _to_floats(words: gl.tensor, SHAPE: gl.constexpr) -> gl.tuple:
    """Returns a word's two or four weights, from the lowest bits, in float32."""
    FLOATS: gl.constexpr = (gl.float32, gl.float32, gl.float32, gl.float32)
    if SHAPE.kind == "bf16":
        numbers = ((words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True))
    elif SHAPE.kind == "fp16":
        low, high = words.to(gl.int16), (words >> 16).to(gl.int16)
        numbers = (low.to(gl.float16, bitcast=True).to(gl.float32), high.to(gl.float16, bitcast=True).to(gl.float32))
    elif SHAPE.kind == "int8":
        numbers = gl.inline_asm_elementwise(
            INT8_TO_FLOAT, "=&f,=&f,=&f,=&f,r", [words], dtype=FLOATS, is_pure=True, pack=1
        )
    else:
        numbers = gl.inline_asm_elementwise(
            _FP8_TO_FLOAT, "=&f,=&f,=&f,=&f,r", [words], dtype=FLOATS, is_pure=True, pack=1
        )
    return numbers


@gluon_jit()
def _multiply(weights: gl.tuple, inputs: gl.tuple, SHAPE: gl.constexpr, LANE_LAYOUT: gl.constexpr) -> gl.tensor:
    """Returns each lane's part of the products of a chunk [rows, 32]."""
    words = weights[0]
    if SHAPE.is_int4:
        lower_a, upper_a, lower_b, upper_b, total, x_scale = inputs
        low, high = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
        upper = _add_products(high, upper_b, _add_products(low, upper_a, gl.zeros_like(words)))
        lower = _add_products(high, lower_b, _add_products(low, lower_a, gl.zeros_like(words)))
        products = upper * 256 + lower
    else:
        numbers = _to_floats(words, SHAPE)
        products = numbers[0] * inputs[0] + numbers[1] * inputs[1]
        if not SHAPE.is_half:
            products += numbers[2] * inputs[2] + numbers[3] * inputs[3]
    dot = gl.sum(gl.reshape(products, [words.shape[0], 32, 4]), axis=2)
    dot = gl.convert_layout(dot, LANE_LAYOUT, assert_trivial=True)
    if SHAPE.is_int4:
        dot = (dot.to(gl.float32) - weights[2].to(gl.float32) * total) * (weights[1].to(gl.float32) * x_scale)
    elif SHAPE.has_group_scale:
        dot = dot * weights[1]
    return dot


@gluon_jit()
def _row_linear_kernel(given: gl.tuple, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr) -> None:
    """A program takes bands of outputs, some for each warp, and of each output some chunks at a time.

    given: RowTensors; SHAPE: RowShape; TILE: RowTile.
    """
    WARPS: gl.constexpr = gl.num_warps()
    WARP_ROWS: gl.constexpr = TILE.outputs
    PIECE_CHUNKS: gl.constexpr = TILE.chunks
    PIECES: gl.constexpr = (SHAPE.num_chunks + PIECE_CHUNKS - 1) // PIECE_CHUNKS
    ROWS: gl.constexpr = WARPS * WARP_ROWS
    NUM_BANDS: gl.constexpr = (SHAPE.output_size + ROWS - 1) // ROWS
    PADDED_BLOCKS: gl.constexpr = SHAPE.padded_blocks
    BLOCK_WORDS: gl.constexpr = SHAPE.block_words
    WORD_LAYOUT: gl.constexpr = gl.BlockedLayout([WARP_ROWS, 4], [1, 32], [WARPS, 1], [1, 0])
    LANE_LAYOUT: gl.constexpr = gl.BlockedLayout([WARP_ROWS, 1], [1, 32], [WARPS, 1], [1, 0])
    # Of the input on its way to shared memory: a block's words lie in one warp.
    EACH: gl.constexpr = max(max(1, BLOCK_WORDS // 32), min(4, PADDED_BLOCKS * BLOCK_WORDS // (32 * WARPS)))
    BLOCK_LANES: gl.constexpr = BLOCK_WORDS // EACH
    INPUT: gl.constexpr = gl.BlockedLayout([1, EACH], [32 // BLOCK_LANES, BLOCK_LANES], [WARPS, 1], [1, 0])
    ALL_BLOCKS: gl.constexpr = gl.BlockedLayout([1, max(1, PADDED_BLOCKS // 32)], [1, 32], [WARPS, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    INPUT_TYPE: gl.constexpr = gl.int32 if SHAPE.is_int4 else gl.float32
    dtype: gl.constexpr = given.out.type.element_ty
    if PDL:
        gdc_launch_dependents()
    # Separate buffers: between stores to parts of one buffer the compiler puts a barrier. A buffer has a word for each
    # word of the weight: one of its inputs, or in INT4 the upper or lower bytes of four.
    inputs: gl.tuple = ()
    NUM_PARTS: gl.constexpr = SHAPE.num_parts
    for _part in gl.static_range(NUM_PARTS):
        inputs = inputs + (gl.allocate_shared_memory(INPUT_TYPE, [PADDED_BLOCKS * BLOCK_WORDS], PLAIN),)
    sums: gl.tuple = ()  # of blocks: the sum and the scale of integers, the sum of squares
    for _part in gl.static_range(3):
        sums = sums + (gl.allocate_shared_memory(gl.float32, [PADDED_BLOCKS], PLAIN),)
    first_band = gl.program_id(0)
    next_piece = _load_piece(given, first_band * ROWS, 0, SHAPE, TILE, WORD_LAYOUT, LANE_LAYOUT)
    block = gl.expand_dims(gl.arange(0, PADDED_BLOCKS, gl.SliceLayout(1, INPUT)), 1)
    word = gl.expand_dims(gl.arange(0, BLOCK_WORDS, gl.SliceLayout(0, INPUT)), 0)
    norm_weight: gl.tuple = ()
    if SHAPE.has_norm:
        norm_weight = _load_row(given.norm_weight, block, word, SHAPE, dtype)
    if PDL:
        gdc_wait()
    x = _load_row(given.x, block, word, SHAPE, dtype)
    if SHAPE.has_norm:
        squares = x[0] * x[0]
        normed: gl.tuple = (x[0] * norm_weight[0],)
        for index in gl.static_range(1, len(x)):
            squares += x[index] * x[index]
            normed = normed + (x[index] * norm_weight[index],)
        sums[2].store(gl.sum(squares, axis=1))
        x = normed
    if SHAPE.is_int4:
        x = _to_integers(x, sums[0], sums[1], SHAPE.has_norm)
    for part in gl.static_range(NUM_PARTS):
        inputs[part].store(gl.reshape(x[part], [PADDED_BLOCKS * BLOCK_WORDS]))
    block_barrier()  # the compiler's own may lie in the main loop
    factor = 1.0
    if SHAPE.has_norm:  # every warp adds up all
        square_sum = gl.sum(sums[2].load(gl.SliceLayout(0, ALL_BLOCKS)), axis=0)
        factor = 1.0 / gl.sqrt(square_sum / SHAPE.input_size + given.eps)

    for band in range(first_band, NUM_BANDS, gl.num_programs(0)):
        output = band * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LANE_LAYOUT))
        up_output = SHAPE.output_size + output
        mask = output < SHAPE.output_size
        zero = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LANE_LAYOUT))
        bias, up_bias, addend = zero, zero, zero
        scale = zero + factor
        up_scale = scale
        if SHAPE.has_bias:
            bias = gl.load(given.bias + output, mask=mask, other=0.0).to(gl.float32)
            if SHAPE.is_gated:
                up_bias = gl.load(given.bias + up_output, mask=mask, other=0.0).to(gl.float32)
        if SHAPE.has_residual:
            addend = gl.load(given.residual + output, mask=mask, other=0.0).to(gl.float32)
        if not (SHAPE.has_group_scale or SHAPE.is_half):
            scale *= gl.load(given.scale + output * given.scale_row_stride, mask=mask, other=0.0)
            if SHAPE.is_gated:
                up_scale *= gl.load(given.scale + up_output * given.scale_row_stride, mask=mask, other=0.0)
        lane_sum = gl.zeros([ROWS, 32], gl.float32, LANE_LAYOUT)
        up_sum = lane_sum
        for piece in gl.static_range(PIECES):
            weights = next_piece
            next_band = band
            if piece + 1 == PIECES:
                next_band = band + gl.num_programs(0)
            next_piece = _load_piece(
                given, next_band * ROWS, (piece + 1) % PIECES * PIECE_CHUNKS, SHAPE, TILE, WORD_LAYOUT, LANE_LAYOUT
            )
            for index in gl.static_range(PIECE_CHUNKS):
                of_chunk = _load_inputs(inputs, sums, piece * PIECE_CHUNKS + index, SHAPE, WORD_LAYOUT, LANE_LAYOUT)
                lane_sum += _multiply(weights[index], of_chunk, SHAPE, LANE_LAYOUT)
                if SHAPE.is_gated:
                    up_sum += _multiply(weights[PIECE_CHUNKS + index], of_chunk, SHAPE, LANE_LAYOUT)
        out = gl.sum(lane_sum, axis=1) * scale + bias
        if SHAPE.is_gated:
            up = gl.sum(up_sum, axis=1) * up_scale + up_bias
            out = out / (1.0 + gl.exp(-out)) * up
        gl.store(given.out + output, (out + addend).to(dtype), mask=mask)


def suits_row_linear(x: torch.Tensor, group_size: int = 0) -> bool:
    """Returns whether `row_linear` can multiply x [num_tokens, inputs]: at most one token, whole words and blocks."""
    if not HAS_GLUON:
        return False
    num_tokens, input_size = x.shape
    count = 2 if group_size else 4  # inputs that are read as one word
    has_words = x.is_contiguous() and input_size % count == x.stride(0) % count == x.storage_offset() % count == 0
    has_blocks = group_size % BLOCK_SIZE == 0 or group_size >= input_size
    has_room = next_power_of_2(input_size) * (2 if group_size else 4) + _SUMS_BYTES <= shared_memory(x.device)
    return num_tokens <= 1 and x.itemsize == 2 and has_words and has_blocks and has_room and input_size <= _MAX_INPUTS


def row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    zeros: torch.Tensor | None = None,
    group_size: int = 0,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    tile: RowTile | None = None,
) -> torch.Tensor:
    """Returns act(rms_norm(x) · weightᵀ + bias) + residual for at most one token; x [num_tokens, inputs] bf16 or fp16.

    weight [outputs, inputs] of x's dtype; or FP8 or INT8 with a scale as in `skinny_linear`; or INT4 [outputs, words]
    of `pack_int4`, with scale and zeros [outputs, groups] float16, of any strides, the same for both, and their
    group_size. The weight is contiguous, and bias, norm_weight and residual have x's dtype.
    → [num_tokens, outputs or half as many], of x's dtype. Needs `suits_row_linear`.
    """
    num_tokens, input_size = x.shape
    output_size = weight.shape[0] // (1 + gated)
    out = torch.empty(num_tokens, output_size, dtype=x.dtype, device=x.device)  # [num_tokens, output_size]
    if num_tokens == 0:
        return out
    is_int4, is_half = group_size > 0, weight.dtype == x.dtype
    assert is_half == (scale is None), "weights of 8 and 4 bits have a scale"
    words, weight_words = x.view(torch.int32 if is_int4 or is_half else torch.int64), weight.view(torch.int32)
    has_blocks = scale is not None and not is_int4 and scales_blocks(scale, weight)
    scale = weight_words if scale is None else scale
    given = RowTensors(
        words,
        weight_words,
        scale,
        scale if zeros is None else zeros,
        x if bias is None else bias,
        words if norm_weight is None else norm_weight.view(words.dtype),
        x if residual is None else residual,
        out,
        scale_row_stride=0 if len(scale) == 1 else scale.stride(0),
        scale_group_stride=scale.stride(1),
        eps=eps,
    )
    num_multiprocessors = multiprocessor_count(x.device)
    shape = RowShape(
        kind="int4" if is_int4 else _KINDS[weight.dtype],
        has_zeros=zeros is not None,
        has_bias=bias is not None,
        has_norm=norm_weight is not None,
        has_residual=residual is not None,
        is_gated=gated,
        group_size=group_size if is_int4 else SCALE_BLOCK,
        scale_rows=SCALE_BLOCK if has_blocks else 1,
        output_size=output_size,
        input_size=input_size,
        num_words=weight_words.shape[1],
    )
    tile = tile or shape.choose_tile(num_multiprocessors)
    grid = min(tile.programs * num_multiprocessors, -(-output_size // (tile.outputs * tile.warps)))
    options = {"num_warps": tile.warps, "maxnreg": tile.max_registers, **pdl_options(x.device)}
    _row_linear_kernel[(grid,)](given=given, SHAPE=shape, TILE=tile, **options)
    return out
