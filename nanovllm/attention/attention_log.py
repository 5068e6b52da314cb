"""The DEBUG lines of an attention layer."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.attention.interface import AttentionMetadata, LayerKVCache
from nanovllm.logs import events
from nanovllm.utils.logger import setup_logger

logger = setup_logger("nanovllm.layers.attention")  # the name that users' documents show


def log_inputs(
    query: torch.Tensor, metadata: AttentionMetadata, kv_cache: LayerKVCache, step_fields: dict[str, Any]
) -> None:
    num_tokens = query.shape[0]
    num_kv_heads, head_dim = kv_cache.key.shape[2:]
    events.attention_forward.log(
        logger,
        is_prefill=metadata.prefill is not None,
        q=list(query.shape),
        k=[num_tokens, num_kv_heads, head_dim],
        v=[num_tokens, num_kv_heads, head_dim],
        num_decode_tokens=metadata.num_decode_tokens,
        **step_fields,
    )
    events.attention_store.log(
        logger,
        num_tokens=num_tokens,
        num_heads=num_kv_heads,
        head_dim=head_dim,
        num_slots=metadata.slot_mapping.numel(),
        **step_fields,
    )
    if metadata.decode is not None:
        k_cache, v_cache = list(kv_cache.key.shape), list(kv_cache.value.shape)
        events.attention_decode.log(logger, k_cache=k_cache, v_cache=v_cache, **step_fields)


def log_output(output: torch.Tensor, step_fields: dict[str, Any]) -> None:
    events.attention_output.log(logger, output=list(output.shape), **step_fields)
