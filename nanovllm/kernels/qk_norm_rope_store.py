"""Everything between the QKV projection and attention in one launch: norm, rotation, and the store into the KV cache.

RMSNorm of each query and key head and rotary position embedding (where the model has them), and keys and values into
their pages. Keys are not written anywhere else: attention reads them from the cache. In an FP8 cache each head is
divided by a scale of its own, so that its largest component becomes e4m3's largest number: no calibration, and a
token's entry depends on that token alone.
Sources: Henry et al., "Query-Key Normalization for Transformers", 2020, https://arxiv.org/abs/2010.04245;
Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864, in the half-rotation layout of Hugging Face
(component i turns with component i + head_dim / 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.attention_inputs import LayerKVCache
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.triton_support import (
    jit,
    let_next_kernel_start,
    next_power_of_2,
    pdl_options,
    runs_triton,
    tl,
    wait_for_previous_kernel,
)

_BLOCK_HEADS = 8  # heads a program handles, at most
_NUM_WARPS = 4
FP8_MAX = 448.0  # the largest number of e4m3
_SMALLEST_AMAX = 1e-12  # so that the scale of a head of zeros is not 0


@dataclass(frozen=True)
class QKNorm:
    """RMS norm of every query and key head."""

    query_weight: torch.Tensor  # [head_dim]
    key_weight: torch.Tensor  # [head_dim]
    eps: float


@jit
def _load_rotated(
    head_ptrs: tl.tensor,
    mask: tl.tensor,
    weight_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Loads heads, normed and rotated, in fp32: their two halves, each [BLOCK_HEADS, BLOCK_HALF]."""
    low = tl.load(head_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(head_ptrs + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        dim = tl.arange(0, BLOCK_HALF)
        mean_square = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF_DIM)
        scale = (1.0 / tl.sqrt(mean_square + eps))[:, None]
        low = low * scale * tl.load(weight_ptr + dim, mask=dim < HALF_DIM, other=0.0).to(tl.float32)[None, :]
        high_weight = tl.load(weight_ptr + HALF_DIM + dim, mask=dim < HALF_DIM, other=0.0).to(tl.float32)
        high = high * scale * high_weight[None, :]
    if HAS_ROPE:
        low, high = low * cos - high * sin, high * cos + low * sin
    return low, high


@jit
def _store_halves(
    low: tl.tensor, high: tl.tensor, head_ptrs: tl.tensor, mask: tl.tensor, HALF_DIM: tl.constexpr
) -> None:
    """Stores the two halves of heads in the target's dtype."""
    dtype = head_ptrs.dtype.element_ty
    tl.store(head_ptrs, low.to(dtype), mask=mask)
    tl.store(head_ptrs + HALF_DIM, high.to(dtype), mask=mask)


@jit
def _store_quantized(
    low: tl.tensor,
    high: tl.tensor,
    head_ptrs: tl.tensor,
    mask: tl.tensor,
    scale_ptrs: tl.tensor,
    head_mask: tl.tensor,
    HALF_DIM: tl.constexpr,
    FP8_MAX: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
) -> None:
    """Stores each head divided by its scale, and the scales [BLOCK_HEADS]."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
    amax = tl.maximum(amax, SMALLEST_AMAX)
    tl.store(scale_ptrs, amax / FP8_MAX, mask=head_mask)
    inverse = (FP8_MAX / amax)[:, None]
    _store_halves(low * inverse, high * inverse, head_ptrs, mask, HALF_DIM)


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
    key_scale_ptr: tl.tensor,
    value_scale_ptr: tl.tensor,
    token_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    FP8_MAX: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per tile of heads. A token's programs are adjacent: tiles of query heads, then tiles of KV heads."""
    let_next_kernel_start(PDL)
    query_tiles: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    tiles: tl.constexpr = query_tiles + (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    dim = tl.arange(0, BLOCK_HALF)
    cos, sin = 0.0, 0.0
    if HAS_ROPE:
        angle_ptr = cos_sin_cache_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF_DIM) + dim
        cos = tl.load(angle_ptr, mask=dim < HALF_DIM, other=0.0)[None, :]
        sin = tl.load(angle_ptr + HALF_DIM, mask=dim < HALF_DIM, other=0.0)[None, :]
    slot = tl.load(slot_mapping_ptr + token)
    wait_for_previous_kernel(PDL)
    if tile < query_tiles:
        head = tile * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (head < NUM_HEADS)[:, None] & (dim < HALF_DIM)[None, :]
        within = head[:, None] * (2 * HALF_DIM) + dim[None, :]  # heads of a token lie side by side
        source = query_ptr + token * token_stride + within
        low, high = _load_rotated(
            source, mask, query_weight_ptr, cos, sin, eps, HAS_NORM, HAS_ROPE, HALF_DIM, BLOCK_HALF
        )
        target = query_out_ptr + token * NUM_HEADS * (2 * HALF_DIM) + within
        _store_halves(low, high, target, mask, HALF_DIM)
    else:
        head = (tile - query_tiles) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (head < NUM_KV_HEADS)[:, None] & (dim < HALF_DIM)[None, :]
        within = head[:, None] * (2 * HALF_DIM) + dim[None, :]
        page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        stored = page * page_stride + offset * slot_stride + within
        value_source = value_ptr + token * token_stride + within
        value_low = tl.load(value_source, mask=mask, other=0.0)
        value_high = tl.load(value_source + HALF_DIM, mask=mask, other=0.0)
        source = key_ptr + token * token_stride + within
        low, high = _load_rotated(source, mask, key_weight_ptr, cos, sin, eps, HAS_NORM, HAS_ROPE, HALF_DIM, BLOCK_HALF)
        if IS_QUANTIZED:
            scale_at = page * scale_page_stride + head * BLOCK_SIZE + offset
            head_mask = head < NUM_KV_HEADS
            _store_quantized(
                low,
                high,
                key_cache_ptr + stored,
                mask,
                key_scale_ptr + scale_at,
                head_mask,
                HALF_DIM,
                FP8_MAX,
                SMALLEST_AMAX,
            )
            _store_quantized(
                value_low,
                value_high,
                value_cache_ptr + stored,
                mask,
                value_scale_ptr + scale_at,
                head_mask,
                HALF_DIM,
                FP8_MAX,
                SMALLEST_AMAX,
            )
        else:
            _store_halves(low, high, key_cache_ptr + stored, mask, HALF_DIM)
            _store_halves(value_low, value_high, value_cache_ptr + stored, mask, HALF_DIM)


def qk_norm_rope_store_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    norm: QKNorm | None,
    cos_sin_cache: torch.Tensor | None,
    positions: torch.Tensor,
    kv_cache: LayerKVCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Reference for `qk_norm_rope_store` in plain torch; also used on CPUs."""
    # All heads at once: on a CPU the cost is the number of calls.
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    heads = torch.cat((query, key), dim=1).float()  # [num_tokens, heads, head_dim]
    if norm is not None:
        weights = (norm.query_weight.expand(num_heads, -1), norm.key_weight.expand(num_kv_heads, -1))
        heads = rms_norm_reference(heads, torch.cat(weights), norm.eps)  # weight [heads, head_dim]
    rotated = heads if cos_sin_cache is None else _rotated(heads, cos_sin_cache, positions)
    if kv_cache.key_scale is not None and kv_cache.value_scale is not None:
        _store_quantized_reference(rotated[:, num_heads:], kv_cache.key, kv_cache.key_scale, slot_mapping)
        _store_quantized_reference(value.float(), kv_cache.value, kv_cache.value_scale, slot_mapping)
        return rotated[:, :num_heads].to(query.dtype)
    rotated = rotated.to(query.dtype)
    kv_cache.key.view(-1, *key.shape[1:]).index_copy_(0, slot_mapping, rotated[:, num_heads:])
    kv_cache.value.view(-1, *value.shape[1:]).index_copy_(0, slot_mapping, value)
    return rotated[:, :num_heads]


def _rotated(heads: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotates heads [num_tokens, heads, head_dim] in place."""
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, head_dim / 2]
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # each [num_tokens, 1, head_dim]
    low, high = heads.chunk(2, dim=-1)
    turned = torch.cat((high, low), dim=-1).mul_(sin)
    return heads.mul_(cos).add_(turned)


def _store_quantized_reference(
    heads: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Stores heads [num_tokens, num_kv_heads, head_dim] fp32 in an e4m3 cache and its scales."""
    block_size = cache.shape[1]
    amax = heads.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST_AMAX)  # [num_tokens, num_kv_heads, 1]
    quantized = (heads * (FP8_MAX / amax)).to(cache.dtype).view(torch.uint8)
    cache.view(torch.uint8).view(-1, *heads.shape[1:]).index_copy_(0, slot_mapping, quantized)
    scale[slot_mapping // block_size, :, slot_mapping % block_size] = amax.squeeze(-1) / FP8_MAX


def qk_norm_rope_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    norm: QKNorm | None,
    cos_sin_cache: torch.Tensor | None,
    positions: torch.Tensor,
    kv_cache: LayerKVCache,
    slot_mapping: torch.Tensor,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Norms and rotates query and key heads, stores keys and values in their slots, and returns the query heads.

    query [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim]: views of one fused
    projection (heads side by side); norm None: no norm; cos_sin_cache [max_position, head_dim] fp32, cosines in the
    first half (None: no rotation); positions [num_tokens] int64. Computed in fp32 and rounded once.
    kv_cache, each page contiguous, is written in place: slot_mapping [num_tokens] int64, ≥ 0, has each token's slot.
    If tokens share a slot (padding), any one of them is stored.
    """
    if not runs_triton(query, use_triton):
        return qk_norm_rope_store_reference(
            query,
            key,
            value,
            norm=norm,
            cos_sin_cache=cos_sin_cache,
            positions=positions,
            kv_cache=kv_cache,
            slot_mapping=slot_mapping,
        )
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_dim]
    if len(query):
        _launch(
            query,
            key,
            value,
            query_out,
            norm=norm,
            cos_sin_cache=cos_sin_cache,
            positions=positions,
            kv_cache=kv_cache,
            slot_mapping=slot_mapping,
        )
    return query_out


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_out: torch.Tensor,
    norm: QKNorm | None,
    cos_sin_cache: torch.Tensor | None,
    positions: torch.Tensor,
    kv_cache: LayerKVCache,
    slot_mapping: torch.Tensor,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    block_heads = min(next_power_of_2(max(num_heads, num_kv_heads)), _BLOCK_HEADS)
    tiles = -(-num_heads // block_heads) + -(-num_kv_heads // block_heads)
    is_quantized = kv_cache.is_quantized
    unused = query
    _qk_norm_rope_store_kernel[(num_tokens * tiles,)](
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        query_weight_ptr=unused if norm is None else norm.query_weight,
        key_weight_ptr=unused if norm is None else norm.key_weight,
        cos_sin_cache_ptr=unused if cos_sin_cache is None else cos_sin_cache,
        positions_ptr=positions,
        slot_mapping_ptr=slot_mapping,
        query_out_ptr=query_out,
        key_cache_ptr=kv_cache.key,
        value_cache_ptr=kv_cache.value,
        key_scale_ptr=kv_cache.key_scale if is_quantized else kv_cache.key,  # not written without scales
        value_scale_ptr=kv_cache.value_scale if is_quantized else kv_cache.value,
        token_stride=query.stride(0),
        page_stride=kv_cache.key.stride(0),
        slot_stride=kv_cache.key.stride(1),
        scale_page_stride=kv_cache.scale_page_stride,
        eps=0.0 if norm is None else norm.eps,
        HAS_NORM=norm is not None,
        HAS_ROPE=cos_sin_cache is not None,
        IS_QUANTIZED=is_quantized,
        BLOCK_SIZE=kv_cache.key.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=next_power_of_2(head_dim // 2),
        FP8_MAX=FP8_MAX,
        SMALLEST_AMAX=_SMALLEST_AMAX,
        num_warps=_NUM_WARPS,
        **pdl_options(query.device),
    )
