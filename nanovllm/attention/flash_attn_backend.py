"""Attention through the packages flash-attn (FlashAttention 2) and flash-attn-4 (FlashAttention 4, prefill only).

Sources: Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691; https://github.com/Dao-AILab/flash-attention.
Both packages are optional. They are imported when a backend is built or one of the `…_problem` functions is called.
"""

from __future__ import annotations

from importlib import metadata as package_metadata

import torch

from nanovllm.attention.interface import DecodeMetadata, LayerKVCache, PrefillMetadata

PAGE_MULTIPLE = 256  # FlashAttention 2 reads pages of this many tokens, or multiples


class FlashAttentionBackend:
    """FlashAttention 2: prefill and decode; bf16 and fp16, pages of a multiple of 256 tokens."""

    name = "flash_attn"
    supports_cuda_graphs = True
    supports_prefill_graphs = False
    uses_shared_prefixes = False

    def __init__(self) -> None:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._varlen = flash_attn_varlen_func
        self._with_kvcache = flash_attn_with_kvcache

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
        ends = metadata.context_lens.cumsum(0, dtype=torch.int32)
        attended: torch.Tensor = self._varlen(
            query,
            kv_cache.key,
            kv_cache.value,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=torch.nn.functional.pad(ends, (1, 0)),  # [num_seqs + 1]
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            block_table=metadata.block_tables,
        )
        return attended if out is None else out.copy_(attended)

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
        attended: torch.Tensor = self._with_kvcache(
            query.unsqueeze(1),  # [num_seqs, 1, num_heads, head_dim]
            kv_cache.key,
            kv_cache.value,
            cache_seqlens=metadata.context_lens,
            block_table=metadata.block_tables,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        attended = attended.squeeze(1)
        return attended if out is None else out.copy_(attended)


class FlashAttention4Prefill:
    """FlashAttention 4: prefill on Hopper and Blackwell; bf16 and fp16. Compiles at the first call, 2 to 3 s.

    Pages of exactly one key tile (128 tokens) are fastest but are read to their end, so all of the last page must be
    finite. Of pages of other sizes it reads only the sequence's tokens.
    """

    name = "flash_attn_4"
    supports_prefill_graphs = False

    def __init__(self) -> None:
        from flash_attn.cute import flash_attn_varlen_func

        self._varlen = flash_attn_varlen_func

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
        result = self._varlen(
            query,
            kv_cache.key,
            kv_cache.value,
            cu_seqlens_q=metadata.cu_seqlens_q,
            seqused_k=metadata.context_lens,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_seqlen_k,
            page_table=metadata.block_tables,
            softmax_scale=scale,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
        )
        attended: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return attended if out is None else out.copy_(attended)


def flash_attn_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Returns why FlashAttention 2 cannot run here, or None. Tries a small call: builds differ in their kernels."""
    try:
        backend = FlashAttentionBackend()
    except Exception as error:  # a build for another torch fails with many kinds of errors
        return f"package flash-attn is not importable ({type(error).__name__}: {_first_line(error)})"
    page = torch.zeros(1, PAGE_MULTIPLE, 1, head_dim, dtype=dtype, device=device)  # [1, block_size, 1, head_dim]
    one = torch.ones(1, dtype=torch.int32, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)  # [1, 1]
    query = page[:, 0]  # [1, 1, head_dim]
    cache = LayerKVCache(page, page)
    try:
        backend.decode(query, cache, DecodeMetadata(one, table, 1), 1.0)
        backend.prefill(query, cache, PrefillMetadata(torch.cat((one - 1, one)), one, table, 1, 1), 1.0)
    except Exception as error:
        return f"a trial call failed ({type(error).__name__}: {_first_line(error)})"
    return None


def flash_attn_4_problem(device: torch.device) -> str | None:
    """Returns why FlashAttention 4 cannot run here, or None."""
    try:
        # flash-attn 2.8 ships an early flash_attn.cute that has no paged cache on Hopper: ask for the package by name.
        package_metadata.version("flash-attn-4")
    except package_metadata.PackageNotFoundError:
        return "package flash-attn-4 is not installed"
    major = torch.cuda.get_device_capability(device)[0]
    if major not in (9, 10):
        return f"compute capability {major}.x is neither Hopper's nor Blackwell's"
    try:
        FlashAttention4Prefill()
    except Exception as error:
        return f"package flash-attn-4 is not importable ({type(error).__name__}: {_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]
