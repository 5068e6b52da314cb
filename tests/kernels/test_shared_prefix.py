"""Shared prefixes: what tiles share is found exactly, and attention with and without sharing is the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.paged_decode import paged_decode, paged_decode_reference
from nanovllm.kernels.shared_prefix import (
    SHARED_MULTIPLE,
    choose_num_prefix_splits,
    find_shared_prefixes,
    find_shared_prefixes_reference,
)
from tests.kernels.inputs import DTYPES, TOLERANCES, relative_error


def batch(device, generator, lengths, groups, block_size):
    """Block tables; `groups` gives each row (group, tokens): so far it has the pages of its group, if it has one."""
    max_blocks = max(-(-length // block_size) for length in lengths) + 1
    tables = torch.randperm(len(lengths) * max_blocks, generator=generator).int().view(len(lengths), max_blocks)
    owners: dict[int, int] = {}
    for row, (group, tokens) in enumerate(groups):
        if group is not None:
            owner = owners.setdefault(group, row)
            tables[row, : tokens // block_size] = tables[owner, : tokens // block_size]
    return tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_tiles_share_is_found(data):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block_size = data.draw(st.sampled_from([1, 16, 48, 256]))
    runs = data.draw(
        st.lists(
            st.tuples(st.none() | st.integers(0, 2), st.integers(0, 500), st.integers(1, 30)), min_size=1, max_size=6
        )
    )
    groups, lengths = [], []
    for group, tokens, count in runs:
        for length in data.draw(st.lists(st.integers(1, 500), min_size=count, max_size=count)):
            lengths.append(max(length, data.draw(st.sampled_from([1, tokens, tokens + 1]))))
            groups.append((group, min(tokens, lengths[-1])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    tables, context_lens = batch(device, generator, lengths, groups, block_size)
    group = data.draw(st.sampled_from([1, 4, 8]))  # tiles of up to 64, 16 and 8 rows
    got = find_shared_prefixes(tables, context_lens, block_size, group, min_tokens=64, use_triton=True)
    expected = find_shared_prefixes_reference(tables, context_lens, block_size, got.max_tile_rows, 64)
    assert got.lens.tolist() == expected.lens.tolist()
    assert got.tile_rows.tolist() == expected.tile_rows.tolist()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_reference_gives_tiles_that_can_be_read_once(data):
    """Each tile's rows really have the pages that it reads, keep a token of their own, and are in no other tile."""
    block_size = data.draw(st.sampled_from([16, 48]))
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=40))
    groups = [(data.draw(st.none() | st.integers(0, 1)), min(length, 200)) for length in lengths]
    generator = torch.Generator().manual_seed(0)
    tables, context_lens = batch(torch.device("cpu"), generator, sorted(lengths), groups, block_size)
    found = find_shared_prefixes_reference(tables, context_lens, block_size, 16, 64)
    seen: list[int] = []
    for first, count in enumerate(found.tile_rows.tolist()):
        assert count == 0 or 4 <= count <= 16
        rows = range(first, first + count)
        seen += rows
        if count:
            shared = int(found.lens[first])
            assert shared >= 64
            assert shared % SHARED_MULTIPLE == 0
            for row in rows:
                assert found.lens[row] == shared < context_lens[row]
                pages = -(-shared // block_size)
                assert tables[row, :pages].tolist() == tables[first, :pages].tolist()
    assert len(seen) == len(set(seen))
    assert all(row in seen or length == 0 for row, length in enumerate(found.lens.tolist()))


PADDING = [(None, 0)] * 2
CASES = {  # groups of the rows, what they share
    "all rows share": ([(0, 128)] * 9, [128] * 9),
    "nobody shares": ([(None, 0)] * 9, [0] * 9),
    "too few share": ([(0, 128)] * 3 + [(None, 0)] * 6, [0] * 9),
    "one in the middle does not": ([(0, 128)] * 5 + [(None, 0)] + [(0, 128)] * 3, [128] * 5 + [0] * 4),
    "to different lengths": ([(0, 144), (0, 128), (0, 80)] * 3, [64] * 9),
    "two groups": ([(0, 128)] * 8 + [(1, 96)] * 9, [128] * 8 + [96] * 9),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_same_with_sharing(device, generator, dtype, case):
    groups, shared_lens = CASES[case]
    lengths = [145 + 3 * row + 100 * (row == 3) for row in range(len(groups))] + [1, 1]  # the last two are padding's
    check_attention(device, generator, dtype, 16, 1, 2, lengths, groups + PADDING, [*shared_lens, 0, 0])


@pytest.mark.parametrize(("num_kv_heads", "group"), [(2, 1), (2, 4), (1, 8), (1, 3)])
def test_attention_is_the_same_for_any_query_group(device, generator, num_kv_heads, group):
    groups, shared_lens = CASES["two groups"]
    lengths = [150 + row for row in range(len(groups))]
    check_attention(device, generator, torch.float32, 16, num_kv_heads, group, lengths, groups, shared_lens)


@pytest.mark.parametrize(("block_size", "shared"), [(1, 128), (8, 128), (32, 128), (64, 128), (256, 256), (48, 96)])
def test_attention_is_the_same_with_any_page_size(device, generator, block_size, shared):
    """The shared part ends where the first row's full pages do: it has one token more."""
    groups = [(0, 256 if block_size == 256 else 140)] * 8
    lengths = [shared + 1, *range(270, 277)]
    check_attention(device, generator, torch.float32, block_size, 1, 2, lengths, groups, [shared] * 8)


def check_attention(
    device, generator, dtype, block_size, num_kv_heads, group, lengths, groups, shared_lens, head_dim=32
):
    """Of rows in parts of 1 and 3, prefixes in parts of 1, 2 and 5: with five, some have nothing to read."""
    tables, context_lens = batch(device, generator, lengths, groups, block_size)
    shape = (int(tables.max()) + 1, block_size, num_kv_heads, head_dim)
    keys = torch.randn(shape, generator=generator).to(device, dtype)
    values = torch.randn(shape, generator=generator).to(device, dtype)
    query = torch.randn(len(lengths), num_kv_heads * group, head_dim, generator=generator).to(device, dtype)
    shared = find_shared_prefixes(tables, context_lens, block_size, group, min_tokens=64, use_triton=True)
    assert shared.lens.tolist() == shared_lens
    scale = head_dim**-0.5
    kv_cache, metadata = LayerKVCache(keys, values), DecodeMetadata(context_lens, tables, 512, shared)
    expected = paged_decode_reference(query, kv_cache, metadata, scale)
    for num_splits, prefix_splits in ((1, 1), (3, 2), (1, 5)):
        got = paged_decode(
            query,
            kv_cache,
            metadata,
            scale,
            num_splits=num_splits,
            prefix_splits=prefix_splits,
            use_triton=True,
        )
        assert relative_error(got, expected) <= 2 * TOLERANCES[dtype]


def test_a_run_longer_than_a_tile_is_read_in_equal_parts(device, generator):
    """Of 19 rows a tile takes 16: ten and nine, not sixteen and three, which would be too few."""
    groups = [(0, 128)] * 19
    check_attention(device, generator, torch.float32, 16, 1, 4, [150] * 19, groups, [128] * 19)
    tables, context_lens = batch(device, generator, [150] * 19, groups, 16)
    shared = find_shared_prefixes(tables, context_lens, 16, 4, min_tokens=64, use_triton=True)
    assert shared.tile_rows.tolist() == [10, *[0] * 9, 9, *[0] * 8]


def test_prefix_splits_fill_the_device_once():
    def splits(num_seqs: int, max_tile_rows: int = 64, num_kv_heads: int = 8) -> int:
        return choose_num_prefix_splits(num_seqs, max_tile_rows, num_kv_heads, num_multiprocessors=132)

    assert [splits(count) for count in (16, 64, 256, 6400)] == [16, 16, 8, 1]  # two programs a multiprocessor
    assert splits(1, num_kv_heads=1) == 16
