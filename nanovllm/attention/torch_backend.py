"""Attention in plain torch: the backend for CPUs, and the reference that the other backends are compared with.

Pages are gathered by block table and given to torch's own fused attention, which on a CPU handles grouped queries
without copying keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from nanovllm.attention.interface import DecodeMetadata, LayerKVCache, PrefillMetadata

_DECODE_BUCKET = 16  # sequences of similar length attend together: little padding, and the gathered keys stay in cache


class TorchBackend:
    """Prefill and decode on any device that torch supports."""

    name = "torch"
    supports_cuda_graphs = False
    supports_prefill_graphs = False
    uses_shared_prefixes = False

    def __init__(self) -> None:
        # Shared by all layers of a decode step with the same window; the first of them makes it.
        self._planned: tuple[DecodeMetadata, dict[int | None, _DecodePlan]] | None = None

    def prefill(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: PrefillMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Returns the output for query [num_tokens, num_heads, head_dim]. Computes one sequence at a time, unpadded."""
        if out is None:
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_dim]
        starts = metadata.cu_seqlens_q.tolist()
        for seq, context_len in enumerate(metadata.context_lens.tolist()):
            chunk = slice(starts[seq], starts[seq + 1])
            query_len = chunk.stop - chunk.start
            if not query_len:  # padding
                continue
            first = 0 if window is None else max(context_len - query_len - window + 1, 0)  # key that a query sees
            positions = torch.arange(first, context_len, device=query.device).unsqueeze(0)
            slots = _slots(metadata.block_tables[seq : seq + 1], positions, kv_cache.key.shape[1])
            keys, values = _gather(kv_cache, slots, query.dtype)
            # Without a cached prefix torch's own causal mask applies, which skips the masked part.
            whole = query_len == context_len <= (window or context_len)
            mask = None if whole else _chunk_mask(query_len, context_len - first, window, query.device)
            attended = scaled_dot_product_attention(
                query[chunk].transpose(0, 1).unsqueeze(0),  # [1, num_heads, query_len, head_dim]
                keys,
                values,
                attn_mask=mask,
                is_causal=whole,
                scale=scale,
                enable_gqa=True,
            )
            out[chunk] = attended.squeeze(0).transpose(0, 1)
        return out

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: DecodeMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Returns the output for query [num_seqs, num_heads, head_dim]. Sequences of similar length attend together."""
        planned = self._planned  # read once: kernels are compiled by steps in several threads
        if planned is None or planned[0] is not metadata:
            self._planned = planned = (metadata, {})
        plans = planned[1]
        if window not in plans:
            plans[window] = _DecodePlan.of(metadata, kv_cache.key.shape[1], query.dtype, window)
        plan = plans[window]
        if plan.order is None or plan.inverse is None:
            attended = _decode_bucket(query, kv_cache, plan.buckets[0], scale)
        else:
            parts = zip(query.index_select(0, plan.order).split(_DECODE_BUCKET), plan.buckets, strict=True)
            ordered = torch.cat([_decode_bucket(part, kv_cache, bucket, scale) for part, bucket in parts])
            attended = ordered.index_select(0, plan.inverse)
        return attended if out is None else out.copy_(attended)


@dataclass(frozen=True)
class _Bucket:
    """Sequences that attend together, the same in every layer of a step."""

    slots: torch.Tensor  # [num_seqs, longest] int64, where their keys are
    mask: torch.Tensor  # [num_seqs, 1, 1, longest] of the query's dtype, -inf past a sequence's end


@dataclass(frozen=True)
class _DecodePlan:
    buckets: list[_Bucket]
    order: torch.Tensor | None = None  # [num_seqs] int64, sequences by length; None: one bucket, in the given order
    inverse: torch.Tensor | None = None  # [num_seqs] int64, the place of each sequence in that order

    @classmethod
    def of(cls, metadata: DecodeMetadata, block_size: int, dtype: torch.dtype, window: int | None) -> _DecodePlan:
        if len(metadata.context_lens) <= _DECODE_BUCKET:
            return cls([_bucket(metadata.block_tables, metadata.context_lens, block_size, dtype, window)])
        order = metadata.context_lens.argsort()
        buckets = [
            _bucket(metadata.block_tables[rows], metadata.context_lens[rows], block_size, dtype, window)
            for rows in order.split(_DECODE_BUCKET)
        ]
        return cls(buckets, order, order.argsort())


def _bucket(
    block_tables: torch.Tensor, context_lens: torch.Tensor, block_size: int, dtype: torch.dtype, window: int | None
) -> _Bucket:
    ends = context_lens.unsqueeze(1)
    longest = int(context_lens.max())
    position = torch.arange(min(longest, window or longest), device=ends.device)
    if window is not None:
        position = position + (ends - window).clamp(min=0)
    # Past its end a shorter sequence repeats its last key, masked: unused slots may hold NaN.
    slots = _slots(block_tables, position.minimum(ends - 1), block_size)
    mask = torch.zeros(slots.shape, dtype=dtype, device=ends.device).masked_fill_(position >= ends, -torch.inf)
    return _Bucket(slots, mask[:, None, None, :])


def _decode_bucket(query: torch.Tensor, kv_cache: LayerKVCache, bucket: _Bucket, scale: float) -> torch.Tensor:
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.key.shape[2]
    keys, values = _gather(kv_cache, bucket.slots, query.dtype)
    # Query heads that share a KV head become query positions: one pass over each key serves them all.
    grouped = query.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=bucket.mask, scale=scale)
    return out.reshape(num_seqs, num_heads, head_dim)


def _slots(block_tables: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Returns the cache slots of `positions` [num_seqs, length], the same shape."""
    blocks = block_tables.gather(1, positions // block_size).long()
    return blocks * block_size + positions % block_size


def _gather(kv_cache: LayerKVCache, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values at `slots` [num_seqs, length], each [num_seqs, num_kv_heads, length, head_dim]."""
    _, block_size, num_kv_heads, head_dim = kv_cache.key.shape

    def gather(cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if scale is None:
            rows = cache.view(-1, num_kv_heads * head_dim).index_select(0, slots.flatten())
            return rows.view(*slots.shape, num_kv_heads, head_dim).transpose(1, 2)
        rows = cache.view(torch.uint8).view(-1, num_kv_heads * head_dim).index_select(0, slots.flatten())
        heads = rows.view(cache.dtype).view(*slots.shape, num_kv_heads, head_dim)
        scales = scale[slots // block_size, :, slots % block_size]  # [num_seqs, length, num_kv_heads]
        return (heads.float() * scales.unsqueeze(-1)).to(dtype).transpose(1, 2)

    return gather(kv_cache.key, kv_cache.key_scale), gather(kv_cache.value, kv_cache.value_scale)


def _chunk_mask(query_len: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Returns [query_len, num_keys] bool, True where a query sees a key. The last query is the last key's token."""
    mask = torch.ones(query_len, num_keys, dtype=torch.bool, device=device).tril(num_keys - query_len)
    return mask if window is None else mask.triu(num_keys - query_len - window + 1)
