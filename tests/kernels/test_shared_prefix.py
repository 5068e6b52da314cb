"""Shared prefixes: what tiles share is found exactly, and attention with and without sharing is the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels.paged_decode import paged_decode, paged_decode_reference
from nanovllm.kernels.shared_prefix import (
    BLOCK_KEYS,
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


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_tiles_share_is_found(data):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block_size = data.draw(st.sampled_from([1, 16, 48, 256]))
    num_rows = data.draw(st.integers(1, 12))
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=num_rows, max_size=num_rows))
    shared = st.tuples(st.none() | st.integers(0, 1), st.integers(0, 400))
    groups = [
        (group, min(tokens, length))
        for (group, tokens), length in zip(
            data.draw(st.lists(shared, min_size=num_rows, max_size=num_rows)), lengths, strict=True
        )
    ]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    tables, context_lens = batch(device, generator, lengths, groups, block_size)
    group = data.draw(st.sampled_from([16, 32]))  # tiles of 8 and of 4 rows
    got = find_shared_prefixes(tables, context_lens, block_size, group, min_tokens=64, use_triton=True)
    expected = find_shared_prefixes_reference(tables, context_lens, block_size, got.tile_rows, 64)
    assert got.lens.tolist() == expected.lens.tolist()
    for tile, length in enumerate(got.lens.tolist()):
        assert length % BLOCK_KEYS == 0
        if length:
            assert got.rows[tile] == expected.rows[tile]


CASES = {
    "all rows share": [(0, 128)] * 5,
    "nobody shares": [(None, 0)] * 5,
    "one does not": [(0, 128)] * 3 + [(None, 0)] + [(0, 128)],
    "to different lengths": [(0, 144), (0, 128), (0, 80), (0, 144), (0, 144)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kv_heads", "group"), [(2, 1), (1, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_same_with_sharing(device, generator, dtype, num_kv_heads, group, case):
    block_size, head_dim = 16, 64
    lengths = [150, 145, 160, 300, 146, 1, 1]  # the last two are padding's
    tables, context_lens = batch(device, generator, lengths, [*CASES[case], (None, 0), (None, 0)], block_size)
    shape = (int(tables.max()) + 1, block_size, num_kv_heads, head_dim)
    keys = torch.randn(shape, generator=generator).to(device, dtype)
    values = torch.randn(shape, generator=generator).to(device, dtype)
    query = torch.randn(len(lengths), num_kv_heads * group, head_dim, generator=generator).to(device, dtype)
    shared = find_shared_prefixes(tables, context_lens, block_size, group, min_tokens=64, use_triton=True)
    assert shared.lens.tolist() == [{"all rows share": 128, "to different lengths": 64}.get(case, 0)]
    expected = paged_decode_reference(query, keys, values, tables, context_lens, head_dim**-0.5)
    for num_splits in (1, 3):
        got = paged_decode(
            query,
            keys,
            values,
            tables,
            context_lens,
            512,
            head_dim**-0.5,
            shared,
            num_splits=num_splits,
            use_triton=True,
        )
        assert relative_error(got, expected) <= 2 * TOLERANCES[dtype]


def test_tiles_share_apart_from_each_other(device, generator):
    """Two tiles with a prefix each, and one without; pages of 64 and of 1 token, where nothing is aligned."""
    for block_size in (64, 1):
        tile = [(0, 192)] * 4, [(1, 128)] * 4, [(None, 0)] * 2
        lengths = [200 + row for row in range(8)] + [90, 1]
        tables, context_lens = batch(device, generator, lengths, [*tile[0], *tile[1], *tile[2]], block_size)
        shared = find_shared_prefixes(tables, context_lens, block_size, 32, min_tokens=64, use_triton=True)
        assert shared.tile_rows == 4
        assert shared.lens.tolist()[:2] == [192, 128]
        shape = (int(tables.max()) + 1, block_size, 1, 32)
        keys, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        query = torch.randn(10, 32, 32, generator=generator).to(device)
        got = paged_decode(query, keys, values, tables, context_lens, 512, 0.2, shared, use_triton=True)
        expected = paged_decode_reference(query, keys, values, tables, context_lens, 0.2)
        assert relative_error(got, expected) <= 2 * TOLERANCES[torch.float32]


def test_prefix_splits_fill_the_device_once():
    assert choose_num_prefix_splits(num_tiles=4, num_kv_heads=8, num_multiprocessors=132) == 4
    assert choose_num_prefix_splits(num_tiles=100, num_kv_heads=8, num_multiprocessors=132) == 1
    assert choose_num_prefix_splits(num_tiles=1, num_kv_heads=1, num_multiprocessors=132) == 16
