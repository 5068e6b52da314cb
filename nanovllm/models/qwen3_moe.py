"""Qwen3, the mixtures of experts (arXiv:2505.09388): 30B-A3B and 235B-A22B.

Layers are those of `models.qwen3`; most or all of them have experts in place of the dense MLP.
"""

from __future__ import annotations

from torch import nn

from nanovllm.experts.sparse_moe import SparseMoeBlock
from nanovllm.models.decoder import DecoderForCausalLM, DecoderLayer, DecoderModel
from nanovllm.models.model_context import ModelContext
from nanovllm.models.qwen3 import Qwen3Attention, Qwen3MLP
from nanovllm.utils.loader import CheckpointForm


class Qwen3MoeSparseMoeBlock(SparseMoeBlock):
    def __init__(self, context: ModelContext) -> None:
        experts = context.config.experts
        assert experts is not None
        super().__init__(
            context,
            context.experts_method,
            context.config.hidden_size,
            num_experts=experts.num_experts,
            top_k=experts.num_experts_per_tok,
            intermediate_size=experts.moe_intermediate_size,
            renormalize=experts.norm_topk_prob,
        )


class Qwen3MoeDecoderLayer(DecoderLayer):
    def __init__(self, context: ModelContext, index: int) -> None:
        experts = context.config.experts
        assert experts is not None
        mlp: nn.Module = (Qwen3MoeSparseMoeBlock if index in experts.sparse_layers else Qwen3MLP)(context)
        super().__init__(context, Qwen3Attention(context, index), mlp)


class Qwen3MoeForCausalLM(DecoderForCausalLM):
    checkpoint_form = CheckpointForm(
        stacked={".experts.gate_up_proj": ("gate_proj", "up_proj"), ".experts.down_proj": ("down_proj",)}
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, DecoderModel(context, Qwen3MoeDecoderLayer))
