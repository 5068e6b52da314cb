"""The interface of attention backends: the metadata of a step, and a protocol each for prefill and decode.

A step's tokens lie in one flat batch: first one token for each decode row, then the chunks of the
prefill rows one after another. Keys and values of all of them are stored in the paged cache before
any attention runs, so every query reads its whole context, its own token included, from the cache.

In a captured step the batch is padded: more decode rows than there are run first, and the chunks' outputs, written
after theirs, overwrite what the padding rows wrote.
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
    """One step: `decode` covers the first `num_decode_tokens` tokens, `prefill` those of its chunks."""

    slot_mapping: torch.Tensor  # [num_tokens] int64, the cache slot of each token
    num_decode_tokens: int
    decode: DecodeMetadata | None  # None when no row decodes
    prefill: PrefillMetadata | None  # None when no row prefills
    first_prefill_token: int  # the token that `prefill.cu_seqlens_q` counts from


class PrefillBackend(Protocol):
    """Attention of prompt chunks over the paged cache (causal, grouped queries)."""

    name: str
    supports_prefill_graphs: bool  # False: steps with chunks run eagerly

    def prefill(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: PrefillMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Returns the output for query [num_tokens, num_heads, head_dim], in the same shape and dtype.

        out: where to write it; None: a new tensor. window: how many keys a query attends to, its own and those just
        before; None: all. With `supports_prefill_graphs` the call may be captured: it must not synchronise, the
        metadata's lengths are upper bounds, and tokens of no chunk keep their value in `out`.
        """
        ...


class DecodeBackend(Protocol):
    """Attention of single tokens over the paged cache (grouped queries)."""

    name: str
    supports_cuda_graphs: bool  # False: `decode` reads lengths on the host, so every step runs eagerly
    uses_shared_prefixes: bool  # False: the engine does not look for them

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: DecodeMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Returns the output for query [num_seqs, num_heads, head_dim], in the same shape and dtype.

        out: where to write it; None: a new tensor. window: as in `prefill`. With `supports_cuda_graphs` the call is
        captured: it must not synchronise, and no shape may depend on a tensor's values.
        """
        ...
