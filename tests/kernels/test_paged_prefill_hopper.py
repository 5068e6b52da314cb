"""The prefill kernel for Hopper GPUs: on one where there is one, else in the emulator of gluon_emulator."""

from __future__ import annotations

import pytest
import torch

from nanovllm.attention import triton_backend
from nanovllm.kernels.attention_inputs import PrefillMetadata
from nanovllm.kernels.dequantize_pages import dequantize_pages
from nanovllm.kernels.paged_prefill import paged_prefill
from nanovllm.kernels.paged_prefill_hopper import can_run_on_hopper, paged_prefill_hopper
from tests.kernels.gluon_emulator import emulate
from tests.kernels.inputs import check_close, relative_error
from tests.kernels.test_paged_prefill import FP8_TOLERANCES, fp8_prefill_case, prefill_case

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu) if ON_HOPPER else "cpu"]
# Of one query and head. A key too many among 250 is about 0.06; rounding weights to bf16 is 0.003 in the emulator.
ROW_TOLERANCE = 0.01


def needs_hopper(test):
    """For what is no kernel of Gluon."""
    return pytest.mark.gpu(pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")(test))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


# (queries, context): one token, borders of pages (16), of a warpgroup's rows, of tiles and of blocks of keys (128).
RAGGED = [(1, 1), (17, 48), (64, 64), (33, 128), (5, 129), (70, 200)]
WINDOWS = [7, 129]
BLOCK_SIZES = [8, 16, 256]
if ON_HOPPER:  # which has the time for more
    RAGGED += [(1, 33), (63, 64), (65, 65), (1, 257), (130, 383)]
    WINDOWS += [1, 64, 128, 300, 2000]
    BLOCK_SIZES += [64, 128]


def prefill(query, kv_cache, metadata, scale, window=None, seed=0):
    """In the emulator, three programs share the tiles."""
    if query.is_cuda:
        assert can_run_on_hopper(query, kv_cache.key)
        return paged_prefill(query, kv_cache, metadata, scale, window=window)
    out = torch.full(query.shape, torch.nan, dtype=query.dtype)
    emulated = emulate(paged_prefill_hopper, seed, multiprocessor_count=lambda device: 3)
    emulated(query, kv_cache, metadata, scale, out, window)
    return out


def check(device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, shapes, window=None, seed=0):
    heads = (num_heads, num_kv_heads, head_dim)
    arguments, oracle = prefill_case(
        device, generator, dtype, block_size, *heads, shapes, padding_heads=8, window=window
    )
    out = prefill(*arguments, window=window, seed=seed)
    check_close(out, oracle, dtype)
    error = (out.double() - oracle).norm(dim=-1) / oracle.norm(dim=-1)
    assert float(error.max()) <= ROW_TOLERANCE


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (8, 1, 128), (2, 2, 128)])
def test_windows(device, generator, num_heads, num_kv_heads, head_dim, window):
    shapes = [*RAGGED, *([(300, 300), (300, 1100)] if ON_HOPPER else [(100, 370)])]
    check(device, generator, torch.bfloat16, 16, num_heads, num_kv_heads, head_dim, shapes, window)


@pytest.mark.parametrize(("window", "borders"), [(None, (222, 254)), (257, (322, 354))])
def test_a_block_of_which_a_row_sees_all_keys_but_one(device, generator, window, borders):
    """And none, and two: there, the mask begins or ceases to be needed. A tile is 64 tokens, a warpgroup 32 of them."""
    shapes = [(64, first + 64) for border in borders for first in (border - 1, border, border + 1)]
    check(device, generator, torch.bfloat16, 16, 2, 1, 64, shapes, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_page_sizes(device, generator, dtype, head_dim, block_size):
    check(device, generator, dtype, block_size, 4, 2, head_dim, RAGGED)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 1), (8, 1), (16, 1)])
def test_group_sizes(device, generator, num_heads, num_kv_heads):
    check(device, generator, torch.bfloat16, 16, num_heads, num_kv_heads, 128, RAGGED)


def test_more_sequences_and_tiles_than_programs_and_lanes(device, generator):
    heads, num_seqs = ((8, 4), 100) if ON_HOPPER else ((2, 1), 40)
    check(
        device, generator, torch.bfloat16, 16, *heads, 64, [(1 + i % 70, 1 + i % 70 + i % 40) for i in range(num_seqs)]
    )


def test_one_chunk_of_many_tiles_behind_a_prefix(device, generator):
    check(device, generator, torch.bfloat16, 16, 2, 1, 128, [(300, 1100)])


@pytest.mark.skipif(ON_HOPPER, reason="the GPU has an order of its own")
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("seed", range(4))
def test_other_orders_of_what_happens_at_the_same_time(device, generator, seed, window):
    check(device, generator, torch.bfloat16, 16, 4, 2, 64, [(70, 300), (1, 500), (64, 64)], window, seed)


def test_a_sequence_without_tokens_is_passed_over(device, generator):
    arguments, oracle = prefill_case(device, generator, torch.bfloat16, 16, 4, 2, 64, [(40, 40), (30, 50)], 8)
    query, kv_cache, metadata, scale = arguments
    starts = torch.tensor([0, 0, 40, 40, 70, 70], dtype=torch.int32, device=device)
    lens = torch.tensor([0, 40, 9, 50, 0], dtype=torch.int32, device=device)
    tables = metadata.block_tables[[0, 0, 0, 1, 1]]
    spread = PrefillMetadata(starts, lens, tables, metadata.max_seqlen_q, metadata.max_seqlen_k)
    out = prefill(query, kv_cache, spread, scale)
    check_close(out, oracle, torch.bfloat16)


@needs_hopper
@pytest.mark.parametrize(
    ("dtype", "block_size", "num_heads", "num_kv_heads", "head_dim"),
    [
        (torch.float32, 16, 2, 1, 64),  # a type of 4 bytes
        (torch.bfloat16, 16, 5, 1, 64),  # a group that is no power of two
        (torch.bfloat16, 16, 2, 1, 80),
        (torch.bfloat16, 16, 2, 1, 256),
        (torch.bfloat16, 4, 2, 1, 64),  # pages of fewer rows than the swizzle has
    ],
)
def test_what_it_does_not_take(device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim):
    arguments, oracle = prefill_case(
        device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, [(70, 90)], 8
    )
    assert not can_run_on_hopper(arguments[0], arguments[1].key)
    check_close(paged_prefill(*arguments), oracle, dtype)


@needs_hopper
@pytest.mark.parametrize(
    ("shapes", "copies"), [([(1200, 1700), (130, 130)], True), ([(300, 700)], False), ([(4, 700), (1, 1)], False)]
)
def test_an_fp8_cache_is_copied_where_many_queries_read_it(device, generator, monkeypatch, shapes, copies):
    arguments, oracle = fp8_prefill_case(device, generator, torch.bfloat16, 16, 4, 2, 128, shapes)
    copied = []
    monkeypatch.setattr(
        triton_backend, "dequantize_pages", lambda *given: copied.append(True) or dequantize_pages(*given)
    )
    out = triton_backend.TritonBackend().prefill(*arguments)
    assert bool(copied) is copies
    assert relative_error(out, oracle) <= FP8_TOLERANCES[torch.bfloat16]
