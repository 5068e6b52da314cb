"""Random inputs for kernel tests, and how close a kernel must come to its reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.int4_packing import pack_int4

# Triton's interpreter neither rounds bf16 to nearest nor multiplies bf16 matrices: that type is for the GPU.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
HALF_TYPES = DTYPES[1:]
EMULATED_TYPES = [torch.bfloat16, torch.float16]  # of kernels in Gluon, whose emulator has both

# Largest error against a float32 reference, relative to the reference's norm: rounding of the output alone.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ in float64; NaN counts as infinitely far."""
    difference = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float("inf") if bool(difference.isnan()) else float(difference)


def check_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    assert got.dtype == dtype
    assert relative_error(got, expected) <= TOLERANCES[dtype]


def random_int4_weight(
    generator: torch.Generator,
    device: torch.device,
    outputs: int,
    input_size: int,
    group_size: int,
    has_zeros: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The weight in float32, exactly, and as kernels take it: words, scale and zeros [outputs, groups] float16.

    Outputs are side by side in memory, as the engine keeps them. A group larger than the input is all of it.
    """
    values = torch.randint(0, 16, (outputs, input_size), generator=generator)
    scale = (torch.rand(outputs, -(-input_size // group_size), generator=generator) * 0.2 * input_size**-0.5).half()
    zeros = torch.randint(0, 17, scale.shape, generator=generator) if has_zeros else torch.full(scale.shape, 8)
    each_scale, each_zero = (part.repeat_interleave(group_size, 1)[:, :input_size] for part in (scale.float(), zeros))
    kept_zeros = zeros.half().T.to(device).contiguous().T if has_zeros else None
    weight = (values - each_zero) * each_scale
    return weight.to(device), pack_int4(values).to(device), scale.T.to(device).contiguous().T, kept_zeros


@dataclass(frozen=True)
class PagedSequences:
    """Sequences in a paged cache. Slots that belong to no token, and table entries behind the last page, are poison."""

    key_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    context_lens: torch.Tensor  # [num_seqs] int32
    keys: list[torch.Tensor]  # of each sequence [context_len, num_kv_heads, head_dim]
    values: list[torch.Tensor]

    @property
    def kv_cache(self) -> LayerKVCache:
        return LayerKVCache(self.key_cache, self.value_cache)


def paged_sequences(
    context_lens: list[int],
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    unused_page: int = 2**30,
) -> PagedSequences:
    """Sequences of the given lengths over shuffled pages."""
    pages = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(pages) + 3
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    key_cache = torch.full(shape, torch.nan, dtype=dtype)
    value_cache = torch.full(shape, torch.nan, dtype=dtype)
    block_tables = torch.full((len(context_lens), max(pages) + 2), unused_page, dtype=torch.int32)
    order = torch.randperm(num_blocks, generator=generator)
    keys, values, used = [], [], 0
    for seq, length in enumerate(context_lens):
        table = order[used : used + pages[seq]]
        used += pages[seq]
        block_tables[seq, : pages[seq]] = table.int()
        position = torch.arange(length)
        block, offset = table[position // block_size], position % block_size
        keys.append(torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype))
        values.append(torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype))
        key_cache[block, offset] = keys[-1]
        value_cache[block, offset] = values[-1]
    return PagedSequences(
        key_cache.to(device),
        value_cache.to(device),
        block_tables.to(device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
        keys,
        values,
    )


@dataclass(frozen=True)
class QuantizedSequences:
    """The same sequences in an FP8 cache, and what they say there."""

    key_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim] float8_e4m3fn
    value_cache: torch.Tensor
    key_scale: torch.Tensor  # [num_blocks, num_kv_heads, block_size] float32
    value_scale: torch.Tensor
    keys: list[torch.Tensor]  # of each sequence [context_len, num_kv_heads, head_dim] float64
    values: list[torch.Tensor]

    @property
    def kv_cache(self) -> LayerKVCache:
        return LayerKVCache(self.key_cache, self.value_cache, self.key_scale, self.value_scale)


def quantized(cache: PagedSequences) -> QuantizedSequences:
    """Worked out here once more, component by component. What was poison is poison in pages and scales."""

    def quantize(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = pages.double().abs().amax(-1) / 448  # [num_blocks, block_size, num_kv_heads]
        stored = (pages.double() / scale.unsqueeze(-1)).float().to(torch.float8_e4m3fn)
        return (
            stored,
            scale.float().transpose(1, 2).contiguous(),
            stored.double() * scale.float().unsqueeze(-1).double(),
        )

    def read(pages: torch.Tensor) -> list[torch.Tensor]:
        block_size = pages.shape[1]
        tables = zip(cache.block_tables.cpu().long(), cache.context_lens.tolist(), strict=True)
        return [pages.cpu()[table[: -(-length // block_size)]].flatten(0, 1)[:length] for table, length in tables]

    key_cache, key_scale, restored_keys = quantize(cache.key_cache)
    value_cache, value_scale, restored_values = quantize(cache.value_cache)
    keys, values = read(restored_keys), read(restored_values)
    return QuantizedSequences(key_cache, value_cache, key_scale, value_scale, keys, values)


def attention_oracle(
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention in float64, one sequence, head and query after another: [num_tokens, num_heads, head_dim].

    Each sequence's queries [query_len, num_heads, head_dim] are the last ones of its context. A query sees `window`
    keys, its own and those just before.
    """
    rows = []
    for query, key, value in zip(queries, keys, values, strict=True):
        group = query.shape[1] // key.shape[1]
        for index in range(query.shape[0]):
            visible = key.shape[0] - query.shape[0] + index + 1
            heads = []
            for head in range(query.shape[1]):
                first = 0 if window is None else max(visible - window, 0)
                seen = key[first:visible, head // group].double()
                weights = (seen @ query[index, head].double() * scale).softmax(dim=0)
                heads.append(weights @ value[first:visible, head // group].double())
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def last_keys_and_values(kv_cache: LayerKVCache, metadata: DecodeMetadata) -> list[torch.Tensor]:
    """Returns views of what the cache holds of each row's last token."""
    block_size = kv_cache.key.shape[1]
    views: list[torch.Tensor] = []
    for context_len, table in zip(metadata.context_lens.tolist(), metadata.block_tables, strict=True):
        page, offset = int(table[(context_len - 1) // block_size]), (context_len - 1) % block_size
        views += [kv_cache.key[page, offset], kv_cache.value[page, offset]]
        if kv_cache.key_scale is not None and kv_cache.value_scale is not None:
            views += [kv_cache.key_scale[page, :, offset], kv_cache.value_scale[page, :, offset]]
    return views


def drafts_of_one_row(
    num_known: int, num_drafts: int, is_quantized: bool, generator: torch.Generator
) -> tuple[tuple[torch.Tensor, LayerKVCache, DecodeMetadata, float], torch.Tensor]:
    """(arguments of decode attention for a row of so many tokens and for its drafts, what float64 says)."""
    lengths, scale = [num_known + draft for draft in range(num_drafts + 1)], 0.125
    pages = paged_sequences(lengths[-1:], 16, 2, 64, torch.float32, torch.device("cpu"), generator)
    cache = quantized(pages) if is_quantized else pages
    query = torch.randn(len(lengths), 4, 64, generator=generator)
    keys, values = ([of_all[0][:length] for length in lengths] for of_all in (cache.keys, cache.values))
    oracle = attention_oracle([row.unsqueeze(0) for row in query], keys, values, scale)
    tables = pages.block_tables.expand(len(lengths), -1).contiguous()
    context_lens = torch.tensor(lengths, dtype=torch.int32)
    return (query, cache.kv_cache, DecodeMetadata(context_lens, tables, lengths[-1]), scale), oracle
