"""Llama (arXiv:2302.13971, arXiv:2407.21783), and what has its form: Llama 2 and 3, TinyLlama, SmolLM2, Yi.

The decoder of `models.decoder` as it is, with biases where config.json asks for them.
"""

from __future__ import annotations

from nanovllm.models.decoder import DecoderAttention, DecoderForCausalLM, DecoderLayer, DecoderModel, GatedMLP
from nanovllm.models.model_context import ModelContext


class LlamaDecoderLayer(DecoderLayer):
    def __init__(self, context: ModelContext, index: int) -> None:
        bias = context.config.attention_bias
        attention = DecoderAttention(context, index, qkv_bias=bias, output_bias=bias)
        super().__init__(context, attention, GatedMLP(context, bias=context.config.mlp_bias))


class LlamaForCausalLM(DecoderForCausalLM):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, DecoderModel(context, LlamaDecoderLayer))
