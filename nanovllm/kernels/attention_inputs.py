"""The inputs of the attention kernels: a layer's pages of the KV cache, and the sequences of a step.

`nanovllm.attention.interface` re-exports these names; backends and models import them from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerKVCache:
    """One layer's pages. Block b, offset o holds the token at slot b · block_size + o.

    Keys and values have the same strides. An FP8 cache has scales: the value of a token's head is what is
    stored times its scale. A page's scales of one head are adjacent, because attention reads them that way.
    """

    key: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    key_scale: torch.Tensor | None = None  # [num_blocks, num_kv_heads, block_size] float32, contiguous
    value_scale: torch.Tensor | None = None  # [num_blocks, num_kv_heads, block_size] float32, contiguous

    @property
    def is_quantized(self) -> bool:
        """True if keys and values are float8_e4m3fn with scales."""
        return self.key_scale is not None and self.value_scale is not None

    @property
    def scale_page_stride(self) -> int:
        """Stride between the scales of two pages, in elements; 0 without scales."""
        return 0 if self.key_scale is None else self.key_scale.stride(0)


@dataclass(frozen=True)
class SharedPrefixes:
    """Tiles of adjacent rows whose block tables begin with the same pages. Each row is longer than its shared part."""

    lens: torch.Tensor  # [num_seqs] int32, tokens that the row's tile shares (0: the row is in no tile)
    tile_rows: torch.Tensor  # [num_seqs] int32, rows of the tile that begins with this row (0: no tile begins here)
    max_tile_rows: int


@dataclass(frozen=True)
class PrefillMetadata:
    """Chunks of prompts: sequence i has queries cu_seqlens_q[i] … cu_seqlens_q[i + 1].

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
    """One query per sequence, at position context_lens - 1."""

    context_lens: torch.Tensor  # [num_seqs] int32, keys in the cache, the query's own included; ≥ 1
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    max_context_len: int  # an upper bound of context_lens, fixed when a CUDA graph is captured
    shared: SharedPrefixes | None = None  # prefixes that a backend may read once for many sequences
