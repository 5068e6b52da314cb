"""What follows the sums of a product: scales, bias, gate and residual; and the sums of products whose inputs are split.

Where a product has too few programs to keep all multiprocessors reading, each computes a part of the inputs, and a
second kernel adds the parts.
"""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.kernels.triton_support import jit, jit_with_varying, join_launch_chain, pdl_options, tl

_BLOCK_N = 512


@jit
def finish(
    out: tl.tensor,
    up: tl.tensor,
    scale_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    output: tl.tensor,
    token: tl.tensor,
    residual_stride: tl.tensor,
    num_tokens: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
) -> None:
    """Scales sums [outputs, tokens], does what follows the product, and stores them."""
    output_mask = output < OUTPUT_SIZE
    if HAS_SCALE:
        out *= tl.load(scale_ptr + output * SCALE_STRIDE, mask=output_mask, other=0.0).to(tl.float32)[:, None]
        if IS_GATED:
            up_scale_ptr = scale_ptr + (OUTPUT_SIZE + output) * SCALE_STRIDE
            up *= tl.load(up_scale_ptr, mask=output_mask, other=0.0).to(tl.float32)[:, None]
        if HAS_X_SCALE:
            x_scale = tl.load(x_scale_ptr + token, mask=token < num_tokens, other=0.0)[None, :]
            out *= x_scale
            up *= x_scale
    if HAS_BIAS:
        out += tl.load(bias_ptr + output, mask=output_mask, other=0.0).to(tl.float32)[:, None]
        if IS_GATED:
            up += tl.load(bias_ptr + OUTPUT_SIZE + output, mask=output_mask, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        out = out / (1.0 + tl.exp(-out)) * up
    mask = output_mask[:, None] & (token < num_tokens)[None, :]
    row = token.to(tl.int64)[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + output[:, None], mask=mask, other=0.0)
        out += residual.to(tl.float32)
    tl.store(out_ptr + row * OUTPUT_SIZE + output[:, None], out.to(out_ptr.dtype.element_ty), mask=mask)


@jit_with_varying("num_tokens")
def _add_splits_kernel(
    x_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    residual_stride: tl.tensor,
    num_tokens: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, token): the sum over the splits of some outputs, finished."""
    NUM_ROWS: tl.constexpr = OUTPUT_SIZE * (2 if IS_GATED else 1)
    join_launch_chain(PDL)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) + tl.arange(0, 1)
    mask = (output < OUTPUT_SIZE)[:, None]
    out = tl.zeros([BLOCK_N, 1], tl.float32)
    up = tl.zeros([BLOCK_N, 1], tl.float32)
    for split in tl.static_range(SPLITS):
        row = (split * num_tokens + token).to(tl.int64)[None, :] * NUM_ROWS
        out += tl.load(partial_ptr + row + output[:, None], mask=mask, other=0.0)
        if IS_GATED:
            up += tl.load(partial_ptr + row + OUTPUT_SIZE + output[:, None], mask=mask, other=0.0)
    finish(
        out, up, scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, output, token, residual_stride,
        num_tokens, HAS_SCALE, HAS_X_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED, SCALE_STRIDE, OUTPUT_SIZE,
    )  # fmt: skip


def finishing_arguments(
    num_tokens: int,
    rows: int,
    dtype: torch.dtype,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    has_scale: bool,
    x_scale: torch.Tensor | None,
    gated: bool,
    residual: torch.Tensor | None,
    splits: int,
) -> dict[str, Any]:
    """Allocates the output, and returns arguments of a product's kernel and of `add_splits`.

    out_ptr is [num_tokens, outputs] of `dtype`; partial_ptr [splits, num_tokens, rows] float32, or the output if there
    are no splits. Parts that are left out are not read. rows: of the weight, twice as many as outputs if gated. x_scale
    [num_tokens]. has_scale: the sums are yet to be multiplied by scale [rows, 1] or [1, 1].
    """
    out = scale.new_empty(num_tokens, rows // (1 + gated), dtype=dtype)
    partial = scale.new_empty(splits, num_tokens, rows, dtype=torch.float32) if splits > 1 else out
    return {
        "x_scale_ptr": scale if x_scale is None else x_scale,
        "scale_ptr": scale,
        "bias_ptr": out if bias is None else bias,
        "residual_ptr": out if residual is None else residual,
        "out_ptr": out,
        "partial_ptr": partial,
        "residual_stride": 0 if residual is None else residual.stride(0),
        "num_tokens": num_tokens,
        "HAS_SCALE": has_scale,
        "HAS_X_SCALE": x_scale is not None,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "IS_GATED": gated,
        "SCALE_STRIDE": 0 if len(scale) == 1 else 1,
        "OUTPUT_SIZE": out.shape[1],
        "SPLITS": splits,
        **pdl_options(out.device),
    }


def add_splits(arguments: dict[str, Any]) -> None:
    """Adds the parts of `finishing_arguments`, finishes the sums and stores them."""
    grid = (-(-arguments["OUTPUT_SIZE"] // _BLOCK_N), arguments["num_tokens"])
    _add_splits_kernel[grid](BLOCK_N=_BLOCK_N, **arguments)
