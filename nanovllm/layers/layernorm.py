"""Root-mean-square norm (Zhang & Sennrich, 2019, arXiv:1910.07467), with the residual stream passed along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm
from nanovllm.layers.parameter import WeightPart, empty_parameter


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, over the last dimension; computed in float32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `hidden` to the residual stream. Returns (normed sum, sum), both [num_tokens, size].

        One kernel does both, which saves reading the stream twice. residual None: `hidden` is the whole stream.
        """
        if residual is None:
            return rms_norm(hidden, self.weight, self.eps), hidden
        return add_rms_norm(hidden, residual, self.weight, self.eps)

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        return {f"{prefix}.weight": [WeightPart(f"{prefix}.weight", tuple(self.weight.shape))]}


def norm_arguments(norm: RMSNorm | None) -> dict[str, Any]:
    """Returns the arguments of a kernel that norms its input first, if there is a norm."""
    return {"norm_weight": None, "eps": 0.0} if norm is None else {"norm_weight": norm.weight, "eps": norm.eps}
