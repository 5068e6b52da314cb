"""The computing warpgroups of dense_matmul.py: multiply stage after stage, finish and store the sums."""

from __future__ import annotations

from nanovllm.kernels.matmul_units import WARPGROUP_ROWS, find_rows, find_unit, finish_sums, load_residual
from nanovllm.kernels.triton_support import (
    constant,
    gdc_wait,
    gl,
    gluon_jit,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

GROUP_SIZE = 128  # inputs, and outputs of a weight, that share a scale
_ROWS = constant(WARPGROUP_ROWS)
_GROUP = constant(GROUP_SIZE)
_FACTOR_BYTES = constant(32)  # of a row that one matrix instruction takes
_EARLY_TOKENS = constant(64)  # of a tile that has registers for the residual beside the sums


@gluon_jit()
def _sum_stages(
    warpgroup: gl.constexpr,
    acc: gl.tensor,
    num_blocks: gl.constexpr,
    num_seen: gl.tensor,
    weights: gl.shared_memory_descriptor,
    x: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
) -> gl.tensor:
    """Returns acc plus the products of all blocks. One stage is multiplied while the next is waited for."""
    STAGES: gl.constexpr = ready.shape[0]
    PARTS: gl.constexpr = x.shape[0] // STAGES
    WARPGROUPS: gl.constexpr = weights.shape[0] // x.shape[0]
    for block in range(num_blocks):
        stage = num_seen % STAGES
        mbarrier.wait(ready.index(stage), num_seen // STAGES & 1)
        for part in gl.static_range(PARTS):
            index = stage * PARTS + part
            inputs = x.index(index).permute((1, 0))  # [inputs, TOKENS]
            acc = warpgroup_mma(weights.index(index * WARPGROUPS + warpgroup), inputs, acc, is_async=True)
        acc = warpgroup_mma_wait(PARTS, deps=(acc,))  # the stage before is multiplied
        mbarrier.arrive(free.index((num_seen + STAGES - 1) % STAGES), pred=block > 0)
        num_seen += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(free.index((num_seen + STAGES - 1) % STAGES))
    return acc


@gluon_jit()
def _sum_grouped_stages(
    warpgroup: gl.constexpr,
    acc: gl.tensor,
    num_blocks: gl.constexpr,
    num_seen: gl.tensor,
    weights: gl.shared_memory_descriptor,
    x: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    row: gl.tensor,
    has_row: gl.tensor,
    scale_ptr: gl.tensor,
    x_scales: gl.shared_memory_descriptor,
    NUM_GROUPS: gl.constexpr,
) -> gl.tensor:
    """The same with a scale for each part of a block: it is scaled while the next part is multiplied.

    scale_ptr: of blocks of the weight, whose rows are `row` [64].
    """
    ACC: gl.constexpr = acc.type.layout
    STAGES: gl.constexpr = ready.shape[0]
    PARTS: gl.constexpr = x.shape[0] // STAGES
    WARPGROUPS: gl.constexpr = weights.shape[0] // x.shape[0]
    for block in range(num_blocks):
        stage = num_seen % STAGES
        scales: gl.tuple = ()
        for part in gl.static_range(PARTS):
            group = block * PARTS + part
            mask = has_row & (group < NUM_GROUPS)
            scale = gl.load(scale_ptr + row // _GROUP * NUM_GROUPS + group, mask=mask, other=0.0)
            scales = scales + (gl.expand_dims(scale, 1),)
        mbarrier.wait(ready.index(stage), num_seen // STAGES & 1)
        products: gl.tuple = ()
        for part in gl.static_range(PARTS):
            index = stage * PARTS + part
            inputs = x.index(index).permute((1, 0))  # [inputs, TOKENS]
            weight = weights.index(index * WARPGROUPS + warpgroup)
            product = warpgroup_mma(weight, inputs, gl.zeros_like(acc), use_acc=False, is_async=True)
            products = products + (product,)
        for part in gl.static_range(PARTS):
            x_scale = gl.expand_dims(x_scales.index(stage * PARTS + part).load(gl.SliceLayout(0, ACC)), 0)
            acc += warpgroup_mma_wait(PARTS - 1 - part, deps=(products[part],)) * (scales[part] * x_scale)
        mbarrier.arrive(free.index(stage))
        num_seen += 1
    return acc


@gluon_jit()
def multiply(
    warpgroup: gl.constexpr,
    x_scale_ptr: gl.tensor,
    scale_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    out_ptr: gl.tensor,
    residual_stride: gl.tensor,
    num_tokens: gl.tensor,
    num_units: gl.tensor,
    weights: gl.shared_memory_descriptor,
    x: gl.shared_memory_descriptor,
    x_scales: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    NUM_GROUPS: gl.constexpr,
    HAS_X_SCALE: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_GATED: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
    NUM_OUTPUT_TILES: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    HAS_BANDS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """A computing warpgroup: rows warpgroup · 64 … of every tile."""
    TOKENS: gl.constexpr = x.shape[1]
    WARPGROUPS: gl.constexpr = weights.shape[0] // x.shape[0]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, _FACTOR_BYTES // x.dtype.itemsize])
    LOADS_RESIDUAL: gl.constexpr = HAS_RESIDUAL and not IS_GATED and TOKENS <= _EARLY_TOKENS
    if PDL:
        gdc_wait()
    num_seen = 0
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        first_token, output_tile, _split = find_unit(unit, num_tokens, TOKENS, NUM_OUTPUT_TILES, HAS_BANDS)
        first_row = (output_tile * WARPGROUPS + warpgroup) * _ROWS
        acc = gl.zeros([_ROWS, TOKENS], gl.float32, ACC)
        residual = acc
        if LOADS_RESIDUAL:  # while the first stage is copied
            residual = load_residual(
                first_row, first_token, residual_ptr, residual_stride, num_tokens, _ROWS, TOKENS, OUTPUT_SIZE
            )
        if NUM_GROUPS > 0:
            row, has_row = find_rows(first_row, IS_GATED, OUTPUT_SIZE, ACC)
            acc = _sum_grouped_stages(
                warpgroup, acc, NUM_BLOCKS, num_seen, weights, x, ready, free, row, has_row, scale_ptr, x_scales,
                NUM_GROUPS,
            )  # fmt: skip
        else:
            acc = _sum_stages(warpgroup, acc, NUM_BLOCKS, num_seen, weights, x, ready, free)
        num_seen += NUM_BLOCKS
        finish_sums(
            acc, residual, first_row, first_token, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr,
            residual_stride, num_tokens, HAS_X_SCALE, HAS_SCALE, SCALE_STRIDE, HAS_BIAS, HAS_RESIDUAL, LOADS_RESIDUAL,
            IS_GATED, OUTPUT_SIZE,
        )  # fmt: skip
