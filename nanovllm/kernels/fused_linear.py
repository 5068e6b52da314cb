"""Products in the model's dtype with what surrounds them: by which kernel."""

from __future__ import annotations

from typing import Literal

import torch

from nanovllm.kernels.dense_matmul import dense_matmul, suits_dense_matmul
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.row_linear import row_linear, suits_row_linear
from nanovllm.kernels.skinny_linear import skinny_linear, suits_skinny_linear
from nanovllm.kernels.triton_support import multiprocessor_count, next_power_of_2

# As measured in whole steps on an H200 (docs/performance.md): more tokens are left to the BLAS.
_MAX_TOKENS = 64
_MAX_GATED_TOKENS = 128
_MAX_TOKENS_OF_SMALL_WEIGHT = 256
_SMALL_WEIGHT = 2**23
# From here on, as in prompt steps, what fusing need not read and write again outweighs the BLAS's faster product.
_MIN_GATED_PROMPT_TOKENS = 1280
_MIN_ADDED_PROMPT_TOKENS = 4096
_MIN_WEIGHT = 2**20  # smaller ones, such as a router's, have too few rows to keep the multiprocessors busy
_ROW_WEIGHT = (4096, 4096)  # o of 8B, where `row_linear` is faster; measured without norm and gate
_MIN_ROW_MULTIPROCESSORS = 128  # one for each of its programs
_MAX_EXTRA_PRODUCTS_BESIDE_DENSE = 2**23  # of tokens after the first, which `skinny_linear` computes one by one


def largest_prompt_sizes(max_tokens: int) -> list[int]:
    """Returns the tokens of those prompt steps, of up to `max_tokens`, that may take most memory.

    Just below where gates, or additions, begin to be fused, a step stores more for each token than above.
    """
    firsts = (_MIN_GATED_PROMPT_TOKENS, _MIN_ADDED_PROMPT_TOKENS)
    return [*(first - 1 for first in firsts if first <= max_tokens), max_tokens]


def suits_fused_linear(hidden: torch.Tensor, weight: torch.Tensor, *, gated: bool, only_adds: bool) -> bool:
    """Returns whether `fused_linear` beats the BLAS, and kernels for the rest, on hidden [num_tokens, inputs].

    only_adds: all that follows is an addition: a residual is given, and no bias.
    """
    return _choose(hidden, weight, gated, only_adds) is not None


def _choose(
    hidden: torch.Tensor, weight: torch.Tensor, gated: bool, only_adds: bool
) -> Literal["skinny", "dense", "blas"] | None:
    num_tokens, num_weights = len(hidden), weight.numel()
    is_skinny = suits_skinny_linear(hidden, weight)
    num_extra = next_power_of_2(num_tokens) - 1  # by powers of two, as kernels are compiled when the engine starts
    if is_skinny and num_extra * num_weights <= _MAX_EXTRA_PRODUCTS_BESIDE_DENSE:
        return "skinny"
    most = _MAX_GATED_TOKENS if gated else _MAX_TOKENS
    if num_weights <= _SMALL_WEIGHT:
        most = _MAX_TOKENS_OF_SMALL_WEIGHT
    is_worth_it = num_weights >= _MIN_WEIGHT and (
        num_tokens <= most or (gated and num_tokens >= _MIN_GATED_PROMPT_TOKENS)
    )
    if is_worth_it and weight.dtype is hidden.dtype and suits_dense_matmul(hidden, weight, gated=gated):
        return "dense"
    if only_adds and not gated and num_tokens >= _MIN_ADDED_PROMPT_TOKENS and hidden.is_cuda and hidden.itemsize == 2:
        return "blas"
    return "skinny" if is_skinny else None


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
    for a token or a few (one row of o of 8B: `row_linear`). The result may overwrite residual. Needs
    `suits_fused_linear`.
    """
    kernel = _choose(hidden, weight, gated, only_adds=residual is not None and bias is None)
    assert kernel is not None, "suits_fused_linear"
    if kernel == "skinny":
        is_measured = weight.shape == _ROW_WEIGHT and norm_weight is None and not gated
        if is_measured and suits_row_linear(hidden) and multiprocessor_count(hidden.device) >= _MIN_ROW_MULTIPROCESSORS:
            return row_linear(hidden, weight, bias=bias, residual=residual)
        return skinny_linear(hidden, weight, bias, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual)
    # In a product's kernel every program norms all tokens, which is no faster with 32 of them and slower with more.
    normed = hidden if norm_weight is None else rms_norm(hidden, norm_weight, eps)
    if kernel == "dense":
        return dense_matmul(normed, weight, bias, gated=gated, residual=residual)
    assert residual is not None, "the BLAS fuses nothing else"
    return residual.addmm_(normed, weight.t())
