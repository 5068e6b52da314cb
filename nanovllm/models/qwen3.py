"""Qwen3, the dense models (arXiv:2505.09388): 0.6B to 32B.

A pre-norm transformer: grouped-query attention with an RMS norm on every query and key head, rotary positions,
SwiGLU. Tokens of all sequences of a step lie in one flat batch. The stream that layers add to is `hidden + residual`,
or `hidden` alone where residual is None: the last addition may wait, so that it can be one kernel with the next norm.
Norms are handed to the products that follow them, for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nanovllm.attention.interface import AttentionMetadata, LayerKVCache
from nanovllm.kernels.qk_norm_rope_store import QKNorm, qk_norm_rope_store
from nanovllm.layers.attention import Attention, AttentionBackends
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GatedParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.rotary_embedding import build_cos_sin_cache
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.model_config import ModelConfig


class Qwen3Attention(nn.Module):
    def __init__(
        self, config: ModelConfig, backends: AttentionBackends, parallel: TensorParallel, dtype: torch.dtype
    ) -> None:
        super().__init__()
        hidden_size, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.qkv_proj = QKVParallelLinear(
            hidden_size, config.num_heads, config.num_kv_heads, head_dim, parallel, dtype, bias
        )
        self.o_proj = RowParallelLinear(config.num_heads * head_dim, hidden_size, parallel, dtype, bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype)
        self.attention = Attention(head_dim, backends)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        norm: RMSNorm,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: LayerKVCache,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv, residual = self.qkv_proj(hidden, residual, norm)
        query, key, value = self.qkv_proj.split_heads(qkv)  # [num_tokens, heads, head_dim] each
        query = qk_norm_rope_store(
            query,
            key,
            value,
            norm=QKNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps),
            cos_sin_cache=cos_sin_cache,
            positions=positions,
            kv_cache=kv_cache,
            slot_mapping=metadata.slot_mapping,
        )
        attended = self.attention(query, metadata, kv_cache)  # [num_tokens, num_heads, head_dim]
        hidden, residual = self.o_proj(attended.flatten(1), residual)  # [num_tokens, hidden_size]
        return hidden, residual


class Qwen3MLP(nn.Module):
    def __init__(self, config: ModelConfig, parallel: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = GatedParallelLinear(config.hidden_size, sizes, parallel, dtype)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, parallel, dtype)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gated, residual = self.gate_up_proj(hidden, residual, norm)  # [num_tokens, intermediate_size]
        hidden, residual = self.down_proj(gated, residual)  # [num_tokens, hidden_size]
        return hidden, residual


class Qwen3DecoderLayer(nn.Module):
    def __init__(
        self, config: ModelConfig, backends: AttentionBackends, parallel: TensorParallel, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Qwen3Attention(config, backends, parallel, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = Qwen3MLP(config, parallel, dtype)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: LayerKVCache,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, residual = self.self_attn(
            hidden, residual, self.input_layernorm, positions, cos_sin_cache, metadata, kv_cache
        )
        hidden, residual = self.mlp(hidden, residual, self.post_attention_layernorm)
        return hidden, residual


class Qwen3Model(nn.Module):
    cos_sin_cache: torch.Tensor  # [max_context_len, head_dim] float32

    def __init__(
        self,
        config: ModelConfig,
        backends: AttentionBackends,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel, dtype)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, backends, parallel, dtype) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        cos_sin_cache = build_cos_sin_cache(config.head_dim, config.max_context_len, config.rope, device)
        self.register_buffer("cos_sin_cache", cos_sin_cache, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        hidden, residual = self.embed_tokens(input_ids), None  # [num_tokens, hidden_size]
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, positions, self.cos_sin_cache, metadata, kv_cache)
        normed: torch.Tensor = self.norm(hidden, residual)[0]
        return normed


class Qwen3ForCausalLM(CausalLM):
    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionBackends,
        tensor_parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(config, attention, tensor_parallel, dtype, device)
        self.model = Qwen3Model(config, attention, tensor_parallel, dtype, device)
        if config.tie_word_embeddings:
            self.redundant_weights = frozenset({"lm_head.weight"})
            self.lm_head = self.model.embed_tokens
        else:
            self.redundant_weights = frozenset()
            self.lm_head = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tensor_parallel, dtype)

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
