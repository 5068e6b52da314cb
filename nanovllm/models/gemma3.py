"""Gemma 3 (arXiv:2503.19786): 270m and 1B, and the text model of the larger ones, whose vision weights are skipped.

What is its own: norms whose weights are stored as differences from 1, before and after both blocks; scaled embeddings;
GeGLU; and most layers have a sliding window, with rotations for short distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from nanovllm.attention.interface import LayerKVCache
from nanovllm.kernels.qk_norm_rope_store import QKNorm
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parameter import WeightPart
from nanovllm.models.decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    GatedMLP,
    StepInputs,
)
from nanovllm.models.model_context import ModelContext
from nanovllm.utils.loader import CheckpointForm


class Gemma3RMSNorm(RMSNorm):
    """An RMS norm whose weight in the checkpoint is its difference from 1. float32 holds the sum without rounding."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps, torch.float32)

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        return {
            name: [replace(part, plus=1.0) for part in parts] for name, parts in super().weight_parts(prefix).items()
        }


class Gemma3Attention(DecoderAttention):
    def __init__(self, context: ModelContext, index: int) -> None:
        config = context.config
        super().__init__(context, index, qkv_bias=config.attention_bias, output_bias=config.attention_bias)
        self.q_norm = Gemma3RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = Gemma3RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attention.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5

    def qk_norm(self) -> QKNorm:
        return QKNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)


class Gemma3DecoderLayer(DecoderLayer):
    """Attention and MLP, each with a norm before it, and one after it, before the addition."""

    def __init__(self, context: ModelContext, index: int) -> None:
        super().__init__(context, Gemma3Attention(context, index), GatedMLP(context))
        size, eps = context.config.hidden_size, context.config.rms_norm_eps
        self.input_layernorm = Gemma3RMSNorm(size, eps)
        self.post_attention_layernorm = Gemma3RMSNorm(size, eps)
        self.pre_feedforward_layernorm = Gemma3RMSNorm(size, eps)
        self.post_feedforward_layernorm = Gemma3RMSNorm(size, eps)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, step: StepInputs, kv_cache: LayerKVCache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, residual = self.self_attn(
            hidden, residual, self.input_layernorm, step, kv_cache, self.post_attention_layernorm
        )
        hidden, residual = self.mlp(hidden, residual, self.pre_feedforward_layernorm, self.post_feedforward_layernorm)
        return hidden, residual


class Gemma3Model(DecoderModel):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, Gemma3DecoderLayer)
        config = context.config
        self.norm = Gemma3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embed_scale = float(torch.tensor(config.hidden_size**0.5).to(context.dtype))  # rounded, as in training

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return super().embed(input_ids, positions) * self.embed_scale


class Gemma3ForCausalLM(DecoderForCausalLM):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, Gemma3Model(context))


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text model of a checkpoint that has a vision model too."""

    checkpoint_form = CheckpointForm(
        {
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": None,
            "multi_modal_projector.": None,
            # As transformers 4.52 and later name the modules:
            "model.language_model.": "model.",
            "model.vision_tower.": None,
            "model.multi_modal_projector.": None,
        }
    )
