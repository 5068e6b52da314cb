"""Matrix products with few rows, y = x · Wᵀ, for the small batches of a decode step.

Such a product costs the time to read the weight. Each program takes a few outputs and loads their rows of the weight
before the kernel ahead has ended, because they do not depend on it; only then does it wait for its input. The
operations around the product are fused, since a launch costs as much as the product: the RMS norm of the input,
SiLU · mul of a gated product, and the addition to the residual stream. Weights of 8 bits are converted in registers;
their scales multiply the sums, or the input where every 128 inputs have a scale of their own.

Triton's blocks are powers of two, and 8,192 is much more than 5,120 inputs: with weights of 8 bits such a row has five
parts of 1,024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.silu_and_mul import silu_and_mul_reference
from nanovllm.kernels.triton_support import (
    HAS_TRITON,
    INTERPRETED,
    constant,
    jit,
    jit_with_varying,
    let_next_kernel_start,
    next_power_of_2,
    pdl_options,
    runs_triton,
    tl,
    wait_for_previous_kernel,
)

_MAX_ROW_BYTES = 32768  # of the weight: a program holds whole rows
_MAX_TOKENS = 4  # with more, the BLAS is faster
_MAX_EXTRA_PRODUCTS = 1 << 25  # multiplications for the tokens after the first; more would cost more than is saved
# The shape of a program, as measured: one warp handles rows of up to 1024 inputs and waits for no other.
_MAX_COLUMNS_OF_ONE_WARP = 1024
_MIN_COLUMNS_OF_PARTS = 8192  # warps read 512 to 2048 inputs at once, and parts should not be much smaller
_MAX_EMPTY = 3 / 8  # of the inputs, by which a row of one part may be longer
_WEIGHTS_OF_ONE_WARP = 4096
_WEIGHTS_OF_FOUR_WARPS = 8192
# One token leaves registers for more weights, as long as enough programs remain.
_WEIGHTS_OF_ONE_TOKEN = {1: 40960, 2: 16384}  # by the bytes of a weight; of four warps
_MAX_ROW_BYTES_OF_FOUR_WARPS = 16384
_MIN_PROGRAMS = 512
SCALE_BLOCK = 128  # inputs and outputs that share a scale, where scales are of blocks
_SCALE_BLOCK = constant(SCALE_BLOCK)
_IS_INTERPRETED = constant(INTERPRETED)

# prmt takes the weight's byte 0 … 3 and the bytes 00 00 4B: the number 2²³ + u, of which u = v + 128 becomes v.
INT8_TO_FLOAT = constant(
    "{\n.reg .b32 bytes, number;\nxor.b32 bytes, $4, 0x80808080;\n"
    + "".join(
        f"prmt.b32 number, bytes, 0x4B000000, 0x744{byte};\nsub.rn.f32 ${byte}, number, 0f4B000080;\n"
        for byte in range(4)
    )
    + "}"
)


@jit
def _load_weight(
    weight_ptr: tl.tensor,
    output: tl.tensor,
    column: tl.tensor,
    OUTPUT_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
) -> tl.tensor:
    """Loads the weight's rows of some outputs: [BLOCK_N, BLOCK_K]."""
    mask = (output < OUTPUT_SIZE)[:, None] & (column < INPUT_SIZE)[None, :]
    return tl.load(weight_ptr + output.to(tl.int64)[:, None] * INPUT_SIZE + column[None, :], mask=mask, other=0.0)


@jit
def _to_float(weight: tl.tensor, KEEP: tl.constexpr) -> tl.tensor:
    """Returns a weight in float32. KEEP: registers may hold the numbers for the next token.

    For INT8 in fewer instructions than the GPU's own conversion, which has an eighth of a multiplication's rate.
    """
    if weight.dtype == tl.int8 and not _IS_INTERPRETED:
        numbers = tl.inline_asm_elementwise(
            INT8_TO_FLOAT, "=&f,=&f,=&f,=&f,r", [weight], dtype=tl.float32, is_pure=KEEP, pack=4
        )
    else:
        numbers = weight.to(tl.float32)
    return numbers


@jit
def _load_row(
    ptr: tl.tensor,
    first: tl.constexpr,
    mask: tl.tensor,
    BY_SIXTEEN: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Loads inputs, or the norm's weight, from number `first` on: [BLOCK_K] in float32.

    A thread reads 16 bytes at a time: 16 weights of 8 bits, but 8 inputs. BY_SIXTEEN: it reads twice as many, those of
    its weights, so that they need not pass through shared memory.
    """
    if BY_SIXTEEN:
        index = tl.arange(0, BLOCK_K // 2)
        column = first + index // 8 * 16 + index % 8
        lower = tl.load(ptr + column, mask=(column < INPUT_SIZE) & mask, other=0.0)
        upper = tl.load(ptr + column + 8, mask=(column + 8 < INPUT_SIZE) & mask, other=0.0)
        pairs = tl.reshape(tl.join(lower, upper), [BLOCK_K // 16, 8, 2])
        row = tl.reshape(tl.permute(pairs, (0, 2, 1)), [BLOCK_K])
    else:
        column = first + tl.arange(0, BLOCK_K)
        row = tl.load(ptr + column, mask=(column < INPUT_SIZE) & mask, other=0.0)
    return row.to(tl.float32)


@jit
def _load_block_scale(
    scale_ptr: tl.tensor, output: tl.tensor, column: tl.tensor, INPUT_SIZE: tl.constexpr
) -> tl.tensor:
    """Loads the scales of the blocks that hold one output's row of the weight: [BLOCK_K]."""
    NUM_BLOCKS: tl.constexpr = (INPUT_SIZE + _SCALE_BLOCK - 1) // _SCALE_BLOCK
    block = output // _SCALE_BLOCK * NUM_BLOCKS + column // _SCALE_BLOCK
    return tl.load(scale_ptr + block, mask=column < INPUT_SIZE, other=0.0)


@jit_with_varying("num_tokens")
def _skinny_linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    num_tokens: tl.tensor,
    eps: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_BLOCK_SCALE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, tokens): BLOCK_M tokens, one after another, times the weights of BLOCK_N outputs.

    With block scales, BLOCK_N outputs lie in one block.
    """
    HAS_BYTES: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth == 8
    BY_SIXTEEN: tl.constexpr = HAS_BYTES and PARTS == 1 and BLOCK_K >= 16 and not HAS_BLOCK_SCALE
    let_next_kernel_start(PDL)
    first_output = tl.program_id(0) * BLOCK_N
    output = first_output + tl.arange(0, BLOCK_N)
    output_mask = output < OUTPUT_SIZE
    weights: tl.tuple = ()
    up_weights: tl.tuple = ()
    block_scales: tl.tuple = ()
    up_block_scales: tl.tuple = ()
    norm_weights: tl.tuple = ()
    for part in tl.static_range(PARTS):
        column = part * BLOCK_K + tl.arange(0, BLOCK_K)
        weights += (_load_weight(weight_ptr, output, column, OUTPUT_SIZE, INPUT_SIZE),)
        if IS_GATED:
            up_weight = _load_weight(weight_ptr + OUTPUT_SIZE * INPUT_SIZE, output, column, OUTPUT_SIZE, INPUT_SIZE)
            up_weights += (up_weight,)
        if HAS_BLOCK_SCALE:
            block_scale = _load_block_scale(scale_ptr, first_output, column, INPUT_SIZE)
            block_scales += (block_scale,)
            if IS_GATED:
                up_block_scale = _load_block_scale(scale_ptr, OUTPUT_SIZE + first_output, column, INPUT_SIZE)
                up_block_scales += (up_block_scale,)
        if HAS_NORM:
            norm_weight = _load_row(norm_weight_ptr, part * BLOCK_K, True, BY_SIXTEEN, INPUT_SIZE, BLOCK_K)
            norm_weights += (norm_weight,)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + output * SCALE_STRIDE, mask=output_mask, other=0.0)
        if IS_GATED:
            up_scale = tl.load(scale_ptr + (OUTPUT_SIZE + output) * SCALE_STRIDE, mask=output_mask, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + output, mask=output_mask, other=0.0).to(tl.float32)
        if IS_GATED:
            up_bias = tl.load(bias_ptr + OUTPUT_SIZE + output, mask=output_mask, other=0.0).to(tl.float32)
    wait_for_previous_kernel(PDL)

    for index in tl.static_range(BLOCK_M):
        token = (tl.program_id(1) * BLOCK_M + index).to(tl.int64)
        mask = output_mask & (token < num_tokens)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + token * residual_stride + output, mask=mask, other=0.0).to(tl.float32)
        xs: tl.tuple = ()
        for part in tl.static_range(PARTS):
            x = _load_row(x_ptr + token * x_stride, part * BLOCK_K, token < num_tokens, BY_SIXTEEN, INPUT_SIZE, BLOCK_K)
            xs += (x,)
        if HAS_NORM:
            # The norm's division comes after the product, so that neither sum waits for the other.
            squares = xs[0] * xs[0]
            for part in tl.static_range(1, PARTS):
                squares += xs[part] * xs[part]
            mean_square = tl.sum(squares, axis=0) / INPUT_SIZE
        if PARTS > 1:
            products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            up_products = products
        # Gate and up side by side, and so are their loads: one after the other, rows of five parts in FP8 need up to
        # 255 registers instead of 168, which leave room for fewer programs.
        for part in tl.static_range(PARTS):
            x = xs[part] * norm_weights[part] if HAS_NORM else xs[part]
            gate_x = x * block_scales[part] if HAS_BLOCK_SCALE else x
            product = gate_x[None, :] * _to_float(weights[part], BLOCK_M == 1)
            products = product if PARTS == 1 else products + product
            if IS_GATED:
                up_x = x * up_block_scales[part] if HAS_BLOCK_SCALE else x
                product = up_x[None, :] * _to_float(up_weights[part], BLOCK_M == 1)
                up_products = product if PARTS == 1 else up_products + product
        out = tl.sum(products, axis=1)  # [BLOCK_N]
        if IS_GATED:
            up = tl.sum(up_products, axis=1)
        if HAS_SCALE:
            out = out * scale
            if IS_GATED:
                up = up * up_scale
        if HAS_NORM:
            norm = 1.0 / tl.sqrt(mean_square + eps)
            out = out * norm
            if IS_GATED:
                up = up * norm
        if HAS_BIAS:
            out += bias
            if IS_GATED:
                up += up_bias
        if IS_GATED:
            out = out / (1.0 + tl.exp(-out)) * up
        if HAS_RESIDUAL:
            out += residual
        tl.store(out_ptr + token * OUTPUT_SIZE + output, out.to(out_ptr.dtype.element_ty), mask=mask)


def suits_skinny_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Returns whether `skinny_linear` beats torch's kernels on x [num_tokens, input_size]: few tokens, on a GPU."""
    num_tokens, input_size = x.shape
    few = num_tokens <= _MAX_TOKENS and (num_tokens - 1) * weight.numel() <= _MAX_EXTRA_PRODUCTS
    return HAS_TRITON and x.is_cuda and few and input_size * weight.itemsize <= _MAX_ROW_BYTES


def _choose_parts(input_size: int, itemsize: int) -> tuple[int, int]:
    """Returns (inputs of a part, parts) of a weight's row: the whole row, or as many eighths of a block as it needs.

    Parts where much of the block would be empty: with 8 bits a weight multiplying takes long, with 16 reading does.
    """
    columns = next_power_of_2(input_size)
    if itemsize > 1 or columns < _MIN_COLUMNS_OF_PARTS or columns - input_size <= _MAX_EMPTY * input_size:
        return columns, 1
    return columns // 8, -(-input_size // (columns // 8))


def _choose_tile(num_tokens: int, weight: torch.Tensor, gated: bool) -> tuple[int, int]:
    """Returns (outputs of a program, its warps)."""
    num_rows, input_size = weight.shape
    part, num_parts = _choose_parts(input_size, weight.itemsize)
    num_columns = part * num_parts
    num_warps = 1 if num_columns <= _MAX_COLUMNS_OF_ONE_WARP else 4
    weights = _WEIGHTS_OF_ONE_WARP if num_warps == 1 else _WEIGHTS_OF_FOUR_WARPS
    if weight.itemsize == 1:
        weights *= 2 if num_warps == 1 else 4
    most_rows = weights // num_columns
    if num_tokens == 1 and num_warps > 1 and weight.itemsize in _WEIGHTS_OF_ONE_TOKEN:
        num_warps = 4 if input_size * weight.itemsize <= _MAX_ROW_BYTES_OF_FOUR_WARPS else 8
        weights = _WEIGHTS_OF_ONE_TOKEN[weight.itemsize] * num_warps // 4
        most_rows = max(most_rows, min(weights // input_size, num_rows // _MIN_PROGRAMS))
    rows = 1 + gated
    while 2 * rows <= most_rows:
        rows *= 2
    return rows // (1 + gated), num_warps


def scales_blocks(scale: torch.Tensor, weight: torch.Tensor) -> bool:
    """Returns whether `scale` holds a scale for each block of 128 × 128 weights, not for each output or for all."""
    return scale.shape[1] > 1 or len(scale) not in (1, len(weight))


def scaled_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the weight that `weight` and `scale` stand for, in float32."""
    if scales_blocks(scale, weight):
        scale = scale.repeat_interleave(SCALE_BLOCK, dim=0).repeat_interleave(SCALE_BLOCK, dim=1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    return weight.float() * scale


def skinny_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference for `skinny_linear` in plain torch."""
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps)
    weight = weight.float() if scale is None else scaled_weight(weight, scale)
    out = F.linear(x.float(), weight, None if bias is None else bias.float())
    if gated:
        out = silu_and_mul_reference(out)
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns act(rms_norm(x) · weightᵀ + bias) + residual for few tokens; every part except the product is optional.

    x [num_tokens, input_size], weight [outputs, input_size] contiguous, bias [outputs]. scale: the weight is of 8 bits
    and multiplied by it, float32 of [outputs, 1], [1, 1] or a number for each block of 128 × 128. norm_weight
    [input_size]: x is RMS-normed with it and `eps` first. gated: outputs are gates, then as many ups, and the result is
    silu(gate) · up. residual, of the result's shape, is added.
    → [num_tokens, outputs or half as many], of x's dtype (bf16, fp16 or fp32), rounded once from fp32.
    """
    if not runs_triton(x, use_triton):
        return skinny_linear_reference(
            x, weight, bias, scale=scale, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual
        )
    num_tokens, input_size = x.shape
    output_size = weight.shape[0] // (1 + gated)
    out = torch.empty(num_tokens, output_size, dtype=x.dtype, device=x.device)  # [num_tokens, output_size]
    if num_tokens == 0:
        return out
    block_m = min(next_power_of_2(num_tokens), _MAX_TOKENS)
    block_k, num_parts = _choose_parts(input_size, weight.itemsize)
    block_n, num_warps = _choose_tile(num_tokens, weight, gated)
    has_block_scale = scale is not None and scales_blocks(scale, weight)
    if has_block_scale:
        block_n = min(block_n, SCALE_BLOCK)
        while gated and output_size % block_n:  # so that a program's outputs lie in one block
            block_n //= 2
    grid = (-(-output_size // block_n), -(-num_tokens // block_m))
    _skinny_linear_kernel[grid](
        x_ptr=x,
        weight_ptr=weight,
        scale_ptr=x if scale is None else scale,
        bias_ptr=x if bias is None else bias,  # parts that are left out are not read
        norm_weight_ptr=x if norm_weight is None else norm_weight,
        residual_ptr=x if residual is None else residual,
        out_ptr=out,
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        num_tokens=num_tokens,
        eps=eps,
        HAS_SCALE=scale is not None and not has_block_scale,
        HAS_BLOCK_SCALE=has_block_scale,
        SCALE_STRIDE=0 if scale is None or len(scale) == 1 else 1,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None,
        HAS_RESIDUAL=residual is not None,
        IS_GATED=gated,
        OUTPUT_SIZE=output_size,
        INPUT_SIZE=input_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PARTS=num_parts,
        num_warps=num_warps,
        num_stages=1,
        **pdl_options(x.device),
    )
    return out
