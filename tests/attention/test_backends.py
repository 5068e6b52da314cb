"""Each backend against float64 attention, computed one query after another."""

from __future__ import annotations

import pytest
import torch

from nanovllm.attention.flash_attn_backend import (
    FlashAttention4Prefill,
    FlashAttentionBackend,
    flash_attn_4_problem,
    flash_attn_problem,
)
from nanovllm.attention.interface import DecodeMetadata, LayerKVCache, PrefillMetadata
from nanovllm.attention.torch_backend import TorchBackend
from nanovllm.attention.triton_backend import TritonBackend
from tests.kernels.inputs import DTYPES, attention_oracle, check_close, paged_sequences

BACKENDS = [TorchBackend, TritonBackend]
SHAPES = [(1, 1), (1, 40), (17, 17), (16, 48), (33, 65)]  # (queries, context)


def prefill_case(
    device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, shapes, unused_page=2**30, window=None
):
    query_lens = [query_len for query_len, _ in shapes]
    contexts = [context_len for _, context_len in shapes]
    cache = paged_sequences(contexts, block_size, num_kv_heads, head_dim, dtype, device, generator, unused_page)
    query = torch.randn(sum(query_lens), num_heads, head_dim, generator=generator).to(dtype)
    scale = 1.3 * head_dim**-0.5
    oracle = attention_oracle(list(query.split(query_lens)), cache.keys, cache.values, scale, window)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(device)
    metadata = PrefillMetadata(starts, cache.context_lens, cache.block_tables, max(query_lens), max(contexts))
    return query.to(device), LayerKVCache(cache.key_cache, cache.value_cache), metadata, scale, oracle.to(device)


def decode_case(
    device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, lengths, unused_page=2**30, window=None
):
    cache = paged_sequences(lengths, block_size, num_kv_heads, head_dim, dtype, device, generator, unused_page)
    query = torch.randn(len(lengths), num_heads, head_dim, generator=generator).to(dtype)
    scale = 1.3 * head_dim**-0.5
    oracle = attention_oracle([row.unsqueeze(0) for row in query], cache.keys, cache.values, scale, window)
    metadata = DecodeMetadata(cache.context_lens, cache.block_tables, max(lengths))
    return query.to(device), LayerKVCache(cache.key_cache, cache.value_cache), metadata, scale, oracle.to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [4, 16, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (8, 1)])
def test_prefill(device, generator, backend, dtype, block_size, num_heads, num_kv_heads):
    query, cache, metadata, scale, oracle = prefill_case(
        device, generator, dtype, block_size, num_heads, num_kv_heads, 32, SHAPES
    )
    check_close(backend().prefill(query, cache, metadata, scale), oracle, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [4, 16, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (8, 1)])
def test_decode(device, generator, backend, dtype, block_size, num_heads, num_kv_heads):
    lengths = [1, 16, 17, 50]
    query, cache, metadata, scale, oracle = decode_case(
        device, generator, dtype, block_size, num_heads, num_kv_heads, 32, lengths
    )
    check_close(backend().decode(query, cache, metadata, scale), oracle, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 5, 16, 33, 500])
def test_windows(device, generator, backend, window):
    """Layers with different windows, and without, share the metadata of a step."""
    heads = (4, 2, 32)
    *arguments, _ = prefill_case(device, generator, torch.float32, 4, *heads, SHAPES)
    attention = backend()
    attention.prefill(*arguments)
    *arguments, oracle = prefill_case(device, generator, torch.float32, 4, *heads, SHAPES, window=window)
    check_close(attention.prefill(*arguments, window=window), oracle, torch.float32)
    lengths = [*range(1, 40, 2), 70]
    state = generator.get_state()
    *arguments, everything = decode_case(device, generator, torch.float32, 4, *heads, lengths)
    *_, oracle = decode_case(device, generator.set_state(state), torch.float32, 4, *heads, lengths, window=window)
    check_close(attention.decode(*arguments), everything, torch.float32)
    check_close(attention.decode(*arguments, window=window), oracle, torch.float32)
    check_close(attention.decode(*arguments), everything, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_of_a_batch_of_many_lengths(device, generator, backend):
    lengths = torch.randint(1, 80, (37,), generator=generator).tolist()
    query, cache, metadata, scale, oracle = decode_case(device, generator, torch.float32, 16, 4, 2, 16, lengths)
    check_close(backend().decode(query, cache, metadata, scale), oracle, torch.float32)


def test_one_sequence_of_nan_spoils_no_other(device, generator):
    """Sequences of different lengths attend together: a shorter one must not read what is behind its end."""
    query, cache, metadata, scale, oracle = decode_case(device, generator, torch.float32, 4, 2, 1, 16, [3, 9, 20])
    query[1] = torch.nan
    for backend in BACKENDS:
        got = backend().decode(query, cache, metadata, scale)
        check_close(got[[0, 2]], oracle[[0, 2]], torch.float32)
        assert bool(got[1].isnan().all())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (16, 8), (8, 1)])
def test_flash_attn(generator, num_heads, num_kv_heads, head_dim):
    device, dtype = torch.device("cuda"), torch.bfloat16
    problem = flash_attn_problem(device, dtype, head_dim)
    if problem:
        pytest.skip(problem)
    backend = FlashAttentionBackend()
    heads = (num_heads, num_kv_heads, head_dim)
    shapes = [*SHAPES, (300, 300), (100, 600)]
    query, cache, metadata, scale, oracle = prefill_case(device, generator, dtype, 256, *heads, shapes, 0)
    check_close(backend.prefill(query, cache, metadata, scale), oracle, dtype)
    query, cache, metadata, scale, oracle = decode_case(device, generator, dtype, 256, *heads, [1, 255, 256, 600], 0)
    check_close(backend.decode(query, cache, metadata, scale), oracle, dtype)
    *arguments, oracle = prefill_case(device, generator, dtype, 256, *heads, shapes, 0, window=100)
    try:
        check_close(backend.prefill(*arguments, window=100), oracle, dtype)
    except RuntimeError as error:
        if "build does not support local attention" not in str(error):
            raise
        pytest.skip("flash-attn was built without windows; without one it is right")
    *arguments, oracle = decode_case(device, generator, dtype, 256, *heads, [1, 100, 256, 600], 0, window=100)
    check_close(backend.decode(*arguments, window=100), oracle, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 128, 256])
def test_flash_attn_4(generator, block_size):
    device, dtype = torch.device("cuda"), torch.bfloat16
    problem = flash_attn_4_problem(device)
    if problem:
        pytest.skip(problem)
    shapes = [*SHAPES, (300, 300), (100, 600)]
    query, cache, metadata, scale, oracle = prefill_case(device, generator, dtype, block_size, 16, 8, 128, shapes, 0)
    # It reads the whole of a sequence's last page, which must hold finite numbers.
    cache.key.nan_to_num_(), cache.value.nan_to_num_()
    check_close(FlashAttention4Prefill().prefill(query, cache, metadata, scale), oracle, dtype)
    heads = (16, 8, 128)
    *arguments, oracle = prefill_case(device, generator, dtype, block_size, *heads, shapes, 0, window=100)
    arguments[1].key.nan_to_num_(), arguments[1].value.nan_to_num_()
    check_close(FlashAttention4Prefill().prefill(*arguments, window=100), oracle, dtype)


class Interrupted(TorchBackend):
    """A backend in which another thread's step comes whenever a step has begun its plan, as while kernels compile."""

    other: object = None

    @property
    def _planned(self):
        return self._current

    @_planned.setter
    def _planned(self, planned):
        self._current = planned
        other, self.other = self.other, None
        if other is not None:
            self.decode(*other)


def test_steps_of_several_threads_do_not_take_each_others_plans(generator):
    def case(lengths):
        return decode_case(torch.device("cpu"), generator, torch.float32, 16, 4, 2, 32, lengths)

    backend = Interrupted()
    *few, oracle = case([3, 40])
    *many, _ = case([5] * 40)
    backend.other = many
    check_close(backend.decode(*few), oracle, torch.float32)
