"""What attention needs to know about a step, and what a backend must do with it.

A step's tokens lie in one flat batch: first one token for each decode row, then the chunks of the
prefill rows one after another. Keys and values of all of them are stored in the paged cache before
any attention runs, so every query reads its whole context, its own token included, from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from nanovllm.kernels.shared_prefix import SharedPrefixes


@dataclass(frozen=True)
class LayerKVCache:
    """One layer's pages. Block b, offset o holds the token at slot b · block_size + o.

    An FP8 cache has scales: a head of a token is what is stored times its scale. A page's scales of one head lie side
    by side, since that is how attention reads them.
    """

    key: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    key_scale: torch.Tensor | None = None  # [num_blocks, num_kv_heads, block_size] float32
    value_scale: torch.Tensor | None = None  # [num_blocks, num_kv_heads, block_size] float32


@dataclass(frozen=True)
class PrefillMetadata:
    """Chunks of prompts: sequence i brings queries cu_seqlens_q[i] … cu_seqlens_q[i+1].

    Its queries are the last ones of its context: query j of q stands at position
    context_lens[i] - q + j and attends to the keys at positions up to its own.
    """

    cu_seqlens_q: torch.Tensor  # [num_seqs + 1] int32
    context_lens: torch.Tensor  # [num_seqs] int32, keys in the cache, the chunk's own included; ≥ 1
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    max_seqlen_q: int  # longest chunk
    max_seqlen_k: int  # longest context


@dataclass(frozen=True)
class DecodeMetadata:
    """One query a sequence, at position context_lens - 1."""

    context_lens: torch.Tensor  # [num_seqs] int32, keys in the cache, the query's own included; ≥ 1
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    max_context_len: int  # an upper bound of context_lens, fixed when a CUDA graph is captured
    shared: SharedPrefixes | None = None  # prefixes that a backend may read once for many sequences


@dataclass(frozen=True)
class AttentionMetadata:
    """One step: `decode` covers the first `num_decode_tokens` tokens, `prefill` the rest."""

    slot_mapping: torch.Tensor  # [num_tokens] int64, the cache slot of each token
    num_decode_tokens: int
    decode: DecodeMetadata | None  # None when no row decodes
    prefill: PrefillMetadata | None  # None when no row prefills


class PrefillBackend(Protocol):
    """Attention of prompt chunks over the paged cache (causal, grouped queries)."""

    name: str

    def prefill(
        self, query: torch.Tensor, kv_cache: LayerKVCache, metadata: PrefillMetadata, scale: float
    ) -> torch.Tensor:
        """query [num_tokens, num_heads, head_dim] → output of the same shape and dtype."""
        ...


class DecodeBackend(Protocol):
    """Attention of single tokens over the paged cache (grouped queries)."""

    name: str
    supports_cuda_graphs: bool  # False: `decode` reads lengths on the host, so every step runs eagerly
    uses_shared_prefixes: bool  # False: it is not worth finding them

    def decode(
        self, query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float
    ) -> torch.Tensor:
        """query [num_seqs, num_heads, head_dim] → output of the same shape and dtype.

        With `supports_cuda_graphs` it is captured: no synchronisation, no shape that depends on a tensor's values.
        """
        ...
