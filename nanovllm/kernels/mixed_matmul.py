"""Mixed-precision products y = x · Wᵀ: 16-bit activations with INT4 or INT8 weights, for Hopper GPUs (H100, H200).

As in quantized_matmul.py, a weight's outputs are the rows of the tensor cores' product and the tokens its columns, so
that converted weights go to the tensor cores from registers. Here the warps of a program divide the work, as in
paged_prefill_hopper.py: two warps copy weights and activations into a ring of stages, and two or three warpgroups, with
64 rows each, convert and multiply. While one converts, the tensor cores work for another.

There is one program for each multiprocessor. It takes one unit of work, a tile of outputs and tokens over a part of the
inputs, after another, and the copies for the next begin before the last has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from nanovllm.kernels.add_splits import add_splits, finishing_arguments
from nanovllm.kernels.int4_packing import BLOCK_SIZE, PLANE_SIZE
from nanovllm.kernels.matmul_units import (
    FINISHING_BYTES,
    RESERVED_BYTES,
    WARPGROUP_ROWS,
    can_copy_activations,
    can_copy_weight,
    counted_tokens,
    describe_activations,
    describe_scales,
    describe_weight,
    load_activations,
    load_weights,
)
from nanovllm.kernels.mixed_matmul_multiply import multiply
from nanovllm.kernels.triton_support import (
    HAS_GLUON,
    constant,
    fence_async_shared,
    gdc_launch_dependents,
    gl,
    gluon_jit,
    is_hopper,
    mbarrier,
    multiprocessor_count,
    next_power_of_2,
    shared_memory,
    tma,
)

_ROWS = constant(WARPGROUP_ROWS)
_SCALE_BYTES = 2
_ALIGNED_SCALES = 8  # rows: their scales are 16 bytes, of which the accelerator's strides are multiples
_MIN_TOKENS = 16
_MAX_STAGES = 8
_MAX_SPLITS = 8
# Microseconds, estimated: what a unit of work begins and ends with; another launch, and a sum written and read.
_UNIT_TIME = 0.5
_SPLIT_TIME = 2.5
_SUM_TIME = 2.7e-6
_BLOCK = constant(BLOCK_SIZE)
_PLANE = constant(PLANE_SIZE)
# Of `finishing_arguments`, what `add_splits` alone takes.
_OF_SPLITS = {"x_scale_ptr", "out_ptr", "HAS_X_SCALE"}


class _Limits(NamedTuple):
    """Of tiles with one number of warpgroups. Times are microseconds, estimated, while all programs read."""

    max_tokens: int  # whose sums, and for INT4 those of a group, fit in 240 registers a thread, or 160
    block_time: float  # of 128 inputs
    token_time: float  # of a block's product with one more token


# By computing warpgroups. On an H200 these choose for Qwen3-8B what was fastest in INT4, and nearly so in INT8.
_INT4_LIMITS = {2: _Limits(128, 0.25, 0.0045), 3: _Limits(64, 0.5, 0.0045)}
_INT8_LIMITS = {2: _Limits(128, 0.5, 0.003), 3: _Limits(128, 0.8, 0.0045)}


@gluon_jit("num_tokens", "num_units")
def _mixed_matmul_kernel(
    x_desc: tma.tensor_descriptor,
    few_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    scale_desc: tma.tensor_descriptor,
    zero_desc: tma.tensor_descriptor,
    scale_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    partial_ptr: gl.tensor,
    residual_stride: gl.tensor,
    num_tokens: gl.tensor,
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
    WEIGHT_ROWS: gl.constexpr,
    SCALE_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """Allocates a ring of stages of 128 inputs, and starts the warps.

    HAS_SCALE: the weights are INT8, and scale_ptr has what finished sums are scaled by. Otherwise they are INT4, and
    scale_desc and zero_desc have what belongs to groups. partial_ptr: as in `finishing_arguments`.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    WORDS: gl.constexpr = weight_desc.block_type.shape[-1]
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    PARTS: gl.constexpr = _BLOCK // COLUMNS
    NUM_BLOCKS: gl.constexpr = (INPUT_SIZE + _BLOCK - 1) // _BLOCK
    BLOCKS_A_SPLIT: gl.constexpr = (NUM_BLOCKS + SPLITS - 1) // SPLITS
    WARPGROUPS: gl.constexpr = ROWS // _ROWS
    TILE_OUTPUTS: gl.constexpr = ROWS // (2 if IS_GATED else 1)
    NUM_OUTPUT_TILES: gl.constexpr = (OUTPUT_SIZE + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    WEIGHT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * WORDS, element_bitwidth=16, rank=2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if PDL:
        gdc_launch_dependents()
    weights = gl.allocate_shared_memory(gl.int16, [STAGES * ROWS // WEIGHT_ROWS, WEIGHT_ROWS, WORDS], WEIGHT_LAYOUT)
    scales = weights
    zeros = weights
    if not HAS_SCALE:
        GROUPS: gl.constexpr = STAGES * scale_desc.block_type.shape[0]
        scales = gl.allocate_shared_memory(scale_desc.dtype, [GROUPS, SCALE_ROWS], PLAIN)
        if HAS_ZEROS:
            zeros = gl.allocate_shared_memory(zero_desc.dtype, [GROUPS, SCALE_ROWS], PLAIN)
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES * PARTS, TOKENS, COLUMNS], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)  # both loading warps
        mbarrier.init(free.index(stage), count=WARPGROUPS)
    fence_async_shared()  # the accelerator's own arrivals see the barriers
    buffers = (weights, scales, zeros, x)
    given = (
        scale_ptr, bias_ptr, residual_ptr, partial_ptr, residual_stride, num_tokens, num_units, buffers, ready, free,
    )  # fmt: skip
    SHAPE: gl.constexpr = (
        HAS_ZEROS, HAS_SCALE, SCALE_STRIDE, HAS_BIAS, HAS_RESIDUAL, IS_GATED, OUTPUT_SIZE, NUM_OUTPUT_TILES, NUM_BLOCKS,
        BLOCKS_A_SPLIT, SPLITS, PDL,
    )  # fmt: skip
    REGISTERS: gl.constexpr = 240 if WARPGROUPS == 2 else 160  # of a computing thread
    # The third computing warpgroup stands last, where a tile without one leaves it out.
    gl.warp_specialize(
        [
            (multiply, (0,) + given + SHAPE),
            (multiply, (1,) + given + SHAPE),
            (
                load_activations,
                (
                    x_desc, few_desc, x_desc, num_tokens, num_units, x, x, ready, free, False, NUM_OUTPUT_TILES,
                    NUM_BLOCKS, BLOCKS_A_SPLIT, False, PDL,
                ),
            ),
            (
                load_weights,
                (
                    weight_desc, scale_desc, zero_desc, num_tokens, num_units, weights, scales, zeros, ready, free,
                    TOKENS, 1, not HAS_SCALE, HAS_ZEROS, IS_GATED, _BLOCK, GROUP_SIZE, NUM_OUTPUT_TILES, NUM_BLOCKS,
                    BLOCKS_A_SPLIT, False,
                ),
            ),
            (multiply, (2,) + given + SHAPE),
        ][: WARPGROUPS + 2],
        worker_num_warps=[4, 1, 1, 4][: WARPGROUPS + 1],
        worker_num_regs=[REGISTERS, 24, 24, REGISTERS][: WARPGROUPS + 1],
    )  # fmt: skip


@dataclass(frozen=True)
class MixedTile:
    """tokens: of a unit of work. stages: of 128 inputs. splits: of the inputs. warpgroups: that compute."""

    tokens: int
    stages: int
    splits: int = 1
    warpgroups: int = 2

    @property
    def rows(self) -> int:
        """Of the weight."""
        return WARPGROUP_ROWS * self.warpgroups

    @property
    def weight_rows(self) -> int:
        """Of a copy, whose size is a power of two: 192 rows take three copies."""
        return self.rows & -self.rows

    @property
    def scale_rows(self) -> int:
        """Of a copy of scales or zero points, which are so few that one may copy more than the tile's rows."""
        return next_power_of_2(self.rows)


def _num_groups(group_size: int) -> int:
    """Returns how many groups a block of 128 inputs has scales of: 0 in INT8."""
    return max(BLOCK_SIZE // group_size, 1) if group_size else 0


def suits_mixed_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, group_size: int = 0, gated: bool
) -> bool:
    """Returns whether `mixed_matmul` can multiply x [num_tokens, inputs] here; zeros are laid out as scale is."""
    return (
        HAS_GLUON
        and is_hopper(x.device)
        and x.dtype in (torch.bfloat16, torch.float16)
        and can_copy_activations(x)
        and can_copy_weight(weight, gated)
        and scale.stride(0) == 1
        and weight.shape[0] % _ALIGNED_SCALES == 0
        and (group_size in (32, 64) or group_size % BLOCK_SIZE == 0 or group_size >= x.shape[1])
    )


@cache  # a step asks for the same few shapes in every layer
def choose_mixed_tile(
    num_tokens: int,
    rows: int,
    input_size: int,
    *,
    group_size: int,
    num_programs: int,
    memory: int,
) -> MixedTile:
    """Returns the tile that should be fastest for a weight of `rows` rows, by an estimate for `counted_tokens`.

    group_size: 0 for INT8. num_programs: that run at the same time; memory: bytes that one may use.
    """
    num_tokens = counted_tokens(num_tokens)
    num_blocks = -(-input_size // BLOCK_SIZE)
    candidates = []
    for warpgroups, limits in (_INT4_LIMITS if group_size else _INT8_LIMITS).items():
        tile = _largest_tile(warpgroups, num_tokens, group_size, memory)
        tiles = -(-num_tokens // tile.tokens) * -(-rows // tile.rows)
        block_time = limits.block_time + tile.tokens * limits.token_time
        for wanted in range(1, min(_MAX_SPLITS, num_blocks) + 1):
            blocks_a_split = -(-num_blocks // wanted)
            splits = -(-num_blocks // blocks_a_split)
            rounds = -(-tiles * splits // num_programs)
            time = rounds * (blocks_a_split * block_time + _UNIT_TIME)
            if splits > 1:
                time += _SPLIT_TIME + splits * num_tokens * rows * _SUM_TIME
            candidates.append((time, replace(tile, splits=splits)))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _largest_tile(warpgroups: int, num_tokens: int, group_size: int, memory: int) -> MixedTile:
    """Returns the tile of one split that takes as many of the tokens at once as it can."""
    groups = _num_groups(group_size)
    most = (_INT4_LIMITS if groups else _INT8_LIMITS)[warpgroups].max_tokens
    tokens = min(max(next_power_of_2(num_tokens), _MIN_TOKENS), most if groups < 4 else most // 2)
    tile = MixedTile(tokens, 1, warpgroups=warpgroups)
    weight_bytes = tile.rows * BLOCK_SIZE // (2 if groups else 1)
    stage = weight_bytes + 2 * tokens * BLOCK_SIZE + 2 * groups * tile.scale_rows * _SCALE_BYTES
    left = memory - RESERVED_BYTES - warpgroups * FINISHING_BYTES
    return replace(tile, stages=min(left // stage, _MAX_STAGES))


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
    float16, transposed in memory; or [outputs, inputs] int8, with scale [outputs, 1] or [1, 1] and group_size 0. Needs
    `suits_mixed_matmul`. tile: that of `choose_mixed_tile`, if none is given.
    """
    num_tokens, input_size = x.shape
    if num_tokens == 0:
        return x.new_empty(0, len(weight) // (1 + gated))
    tile = tile or choose_mixed_tile(
        num_tokens,
        len(weight),
        input_size,
        group_size=group_size,
        num_programs=multiprocessor_count(x.device),
        memory=shared_memory(x.device),
    )
    finishing = finishing_arguments(
        num_tokens,
        len(weight),
        x.dtype,
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
    out: torch.Tensor = finishing["out_ptr"]
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
    num_units = -(-len(x) // tile.tokens) * -(-len(weight) // tile.rows) * tile.splits
    if group_size:
        groups = _num_groups(group_size)
        weight_desc = describe_weight(weight, tile.weight_rows, PLANE_SIZE, gated)
        scale_desc = describe_scales(scale, tile.scale_rows, groups, gated)
        zero_desc = scale_desc if zeros is None else describe_scales(zeros, tile.scale_rows, groups, gated)
    else:
        weight_desc = describe_weight(weight.view(torch.int16), tile.weight_rows, BLOCK_SIZE // 2, gated)
        scale_desc = zero_desc = weight_desc  # not read
    _mixed_matmul_kernel[(min(num_units, multiprocessor_count(x.device)),)](
        weight_desc=weight_desc,
        scale_desc=scale_desc,
        zero_desc=zero_desc,
        num_units=num_units,
        HAS_ZEROS=zeros is not None,
        GROUP_SIZE=group_size,
        INPUT_SIZE=x.shape[1],
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        WEIGHT_ROWS=tile.weight_rows,
        SCALE_ROWS=tile.scale_rows,
        STAGES=tile.stages,
        num_warps=4,
        **describe_activations(x, tile.tokens),
        **{name: value for name, value in finishing.items() if name not in _OF_SPLITS},
    )
