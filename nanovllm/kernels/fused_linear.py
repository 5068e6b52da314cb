"""Products in the model's dtype with what surrounds them, for the tokens of a decode step: by which kernel."""

from __future__ import annotations

import torch

from nanovllm.kernels.dense_matmul import dense_matmul, suits_dense_matmul
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.skinny_linear import skinny_linear, suits_skinny_linear

# As measured in whole decode steps on an H200 (docs/performance.md): more tokens are left to the BLAS.
_MAX_TOKENS = 64
_MAX_GATED_TOKENS = 128
_MAX_TOKENS_OF_SMALL_WEIGHT = 256
_SMALL_WEIGHT = 2**23
_MAX_EXTRA_PRODUCTS = 2**23  # of tokens after the first, which `skinny_linear` multiplies without the tensor cores


def suits_fused_linear(hidden: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> bool:
    """Returns whether `fused_linear` beats the BLAS, and kernels for the rest, on hidden [num_tokens, inputs]."""
    return suits_skinny_linear(hidden, weight) or _suits_dense(hidden, weight, gated)


def _suits_dense(hidden: torch.Tensor, weight: torch.Tensor, gated: bool) -> bool:
    most = _MAX_GATED_TOKENS if gated else _MAX_TOKENS
    if weight.numel() <= _SMALL_WEIGHT:
        most = _MAX_TOKENS_OF_SMALL_WEIGHT
    is_skinny = suits_skinny_linear(hidden, weight) and (len(hidden) - 1) * weight.numel() <= _MAX_EXTRA_PRODUCTS
    return len(hidden) <= most and not is_skinny and suits_dense_matmul(hidden, weight)


def fused_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns act(rms_norm(hidden) · weightᵀ + bias) + residual: [num_tokens, outputs or half as many].

    hidden [num_tokens, inputs], weight [outputs, inputs], and the rest, are as in `skinny_linear`, which computes it
    for a token or a few. Needs `suits_fused_linear`.
    """
    if not _suits_dense(hidden, weight, gated):
        return skinny_linear(hidden, weight, bias, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual)
    # In a product's kernel the norm takes as long for 32 tokens, and longer for more: every program norms all of them.
    normed = hidden if norm_weight is None else rms_norm(hidden, norm_weight, eps)
    return dense_matmul(normed, weight, bias, gated=gated, residual=residual)
