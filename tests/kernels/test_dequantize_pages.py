from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.attention_inputs import PrefillMetadata
from nanovllm.kernels.dequantize_pages import dequantize_pages
from tests.kernels.inputs import DTYPES, paged_sequences, quantized


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "num_kv_heads", "head_dim"), [(4, 3, 40), (16, 2, 64), (64, 1, 128)])
def test_contexts_come_back_in_pages_of_their_own(device, generator, dtype, block_size, num_kv_heads, head_dim):
    lengths = [1, 33, 70, 31]
    pages = paged_sequences(lengths, block_size, num_kv_heads, head_dim, dtype, device, generator)
    cache = quantized(pages)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    metadata = PrefillMetadata(starts, pages.context_lens, pages.block_tables, 1, max(lengths))
    copy, copied = dequantize_pages(cache.kv_cache, metadata, dtype)
    keys, values, tables = copy.key, copy.value, copied.block_tables
    assert keys.dtype == values.dtype == dtype
    assert sorted(tables.flatten().tolist()) == list(range(len(keys)))
    for got, wanted in ((keys, cache.keys), (values, cache.values)):
        for seq, length in enumerate(lengths):
            tokens = got[tables[seq].long()].flatten(0, 1)[:length]  # [length, num_kv_heads, head_dim]
            # One rounding to fp32, one to dtype.
            torch.testing.assert_close(tokens.double().cpu(), wanted[seq], rtol=torch.finfo(dtype).eps, atol=0)
