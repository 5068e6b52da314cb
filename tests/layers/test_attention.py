"""The attention layer: which backend sees which tokens, and the lines it logs."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from nanovllm.attention.interface import AttentionMetadata, DecodeMetadata, LayerKVCache, PrefillMetadata
from nanovllm.layers.attention import Attention
from nanovllm.layers.parallel import CurrentStep

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
WINDOW = 3
LOGGER = "nanovllm.layers.attention"


class Marking:
    """A backend that answers with its number, and notes what it was called with."""

    def __init__(self, number: float) -> None:
        self.number = number
        self.calls: list[tuple[torch.Tensor, object, float]] = []

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: object,
        scale: float,
        out: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        assert kv_cache.key.shape == (3, 4, KV_HEADS, HEAD_DIM)
        assert window == WINDOW
        self.calls.append((query, metadata, scale))
        return (torch.empty_like(query) if out is None else out).fill_(self.number)

    prefill = decode = _attend


def step(num_decode: int, num_prefill: int) -> AttentionMetadata:
    count = num_decode + num_prefill
    ones = torch.ones(1, dtype=torch.int32)
    decode = DecodeMetadata(ones, ones[None], 1) if num_decode else None
    prefill = PrefillMetadata(ones, ones, ones[None], num_prefill, num_prefill) if num_prefill else None
    return AttentionMetadata(torch.arange(count), num_decode, decode, prefill, num_decode)


def run(metadata: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor, Marking, Marking]:
    count = metadata.slot_mapping.numel()
    query = torch.randn(count, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cache = LayerKVCache(torch.zeros(3, 4, KV_HEADS, HEAD_DIM), torch.zeros(3, 4, KV_HEADS, HEAD_DIM))
    decode, prefill = Marking(1.0), Marking(2.0)
    layer = Attention(HEAD_DIM, SimpleNamespace(decode=decode, prefill=prefill), CurrentStep(), WINDOW)
    return layer(query, metadata, cache), query, decode, prefill


@pytest.mark.parametrize(("num_decode", "num_prefill"), [(3, 0), (0, 5), (3, 5), (1, 1)])
def test_decode_tokens_come_first(num_decode: int, num_prefill: int) -> None:
    metadata = step(num_decode, num_prefill)
    output, query, decode, prefill = run(metadata)
    expected = torch.tensor([1.0] * num_decode + [2.0] * num_prefill)
    assert torch.equal(output, expected[:, None, None].expand_as(query))
    assert (len(decode.calls), len(prefill.calls)) == (num_decode > 0, num_prefill > 0)
    for backend, tokens, part in (
        (decode, query[:num_decode], metadata.decode),
        (prefill, query[num_decode:], metadata.prefill),
    ):
        for seen, seen_metadata, scale in backend.calls:
            assert torch.equal(seen, tokens)
            assert seen_metadata is part
            assert scale == HEAD_DIM**-0.5


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_lines_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, LOGGER):
        run(step(0, 5))
        assert lines(caplog) == [
            "Attention forward: is_prefill=True, q=[5, 4, 8], k=[5, 2, 8], v=[5, 2, 8]",
            "Storing KV cache: N=5, num_heads=2, head_dim=8, num_slots=5",
            "Attention output: [5, 4, 8]",
        ]
        caplog.clear()
        run(step(2, 0))
        assert lines(caplog) == [
            "Attention forward: is_prefill=False, q=[2, 4, 8], k=[2, 2, 8], v=[2, 2, 8]",
            "Storing KV cache: N=2, num_heads=2, head_dim=8, num_slots=2",
            "Decode attention: k_cache=[3, 4, 2, 8], v_cache=[3, 4, 2, 8]",
            "Attention output: [2, 4, 8]",
        ]


def test_silent_at_info(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        run(step(2, 5))
    assert lines(caplog) == []
