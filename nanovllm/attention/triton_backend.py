"""Attention through our own Triton kernels: any CUDA device and dtype, any page size."""

from __future__ import annotations

import torch

from nanovllm.attention.interface import DecodeMetadata, LayerKVCache, PrefillMetadata
from nanovllm.kernels.dequantize_pages import dequantize_pages
from nanovllm.kernels.paged_decode import paged_decode
from nanovllm.kernels.paged_decode_fp8 import paged_decode_fp8
from nanovllm.kernels.paged_prefill import paged_prefill
from nanovllm.kernels.paged_prefill_hopper import takes_queries_on_hopper

_MAX_COPIED_KEYS = 4  # of an FP8 cache, for each query: beyond it, the copy costs more than it saves


class TritonBackend:
    """Paged prefill and split-KV decode. On a CPU its kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""

    name = "triton"
    supports_cuda_graphs = True
    uses_shared_prefixes = True

    def prefill(
        self, query: torch.Tensor, kv_cache: LayerKVCache, metadata: PrefillMetadata, scale: float
    ) -> torch.Tensor:
        """query [num_tokens, num_heads, head_dim] → the same shape and dtype."""
        key, value, key_scale, value_scale = kv_cache.key, kv_cache.value, kv_cache.key_scale, kv_cache.value_scale
        block_tables, context_lens = metadata.block_tables, metadata.context_lens
        if key_scale is not None and value_scale is not None and _worth_copying(query, kv_cache, metadata):
            key, value, block_tables = dequantize_pages(
                key_cache=key,
                value_cache=value,
                key_scale=key_scale,
                value_scale=value_scale,
                block_tables=block_tables,
                context_lens=context_lens,
                max_context_len=metadata.max_seqlen_k,
                dtype=query.dtype,
            )
            key_scale = value_scale = None
        return paged_prefill(
            query,
            key_cache=key,
            value_cache=value,
            block_tables=block_tables,
            cu_seqlens_q=metadata.cu_seqlens_q,
            context_lens=context_lens,
            max_seqlen_q=metadata.max_seqlen_q,
            scale=scale,
            key_scale=key_scale,
            value_scale=value_scale,
            use_triton=True,
        )

    def decode(
        self, query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float
    ) -> torch.Tensor:
        """query [num_seqs, num_heads, head_dim] → the same shape and dtype; may be captured in a CUDA graph."""
        if kv_cache.key_scale is not None and kv_cache.value_scale is not None:
            return paged_decode_fp8(
                query,
                kv_cache.key,
                kv_cache.value,
                kv_cache.key_scale,
                kv_cache.value_scale,
                metadata.block_tables,
                metadata.context_lens,
                metadata.max_context_len,
                scale,
                use_triton=True,
            )
        return paged_decode(
            query,
            kv_cache.key,
            kv_cache.value,
            metadata.block_tables,
            metadata.context_lens,
            metadata.max_context_len,
            scale,
            metadata.shared,
            use_triton=True,
        )


def _worth_copying(query: torch.Tensor, kv_cache: LayerKVCache, metadata: PrefillMetadata) -> bool:
    """Whether copying an FP8 cache's contexts for the Hopper kernel, which reads no scales, beats the plain one."""
    _, block_size, num_kv_heads, _ = kv_cache.key.shape
    copied = len(metadata.context_lens) * metadata.max_seqlen_k
    return copied <= _MAX_COPIED_KEYS * len(query) and takes_queries_on_hopper(query, num_kv_heads, block_size)
