"""Mixed-precision products y = x · Wᵀ: 16-bit activations with INT4 or INT8 weights, for Hopper GPUs (H100, H200).

As in quantized_matmul.py, a weight's outputs are the rows of the tensor cores' product and the tokens its columns, so
that converted weights go to the tensor cores from registers. Here the warps of a program divide the work, as in
paged_prefill_hopper.py: two warps copy weights and activations into a ring of stages, and two warpgroups, with 64 rows
each, convert and multiply. While one converts, the tensor cores work for the other.

There is one program for each multiprocessor. It takes one unit of work, a tile of outputs and tokens over a part of the
inputs, after another, and the copies for the next begin before the last has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from nanovllm.kernels.add_splits import add_splits, finishing_arguments
from nanovllm.kernels.int4_packing import BLOCK_SIZE, PLANE_SIZE
from nanovllm.kernels.mixed_matmul_load import load_activations, load_weights
from nanovllm.kernels.mixed_matmul_multiply import multiply
from nanovllm.kernels.triton_support import (
    HAS_GLUON,
    TensorDescriptor,
    constant,
    fence_async_shared,
    gdc_launch_dependents,
    gl,
    gluon_jit,
    mbarrier,
    multiprocessor_count,
    next_power_of_2,
    shared_memory,
    tma,
)

_ROWS = 128  # of the weight in a tile
_INTERLEAVED = 8  # rows of a gate, and then as many of its up: rows 8 apart are in the same thread
_ALIGNED_BYTES = 16  # where the accelerator may begin to read
_MIN_TOKENS = 16
_MAX_TOKENS = 128  # of a tile: a group's sums and those of all groups are in registers
_MAX_STAGES = 8
_MAX_SPLITS = 8
_RESERVED_MEMORY = 2048  # bytes, for barriers and alignment
# Microseconds, estimated: a block of 128 · 128 INT4 weights at a program's share of the bandwidth, and its product with
# each token; another launch, and a sum that is written and read. Gate and up of Qwen3-8B take 0.28 and 0.004 for the
# first two on an H200, with which the same tiles are chosen for that model. A block of INT8 is converted faster than
# all programs' share of the bandwidth brings it, so fewer programs may read as much.
_BLOCK_TIME = 0.25
_INT8_BLOCK_TIME = 0.35
_INT8_READ_TIME = 0.5
_TOKEN_TIME = 0.003
_SPLIT_TIME = 2.5
_SUM_TIME = 2.7e-6
_COLUMNS = 64  # activations that the accelerator copies at a time: 128 bytes, the width of its swizzle
_BLOCK = constant(BLOCK_SIZE)
_PLANE = constant(PLANE_SIZE)
# Of `finishing_arguments`, what `add_splits` alone takes.
_OF_SPLITS = {"x_scale_ptr", "out_ptr", "HAS_X_SCALE"}


@gluon_jit("residual_stride", "num_tokens", "num_token_tiles", "num_units")
def _mixed_matmul_kernel(
    x_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    scale_desc: tma.tensor_descriptor,
    zero_desc: tma.tensor_descriptor,
    scale_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    partial_ptr: gl.tensor,
    residual_stride: gl.tensor,
    num_tokens: gl.tensor,
    num_token_tiles: gl.tensor,
    num_units: gl.tensor,
    HAS_ZEROS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_GATED: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
    INPUT_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """Allocates a ring of stages of BLOCKS · 128 inputs, and starts the warps.

    HAS_SCALE: the weights are INT8, and scale_ptr has what finished sums are scaled by. Otherwise they are INT4, and
    scale_desc and zero_desc have what belongs to groups. partial_ptr: as in `finishing_arguments`.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    WORDS: gl.constexpr = weight_desc.block_type.shape[-1]
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    PARTS: gl.constexpr = BLOCKS * _BLOCK // COLUMNS
    NUM_BLOCKS: gl.constexpr = (INPUT_SIZE + BLOCKS * _BLOCK - 1) // (BLOCKS * _BLOCK)
    BLOCKS_A_SPLIT: gl.constexpr = (NUM_BLOCKS + SPLITS - 1) // SPLITS
    TILE_OUTPUTS: gl.constexpr = ROWS // (2 if IS_GATED else 1)
    NUM_OUTPUT_TILES: gl.constexpr = (OUTPUT_SIZE + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    WEIGHT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * WORDS, element_bitwidth=16, rank=2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if PDL:
        gdc_launch_dependents()
    weights = gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, WORDS], WEIGHT_LAYOUT)
    scales = weights
    zeros = weights
    if not HAS_SCALE:
        GROUPS: gl.constexpr = STAGES * BLOCKS * scale_desc.block_type.shape[0]
        scales = gl.allocate_shared_memory(gl.float32, [GROUPS, ROWS], PLAIN)
        if HAS_ZEROS:
            zeros = gl.allocate_shared_memory(gl.float32, [GROUPS, ROWS], PLAIN)
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES * PARTS, TOKENS, COLUMNS], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)  # both loading warps
        mbarrier.init(free.index(stage), count=2)  # both warpgroups
    fence_async_shared()  # the accelerator's own arrivals see the barriers
    buffers = (weights, scales, zeros, x)
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    0, scale_ptr, bias_ptr, residual_ptr, partial_ptr, residual_stride, num_tokens, num_token_tiles,
                    num_units, buffers, ready, free, HAS_ZEROS, HAS_SCALE, SCALE_STRIDE, HAS_BIAS, HAS_RESIDUAL,
                    IS_GATED, OUTPUT_SIZE, NUM_OUTPUT_TILES, NUM_BLOCKS, BLOCKS_A_SPLIT, SPLITS, PDL,
                ),
            ),
            (
                multiply,
                (
                    1, scale_ptr, bias_ptr, residual_ptr, partial_ptr, residual_stride, num_tokens, num_token_tiles,
                    num_units, buffers, ready, free, HAS_ZEROS, HAS_SCALE, SCALE_STRIDE, HAS_BIAS, HAS_RESIDUAL,
                    IS_GATED, OUTPUT_SIZE, NUM_OUTPUT_TILES, NUM_BLOCKS, BLOCKS_A_SPLIT, SPLITS, PDL,
                ),
            ),
            (
                load_activations,
                (x_desc, num_token_tiles, num_units, x, ready, free, NUM_OUTPUT_TILES, NUM_BLOCKS, BLOCKS_A_SPLIT, PDL),
            ),
            (
                load_weights,
                (
                    weight_desc, scale_desc, zero_desc, num_token_tiles, num_units, weights, scales, zeros, ready, free,
                    HAS_ZEROS, HAS_SCALE, IS_GATED, _BLOCK, GROUP_SIZE, NUM_OUTPUT_TILES, NUM_BLOCKS, BLOCKS_A_SPLIT,
                ),
            ),
        ],
        worker_num_warps=[4, 1, 1],
        worker_num_regs=[240, 24, 24],
    )  # fmt: skip


@dataclass(frozen=True)
class MixedTile:
    """tokens: of a unit of work. blocks: of 128 inputs in a stage. splits: of the inputs."""

    tokens: int
    blocks: int
    stages: int
    splits: int = 1


@cache
def _swizzle(width: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


def _describe_weight(weight: torch.Tensor, words: int, gated: bool) -> TensorDescriptor:
    """How tiles of 128 rows are copied: if gated, 8 gates, their 8 ups, 8 gates …"""
    rows, columns = weight.shape
    if not gated:
        return TensorDescriptor(weight, [rows, columns], [columns, 1], [_ROWS, words], _swizzle(2 * words, 16, 2))
    shape = [rows // 2 // _INTERLEAVED, 2, _INTERLEAVED, columns]
    strides = [_INTERLEAVED * columns, rows // 2 * columns, columns, 1]
    box = [_ROWS // 2 // _INTERLEAVED, 2, _INTERLEAVED, words]
    return TensorDescriptor(weight, shape, strides, box, _swizzle(2 * words, 16, 4))


def _describe_scales(scale: torch.Tensor, groups: int, gated: bool) -> TensorDescriptor:
    """The same rows of scale [rows, all groups], for `groups` groups of a block."""
    rows, all_groups = scale.shape
    stride = scale.stride(1) if all_groups > 1 else rows
    if not gated:
        return TensorDescriptor(scale, [all_groups, rows], [stride, 1], [groups, _ROWS], _swizzle(0, 32, 2))
    shape = [all_groups, rows // 2 // _INTERLEAVED, 2, _INTERLEAVED]
    strides = [stride, _INTERLEAVED, rows // 2, 1]
    box = [groups, _ROWS // 2 // _INTERLEAVED, 2, _INTERLEAVED]
    return TensorDescriptor(scale, shape, strides, box, _swizzle(0, 32, 4))


def suits_mixed_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, group_size: int = 0, gated: bool
) -> bool:
    """Returns whether `mixed_matmul` can multiply x [num_tokens, inputs] here; zeros are laid out as scale is."""
    return (
        HAS_GLUON
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(1) == 1
        and x.stride(0) * x.itemsize % _ALIGNED_BYTES == 0
        and x.data_ptr() % _ALIGNED_BYTES == 0
        and weight.is_contiguous()
        and weight.shape[1] * weight.itemsize % _ALIGNED_BYTES == 0
        and scale.stride(0) == 1
        and weight.shape[0] % (2 * _INTERLEAVED if gated else _ALIGNED_BYTES // scale.itemsize) == 0
        and (group_size in (32, 64) or group_size % BLOCK_SIZE == 0 or group_size >= x.shape[1])
    )


def choose_mixed_tile(
    num_tokens: int,
    rows: int,
    input_size: int,
    *,
    group_size: int,
    num_programs: int,
    memory: int,
) -> MixedTile:
    """Returns the tile that should be fastest for a weight of `rows` rows, by an estimate.

    group_size: 0 for INT8. num_programs: that run at the same time; memory: bytes that one may use.
    """
    groups = max(BLOCK_SIZE // group_size, 1) if group_size else 0
    weight_bytes = _ROWS * BLOCK_SIZE // (2 if groups else 1)
    block_time = _BLOCK_TIME if groups else _INT8_BLOCK_TIME
    tokens = min(max(next_power_of_2(num_tokens), _MIN_TOKENS), _MAX_TOKENS if groups < 4 else _MAX_TOKENS // 2)
    # Two blocks at a time if the sums of both fit in registers: one is converted while the other is multiplied.
    blocks = 2 if groups == 1 and tokens < _MAX_TOKENS else 1
    stage = blocks * (weight_bytes + 2 * tokens * BLOCK_SIZE + 2 * groups * _ROWS * 4)
    stages = min((memory - _RESERVED_MEMORY) // stage, _MAX_STAGES)
    tiles = -(-num_tokens // tokens) * -(-rows // _ROWS)
    num_blocks = -(-input_size // (BLOCK_SIZE * blocks))
    best = 1, float("inf")
    for wanted in range(1, min(_MAX_SPLITS, num_blocks) + 1):
        blocks_a_split = -(-num_blocks // wanted)
        splits = -(-num_blocks // blocks_a_split)
        rounds = -(-tiles * splits // num_programs)
        time = rounds * blocks_a_split * blocks * (block_time + tokens * _TOKEN_TIME)
        if not groups:
            time = max(time, -(-rows // _ROWS) * num_blocks * _INT8_READ_TIME / num_programs)
        if splits > 1:
            time += _SPLIT_TIME + splits * num_tokens * rows * _SUM_TIME
        best = min(best, (splits, time), key=lambda choice: choice[1])
    return MixedTile(tokens, blocks, stages, best[0])


def mixed_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    zeros: torch.Tensor | None = None,
    group_size: int = 0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    tile: MixedTile | None = None,
) -> torch.Tensor:
    """Returns act(x · weightᵀ + bias) + residual: [num_tokens, outputs or half as many], of x's dtype.

    x [num_tokens, inputs] bf16 or fp16; weight [outputs, words] of `pack_int4`, with scale and zeros [outputs, groups]
    float32, transposed in memory; or [outputs, inputs] int8, with scale [outputs, 1] or [1, 1] and group_size 0. Needs
    `suits_mixed_matmul`. tile: that of `choose_mixed_tile`, if none is given.
    """
    num_tokens, input_size = x.shape
    output_size = weight.shape[0] // (1 + gated)
    out = torch.empty(num_tokens, output_size, dtype=x.dtype, device=x.device)  # [num_tokens, output_size]
    if num_tokens == 0:
        return out
    tile = tile or choose_mixed_tile(
        num_tokens,
        weight.shape[0],
        input_size,
        group_size=group_size,
        num_programs=multiprocessor_count(x.device),
        memory=shared_memory(x.device),
    )
    sums = out
    if tile.splits > 1:
        shape = (tile.splits, num_tokens, weight.shape[0])
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)  # [splits, num_tokens, rows]
    finishing = finishing_arguments(
        out,
        sums,
        scale,
        bias,
        has_scale=group_size == 0,
        x_scale=None,
        gated=gated,
        residual=residual,
        splits=tile.splits,
    )
    _launch(x, weight, scale, zeros, group_size, tile, finishing)
    if tile.splits > 1:
        add_splits(finishing)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    tile: MixedTile,
    finishing: dict[str, Any],
) -> None:
    gated: bool = finishing["IS_GATED"]
    token_tiles = -(-len(x) // tile.tokens)
    num_units = token_tiles * -(-len(weight) // _ROWS) * tile.splits
    if group_size:
        groups = max(BLOCK_SIZE // group_size, 1)
        weight_desc = _describe_weight(weight, tile.blocks * PLANE_SIZE, gated)
        scale_desc = _describe_scales(scale, groups, gated)
        zero_desc = scale_desc if zeros is None else _describe_scales(zeros, groups, gated)
    else:
        weight_desc = _describe_weight(weight.view(torch.int16), BLOCK_SIZE // 2, gated)
        scale_desc = zero_desc = weight_desc  # not read
    _mixed_matmul_kernel[(min(num_units, multiprocessor_count(x.device)),)](
        x_desc=TensorDescriptor(x, [*x.shape], [*x.stride()], [tile.tokens, _COLUMNS], _swizzle(128, 16, 2)),
        weight_desc=weight_desc,
        scale_desc=scale_desc,
        zero_desc=zero_desc,
        num_token_tiles=token_tiles,
        num_units=num_units,
        HAS_ZEROS=zeros is not None,
        GROUP_SIZE=group_size,
        INPUT_SIZE=x.shape[1],
        TOKENS=tile.tokens,
        ROWS=_ROWS,
        BLOCKS=tile.blocks,
        STAGES=tile.stages,
        num_warps=4,
        **{name: value for name, value in finishing.items() if name not in _OF_SPLITS},
    )
