"""RMSNorm of each query and key head, then rotary position embedding, in one launch.

Sources: Henry et al., "Query-Key Normalization for Transformers", 2020, https://arxiv.org/abs/2010.04245;
Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864, in the half-rotation layout of Hugging Face
(component i turns with component i + head_dim / 2).
"""

from __future__ import annotations

import torch

from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.triton_support import jit, next_power_of_2, runs_triton, tl

_BLOCK_HEADS = 8  # heads a program handles, at most


@jit
def _norm_and_rotate(
    in_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    first_head: tl.tensor,
    num_heads: tl.tensor,
    in_head_stride: tl.tensor,
    eps: tl.tensor,
    HALF_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """BLOCK_HEADS heads of one token, held as their two halves [BLOCK_HEADS, BLOCK_HALF]."""
    head = first_head + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_HALF)
    dim_mask = dim < HALF_DIM
    mask = (head < num_heads)[:, None] & dim_mask[None, :]
    source = in_ptr + head[:, None] * in_head_stride + dim[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    mean_square = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF_DIM)
    scale = (1.0 / tl.sqrt(mean_square + eps))[:, None]
    low = low * scale * tl.load(weight_ptr + dim, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    high = high * scale * tl.load(weight_ptr + HALF_DIM + dim, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + head[:, None] * (2 * HALF_DIM) + dim[None, :]
    tl.store(target, (low * cos - high * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF_DIM, (high * cos + low * sin).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _qk_norm_rope_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    cos_sin_cache_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    query_out_ptr: tl.tensor,
    key_out_ptr: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    eps: tl.tensor,
    HALF_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Program (token, tile): the tiles of query heads come first, then those of key heads."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    query_tiles = tl.cdiv(num_heads, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_HALF)
    angle_ptr = cos_sin_cache_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF_DIM) + dim
    cos = tl.load(angle_ptr, mask=dim < HALF_DIM, other=0.0)[None, :]
    sin = tl.load(angle_ptr + HALF_DIM, mask=dim < HALF_DIM, other=0.0)[None, :]
    if tile < query_tiles:
        _norm_and_rotate(
            query_ptr + token * query_token_stride,
            query_out_ptr + token * num_heads * (2 * HALF_DIM),
            query_weight_ptr,
            cos,
            sin,
            tile * BLOCK_HEADS,
            num_heads,
            query_head_stride,
            eps,
            HALF_DIM,
            BLOCK_HEADS,
            BLOCK_HALF,
        )
    else:
        _norm_and_rotate(
            key_ptr + token * key_token_stride,
            key_out_ptr + token * num_kv_heads * (2 * HALF_DIM),
            key_weight_ptr,
            cos,
            sin,
            (tile - query_tiles) * BLOCK_HEADS,
            num_kv_heads,
            key_head_stride,
            eps,
            HALF_DIM,
            BLOCK_HEADS,
            BLOCK_HALF,
        )


def qk_norm_rope_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `qk_norm_rope` must equal, in plain torch; also what runs on a CPU."""
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, head_dim / 2]
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # each [num_tokens, 1, head_dim]
    # All heads at once: on a CPU it is the number of calls that costs.
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    weight = torch.cat((query_weight.expand(num_heads, -1), key_weight.expand(num_kv_heads, -1)))  # [heads, head_dim]
    normed = rms_norm_reference(torch.cat((query, key), dim=1).float(), weight, eps)  # [num_tokens, heads, head_dim]
    low, high = normed.chunk(2, dim=-1)
    turned = torch.cat((high, low), dim=-1).mul_(sin)
    rotated = normed.mul_(cos).add_(turned).to(query.dtype)
    return rotated[:, :num_heads], rotated[:, num_heads:]


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    *,
    use_triton: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises every head over head_dim, then rotates it by its token's position; fp32 inside, rounded once.

    query [num_tokens, num_heads, head_dim] and key [num_tokens, num_kv_heads, head_dim]: may be strided views of a
    fused projection (head_dim contiguous); query_weight, key_weight [head_dim]; cos_sin_cache [max_position, head_dim]
    fp32, cosines in the first half; positions [num_tokens] int64 → (query, key) of these shapes, head_dim contiguous.
    """
    if not runs_triton(query, use_triton):
        return qk_norm_rope_reference(query, key, query_weight, key_weight, cos_sin_cache, positions, eps)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_dim]
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)  # [num_tokens, num_kv_heads, head_dim]
    if num_tokens == 0:
        return query_out, key_out
    block_heads = min(next_power_of_2(max(num_heads, num_kv_heads)), _BLOCK_HEADS)
    tiles = -(-num_heads // block_heads) + -(-num_kv_heads // block_heads)
    _qk_norm_rope_kernel[(num_tokens, tiles)](
        query,
        key,
        query_weight,
        key_weight,
        cos_sin_cache,
        positions,
        query_out,
        key_out,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        num_heads,
        num_kv_heads,
        eps,
        HALF_DIM=head_dim // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return query_out, key_out
