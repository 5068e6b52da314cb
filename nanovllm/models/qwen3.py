"""Qwen3, the dense models (arXiv:2505.09388): 0.6B to 32B.

The decoder of `models.decoder` with an RMS norm on every query and key head.
"""

from __future__ import annotations

from nanovllm.kernels.qk_norm_rope_store import QKNorm
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.models.decoder import DecoderAttention, DecoderForCausalLM, DecoderLayer, DecoderModel, GatedMLP
from nanovllm.models.model_context import ModelContext

Qwen3MLP = GatedMLP


class Qwen3Attention(DecoderAttention):
    """Attention whose query and key heads are normed over head_dim before they are rotated."""

    def __init__(self, context: ModelContext, index: int) -> None:
        config = context.config
        super().__init__(context, index, qkv_bias=config.attention_bias, output_bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, context.dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, context.dtype)

    def qk_norm(self) -> QKNorm:
        return QKNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)


class Qwen3DecoderLayer(DecoderLayer):
    def __init__(self, context: ModelContext, index: int) -> None:
        super().__init__(context, Qwen3Attention(context, index), Qwen3MLP(context))


class Qwen3Model(DecoderModel):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, Qwen3DecoderLayer)


class Qwen3ForCausalLM(DecoderForCausalLM):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, Qwen3Model(context))
