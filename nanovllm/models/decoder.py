"""The parts that nearly all decoder-only models share: embedding, layers of attention and MLP, final norm, head.

A pre-norm transformer with grouped-query attention, rotary positions and a gated MLP. A model's own file builds its
layers from these parts and says what differs. Tokens of all sequences of a step lie in one flat batch.

Layers add to one residual stream: `hidden + residual`, or `hidden` alone where residual is None. The last addition may
be deferred, so that one kernel does it together with the next norm. For the same reason, a norm is an argument of the
product that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.attention.interface import AttentionMetadata, LayerKVCache
from nanovllm.kernels.qk_norm_rope_store import QKNorm, qk_norm_rope_store
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GatedParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import build_cos_sin_cache
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.model_context import ModelContext


@dataclass(frozen=True)
class StepInputs:
    """The inputs that all layers of a step share."""

    positions: torch.Tensor  # [num_tokens] int64
    cos_sin_cache: torch.Tensor  # [max_positions, head_dim] float32
    metadata: AttentionMetadata


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, context: ModelContext, *, qkv_bias: bool = False, output_bias: bool = False) -> None:
        super().__init__()
        config = context.config
        self.qkv_proj = QKVParallelLinear(
            context,
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=qkv_bias,
        )
        self.o_proj = RowParallelLinear(
            context, config.num_heads * config.head_dim, config.hidden_size, bias=output_bias
        )
        self.attention = Attention(config.head_dim, context.backends, context.parallel.step)

    def qk_norm(self) -> QKNorm | None:
        """Returns the norm of query and key heads; None for a model without one."""
        return None

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        norm: RMSNorm,
        step: StepInputs,
        kv_cache: LayerKVCache,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv, residual = self.qkv_proj(hidden, residual, norm)
        query, key, value = self.qkv_proj.split_heads(qkv)  # [num_tokens, heads, head_dim] each
        query = qk_norm_rope_store(
            query,
            key,
            value,
            norm=self.qk_norm(),
            cos_sin_cache=step.cos_sin_cache,
            positions=step.positions,
            kv_cache=kv_cache,
            slot_mapping=step.metadata.slot_mapping,
        )
        attended = self.attention(query, step.metadata, kv_cache)  # [num_tokens, num_heads, head_dim]
        hidden, residual = self.o_proj(attended.flatten(1), residual)  # [num_tokens, hidden_size]
        return hidden, residual


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) · up_proj(x)): SwiGLU."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        sizes = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = GatedParallelLinear(context, config.hidden_size, sizes)
        self.down_proj = RowParallelLinear(context, config.intermediate_size, config.hidden_size)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gated, residual = self.gate_up_proj(hidden, residual, norm)  # [num_tokens, intermediate_size]
        hidden, residual = self.down_proj(gated, residual)  # [num_tokens, hidden_size]
        return hidden, residual


class DecoderLayer(nn.Module):
    """Attention and MLP, each with a norm before it and added to the stream."""

    def __init__(self, context: ModelContext, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        config = context.config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context.dtype)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context.dtype)
        self.mlp = mlp

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, step: StepInputs, kv_cache: LayerKVCache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, residual = self.self_attn(hidden, residual, self.input_layernorm, step, kv_cache)
        hidden, residual = self.mlp(hidden, residual, self.post_attention_layernorm)
        return hidden, residual


class DecoderModel(nn.Module):
    """The model without its head: token ids in, normed hidden states out. `make_layer` builds the layer of an index."""

    cos_sin_cache: torch.Tensor  # [max_positions, head_dim] float32

    def __init__(self, context: ModelContext, make_layer: Callable[[ModelContext, int], nn.Module]) -> None:
        super().__init__()
        config = context.config
        self.embed_tokens = VocabParallelEmbedding(context, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(context, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context.dtype)
        max_positions = context.max_positions or config.max_context_len
        cos_sin_cache = build_cos_sin_cache(config.head_dim, max_positions, config.rope, context.device)
        self.register_buffer("cos_sin_cache", cos_sin_cache, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        step = StepInputs(positions, self.cos_sin_cache, metadata)
        hidden, residual = self.embed_tokens(input_ids), None  # [num_tokens, hidden_size]
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, step, kv_cache)
        normed: torch.Tensor = self.norm(hidden, residual)[0]
        return normed


class DecoderForCausalLM(CausalLM):
    """A decoder and its LM head, which is the embedding's table in models that tie the two."""

    def __init__(self, context: ModelContext, model: DecoderModel) -> None:
        super().__init__(context)
        config = context.config
        self.model = model
        if config.tie_word_embeddings:
            self.redundant_weights = frozenset({"lm_head.weight"})
            self.lm_head = model.embed_tokens
        else:
            self.redundant_weights = frozenset()
            self.lm_head = VocabParallelEmbedding(context, config.vocab_size, config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids, positions, metadata, kv_caches)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head.logits(hidden)
