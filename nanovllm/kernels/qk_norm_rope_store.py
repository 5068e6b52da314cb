"""What lies between the QKV projection and attention, in one launch: norm, rotation, and the store into the KV cache.

RMSNorm of each query and key head (models without it give no weights), rotary position embedding, and keys and values
into their pages. Keys are not written anywhere else: attention reads them from the cache.
Sources: Henry et al., "Query-Key Normalization for Transformers", 2020, https://arxiv.org/abs/2010.04245;
Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864, in the half-rotation layout of Hugging Face
(component i turns with component i + head_dim / 2).
"""

from __future__ import annotations

import torch

from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.triton_support import jit, next_power_of_2, runs_triton, tl

_BLOCK_HEADS = 8  # heads a program handles, at most
_NUM_WARPS = 2


@jit
def _load_rotated(
    head_ptrs: tl.tensor,
    mask: tl.tensor,
    weight_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The two halves [BLOCK_HEADS, BLOCK_HALF] of some heads, normed and rotated, in fp32."""
    low = tl.load(head_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(head_ptrs + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        dim = tl.arange(0, BLOCK_HALF)
        mean_square = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF_DIM)
        scale = (1.0 / tl.sqrt(mean_square + eps))[:, None]
        low = low * scale * tl.load(weight_ptr + dim, mask=dim < HALF_DIM, other=0.0).to(tl.float32)[None, :]
        high_weight = tl.load(weight_ptr + HALF_DIM + dim, mask=dim < HALF_DIM, other=0.0).to(tl.float32)
        high = high * scale * high_weight[None, :]
    return low * cos - high * sin, high * cos + low * sin


@jit
def _store_halves(
    low: tl.tensor, high: tl.tensor, head_ptrs: tl.tensor, mask: tl.tensor, HALF_DIM: tl.constexpr
) -> None:
    dtype = head_ptrs.dtype.element_ty
    tl.store(head_ptrs, low.to(dtype), mask=mask)
    tl.store(head_ptrs + HALF_DIM, high.to(dtype), mask=mask)


@jit
def _qk_norm_rope_store_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    cos_sin_cache_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    query_out_ptr: tl.tensor,
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    token_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    block_size: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """A token's programs follow one another: its tiles of query heads, then those of KV heads."""
    query_tiles = tl.cdiv(num_heads, BLOCK_HEADS)
    tiles = query_tiles + tl.cdiv(num_kv_heads, BLOCK_HEADS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    dim = tl.arange(0, BLOCK_HALF)
    angle_ptr = cos_sin_cache_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF_DIM) + dim
    cos = tl.load(angle_ptr, mask=dim < HALF_DIM, other=0.0)[None, :]
    sin = tl.load(angle_ptr + HALF_DIM, mask=dim < HALF_DIM, other=0.0)[None, :]
    if tile < query_tiles:
        head = tile * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (head < num_heads)[:, None] & (dim < HALF_DIM)[None, :]
        within = head[:, None] * (2 * HALF_DIM) + dim[None, :]  # heads of a token lie side by side
        source = query_ptr + token * token_stride + within
        low, high = _load_rotated(source, mask, query_weight_ptr, cos, sin, eps, HAS_NORM, HALF_DIM, BLOCK_HALF)
        target = query_out_ptr + token * num_heads * (2 * HALF_DIM) + within
        _store_halves(low, high, target, mask, HALF_DIM)
    else:
        head = (tile - query_tiles) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (head < num_kv_heads)[:, None] & (dim < HALF_DIM)[None, :]
        within = head[:, None] * (2 * HALF_DIM) + dim[None, :]
        slot = tl.load(slot_mapping_ptr + token)
        stored = (slot // block_size) * page_stride + (slot % block_size) * slot_stride + within
        value_source = value_ptr + token * token_stride + within
        value_low = tl.load(value_source, mask=mask, other=0.0)
        value_high = tl.load(value_source + HALF_DIM, mask=mask, other=0.0)
        source = key_ptr + token * token_stride + within
        low, high = _load_rotated(source, mask, key_weight_ptr, cos, sin, eps, HAS_NORM, HALF_DIM, BLOCK_HALF)
        _store_halves(low, high, key_cache_ptr + stored, mask, HALF_DIM)
        _store_halves(value_low, value_high, value_cache_ptr + stored, mask, HALF_DIM)


def qk_norm_rope_store_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """What `qk_norm_rope_store` must equal, in plain torch; also what runs on a CPU."""
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, head_dim / 2]
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # each [num_tokens, 1, head_dim]
    # All heads at once: on a CPU it is the number of calls that costs.
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    heads = torch.cat((query, key), dim=1).float()  # [num_tokens, heads, head_dim]
    if query_weight is not None and key_weight is not None:
        weight = torch.cat((query_weight.expand(num_heads, -1), key_weight.expand(num_kv_heads, -1)))  # as one token
        heads = rms_norm_reference(heads, weight, eps)
    low, high = heads.chunk(2, dim=-1)
    turned = torch.cat((high, low), dim=-1).mul_(sin)
    rotated = heads.mul_(cos).add_(turned).to(query.dtype)
    key_cache.view(-1, *key.shape[1:]).index_copy_(0, slot_mapping, rotated[:, num_heads:])
    value_cache.view(-1, *value.shape[1:]).index_copy_(0, slot_mapping, value)
    return rotated[:, :num_heads]


def qk_norm_rope_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Norms and rotates query and key heads and stores keys and values in their slots; fp32 inside, rounded once.

    query [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim]: views of one fused
    projection (heads side by side); query_weight, key_weight [head_dim], or None for both: no norm; cos_sin_cache
    [max_position, head_dim] fp32, cosines in the first half; positions [num_tokens] int64.
    key_cache, value_cache [num_blocks, block_size, num_kv_heads, head_dim] are written in place, alike in strides, each
    page contiguous: a token at block slot // block_size, offset slot % block_size of its slot_mapping [num_tokens]
    int64, ≥ 0; of tokens with the same slot (padding's) any one is stored. → the query, of its shape.
    """
    if not runs_triton(query, use_triton):
        return qk_norm_rope_store_reference(
            query,
            key,
            value,
            query_weight,
            key_weight,
            eps,
            cos_sin_cache,
            positions,
            key_cache,
            value_cache,
            slot_mapping,
        )
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_dim]
    if num_tokens == 0:
        return query_out
    block_heads = min(next_power_of_2(max(num_heads, num_kv_heads)), _BLOCK_HEADS)
    tiles = -(-num_heads // block_heads) + -(-num_kv_heads // block_heads)
    has_norm = query_weight is not None and key_weight is not None
    _qk_norm_rope_store_kernel[(num_tokens * tiles,)](
        query,
        key,
        value,
        query_weight if has_norm else cos_sin_cache,  # not read without a norm
        key_weight if has_norm else cos_sin_cache,
        cos_sin_cache,
        positions,
        slot_mapping,
        query_out,
        key_cache,
        value_cache,
        query.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.shape[1],
        num_heads,
        num_kv_heads,
        eps,
        HAS_NORM=has_norm,
        HALF_DIM=head_dim // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=next_power_of_2(head_dim // 2),
        num_warps=_NUM_WARPS,
    )
    return query_out
