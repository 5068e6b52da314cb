"""Reads and advances the rows that decode, in one launch each, before and after the model.

The rows' state stays on the device between steps. Plain indexing would take about fifteen launches per step, which at
small batches costs as much as several layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.triton_support import (
    jit_with_varying,
    join_launch_chain,
    next_power_of_2,
    pdl_options,
    runs_triton,
    tl,
)


@dataclass(frozen=True)
class DecodeTokens:
    """The last tokens of the rows that decode, and where their keys and values go."""

    input_ids: torch.Tensor  # [num_rows] int32
    positions: torch.Tensor  # [num_rows] int64
    context_lens: torch.Tensor  # [num_rows] int32, the token itself included
    slot_mapping: torch.Tensor  # [num_rows] int64
    block_tables: torch.Tensor  # [num_rows, max_blocks] int32


@jit_with_varying("rows_ptr")
def _read_decode_tokens_kernel(
    rows_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    input_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    tables_out_ptr: tl.tensor,
    max_tokens: tl.tensor,
    max_blocks: tl.tensor,
    block_size: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per row."""
    join_launch_chain(PDL)
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    position = length - 1
    table_ptr = block_tables_ptr + row * max_blocks
    tl.store(input_ids_ptr + index, tl.load(token_ids_ptr + row * max_tokens + position))
    tl.store(positions_ptr + index, position.to(tl.int64))
    tl.store(context_lens_ptr + index, length)
    block = tl.load(table_ptr + position // block_size).to(tl.int64)
    tl.store(slot_mapping_ptr + index, block * block_size + position % block_size)
    for first in range(0, max_blocks, BLOCK_SIZE):
        column = first + tl.arange(0, BLOCK_SIZE)
        mask = column < max_blocks
        tl.store(tables_out_ptr + index * max_blocks + column, tl.load(table_ptr + column, mask=mask), mask=mask)


_BLOCK_ROWS = 128  # of a program that appends tokens


@jit_with_varying("rows_ptr", "new_ids_ptr", "num_rows")
def _append_tokens_kernel(
    rows_ptr: tl.tensor,
    new_ids_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    num_rows: tl.tensor,
    null_row: tl.tensor,
    max_tokens: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    join_launch_chain(PDL)
    index = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row = tl.load(rows_ptr + index, mask=index < num_rows, other=null_row).to(tl.int64)
    mask = row != null_row
    length = tl.load(lengths_ptr + row, mask=mask, other=0)
    new_id = tl.maximum(tl.load(new_ids_ptr + index, mask=mask, other=0), 0)
    tl.store(token_ids_ptr + row * max_tokens + length, new_id, mask=mask)
    tl.store(lengths_ptr + row, length + 1, mask=mask)


def read_decode_tokens_reference(
    rows: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> DecodeTokens:
    """Reference for `read_decode_tokens` in plain torch; also used on CPUs."""
    context_lens = lengths[rows]
    positions = context_lens.long() - 1
    tables = block_tables[rows]
    blocks = tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1).long()
    slots = blocks * block_size + positions % block_size
    return DecodeTokens(token_ids[rows, positions], positions, context_lens, slots, tables)


def read_decode_tokens(
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    *,
    use_triton: bool | None = None,
) -> DecodeTokens:
    """Returns the last token of each of `rows` [num_rows] int32, with the inputs that attention needs for it.

    token_ids [all_rows, max_tokens] int32; lengths [all_rows] int32, ≥ 1; block_tables [all_rows, max_blocks] int32.
    """
    if not runs_triton(token_ids, use_triton):
        return read_decode_tokens_reference(rows, token_ids, lengths, block_tables, block_size)
    num_rows, max_blocks = len(rows), block_tables.shape[1]
    device = rows.device
    tokens = DecodeTokens(
        input_ids=torch.empty(num_rows, dtype=torch.int32, device=device),
        positions=torch.empty(num_rows, dtype=torch.int64, device=device),
        context_lens=torch.empty(num_rows, dtype=torch.int32, device=device),
        slot_mapping=torch.empty(num_rows, dtype=torch.int64, device=device),
        block_tables=torch.empty(num_rows, max_blocks, dtype=torch.int32, device=device),
    )
    if num_rows:
        _read_decode_tokens_kernel[(num_rows,)](
            rows_ptr=rows,
            token_ids_ptr=token_ids,
            lengths_ptr=lengths,
            block_tables_ptr=block_tables,
            input_ids_ptr=tokens.input_ids,
            positions_ptr=tokens.positions,
            context_lens_ptr=tokens.context_lens,
            slot_mapping_ptr=tokens.slot_mapping,
            tables_out_ptr=tokens.block_tables,
            max_tokens=token_ids.shape[1],
            max_blocks=max_blocks,
            block_size=block_size,
            BLOCK_SIZE=min(next_power_of_2(max_blocks), 1024),
            **pdl_options(rows.device),
        )
    return tokens


def append_tokens_reference(
    rows: torch.Tensor, new_ids: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor, null_row: int
) -> None:
    """Reference for `append_tokens` in plain torch; also used on CPUs."""
    row_lengths = lengths[rows]
    token_ids[rows, row_lengths] = new_ids.clamp(min=0)
    lengths[rows] = torch.where(rows == null_row, row_lengths, row_lengths + 1)


def append_tokens(
    rows: torch.Tensor,
    new_ids: torch.Tensor,
    token_ids: torch.Tensor,
    lengths: torch.Tensor,
    null_row: int,
    *,
    use_triton: bool | None = None,
) -> None:
    """Appends new_ids [num_rows] int32 to `rows` [num_rows] int32, which are distinct except for the null row.

    Written in place: token_ids [all_rows, max_tokens] int32, lengths [all_rows] int32. The null row keeps its length.
    INVALID_TOKEN is written as 0, which a step that is already planned can compute.
    """
    if not runs_triton(token_ids, use_triton):
        append_tokens_reference(rows, new_ids, token_ids, lengths, null_row)
        return
    num_rows = len(rows)
    if num_rows == 0:
        return
    _append_tokens_kernel[(-(-num_rows // _BLOCK_ROWS),)](
        rows_ptr=rows,
        new_ids_ptr=new_ids,
        token_ids_ptr=token_ids,
        lengths_ptr=lengths,
        num_rows=num_rows,
        null_row=null_row,
        max_tokens=token_ids.shape[1],
        BLOCK_SIZE=_BLOCK_ROWS,
        **pdl_options(rows.device),
    )
