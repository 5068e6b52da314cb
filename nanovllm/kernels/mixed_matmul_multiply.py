"""The computing warpgroups of mixed_matmul.py: convert weights, multiply them with activations, finish and store sums.

Weights are multiplied without their scales. In INT4 the sum of each group is scaled before it is added to the sum of
all, which leaves one subtraction for two weights. In INT8 the finished sums are scaled.
"""

from __future__ import annotations

from nanovllm.kernels.int4_packing import (
    BLOCK_SIZE,
    NUM_PLANES,
    PLANE_SIZE,
    TWO_LARGE_BF16,
    TWO_LARGE_FP16,
    unpacking,
)
from nanovllm.kernels.matmul_units import WARPGROUP_ROWS, find_rows, find_unit, finish_sums
from nanovllm.kernels.triton_support import (
    constant,
    gdc_wait,
    gl,
    gluon_jit,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_ROWS = constant(WARPGROUP_ROWS)
_BLOCK = constant(BLOCK_SIZE)
_PLANE = constant(PLANE_SIZE)
_NUM_PLANES = constant(NUM_PLANES)
# The zero points are subtracted, to which as much was added.
_SUBTRACT = "".join(f"    sub.TYPE ${plane}, ${plane}, ${plane + 5};\n" for plane in range(4))
_UNPACK_BF16 = unpacking(TWO_LARGE_BF16, _SUBTRACT.replace("TYPE", "bf16x2"))
_UNPACK_FP16 = unpacking(TWO_LARGE_FP16, _SUBTRACT.replace("TYPE", "f16x2"))
_CONSTRAINTS = constant("=&r,=&r,=&r,=&r,r,r,r,r,r")
# Two bytes v of INT8. The bits v + 128 are the number (v + 128) · 2⁻¹³³ in bf16 and (v + 128) · 2⁻²⁴ in fp16, whose
# exponents 0 and 1 have the same unit. One instruction then makes v / 512 of each.
_INT8_UNIT = constant(512.0)
_CONVERT_INT8 = """{
    .reg .b32 bytes, factor, offset;
    mov.b32 factor, FACTOR;
    mov.b32 offset, OFFSET;
    cvt.u32.u16 bytes, $2;
    prmt.b32 bytes, bytes, 0, 0x4140;
    xor.b32 bytes, bytes, 0x00800080;
    fma.rn.TYPE bytes, bytes, factor, offset;
    mov.b32 {$0, $1}, bytes;
}"""
_INT8_TO_BF16 = constant(
    _CONVERT_INT8.replace("TYPE", "bf16x2").replace("FACTOR", "0x7D807D80").replace("OFFSET", "0xBE80BE80")
)
_INT8_TO_FP16 = constant(
    _CONVERT_INT8.replace("TYPE", "f16x2").replace("FACTOR", "0x78007800").replace("OFFSET", "0xB400B400")
)


@gluon_jit()
def _unpack_int4(
    words: gl.tensor, zero_0: gl.tensor, zero_1: gl.tensor, zero_2: gl.tensor, zero_3: gl.tensor, dtype: gl.constexpr
) -> gl.tuple:
    """Returns the four planes of int16 words less their zero points, which are given in float32."""
    OFFSET: gl.constexpr = 128.0 if dtype == gl.bfloat16 else 1024.0
    zero_0, zero_1 = (zero_0 + OFFSET).to(dtype), (zero_1 + OFFSET).to(dtype)
    zero_2, zero_3 = (zero_2 + OFFSET).to(dtype), (zero_3 + OFFSET).to(dtype)
    if dtype == gl.bfloat16:
        brain: gl.constexpr = (gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16)
        planes = gl.inline_asm_elementwise(
            _UNPACK_BF16, _CONSTRAINTS, [words, zero_0, zero_1, zero_2, zero_3], dtype=brain, is_pure=True, pack=2
        )
    else:
        half: gl.constexpr = (gl.float16, gl.float16, gl.float16, gl.float16)
        planes = gl.inline_asm_elementwise(
            _UNPACK_FP16, _CONSTRAINTS, [words, zero_0, zero_1, zero_2, zero_3], dtype=half, is_pure=True, pack=2
        )
    return planes


@gluon_jit()
def _convert_int8(words: gl.tensor, dtype: gl.constexpr) -> gl.tensor:
    """Returns the numbers [rows, 2 · words] of words that hold two INT8 numbers each."""
    if dtype == gl.bfloat16:
        brain: gl.constexpr = (gl.bfloat16, gl.bfloat16)
        numbers = gl.inline_asm_elementwise(_INT8_TO_BF16, "=h,=h,h", [words], dtype=brain, is_pure=True, pack=1)
    else:
        half: gl.constexpr = (gl.float16, gl.float16)
        numbers = gl.inline_asm_elementwise(_INT8_TO_FP16, "=h,=h,h", [words], dtype=half, is_pure=True, pack=1)
    return gl.reshape(gl.join(numbers[0], numbers[1]), [words.shape[0], 2 * words.shape[1]])


@gluon_jit()
def _load_column(
    rows: gl.shared_memory_descriptor, warpgroup: gl.constexpr, index: gl.tensor, layout: gl.constexpr
) -> gl.tensor:
    """Loads what belongs to a warpgroup's rows, [64, 1] float32, from rows [groups of all stages, a tile's]."""
    ours = rows.index(index).slice(warpgroup * _ROWS, _ROWS)
    return gl.expand_dims(ours.load(gl.SliceLayout(1, layout)).to(gl.float32), 1)


@gluon_jit()
def _plane_inputs(x: gl.shared_memory_descriptor, stage: gl.tensor, plane: gl.constexpr) -> gl.shared_memory_descriptor:
    """Returns the activations [32, tokens] of a plane of a stage."""
    COLUMNS: gl.constexpr = x.shape[2]
    COLUMN: gl.constexpr = plane * _PLANE
    part = x.index(stage * (_BLOCK // COLUMNS) + COLUMN // COLUMNS)
    return part.slice(COLUMN % COLUMNS, _PLANE, dim=1).permute((1, 0))


@gluon_jit()
def _add_int4_stage(
    warpgroup: gl.constexpr,
    acc: gl.tensor,
    words: gl.shared_memory_descriptor,
    stage: gl.tensor,
    buffers: gl.tuple,
    STAGES: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
) -> gl.tensor:
    """Returns acc [64, tokens] plus a stage's products."""
    _, scales, zeros, x = buffers
    ACC: gl.constexpr = acc.type.layout
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    GROUPS: gl.constexpr = scales.shape[0] // STAGES  # of a block
    GROUP_PLANES: gl.constexpr = _NUM_PLANES // GROUPS
    zero: gl.tuple = ()
    for group in gl.static_range(GROUPS):
        if HAS_ZEROS:
            zero = zero + (_load_column(zeros, warpgroup, stage * GROUPS + group, WEIGHT),)
        else:
            zero = zero + (gl.full([_ROWS, 1], 8.0, gl.float32, WEIGHT),)
    planes = _unpack_int4(
        words.load(WEIGHT),
        zero[0],
        zero[1 // GROUP_PLANES],
        zero[2 // GROUP_PLANES],
        zero[3 // GROUP_PLANES],
        x.dtype,
    )
    products: gl.tuple = ()
    for group in gl.static_range(GROUPS):
        product = gl.zeros_like(acc)
        for plane in gl.static_range(group * GROUP_PLANES, (group + 1) * GROUP_PLANES):
            inputs = _plane_inputs(x, stage, plane)
            has_some = plane > group * GROUP_PLANES
            product = warpgroup_mma(planes[plane], inputs, product, use_acc=has_some, is_async=True)
        products = products + (product,)
    done = warpgroup_mma_wait(deps=products + planes)  # the tensor cores read the planes' registers until here
    for group in gl.static_range(GROUPS):
        acc += done[group] * _load_column(scales, warpgroup, stage * GROUPS + group, ACC)
    return acc


@gluon_jit()
def _add_int8_stage(
    acc: gl.tensor, words: gl.shared_memory_descriptor, stage: gl.tensor, x: gl.shared_memory_descriptor
) -> gl.tensor:
    """Returns acc [64, tokens] plus a stage's products. While one plane is multiplied, the next is converted."""
    ACC: gl.constexpr = acc.type.layout
    WORDS: gl.constexpr = words.shape[1] // _NUM_PLANES
    operands: gl.tuple = ()
    for plane in gl.static_range(_NUM_PLANES):
        pairs = words.slice(plane * WORDS, WORDS, dim=1).load(gl.DotOperandLayout(0, ACC, 1))
        # A thread's pairs of inputs are the words that it has loaded.
        numbers = gl.convert_layout(_convert_int8(pairs, x.dtype), gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)
        acc = warpgroup_mma(numbers, _plane_inputs(x, stage, plane), acc, is_async=True)
        operands = operands + (numbers,)
    return warpgroup_mma_wait(deps=(acc,) + operands)[0]


@gluon_jit()
def _store_split(
    acc: gl.tensor,
    first_row: gl.tensor,
    first_token: gl.tensor,
    split: gl.tensor,
    out_ptr: gl.tensor,
    num_tokens: gl.tensor,
    IS_GATED: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
) -> None:
    """Stores a warpgroup's sums [64, tokens] of a part of the inputs for `add_splits`."""
    ACC: gl.constexpr = acc.type.layout
    row, has_row = find_rows(first_row, IS_GATED, OUTPUT_SIZE, ACC)
    token = first_token + gl.arange(0, acc.shape[1], gl.SliceLayout(0, ACC))
    place = (split * num_tokens + token).to(gl.int64) * (OUTPUT_SIZE * (2 if IS_GATED else 1))
    mask = gl.expand_dims(has_row, 1) & gl.expand_dims(token < num_tokens, 0)
    gl.store(out_ptr + gl.expand_dims(place, 0) + gl.expand_dims(row, 1), acc, mask=mask)


@gluon_jit()
def multiply(
    warpgroup: gl.constexpr,
    scale_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    out_ptr: gl.tensor,
    residual_stride: gl.tensor,
    num_tokens: gl.tensor,
    num_units: gl.tensor,
    buffers: gl.tuple,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    HAS_ZEROS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_GATED: gl.constexpr,
    OUTPUT_SIZE: gl.constexpr,
    NUM_OUTPUT_TILES: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    BLOCKS_A_SPLIT: gl.constexpr,
    SPLITS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """A computing warpgroup: rows warpgroup · 64 … of every tile."""
    STAGES: gl.constexpr = ready.shape[0]
    TOKENS: gl.constexpr = buffers[3].shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    BOXES: gl.constexpr = buffers[0].shape[0] // STAGES  # of a stage's weights
    BOX_ROWS: gl.constexpr = buffers[0].shape[1]
    BOX: gl.constexpr = warpgroup * _ROWS // BOX_ROWS
    if PDL:
        gdc_wait()
    num_seen = 0
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        first_token, output_tile, split = find_unit(unit, num_tokens, TOKENS, NUM_OUTPUT_TILES, False)
        acc = gl.zeros([_ROWS, TOKENS], gl.float32, ACC)
        first_block = split * BLOCKS_A_SPLIT
        for _block in range(first_block, gl.minimum(first_block + BLOCKS_A_SPLIT, NUM_BLOCKS)):
            stage = num_seen % STAGES
            mbarrier.wait(ready.index(stage), num_seen // STAGES & 1)
            words = buffers[0].index(stage * BOXES + BOX).slice(warpgroup * _ROWS % BOX_ROWS, _ROWS)
            if HAS_SCALE:
                acc = _add_int8_stage(acc, words, stage, buffers[3])
            else:
                acc = _add_int4_stage(warpgroup, acc, words, stage, buffers, STAGES, HAS_ZEROS)
            mbarrier.arrive(free.index(stage))
            num_seen += 1

        if HAS_SCALE:
            acc *= _INT8_UNIT
        first_row = (output_tile * (BOXES * BOX_ROWS // _ROWS) + warpgroup) * _ROWS
        if SPLITS > 1:
            _store_split(acc, first_row, first_token, split, out_ptr, num_tokens, IS_GATED, OUTPUT_SIZE)
        else:
            # No residual is loaded yet, and activations have no scale: `acc` and `scale_ptr` stand for theirs.
            finish_sums(
                acc, acc, first_row, first_token, scale_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr,
                residual_stride, num_tokens, False, HAS_SCALE, SCALE_STRIDE, HAS_BIAS, HAS_RESIDUAL, False, IS_GATED,
                OUTPUT_SIZE,
            )  # fmt: skip
