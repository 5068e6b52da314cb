"""Mistral (arXiv:2310.06825): 7B and Nemo, with a sliding window in every layer where config.json has one.

Its layers are Llama's without biases.
"""

from __future__ import annotations

from nanovllm.models.decoder import DecoderAttention, DecoderForCausalLM, DecoderLayer, DecoderModel, GatedMLP
from nanovllm.models.model_context import ModelContext


class MistralDecoderLayer(DecoderLayer):
    def __init__(self, context: ModelContext, index: int) -> None:
        super().__init__(context, DecoderAttention(context, index), GatedMLP(context))


class MistralForCausalLM(DecoderForCausalLM):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, DecoderModel(context, MistralDecoderLayer))
