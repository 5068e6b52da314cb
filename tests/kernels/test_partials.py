from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.attention_inputs import DecodeMetadata, SharedPrefixes
from nanovllm.kernels.partials import PREFIX_BLOCK_KEYS, empty_partials, merge_partials
from tests.kernels.inputs import check_close

BLOCK_KEYS = 16


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize(
    ("num_prefix_splits", "num_splits", "prefix_parts", "own_parts"),
    [
        (0, 3, [0, 0, 0], [1, 2, 3]),
        (0, 70, [0, 0, 0], [1, 33, 70]),
        (34, 2, [0, 1, 34], [1, 2, 1]),  # of the first row, 34 parts that are merged first are unused
    ],
)
def test_parts_are_merged_by_their_shares(
    device, generator, head_dim, num_prefix_splits, num_splits, prefix_parts, own_parts
):
    """Many parts are merged in rounds. Those that have no keys are never written."""
    num_seqs, num_heads = len(own_parts), 2
    out = torch.full((num_seqs, num_heads, head_dim), torch.nan, device=device)
    partials = empty_partials(out, num_splits, num_prefix_splits)
    expected = torch.empty(num_seqs, num_heads, head_dim, dtype=torch.float64)
    for seq in range(num_seqs):
        used = [*range(prefix_parts[seq]), *(num_prefix_splits + part for part in range(own_parts[seq]))]
        parts = torch.randn(num_heads, len(used), head_dim, generator=generator)
        lse = torch.randn(num_heads, len(used), generator=generator) * 30
        partials.out[seq] = partials.lse[seq] = torch.nan
        partials.out[seq][:, used], partials.lse[seq][:, used] = parts.to(device), lse.to(device)
        weights = torch.softmax(lse.double() * torch.log(torch.tensor(2.0)), dim=1)
        expected[seq] = (weights.unsqueeze(-1) * parts.double()).sum(1)
    # Parts are as long as their number makes them: one block each, so all of a row's keys fill its parts.
    prefix_lens = torch.tensor(prefix_parts, dtype=torch.int32) * PREFIX_BLOCK_KEYS
    own_lens = torch.tensor(own_parts, dtype=torch.int32) * BLOCK_KEYS
    shared = SharedPrefixes(prefix_lens.to(device), torch.ones_like(prefix_lens).to(device), 1)
    context_lens = (prefix_lens + own_lens).to(device)
    tables = torch.zeros(num_seqs, 1, dtype=torch.int32, device=device)
    merge_partials(partials, DecodeMetadata(context_lens, tables, int(context_lens.max()), shared), out, BLOCK_KEYS)
    check_close(out, expected.to(device), torch.float32)
