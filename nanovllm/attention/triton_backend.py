"""Attention through our own Triton kernels: any CUDA device and dtype, any page size."""

from __future__ import annotations

import torch

from nanovllm.attention.interface import DecodeMetadata, LayerKVCache, PrefillMetadata
from nanovllm.kernels.paged_decode import paged_decode
from nanovllm.kernels.paged_decode_fp8 import paged_decode_fp8
from nanovllm.kernels.paged_prefill import paged_prefill


class TritonBackend:
    """Paged prefill and split-KV decode. On a CPU its kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""

    name = "triton"
    supports_cuda_graphs = True
    uses_shared_prefixes = True

    def prefill(
        self, query: torch.Tensor, kv_cache: LayerKVCache, metadata: PrefillMetadata, scale: float
    ) -> torch.Tensor:
        """query [num_tokens, num_heads, head_dim] → the same shape and dtype."""
        return paged_prefill(
            query,
            kv_cache.key,
            kv_cache.value,
            metadata.block_tables,
            metadata.cu_seqlens_q,
            metadata.context_lens,
            metadata.max_seqlen_q,
            scale,
            kv_cache.key_scale,
            kv_cache.value_scale,
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
