"""What the products for Hopper GPUs have in common: mixed_matmul.py and dense_matmul.py.

A unit of work is a tile of outputs and tokens, over a part of the inputs. One warp copies its weights and their scales,
another its activations, stage by stage. Weights are never written while a step runs, so their warp begins at once, and
the first stages are full when the kernel ahead ends. Activations are that kernel's work: their warp waits for it first.
"""

from __future__ import annotations

from functools import cache

import torch

from nanovllm.kernels.triton_support import (
    TensorDescriptor,
    constant,
    gdc_wait,
    gl,
    gluon_jit,
    mbarrier,
    next_power_of_2,
    tma,
)

WARPGROUP_ROWS = 64  # of the weight: the rows of one matrix instruction
SWIZZLE_BYTES = 128  # of a row that the accelerator copies at a time
RESERVED_BYTES = 1024  # of shared memory, for barriers and alignment
FINISHING_BYTES = 2048  # of it, through which a warpgroup's sums go to the threads that store them
_INTERLEAVED = 8  # rows of a gate, and then as many of its up: rows 8 apart are in the same thread
_ALIGNED_BYTES = 16  # where the accelerator may begin to read
_COUNTED_TOKENS, MAX_COUNTED_TOKENS = 64, 512  # multiples of the first count up to the second
_MIN_COPIED_TOKENS = 8  # whose places in shared memory are swizzled together
_ALIGNED_TOKENS = constant(8)
_ROWS = constant(WARPGROUP_ROWS)
_TOKENS_AT_ONCE = constant(64)  # whose sums are finished together
_BAND_TOKENS = constant(2048)  # at most; their activations, of 8 KB a token at 8B, are a third of an H200's L2 cache


def counted_tokens(num_tokens: int) -> int:
    """Returns the tokens, at least `num_tokens`, for which a tile is chosen: a power of two, or a multiple of 64.

    They are few numbers, so that few variants are compiled, and those of decode steps when the engine starts. Between
    two multiples of 64, a product has as many tiles of 64, 128 or 256 tokens.
    """
    if _COUNTED_TOKENS < num_tokens <= MAX_COUNTED_TOKENS:
        return -(-num_tokens // _COUNTED_TOKENS) * _COUNTED_TOKENS
    return next_power_of_2(num_tokens)


@gluon_jit()
def find_unit(
    unit: gl.tensor,
    num_tokens: gl.tensor,
    TOKENS: gl.constexpr,
    NUM_OUTPUT_TILES: gl.constexpr,
    HAS_BANDS: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Returns (first token, tile of outputs, split). Neighbouring programs share a weight, which L2 then holds.

    HAS_BANDS: many tokens are taken in equal bands, so that it also holds the activations of programs that run at the
    same time.

    The last tile of tokens ends with the last token, or up to 7 after it, since scales of 4 bytes are copied from a
    multiple of 16 bytes on. So it overlaps the tile before, and both store the same results: the accelerator needs much
    longer for tokens that do not exist.
    """
    MOST_TILES: gl.constexpr = _BAND_TOKENS // TOKENS
    num_tiles = (num_tokens + TOKENS - 1) // TOKENS
    rest = unit // num_tiles
    tile, output_tile, split = unit % num_tiles, rest % NUM_OUTPUT_TILES, rest // NUM_OUTPUT_TILES
    if HAS_BANDS and num_tiles > MOST_TILES:
        num_bands = (num_tiles + MOST_TILES - 1) // MOST_TILES
        band_tiles = (num_tiles + num_bands - 1) // num_bands
        place = output_tile * num_tiles + tile
        first_tile = place // (band_tiles * NUM_OUTPUT_TILES) * band_tiles
        place -= first_tile * NUM_OUTPUT_TILES
        band_tiles = gl.minimum(band_tiles, num_tiles - first_tile)
        tile, output_tile = first_tile + place % band_tiles, place // band_tiles
    last = gl.maximum((num_tokens - TOKENS + _ALIGNED_TOKENS - 1) // _ALIGNED_TOKENS * _ALIGNED_TOKENS, 0)
    return gl.minimum(tile * TOKENS, last), output_tile, split


@gluon_jit()
def _load_scales(
    desc: tma.tensor_descriptor,
    scales: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    group: gl.tensor,
    row: gl.tensor,
    stage: gl.tensor,
    IS_GATED: gl.constexpr,
) -> None:
    """Starts to copy the scales (or zero points) of the tile that begins at `row`, for a block's groups."""
    GROUPS: gl.constexpr = desc.block_type.shape[0]
    BOX: gl.constexpr = [scales.shape[0] // GROUPS] + desc.block_type.shape
    to = scales._reinterpret(scales.dtype, BOX, desc.layout).index(stage)
    if IS_GATED:
        tma.async_copy_global_to_shared(desc, [group, row // 16, 0, 0], ready, to)
    else:
        tma.async_copy_global_to_shared(desc, [group, row], ready, to)


@gluon_jit()
def load_weights(
    weight_desc: tma.tensor_descriptor,
    scale_desc: tma.tensor_descriptor,
    zero_desc: tma.tensor_descriptor,
    num_tokens: gl.tensor,
    num_units: gl.tensor,
    weights: gl.shared_memory_descriptor,
    scales: gl.shared_memory_descriptor,
    zeros: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    TOKENS: gl.constexpr,
    PARTS: gl.constexpr,
    HAS_GROUPS: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    IS_GATED: gl.constexpr,
    BLOCK: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    NUM_OUTPUT_TILES: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    BLOCKS_A_SPLIT: gl.constexpr,
    HAS_BANDS: gl.constexpr,
) -> None:
    """Copies the weights of all of the program's units, as far ahead as there are stages.

    A block of inputs has PARTS, as wide as a copy. HAS_GROUPS: of inputs, with scales and perhaps zero points.
    """
    STAGES: gl.constexpr = ready.shape[0]
    BOXES: gl.constexpr = weights.shape[0] // (STAGES * PARTS)
    BOX_ROWS: gl.constexpr = weights.shape[1]
    COLUMNS: gl.constexpr = weights.shape[2]
    ROWS: gl.constexpr = BOXES * BOX_ROWS
    SCALE_BYTES: gl.constexpr = scales.shape[0] // STAGES * scales.shape[1] * scales.dtype.itemsize if HAS_GROUPS else 0
    WEIGHT_BYTES: gl.constexpr = PARTS * ROWS * COLUMNS * weights.dtype.itemsize
    BYTES: gl.constexpr = WEIGHT_BYTES + SCALE_BYTES * (2 if HAS_ZEROS else 1)
    num_loaded = 0
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        _first_token, output_tile, split = find_unit(unit, num_tokens, TOKENS, NUM_OUTPUT_TILES, HAS_BANDS)
        first_row = output_tile * ROWS
        first = split * BLOCKS_A_SPLIT
        for block in range(first, gl.minimum(first + BLOCKS_A_SPLIT, NUM_BLOCKS)):
            stage = num_loaded % STAGES
            mbarrier.wait(free.index(stage), num_loaded // STAGES & 1 ^ 1)
            stage_ready = ready.index(stage)
            mbarrier.expect(stage_ready, BYTES)
            for part in gl.static_range(PARTS):
                column = (block * PARTS + part) * COLUMNS
                for box in gl.static_range(BOXES):
                    to = weights.index((stage * PARTS + part) * BOXES + box)
                    row = first_row + box * BOX_ROWS
                    if IS_GATED:
                        to = to._reinterpret(weights.dtype, weight_desc.block_type.shape, weight_desc.layout)
                        tma.async_copy_global_to_shared(weight_desc, [row // 16, 0, 0, column], stage_ready, to)
                    else:
                        tma.async_copy_global_to_shared(weight_desc, [row, column], stage_ready, to)
            if HAS_GROUPS:
                group = block * BLOCK // GROUP_SIZE
                _load_scales(scale_desc, scales, stage_ready, group, first_row, stage, IS_GATED)
                if HAS_ZEROS:
                    _load_scales(zero_desc, zeros, stage_ready, group, first_row, stage, IS_GATED)
            num_loaded += 1


@gluon_jit()
def load_activations(
    x_desc: tma.tensor_descriptor,
    few_desc: tma.tensor_descriptor,
    scale_desc: tma.tensor_descriptor,
    num_tokens: gl.tensor,
    num_units: gl.tensor,
    x: gl.shared_memory_descriptor,
    scales: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    HAS_SCALES: gl.constexpr,
    NUM_OUTPUT_TILES: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    BLOCKS_A_SPLIT: gl.constexpr,
    HAS_BANDS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """Copies the activations. What lies behind the inputs becomes 0.

    x_desc: of a tile's tokens; few_desc: of an eighth of them, or 8. If there are fewer tokens than a tile has, those
    that do not exist become others, whose sums are not stored: the accelerator could make them 0, and needs much longer
    for it. HAS_SCALES: each part of a block has a scale for each token.
    """
    STAGES: gl.constexpr = ready.shape[0]
    PARTS: gl.constexpr = x.shape[0] // STAGES
    TOKENS: gl.constexpr = x.shape[1]
    COLUMNS: gl.constexpr = x.shape[2]
    FEW: gl.constexpr = few_desc.block_type.shape[0]  # tokens
    NUM_COPIES: gl.constexpr = TOKENS // FEW
    BYTES: gl.constexpr = PARTS * TOKENS * (COLUMNS * x.dtype.itemsize + (4 if HAS_SCALES else 0))
    few_of_x = x._reinterpret(x.dtype, [STAGES * PARTS * NUM_COPIES, FEW, COLUMNS], few_desc.layout)
    if PDL:
        gdc_wait()
    num_loaded = 0
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        first_token, _output_tile, split = find_unit(unit, num_tokens, TOKENS, NUM_OUTPUT_TILES, HAS_BANDS)
        first = split * BLOCKS_A_SPLIT
        for block in range(first, gl.minimum(first + BLOCKS_A_SPLIT, NUM_BLOCKS)):
            stage = num_loaded % STAGES
            mbarrier.wait(free.index(stage), num_loaded // STAGES & 1 ^ 1)
            stage_ready = ready.index(stage)
            mbarrier.expect(stage_ready, BYTES)
            for part in gl.static_range(PARTS):
                column = (block * PARTS + part) * COLUMNS
                index = stage * PARTS + part
                if num_tokens >= TOKENS:
                    tma.async_copy_global_to_shared(x_desc, [first_token, column], stage_ready, x.index(index))
                else:
                    for copy in gl.static_range(NUM_COPIES):
                        token = copy * FEW
                        token -= gl.where(token < num_tokens, 0, TOKENS // 2)  # most tiles are more than half full
                        to = few_of_x.index(index * NUM_COPIES + copy)
                        tma.async_copy_global_to_shared(few_desc, [token, column], stage_ready, to)
            if HAS_SCALES:
                to = scales._reinterpret(gl.float32, [STAGES, PARTS, TOKENS], scale_desc.layout).index(stage)
                tma.async_copy_global_to_shared(scale_desc, [block * PARTS, first_token], stage_ready, to)
            num_loaded += 1


@gluon_jit()
def find_rows(
    first_row: gl.tensor, IS_GATED: gl.constexpr, OUTPUT_SIZE: gl.constexpr, LAYOUT: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """Returns (rows of the weight, which of them exist), both [64]: 8 gates, their 8 ups, 8 gates … if gated.

    What belongs to them is loaded in this shape, in which a thread has each row once.
    """
    index = gl.arange(0, _ROWS, gl.SliceLayout(1, LAYOUT))
    output = first_row + index
    row = output
    if IS_GATED:
        output = first_row // 2 + index // 16 * 8 + index % 8
        row = output + index // 8 % 2 * OUTPUT_SIZE
    return row, output < OUTPUT_SIZE


@gluon_jit()
def _find_outputs(
    first_output: gl.tensor,
    first_token: gl.tensor,
    num_tokens: gl.tensor,
    stride: gl.tensor,
    OUTPUTS: gl.constexpr,
    TOKENS: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Returns (places of outputs of tokens that lie `stride` apart, which of them exist), both [OUTPUTS, TOKENS].

    A thread has eight outputs of a token, which are copied at once, and its neighbours have the next ones.
    """
    SIDE_BY_SIDE: gl.constexpr = gl.BlockedLayout([8, 1], [OUTPUTS // 8, 256 // OUTPUTS], [1, 4], [0, 1])
    output = gl.expand_dims(first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, SIDE_BY_SIDE)), 1)
    token = gl.expand_dims(first_token + gl.arange(0, TOKENS, gl.SliceLayout(0, SIDE_BY_SIDE)), 0)
    return token.to(gl.int64) * stride + output, (output < OUTPUT_SIZE) & (token < num_tokens)


@gluon_jit()
def load_residual(
    first_output: gl.tensor,
    first_token: gl.tensor,
    residual_ptr: gl.tensor,
    residual_stride: gl.tensor,
    num_tokens: gl.tensor,
    OUTPUTS: gl.constexpr,
    TOKENS: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
) -> gl.tensor:
    """Loads the residual [OUTPUTS, TOKENS] of outputs and tokens; 0 where there are none."""
    place, mask = _find_outputs(first_output, first_token, num_tokens, residual_stride, OUTPUTS, TOKENS, OUTPUT_SIZE)
    return gl.load(residual_ptr + place, mask=mask, other=0.0)


@gluon_jit()
def finish_sums(
    acc: gl.tensor,
    loaded_residual: gl.tensor,
    first_row: gl.tensor,
    first_token: gl.tensor,
    x_scale_ptr: gl.tensor,
    scale_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    out_ptr: gl.tensor,
    residual_stride: gl.tensor,
    num_tokens: gl.tensor,
    HAS_X_SCALE: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_RESIDUAL_LOADED: gl.constexpr,
    IS_GATED: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
) -> None:
    """Scales a warpgroup's sums [64, tokens], does what follows, and stores the result.

    loaded_residual [64, tokens] is not read unless IS_RESIDUAL_LOADED. Many tokens are finished part by part: a later
    part's loads cannot move ahead of an earlier one's stores, so their addresses and values need few registers.
    """
    TOKENS: gl.constexpr = acc.shape[1]
    if TOKENS > _TOKENS_AT_ONCE:
        HALF: gl.constexpr = TOKENS // 2
        halves = gl.split(gl.permute(gl.reshape(acc, [_ROWS, 2, HALF]), (0, 2, 1)))
        for half in gl.static_range(2):
            finish_sums(
                halves[half], loaded_residual, first_row, first_token + half * HALF, x_scale_ptr, scale_ptr, bias_ptr,
                residual_ptr, out_ptr, residual_stride, num_tokens, HAS_X_SCALE, HAS_SCALE, SCALE_STRIDE, HAS_BIAS,
                HAS_RESIDUAL, False, IS_GATED, OUTPUT_SIZE,
            )  # fmt: skip
    else:
        ACC: gl.constexpr = acc.type.layout
        row, has_row = find_rows(first_row, IS_GATED, OUTPUT_SIZE, ACC)
        if HAS_SCALE:
            acc *= gl.expand_dims(gl.load(scale_ptr + row * SCALE_STRIDE, mask=has_row, other=0.0), 1)
        if HAS_X_SCALE:
            token = first_token + gl.arange(0, TOKENS, gl.SliceLayout(0, ACC))
            acc *= gl.expand_dims(gl.load(x_scale_ptr + token, mask=token < num_tokens, other=0.0), 0)
        if HAS_BIAS:
            acc += gl.expand_dims(gl.load(bias_ptr + row, mask=has_row, other=0.0).to(gl.float32), 1)
        out = acc
        OUTPUTS: gl.constexpr = _ROWS // (2 if IS_GATED else 1)
        if IS_GATED:
            gate, up = gl.split(gl.permute(gl.reshape(acc, [_ROWS // 16, 2, 8, TOKENS]), (0, 2, 3, 1)))
            out = gl.reshape(gate / (1.0 + gl.exp(-gate)) * up, [OUTPUTS, TOKENS])
        first_output = first_row // (_ROWS // OUTPUTS)
        residual = loaded_residual
        if HAS_RESIDUAL and not IS_RESIDUAL_LOADED:
            residual = load_residual(
                first_output, first_token, residual_ptr, residual_stride, num_tokens, OUTPUTS, TOKENS, OUTPUT_SIZE
            )
        if HAS_RESIDUAL:
            out += gl.convert_layout(residual, out.type.layout).to(gl.float32)
        place, mask = _find_outputs(first_output, first_token, num_tokens, OUTPUT_SIZE, OUTPUTS, TOKENS, OUTPUT_SIZE)
        gl.store(out_ptr + place, gl.convert_layout(out.to(out_ptr.type.element_ty), place.type.layout), mask=mask)


@cache
def swizzle(width: int, bits: int, rank: int = 2) -> gl.NVMMASharedLayout:
    """Returns how a copy is laid out whose rows have `width` bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


def describe_weight(weight: torch.Tensor, box_rows: int, columns: int, gated: bool) -> TensorDescriptor:
    """Returns how a tile's rows are copied: if gated, 8 gates, their 8 ups, 8 gates …"""
    rows, all_columns = weight.shape
    bits = 8 * weight.itemsize
    width = columns * weight.itemsize
    if not gated:
        strides = [all_columns, 1]
        return TensorDescriptor(weight, [rows, all_columns], strides, [box_rows, columns], swizzle(width, bits))
    shape = [rows // 2 // _INTERLEAVED, 2, _INTERLEAVED, all_columns]
    strides = [_INTERLEAVED * all_columns, rows // 2 * all_columns, all_columns, 1]
    box = [box_rows // 2 // _INTERLEAVED, 2, _INTERLEAVED, columns]
    return TensorDescriptor(weight, shape, strides, box, swizzle(width, bits, 4))


def describe_scales(scale: torch.Tensor, box_rows: int, groups: int, gated: bool) -> TensorDescriptor:
    """Returns the same for scale [rows, all groups], of `groups` groups in a block."""
    rows, all_groups = scale.shape
    stride = scale.stride(1) if all_groups > 1 else rows
    bits = 8 * scale.itemsize
    if not gated:
        return TensorDescriptor(scale, [all_groups, rows], [stride, 1], [groups, box_rows], swizzle(0, bits))
    shape = [all_groups, rows // 2 // _INTERLEAVED, 2, _INTERLEAVED]
    strides = [stride, _INTERLEAVED, rows // 2, 1]
    box = [groups, box_rows // 2 // _INTERLEAVED, 2, _INTERLEAVED]
    return TensorDescriptor(scale, shape, strides, box, swizzle(0, bits, 4))


def describe_activations(x: torch.Tensor, tile_tokens: int) -> dict[str, TensorDescriptor]:
    """Returns how a tile's tokens, and an eighth of them, are copied, 128 bytes of each at a time."""

    def describe(tokens: int) -> TensorDescriptor:
        box = [tokens, SWIZZLE_BYTES // x.itemsize]
        return TensorDescriptor(x, [*x.shape], [*x.stride()], box, swizzle(SWIZZLE_BYTES, 8 * x.itemsize))

    return {"x_desc": describe(tile_tokens), "few_desc": describe(max(tile_tokens // 8, _MIN_COPIED_TOKENS))}


def can_copy_activations(x: torch.Tensor) -> bool:
    """Returns whether the accelerator can copy x [num_tokens, inputs]."""
    row_bytes = x.stride(0) * x.itemsize
    return x.stride(1) == 1 and row_bytes % _ALIGNED_BYTES == 0 and x.data_ptr() % _ALIGNED_BYTES == 0


def can_copy_weight(weight: torch.Tensor, gated: bool) -> bool:
    """Returns whether the accelerator can copy weight [rows, columns]."""
    row_bytes = weight.shape[1] * weight.itemsize
    has_pairs = weight.shape[0] % (2 * _INTERLEAVED) == 0
    is_aligned = row_bytes % _ALIGNED_BYTES == 0 and weight.data_ptr() % _ALIGNED_BYTES == 0
    return weight.is_contiguous() and is_aligned and (has_pairs or not gated)
