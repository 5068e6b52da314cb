"""Products y = x · Wᵀ whose factors the tensor cores take as they are, for Hopper GPUs: 16 bits, or FP8 on both sides.

For the tens to hundreds of tokens of a decode step, and for the gate of a prompt step. A decode step's product costs
little more than reading the weight, so much of it is the time until the first weights arrive and the last sums are
stored. Here the first stages are copied before the kernel ahead has ended, and where registers allow it the residual is
loaded with the first activations.

Warps divide the work as in mixed_matmul.py: two copy weights and activations into a ring of stages, and one to three
warpgroups, with 64 rows of the weight each, multiply.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.add_splits import finishing_arguments
from nanovllm.kernels.dense_matmul_multiply import GROUP_SIZE, multiply
from nanovllm.kernels.dense_tiles import DenseTile, choose_dense_tile
from nanovllm.kernels.matmul_units import (
    MAX_COUNTED_TOKENS,
    SWIZZLE_BYTES,
    WARPGROUP_ROWS,
    can_copy_activations,
    can_copy_weight,
    describe_activations,
    describe_weight,
    load_activations,
    load_weights,
    swizzle,
)
from nanovllm.kernels.skinny_linear import scales_blocks
from nanovllm.kernels.triton_support import (
    HAS_GLUON,
    TensorDescriptor,
    constant,
    fence_async_shared,
    gdc_launch_dependents,
    gl,
    gluon_jit,
    is_hopper,
    mbarrier,
    multiprocessor_count,
    shared_memory,
    tma,
)

_ROWS = constant(WARPGROUP_ROWS)
_NOT_TAKEN = {"partial_ptr", "SPLITS"}  # of `finishing_arguments`: inputs are not split


@gluon_jit("num_tokens", "num_units")
def _dense_matmul_kernel(
    x_desc: tma.tensor_descriptor,
    few_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    x_scale_desc: tma.tensor_descriptor,
    x_scale_ptr: gl.tensor,
    scale_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    out_ptr: gl.tensor,
    residual_stride: gl.tensor,
    num_tokens: gl.tensor,
    num_units: gl.tensor,
    NUM_GROUPS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_GATED: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
    INPUT_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    REGISTERS: gl.constexpr,
    HAS_BANDS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """Allocates a ring of stages, and starts the warps.

    NUM_GROUPS: of 128 inputs, which have a scale for each token, and with 128 outputs one of the weight; 0 without
    them. REGISTERS: of a thread of the second and third warpgroup. HAS_BANDS: as in `find_unit`.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK: gl.constexpr = PARTS * COLUMNS
    NUM_BLOCKS: gl.constexpr = (INPUT_SIZE + BLOCK - 1) // BLOCK
    TILE_OUTPUTS: gl.constexpr = WARPGROUPS * _ROWS // (2 if IS_GATED else 1)
    NUM_OUTPUT_TILES: gl.constexpr = (OUTPUT_SIZE + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    if PDL:
        gdc_launch_dependents()
    weights = gl.allocate_shared_memory(x_desc.dtype, [STAGES * PARTS * WARPGROUPS, _ROWS, COLUMNS], x_desc.layout)
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES * PARTS, TOKENS, COLUMNS], x_desc.layout)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_scales = x
    if NUM_GROUPS > 0:
        x_scales = gl.allocate_shared_memory(gl.float32, [STAGES * PARTS, TOKENS], PLAIN)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)  # both loading warps
        mbarrier.init(free.index(stage), count=WARPGROUPS)
    fence_async_shared()  # the accelerator's own arrivals see the barriers
    given = (
        x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, residual_stride, num_tokens, num_units, weights, x,
        x_scales, ready, free,
    )  # fmt: skip
    SHAPE: gl.constexpr = (
        NUM_GROUPS, HAS_X_SCALE, HAS_SCALE, SCALE_STRIDE, HAS_BIAS, HAS_RESIDUAL, IS_GATED, OUTPUT_SIZE,
        NUM_OUTPUT_TILES, NUM_BLOCKS, HAS_BANDS, PDL,
    )  # fmt: skip
    # Further computing warpgroups stand last, where a tile without them leaves them out.
    gl.warp_specialize(
        [
            (multiply, (0,) + given + SHAPE),
            (
                load_activations,
                (
                    x_desc, few_desc, x_scale_desc, num_tokens, num_units, x, x_scales, ready, free, NUM_GROUPS > 0,
                    NUM_OUTPUT_TILES, NUM_BLOCKS, NUM_BLOCKS, HAS_BANDS, PDL,
                ),
            ),
            (
                load_weights,  # without scales and zero points: `weight_desc` and `weights` stand for theirs
                (
                    weight_desc, weight_desc, weight_desc, num_tokens, num_units, weights, weights, weights, ready,
                    free, TOKENS, PARTS, False, False, IS_GATED, BLOCK, 0, NUM_OUTPUT_TILES, NUM_BLOCKS, NUM_BLOCKS,
                    HAS_BANDS,
                ),
            ),
            (multiply, (1,) + given + SHAPE),
            (multiply, (2,) + given + SHAPE),
        ][: WARPGROUPS + 2],
        worker_num_warps=[1, 1, 4, 4][: WARPGROUPS + 1],
        worker_num_regs=[24, 24, REGISTERS, REGISTERS][: WARPGROUPS + 1],
    )  # fmt: skip


def suits_dense_matmul(hidden: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> bool:
    """Returns whether `dense_matmul` can multiply hidden [num_tokens, inputs], brought to FP8 if the weight is."""
    is_fp8 = weight.dtype is torch.float8_e4m3fn
    return (
        HAS_GLUON
        and is_hopper(hidden.device)
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and (is_fp8 or (weight.dtype is hidden.dtype and can_copy_activations(hidden)))
        and can_copy_weight(weight, gated)
    )


def dense_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: DenseTile | None = None,
) -> torch.Tensor:
    """Returns act((x · weightᵀ) · scales + bias) + residual [num_tokens, outputs or half as many].

    dtype: of the result; None: x's. It must be given for FP8.

    x [num_tokens, inputs] and weight [outputs, inputs], both bf16, fp16 or FP8 (e4m3). scale, of the weight, float32:
    [outputs, 1] or [1, 1], with x_scale [num_tokens, 1] of the activations; or a scale for each block of 128 × 128,
    with x_scale [num_tokens, inputs / 128] transposed in memory, where columns lie a multiple of 4 apart. gated: the
    outputs are gates followed by as many ups, and act is silu(gate) · up. Needs `suits_dense_matmul`. tile: that of
    `choose_dense_tile`, if none is given.
    """
    num_tokens, input_size = x.shape
    dtype = dtype or x.dtype
    if num_tokens == 0:
        return x.new_empty(0, len(weight) // (1 + gated), dtype=dtype)
    has_groups = scale is not None and scales_blocks(scale, weight)
    tile = tile or choose_dense_tile(
        num_tokens,
        len(weight),
        input_size * x.itemsize,
        has_groups=has_groups,
        num_multiprocessors=multiprocessor_count(x.device),
        memory=shared_memory(x.device),
    )
    finishing = finishing_arguments(
        num_tokens,
        len(weight),
        dtype,
        weight if scale is None else scale,
        bias,
        has_scale=scale is not None and not has_groups,
        x_scale=None if has_groups else x_scale,
        gated=gated,
        residual=residual,
        splits=1,
    )
    num_units = -(-num_tokens // tile.tokens) * -(-len(weight) // tile.rows)
    descriptors = describe_activations(x, tile.tokens)
    _dense_matmul_kernel[(min(num_units, multiprocessor_count(x.device)),)](
        weight_desc=describe_weight(weight, WARPGROUP_ROWS, SWIZZLE_BYTES // x.itemsize, gated),
        x_scale_desc=_describe_x_scale(x_scale, tile) if has_groups else descriptors["x_desc"],
        num_units=num_units,
        NUM_GROUPS=-(-input_size // GROUP_SIZE) if has_groups else 0,
        INPUT_SIZE=input_size,
        TOKENS=tile.tokens,
        PARTS=tile.parts,
        STAGES=tile.stages,
        WARPGROUPS=tile.warpgroups,
        REGISTERS=tile.computing_registers,
        HAS_BANDS=num_tokens > MAX_COUNTED_TOKENS,
        num_warps=4,
        maxnreg=tile.registers,
        **descriptors,
        **{name: value for name, value in finishing.items() if name not in _NOT_TAKEN},
    )
    out: torch.Tensor = finishing["out_ptr"]
    return out


def _describe_x_scale(x_scale: torch.Tensor | None, tile: DenseTile) -> TensorDescriptor:
    """Returns how the scales [num_tokens, groups] of a stage's activations are copied."""
    assert x_scale is not None, "scales of blocks belong to activations with a scale for each group"
    num_tokens, groups = x_scale.shape
    stride = x_scale.stride(1) if groups > 1 else -(-num_tokens // 4) * 4
    return TensorDescriptor(x_scale, [groups, num_tokens], [stride, 1], [tile.parts, tile.tokens], swizzle(0, 32))
