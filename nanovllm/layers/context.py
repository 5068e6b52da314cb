"""LayerContext: the argument with which every layer that has weights is built."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanovllm.layers.linear_method import LinearMethod, UnquantizedLinear
from nanovllm.layers.parallel import TensorParallel


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """Settings that all layers of a model share; `models.model_context.ModelContext` adds the model's own."""

    parallel: TensorParallel
    dtype: torch.dtype
    linear_method: LinearMethod = field(default_factory=UnquantizedLinear)
