"""RMSNorm over the hidden dimension, alone or with the residual addition before it.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.triton_support import jit, join_launch_chain, next_power_of_2, pdl_options, runs_triton, tl

_COLUMNS_PER_WARP = 512
_MAX_WARPS = 16


@jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    new_residual_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    hidden_size: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (token): one row, normalised."""
    join_launch_chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_SIZE)
    mask = column < hidden_size
    x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + token * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        # The sum is stored rounded, and the norm is that of the stored numbers.
        rounded = x.to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + token * hidden_size + column, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / hidden_size + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    normed = (x * scale * weight).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + token * hidden_size + column, normed, mask=mask)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Reference for `rms_norm` in plain torch; also used on CPUs."""
    x_float = x.float()
    scale = x_float.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x_float * scale).mul_(weight.float()).to(x.dtype)  # in place: on a CPU the cost is memory traffic


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, use_triton: bool | None = None) -> torch.Tensor:
    """Returns x / sqrt(mean(x²) + eps) · weight, computed in fp32 and rounded once.

    x [num_tokens, hidden_size], rows may be strided; weight [hidden_size] → [num_tokens, hidden_size] of x's dtype.
    """
    if not runs_triton(x, use_triton):
        return rms_norm_reference(x, weight, eps)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # [num_tokens, hidden_size]
    _launch(x, weight, eps, normed)
    return normed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, use_triton: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x to the residual stream and normalises the sum. Returns (rms_norm(x + residual), x + residual).

    All [num_tokens, hidden_size] and of one dtype. The sum is rounded to that dtype before it is normalised.
    """
    if not runs_triton(x, use_triton):
        new_residual = x + residual
        return rms_norm_reference(new_residual, weight, eps), new_residual
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # [num_tokens, hidden_size]
    new_residual = torch.empty_like(normed)  # [num_tokens, hidden_size]
    _launch(x, weight, eps, normed, residual, new_residual)
    return normed, new_residual


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    normed: torch.Tensor,
    residual: torch.Tensor | None = None,
    new_residual: torch.Tensor | None = None,
) -> None:
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return
    block_size = next_power_of_2(hidden_size)
    _rms_norm_kernel[(num_tokens,)](
        x_ptr=x,
        residual_ptr=x if residual is None else residual,  # neither read nor written without a residual
        weight_ptr=weight,
        normed_ptr=normed,
        new_residual_ptr=normed if new_residual is None else new_residual,
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        hidden_size=hidden_size,
        eps=eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK_SIZE=block_size,
        num_warps=min(max(block_size // _COLUMNS_PER_WARP, 1), _MAX_WARPS),
        **pdl_options(x.device),
    )
