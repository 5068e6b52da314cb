from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.columns import INVALID_TOKEN
from nanovllm.kernels.decode_state import (
    append_tokens,
    append_tokens_reference,
    read_decode_tokens,
    read_decode_tokens_reference,
)

NULL_ROW = 6


def state(device, generator, max_blocks, block_size):
    """Six rows and the null row: token ids, lengths, block tables."""
    max_tokens = max_blocks * block_size + 1
    token_ids = torch.randint(0, 1000, (NULL_ROW + 1, max_tokens), generator=generator, dtype=torch.int32)
    lengths = torch.randint(1, max_tokens, (NULL_ROW + 1,), generator=generator, dtype=torch.int32)
    lengths[:2] = torch.tensor([1, max_tokens - 1])
    lengths[NULL_ROW] = 1
    tables = torch.randint(0, 99, (NULL_ROW + 1, max_blocks), generator=generator, dtype=torch.int32)
    return token_ids.to(device), lengths.to(device), tables.to(device)


ROWS = [[0], [3, 1, 0, 5], [2, NULL_ROW, 4, NULL_ROW, NULL_ROW]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("max_blocks", "block_size"), [(1, 16), (5, 4), (1100, 1)])
def test_read_decode_tokens_equals_its_reference(device, generator, rows, max_blocks, block_size):
    token_ids, lengths, tables = state(device, generator, max_blocks, block_size)
    chosen = torch.tensor(rows, dtype=torch.int32, device=device)
    got = read_decode_tokens(chosen, token_ids, lengths, tables, block_size, use_triton=True)
    expected = read_decode_tokens_reference(chosen, token_ids, lengths, tables, block_size)
    for name in ("input_ids", "positions", "context_lens", "slot_mapping", "block_tables"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)
    for index, row in enumerate(rows):  # and both equal what they stand for
        length = int(lengths[row])
        assert int(got.input_ids[index]) == int(token_ids[row, length - 1])
        block = int(tables[row, (length - 1) // block_size])
        assert int(got.slot_mapping[index]) == block * block_size + (length - 1) % block_size


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("rows", [*ROWS, [], [*range(NULL_ROW), *[NULL_ROW] * 200]])
def test_append_tokens_lengthens_each_row_and_spares_the_rest(device, generator, rows, use_triton):
    token_ids, lengths, _ = state(device, generator, 4, 4)
    before = [token_ids[row, : lengths[row]].tolist() for row in range(NULL_ROW + 1)]
    chosen = torch.tensor(rows, dtype=torch.int32, device=device)
    new_ids = torch.arange(2000, 2000 + len(rows), dtype=torch.int32, device=device)
    append = append_tokens if use_triton else append_tokens_reference
    append(chosen, new_ids, token_ids, lengths, NULL_ROW, **({"use_triton": True} if use_triton else {}))
    for row in range(NULL_ROW + 1):
        added = [2000 + rows.index(row)] if row in rows and row != NULL_ROW else []
        assert token_ids[row, : lengths[row]].tolist() == before[row] + added


@pytest.mark.parametrize("use_triton", [True, False])
def test_an_invalid_token_is_appended_as_one_that_can_be_computed(device, generator, use_triton):
    """A step that is in flight reads it, and an embedding has no row -1."""
    token_ids, lengths, _ = state(device, generator, 4, 4)
    row, length = torch.tensor([1], dtype=torch.int32, device=device), int(lengths[1])
    new_ids = torch.tensor([INVALID_TOKEN], dtype=torch.int32, device=device)
    append_tokens(row, new_ids, token_ids, lengths, NULL_ROW, use_triton=use_triton)
    assert (int(lengths[1]), int(token_ids[1, length])) == (length + 1, 0)
