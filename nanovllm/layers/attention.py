"""Attention over the paged KV cache, which already holds the keys and values of the step's own tokens."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from nanovllm.attention.attention_log import log_inputs, log_output, logger
from nanovllm.attention.interface import AttentionMetadata, DecodeBackend, LayerKVCache, PrefillBackend
from nanovllm.layers.parallel import CurrentStep


class AttentionBackends(Protocol):
    """The engine's prefill and decode backends."""

    @property
    def prefill(self) -> PrefillBackend: ...

    @property
    def decode(self) -> DecodeBackend: ...


class Attention:
    """Causal attention with grouped queries. It has no weights; cache and metadata are arguments of the call."""

    def __init__(
        self, head_dim: int, backends: AttentionBackends, step: CurrentStep, window: int | None = None
    ) -> None:
        """window: how many keys a query attends to, its own and those just before; None: all. step: for the log."""
        self.scale = head_dim**-0.5
        self.backends = backends
        self.step = step
        self.window = window

    def __call__(self, query: torch.Tensor, metadata: AttentionMetadata, kv_cache: LayerKVCache) -> torch.Tensor:
        """Returns the attention output for query [num_tokens, num_heads, head_dim], in the same shape.

        `kv_cache` holds the keys and values of all tokens, those of this step included.
        """
        debug = logger.isEnabledFor(logging.DEBUG)
        if debug:
            log_inputs(query, metadata, kv_cache, self.step.fields)
        output = self._attend(query, metadata, kv_cache)
        if debug:
            log_output(output, self.step.fields)
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
