"""Attention in plain torch: what runs on a CPU, and what the other backends are compared with.

Pages are gathered by block table and given to torch's own fused attention, which on a CPU handles grouped queries
without copying keys.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from nanovllm.attention.interface import DecodeMetadata, LayerKVCache, PrefillMetadata

_DECODE_BUCKET = 16  # sequences of like length attend together: little padding, and the gathered keys stay in cache


class TorchBackend:
    """Prefill and decode on any device torch runs on."""

    name = "torch"
    supports_cuda_graphs = False

    def prefill(
        self, query: torch.Tensor, kv_cache: LayerKVCache, metadata: PrefillMetadata, scale: float
    ) -> torch.Tensor:
        """One sequence after another: no padding. query [num_tokens, num_heads, head_dim] → the same shape."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_dim]
        starts = metadata.cu_seqlens_q.tolist()
        for seq, context_len in enumerate(metadata.context_lens.tolist()):
            chunk = slice(starts[seq], starts[seq + 1])
            query_len = chunk.stop - chunk.start
            positions = torch.arange(context_len, device=query.device).unsqueeze(0)
            keys, values = _gather(kv_cache, metadata.block_tables[seq : seq + 1], positions)
            # With no cached prefix the mask is torch's own causal one, which skips what it hides.
            whole = query_len == context_len
            mask = None if whole else _chunk_mask(query_len, context_len, query.device)
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
        self, query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float
    ) -> torch.Tensor:
        """Sequences of like length together. query [num_seqs, num_heads, head_dim] → the same shape."""
        if query.shape[0] <= _DECODE_BUCKET:
            return _decode_bucket(query, kv_cache, metadata.block_tables, metadata.context_lens, scale)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_seqs, num_heads, head_dim]
        for rows in metadata.context_lens.argsort().split(_DECODE_BUCKET):
            out[rows] = _decode_bucket(
                query[rows], kv_cache, metadata.block_tables[rows], metadata.context_lens[rows], scale
            )
        return out


def _decode_bucket(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.key.shape[2]
    position = torch.arange(int(context_lens.max()), device=query.device)
    # Behind its end a shorter sequence repeats its last key, masked: what lies in unused slots may be NaN.
    keys, values = _gather(kv_cache, block_tables, position.minimum(context_lens.unsqueeze(1) - 1))
    visible = position < context_lens.unsqueeze(1)  # [num_seqs, longest]
    # Query heads that share a KV head are given as so many query positions: one pass over each key serves them all.
    grouped = query.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None, :], scale=scale)
    return out.reshape(num_seqs, num_heads, head_dim)


def _gather(
    kv_cache: LayerKVCache, block_tables: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at `positions` [num_seqs, length]: each [num_seqs, num_kv_heads, length, head_dim]."""
    _, block_size, num_kv_heads, head_dim = kv_cache.key.shape
    slots = block_tables.gather(1, positions // block_size) * block_size + positions % block_size

    def gather(cache: torch.Tensor) -> torch.Tensor:
        rows = cache.view(-1, num_kv_heads * head_dim).index_select(0, slots.flatten())
        return rows.view(*positions.shape, num_kv_heads, head_dim).transpose(1, 2)

    return gather(kv_cache.key), gather(kv_cache.value)


def _chunk_mask(query_len: int, context_len: int, device: torch.device) -> torch.Tensor:
    """[query_len, context_len] bool, True where the query, one of the context's last ones, sees the key."""
    return torch.ones(query_len, context_len, dtype=torch.bool, device=device).tril(context_len - query_len)
