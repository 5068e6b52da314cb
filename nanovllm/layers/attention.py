"""Attention over the paged KV cache, which already holds the keys and values of the step's own tokens."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from nanovllm.attention.interface import AttentionMetadata, DecodeBackend, LayerKVCache, PrefillBackend
from nanovllm.logs import events
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)


class AttentionBackends(Protocol):
    """The engine's prefill and decode backends."""

    @property
    def prefill(self) -> PrefillBackend: ...

    @property
    def decode(self) -> DecodeBackend: ...


class Attention:
    """Causal attention with grouped queries. It has no weights; cache and metadata are arguments of the call."""

    def __init__(self, head_dim: int, backends: AttentionBackends, window: int | None = None) -> None:
        """window: how many keys a query attends to, its own and those just before; None: all."""
        self.scale = head_dim**-0.5
        self.backends = backends
        self.window = window

    def __call__(self, query: torch.Tensor, metadata: AttentionMetadata, kv_cache: LayerKVCache) -> torch.Tensor:
        """Returns the attention output for query [num_tokens, num_heads, head_dim], in the same shape.

        `kv_cache` holds the keys and values of all tokens, those of this step included.
        """
        debug = logger.isEnabledFor(logging.DEBUG)
        if debug:
            _log_inputs(query, metadata, kv_cache)
        output = self._attend(query, metadata, kv_cache)
        if debug:
            events.attention_output.log(logger, output=list(output.shape))
        return output

    def _attend(self, query: torch.Tensor, metadata: AttentionMetadata, kv_cache: LayerKVCache) -> torch.Tensor:
        if metadata.decode is None:
            assert metadata.prefill is not None, "a step has tokens of some kind"
            return self.backends.prefill.prefill(query, kv_cache, metadata.prefill, self.scale, None, self.window)
        if metadata.prefill is None:
            return self.backends.decode.decode(query, kv_cache, metadata.decode, self.scale, None, self.window)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_dim]
        end, first = metadata.num_decode_tokens, metadata.first_prefill_token
        self.backends.decode.decode(query[:end], kv_cache, metadata.decode, self.scale, output[:end], self.window)
        self.backends.prefill.prefill(
            query[first:], kv_cache, metadata.prefill, self.scale, output[first:], self.window
        )
        return output


def _log_inputs(query: torch.Tensor, metadata: AttentionMetadata, kv_cache: LayerKVCache) -> None:
    num_tokens = query.shape[0]
    num_kv_heads, head_dim = kv_cache.key.shape[2:]
    events.attention_forward.log(
        logger,
        is_prefill=metadata.prefill is not None,
        q=list(query.shape),
        k=[num_tokens, num_kv_heads, head_dim],
        v=[num_tokens, num_kv_heads, head_dim],
        num_decode_tokens=metadata.num_decode_tokens,
    )
    events.attention_store.log(
        logger,
        num_tokens=num_tokens,
        num_heads=num_kv_heads,
        head_dim=head_dim,
        num_slots=metadata.slot_mapping.numel(),
    )
    if metadata.decode is not None:
        events.attention_decode.log(logger, k_cache=list(kv_cache.key.shape), v_cache=list(kv_cache.value.shape))
