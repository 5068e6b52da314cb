from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nanovllm.kernels.attention_inputs import DecodeMetadata
from nanovllm.kernels.balanced_decode import balanced_decode
from nanovllm.kernels.balanced_decode_fp8 import balanced_decode_fp8
from nanovllm.kernels.paged_decode import paged_decode
from nanovllm.kernels.paged_decode_fp8 import paged_decode_fp8
from tests.kernels import test_paged_decode, test_paged_decode_fp8
from tests.kernels.inputs import DTYPES, TOLERANCES, paged_sequences, quantized, relative_error

LENGTHS = [1, 15, 200, 16, 17, 1, 1, 64, 65, 130]
FP32 = torch.float32


@dataclass(frozen=True)
class Kind:
    """Of cache."""

    attend_balanced: Callable[..., torch.Tensor]
    attend_split: Callable[..., torch.Tensor]
    decode_case: Callable[..., Any]
    tolerances: Mapping[torch.dtype, float]


KINDS = {
    "fp8": Kind(
        balanced_decode_fp8, paged_decode_fp8, test_paged_decode_fp8.decode_case, test_paged_decode_fp8.TOLERANCES
    ),
    "unquantized": Kind(balanced_decode, paged_decode, test_paged_decode.decode_case, TOLERANCES),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def attend(kind, arguments, **settings):
    """Into memory that holds NaN."""
    query = arguments[0]
    out = torch.full(query.shape, torch.nan, dtype=query.dtype, device=query.device)
    assert kind.attend_balanced(*arguments, out, **settings) is out
    return out


def check(kind, got, oracle, dtype):
    assert got.dtype == dtype
    assert relative_error(got, oracle) <= kind.tolerances[dtype]


@pytest.mark.parametrize("num_stretches", [1, 2, 3, 5, 7, 40])
def test_however_the_keys_are_divided(kind, device, generator, num_stretches):
    """A stretch of a part of a row, of a row's end and the next one's begin, of many rows; more than there are keys."""
    arguments, oracle = kind.decode_case(device, generator, FP32, 16, 2, 1, 32, LENGTHS)
    check(kind, attend(kind, arguments, num_stretches=num_stretches), oracle, FP32)


@pytest.mark.parametrize("seed", range(5))
def test_random_lengths(kind, device, seed):
    """Against the other kernel too."""
    generator = torch.Generator().manual_seed(seed)
    longest, num_stretches = (int(torch.randint(1, most, (1,), generator=generator)) for most in (300, 20))
    lengths = torch.randint(1, longest + 1, (8,), generator=generator).tolist()
    arguments, oracle = kind.decode_case(device, generator, FP32, 16, 2, 1, 16, lengths)
    got = attend(kind, arguments, num_stretches=num_stretches)
    check(kind, got, oracle, FP32)
    assert relative_error(got, kind.attend_split(*arguments, use_triton=True)) <= kind.tolerances[FP32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 256])
def test_dtypes_and_page_sizes(kind, device, generator, dtype, block_size):
    arguments, oracle = kind.decode_case(device, generator, dtype, block_size, 2, 1, 64, [17, 1, 200])
    check(kind, attend(kind, arguments, num_stretches=2), oracle, dtype)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(2, 2, 16), (5, 1, 40), (8, 1, 128), (4, 2, 32)])
def test_shapes_of_heads(kind, device, generator, num_heads, num_kv_heads, head_dim):
    arguments, oracle = kind.decode_case(device, generator, FP32, 16, num_heads, num_kv_heads, head_dim, [3, 150])
    check(kind, attend(kind, arguments, num_stretches=2), oracle, FP32)


@pytest.mark.parametrize("window", [1, 16, 31, 50, 1000])
def test_windows(kind, device, generator, window):
    arguments, oracle = kind.decode_case(device, generator, FP32, 16, 2, 1, 32, LENGTHS, window)
    check(kind, attend(kind, arguments, window=window, num_stretches=4), oracle, FP32)


@pytest.mark.parametrize("num_stretches", [1, 3, 9])
def test_rows_without_keys_are_left_as_they_are(kind, device, generator, num_stretches):
    lengths = [0, 0, 33, 0, 200, 0, 0, 64, 0]
    arguments, oracle = kind.decode_case(device, generator, FP32, 16, 2, 1, 32, [max(length, 1) for length in lengths])
    query, kv_cache, metadata, scale = arguments
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    metadata = DecodeMetadata(lens, metadata.block_tables, 200)
    got = attend(kind, (query, kv_cache, metadata, scale), num_stretches=num_stretches)
    assert got[lens == 0].isnan().all()
    check(kind, got[lens > 0], oracle[lens > 0], FP32)
    no_keys = DecodeMetadata(lens * 0, metadata.block_tables, 200)
    assert attend(kind, (query, kv_cache, no_keys, scale), num_stretches=num_stretches).isnan().all()


def test_more_rows_than_a_program_usually_looks_at(kind, device, generator, monkeypatch):
    monkeypatch.setattr("nanovllm.kernels.stretches._BLOCK_ROWS", 1)
    arguments, oracle = kind.decode_case(device, generator, FP32, 16, 1, 1, 16, [20, 100, 1])
    check(kind, attend(kind, arguments, num_stretches=2), oracle, FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("num_seqs", [49, 320])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (16, 8), (8, 1)])
def test_real_sizes(kind, generator, num_seqs, num_heads, num_kv_heads):
    """As many stretches as a GPU takes, with one long row, against the kernel that splits every row alike."""
    device = torch.device("cuda")
    lengths = [2000, *torch.randint(1, 400, (num_seqs - 1,), generator=generator).tolist()]
    pages = paged_sequences(lengths, 16, num_kv_heads, 128, torch.bfloat16, device, generator)
    query = torch.randn(num_seqs, num_heads, 128, generator=generator).to(device, torch.bfloat16)
    metadata = DecodeMetadata(pages.context_lens, pages.block_tables, max(lengths))
    kv_cache = quantized(pages).kv_cache if kind is KINDS["fp8"] else pages.kv_cache
    arguments = (query, kv_cache, metadata, 128**-0.5)
    got, expected = attend(kind, arguments), kind.attend_split(*arguments, num_splits=1)
    assert relative_error(got, expected) <= kind.tolerances[torch.bfloat16]
    assert torch.equal(got, attend(kind, arguments))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths_it_is_given(kind, device, generator):
    arguments, _ = kind.decode_case(device, generator, torch.bfloat16, 16, 16, 8, 128, [40, 2000, 129])
    context_lens, captured = arguments[2].context_lens, attend(kind, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kind.attend_balanced(*arguments, captured)
    for new_lengths in ([40, 2000, 129], [1, 640, 65], [17, 130, 1]):
        context_lens.copy_(torch.tensor(new_lengths))
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, attend(kind, arguments))
