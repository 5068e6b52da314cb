"""The one argument with which a model and its layers are built."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanovllm.experts.experts_method import ExpertsMethod, UnquantizedExperts
from nanovllm.layers.attention import AttentionBackends
from nanovllm.layers.context import LayerContext
from nanovllm.models.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelContext(LayerContext):
    """Shape, backends, rank, dtype, device, and how weights are stored and multiplied.

    Layers see only the part that `LayerContext` has: their sizes are arguments, never a config.
    """

    config: ModelConfig
    max_positions: int | None = None  # of a request, prompt and output; None: the longest context of the model
    backends: AttentionBackends
    experts_method: ExpertsMethod = field(default_factory=UnquantizedExperts)
    device: torch.device | str  # of buffers, computed while the model is built; parameters are on the meta device
