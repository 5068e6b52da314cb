"""The interface of attention backends: the metadata of a step, and a protocol each for prefill and decode.

A step's tokens lie in one flat batch: first one token for each decode row, then the chunks of the
prefill rows one after another. Keys and values of all of them are stored in the paged cache before
any attention runs, so every query reads its whole context, its own token included, from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache, PrefillMetadata

__all__ = [
    "AttentionMetadata",
    "DecodeBackend",
    "DecodeMetadata",
    "LayerKVCache",
    "PrefillBackend",
    "PrefillMetadata",
]


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
        """Returns the output for query [num_tokens, num_heads, head_dim], in the same shape and dtype."""
        ...


class DecodeBackend(Protocol):
    """Attention of single tokens over the paged cache (grouped queries)."""

    name: str
    supports_cuda_graphs: bool  # False: `decode` reads lengths on the host, so every step runs eagerly
    uses_shared_prefixes: bool  # False: the engine does not look for them

    def decode(
        self, query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float
    ) -> torch.Tensor:
        """Returns the output for query [num_seqs, num_heads, head_dim], in the same shape and dtype.

        With `supports_cuda_graphs` the call is captured: it must not synchronise, and no shape may depend on a tensor's
        values.
        """
        ...
