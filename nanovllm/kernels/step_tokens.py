"""Finds the tokens of a padded step, decode rows and chunks, in one launch that a CUDA graph can hold.

The host knows only the step's make-up: which rows, from where, how many tokens. Which token stands at which place of
the flat batch is found on the device, so that one graph serves every make-up of the same size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.triton_support import jit_with_varying, next_power_of_2, runs_triton, tl

_BLOCK_TOKENS = 64
_MIN_BLOCK_CHUNKS = 256  # one kernel for nearly all shapes, so that fewer are compiled


@dataclass(frozen=True)
class StepMakeUp:
    """Which tokens a padded step computes: those of `num_decode` rows, then those of the chunks, then padding."""

    num_decode: torch.Tensor  # [1] int32
    decode_rows: torch.Tensor  # [max_decode_rows] int32; entries at or after `num_decode` are the null row
    chunk_rows: torch.Tensor  # [max_chunks] int32; padding chunks are the null row's
    chunk_starts: torch.Tensor  # [max_chunks] int32, position of the first token
    cu_seqlens_q: torch.Tensor  # [max_chunks + 1] int32, from `num_decode` on; padding chunks are empty


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a padded step. Padding is the null row's only token."""

    input_ids: torch.Tensor  # [num_tokens] int32
    positions: torch.Tensor  # [num_tokens] int64
    slot_mapping: torch.Tensor  # [num_tokens] int64


@jit_with_varying("num_chunks")
def _read_step_tokens_kernel(
    num_decode_ptr: tl.tensor,
    decode_rows_ptr: tl.tensor,
    chunk_rows_ptr: tl.tensor,
    chunk_starts_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    input_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_chunks: tl.tensor,
    null_row: tl.tensor,
    max_tokens: tl.tensor,
    max_blocks: tl.tensor,
    block_size: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
) -> None:
    """One program for BLOCK_TOKENS tokens."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_batch = token < num_tokens
    chunk = tl.arange(0, BLOCK_CHUNKS)
    first = tl.load(cu_seqlens_ptr + chunk, mask=chunk < num_chunks, other=num_tokens)  # [BLOCK_CHUNKS]
    begun = (token[:, None] >= first[None, :]) & (chunk < num_chunks)[None, :]  # [BLOCK_TOKENS, BLOCK_CHUNKS]
    index = tl.maximum(tl.sum(begun.to(tl.int32), axis=1) - 1, 0)
    is_decode = token < tl.load(num_decode_ptr)
    is_chunk = (token < tl.load(cu_seqlens_ptr + num_chunks)) & (is_decode == 0)

    row = tl.load(decode_rows_ptr + token, mask=is_decode, other=null_row)
    row = tl.where(is_chunk, tl.load(chunk_rows_ptr + index, mask=is_chunk, other=null_row), row).to(tl.int64)
    offset = token - tl.load(cu_seqlens_ptr + index, mask=is_chunk, other=0)
    in_chunk = tl.load(chunk_starts_ptr + index, mask=is_chunk, other=0) + offset
    position = tl.where(is_chunk, in_chunk, tl.load(lengths_ptr + row) - 1)
    input_id = tl.load(token_ids_ptr + row * max_tokens + position)
    block = tl.load(block_tables_ptr + row * max_blocks + position // block_size).to(tl.int64)
    tl.store(input_ids_ptr + token, input_id, mask=in_batch)
    tl.store(positions_ptr + token, position.to(tl.int64), mask=in_batch)
    tl.store(slot_mapping_ptr + token, block * block_size + position % block_size, mask=in_batch)


def read_step_tokens_reference(
    make_up: StepMakeUp,
    token_ids: torch.Tensor,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    num_tokens: int,
) -> StepTokens:
    """Reference for `read_step_tokens` in plain torch; also used on CPUs."""
    null_row = len(lengths) - 1
    token = torch.arange(num_tokens, device=lengths.device)  # [num_tokens]
    starts = make_up.cu_seqlens_q
    index = (torch.searchsorted(starts[:-1].contiguous(), token.int(), right=True) - 1).clamp(min=0)
    is_decode = token < make_up.num_decode
    is_chunk = ~is_decode & (token < starts[-1])
    decode_row = make_up.decode_rows[token.clamp(max=len(make_up.decode_rows) - 1)]
    row = torch.where(is_decode, decode_row, null_row)
    row = torch.where(is_chunk, make_up.chunk_rows[index], row).long()
    in_chunk = make_up.chunk_starts[index] + token - starts[index]
    position = torch.where(is_chunk, in_chunk, lengths[row] - 1).long()
    blocks = block_tables[row, position // block_size].long()
    return StepTokens(token_ids[row, position], position, blocks * block_size + position % block_size)


def read_step_tokens(
    make_up: StepMakeUp,
    token_ids: torch.Tensor,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    num_tokens: int,
    *,
    use_triton: bool | None = None,
) -> StepTokens:
    """Returns the tokens of a step that is padded to `num_tokens`. May be captured in a CUDA graph.

    token_ids [all_rows, max_tokens] int32; lengths [all_rows] int32, ≥ 1; block_tables [all_rows, max_blocks] int32.
    The last row is the null row.
    """
    if not runs_triton(token_ids, use_triton):
        return read_step_tokens_reference(make_up, token_ids, lengths, block_tables, block_size, num_tokens)
    device = token_ids.device
    tokens = StepTokens(
        input_ids=torch.empty(num_tokens, dtype=torch.int32, device=device),
        positions=torch.empty(num_tokens, dtype=torch.int64, device=device),
        slot_mapping=torch.empty(num_tokens, dtype=torch.int64, device=device),
    )
    num_chunks = len(make_up.chunk_rows)
    _read_step_tokens_kernel[(-(-num_tokens // _BLOCK_TOKENS),)](
        num_decode_ptr=make_up.num_decode,
        decode_rows_ptr=make_up.decode_rows,
        chunk_rows_ptr=make_up.chunk_rows,
        chunk_starts_ptr=make_up.chunk_starts,
        cu_seqlens_ptr=make_up.cu_seqlens_q,
        token_ids_ptr=token_ids,
        lengths_ptr=lengths,
        block_tables_ptr=block_tables,
        input_ids_ptr=tokens.input_ids,
        positions_ptr=tokens.positions,
        slot_mapping_ptr=tokens.slot_mapping,
        num_tokens=num_tokens,
        num_chunks=num_chunks,
        null_row=len(lengths) - 1,
        max_tokens=token_ids.shape[1],
        max_blocks=block_tables.shape[1],
        block_size=block_size,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_CHUNKS=max(next_power_of_2(num_chunks), _MIN_BLOCK_CHUNKS),
    )
    return tokens
