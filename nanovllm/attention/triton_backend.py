"""Attention through our own Triton kernels: any CUDA device and dtype, any page size."""

from __future__ import annotations

import torch

from nanovllm.attention.interface import DecodeMetadata, LayerKVCache, PrefillMetadata
from nanovllm.kernels.dequantize_pages import dequantize_pages
from nanovllm.kernels.paged_decode import paged_decode
from nanovllm.kernels.paged_decode_fp8 import paged_decode_fp8
from nanovllm.kernels.paged_prefill import paged_prefill
from nanovllm.kernels.paged_prefill_hopper import takes_queries_on_hopper

_MAX_COPIED_KEYS = 4  # of an FP8 cache, per query; a copy of more would cost too much time and memory
# Smaller steps are captured in CUDA graphs, whose shapes cannot depend on how much there is to copy.
MIN_COPYING_QUERIES = 1025


class TritonBackend:
    """Paged prefill and split-KV decode. On a CPU its kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""

    name = "triton"
    supports_cuda_graphs = True
    supports_prefill_graphs = True
    uses_shared_prefixes = True

    def prefill(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: PrefillMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Returns the output for query [num_tokens, num_heads, head_dim], in the same shape and dtype."""
        if kv_cache.is_quantized and _worth_copying(query, kv_cache, metadata):
            kv_cache, metadata = dequantize_pages(kv_cache, metadata, query.dtype)
        return paged_prefill(query, kv_cache, metadata, scale, out, window=window, use_triton=True)

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: DecodeMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Returns the output for query [num_seqs, num_heads, head_dim]; may be captured in a CUDA graph."""
        attend = paged_decode_fp8 if kv_cache.is_quantized else paged_decode
        return attend(query, kv_cache, metadata, scale, out, window=window, use_triton=True)


def _worth_copying(query: torch.Tensor, kv_cache: LayerKVCache, metadata: PrefillMetadata) -> bool:
    """Returns whether to copy an FP8 cache's contexts for the Hopper kernel, which is faster but reads no scales."""
    _, block_size, num_kv_heads, _ = kv_cache.key.shape
    if len(query) < MIN_COPYING_QUERIES:
        return False
    copied = len(metadata.context_lens) * metadata.max_seqlen_k
    return copied <= _MAX_COPIED_KEYS * len(query) and takes_queries_on_hopper(query, num_kv_heads, block_size)
