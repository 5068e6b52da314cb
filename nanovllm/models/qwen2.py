"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): biases on query, key and value."""

from __future__ import annotations

from nanovllm.models.decoder import DecoderAttention, DecoderForCausalLM, DecoderLayer, DecoderModel, GatedMLP
from nanovllm.models.model_context import ModelContext


class Qwen2DecoderLayer(DecoderLayer):
    def __init__(self, context: ModelContext, index: int) -> None:
        super().__init__(context, DecoderAttention(context, index, qkv_bias=True), GatedMLP(context))


class Qwen2ForCausalLM(DecoderForCausalLM):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, DecoderModel(context, Qwen2DecoderLayer))
