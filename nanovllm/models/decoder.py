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
from nanovllm.kernels.silu_and_mul import gelu_and_mul, silu_and_mul
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GatedParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import build_cos_sin_cache
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.model_context import ModelContext

_GATES = {"silu": silu_and_mul, "gelu_pytorch_tanh": gelu_and_mul}


@dataclass(frozen=True)
class StepInputs:
    """The inputs that all layers of a step share, or all with the same rotary positions."""

    positions: torch.Tensor  # [num_tokens] int64
    cos_sin_cache: torch.Tensor | None  # [max_positions, head_dim] float32; None: no rotary positions
    metadata: AttentionMetadata


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions, over all keys or, as config.json says of the layer, a window."""

    output_name: str | None = None  # of the output product in the checkpoint, where it is not "o_proj"

    def __init__(self, context: ModelContext, index: int, *, qkv_bias: bool = False, output_bias: bool = False) -> None:
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
        num_inputs = config.num_heads * config.head_dim
        size, name = config.hidden_size, self.output_name
        self.o_proj = RowParallelLinear(context, num_inputs, size, bias=output_bias, name=name)
        window = config.windows[index]
        self.attention = Attention(config.head_dim, context.backends, context.parallel.step, window)

    def qk_norm(self) -> QKNorm | None:
        """Returns the norm of query and key heads; None for a model without one."""
        return None

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        norm: nn.Module | None,
        step: StepInputs,
        kv_cache: LayerKVCache,
        output_norm: nn.Module | None = None,
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
        hidden, residual = self.o_proj(attended.flatten(1), residual, output_norm)  # [num_tokens, hidden_size]
        return hidden, residual


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) · up_proj(x)): SwiGLU, or GeGLU where config.json says so."""

    def __init__(self, context: ModelContext, *, bias: bool = False) -> None:
        super().__init__()
        config = context.config
        sizes = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        act = _GATES[config.hidden_act]
        self.gate_up_proj = GatedParallelLinear(context, config.hidden_size, sizes, bias=bias, act=act)
        self.down_proj = RowParallelLinear(context, config.intermediate_size, config.hidden_size, bias=bias)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, norm: nn.Module, output_norm: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gated, residual = self.gate_up_proj(hidden, residual, norm)  # [num_tokens, intermediate_size]
        hidden, residual = self.down_proj(gated, residual, output_norm)  # [num_tokens, hidden_size]
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

    cos_sin_cache: torch.Tensor | None  # [max_positions, head_dim] float32
    local_cos_sin_cache: torch.Tensor | None  # the same for layers with a window, where these rotate by other angles

    def __init__(self, context: ModelContext, make_layer: Callable[[ModelContext, int], nn.Module]) -> None:
        super().__init__()
        config = context.config
        self.embed_tokens = VocabParallelEmbedding(context, config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(make_layer(context, index) for index in range(config.num_layers))
        self.norm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps, context.dtype)
        max_positions = context.max_positions or config.max_context_len
        for name, rope in (("cos_sin_cache", config.rope), ("local_cos_sin_cache", config.local_rope)):
            table = None if rope is None else build_cos_sin_cache(config.head_dim, max_positions, rope, context.device)
            self.register_buffer(name, table, persistent=False)
        self.is_local = [config.local_rope is not None and window is not None for window in config.windows]

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns the vectors that the first layer takes: [num_tokens] each → [num_tokens, hidden_size]."""
        embedded: torch.Tensor = self.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        step = StepInputs(positions, self.cos_sin_cache, metadata)
        local_step = StepInputs(positions, self.local_cos_sin_cache, metadata)
        hidden, residual = self.embed(input_ids, positions), None  # [num_tokens, hidden_size]
        for layer, is_local, kv_cache in zip(self.layers, self.is_local, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, local_step if is_local else step, kv_cache)
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
            self.lm_head = VocabParallelEmbedding(context, config.vocab_size, config.embedding_size)

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
