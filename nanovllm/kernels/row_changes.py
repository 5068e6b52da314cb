"""Applies a batch's changes to the device's rows: rows that close, rows that open, and entries of block tables.

One launch for each kind. Plain indexing would take about thirty, whose launches cost a step that admits a request more
than its prompt does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.columns import BLOCKS, OPENED, column_of, columns_of, num_words
from nanovllm.kernels.triton_support import constant, jit_with_varying, next_power_of_2, runs_triton, tl

_BLOCK_SIZE = 1024  # words that a program copies at a time
_ENTRIES_EACH = 256  # block-table entries of a program

_OPENED_WIDTH = constant(num_words(OPENED))
_ROW = constant(column_of(OPENED, "row"))
_NUM_TOKENS = constant(column_of(OPENED, "num_tokens"))
_TEMPERATURE = constant(column_of(OPENED, "temperature"))
_SEED = constant(column_of(OPENED, "seed"))
_TRUNCATION = constant(column_of(OPENED, "truncation"))
_LOGIT_EDITS = constant(column_of(OPENED, "logit_edits"))
_BLOCKS_WIDTH = constant(num_words(BLOCKS))
_BLOCKS_ROW = constant(column_of(BLOCKS, "row"))
_BLOCKS_INDEX = constant(column_of(BLOCKS, "index"))
_BLOCKS_BLOCK = constant(column_of(BLOCKS, "block"))


@dataclass(frozen=True)
class OpenedRows:
    """What a row gets when it is opened, indexed by row."""

    token_ids: torch.Tensor  # [all_rows, max_tokens] int32
    lengths: torch.Tensor  # [all_rows] int32
    temperatures: torch.Tensor  # [all_rows] float32
    seeds: torch.Tensor  # [all_rows] int64
    truncations: torch.Tensor  # [all_rows, words of TRUNCATION] float32
    logit_edits: torch.Tensor  # [all_rows, words of LOGIT_EDITS] int32


@jit_with_varying("closed_ptr")
def _close_rows_kernel(
    closed_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    null_block: tl.tensor,
    max_blocks: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """One program per closed row."""
    row = tl.load(closed_ptr + tl.program_id(0)).to(tl.int64)
    tl.store(lengths_ptr + row, 1)
    for first in range(0, max_blocks, BLOCK_SIZE):
        column = first + tl.arange(0, BLOCK_SIZE)
        empty = tl.zeros([BLOCK_SIZE], tl.int32) + null_block
        tl.store(block_tables_ptr + row * max_blocks + column, empty, mask=column < max_blocks)


@jit_with_varying("records_ptr", "tokens_ptr", "num_opened")
def _open_rows_kernel(
    records_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    temperatures_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    truncations_ptr: tl.tensor,
    logit_edits_ptr: tl.tensor,
    num_opened: tl.tensor,
    max_tokens: tl.tensor,
    BLOCK_OPENED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEED_WORDS: tl.constexpr,
    TRUNCATION_WORDS: tl.constexpr,
    EDIT_WORDS: tl.constexpr,
) -> None:
    """One program per opened row. All tensors are words."""
    index = tl.program_id(0)
    record_ptr = records_ptr + index * _OPENED_WIDTH
    row = tl.load(record_ptr + _ROW).to(tl.int64)
    num_tokens = tl.load(record_ptr + _NUM_TOKENS)
    tl.store(lengths_ptr + row, num_tokens)
    tl.store(temperatures_ptr + row, tl.load(record_ptr + _TEMPERATURE))
    for word in tl.static_range(SEED_WORDS):
        tl.store(seeds_ptr + row * SEED_WORDS + word, tl.load(record_ptr + _SEED + word))
    for word in tl.static_range(TRUNCATION_WORDS):
        tl.store(truncations_ptr + row * TRUNCATION_WORDS + word, tl.load(record_ptr + _TRUNCATION + word))
    for word in tl.static_range(EDIT_WORDS):
        tl.store(logit_edits_ptr + row * EDIT_WORDS + word, tl.load(record_ptr + _LOGIT_EDITS + word))
    other = tl.arange(0, BLOCK_OPENED)
    before = (other < index) & (other < num_opened)
    lengths = tl.load(records_ptr + other * _OPENED_WIDTH + _NUM_TOKENS, mask=before, other=0)
    source_ptr = tokens_ptr + tl.sum(lengths, axis=0)
    for first in range(0, num_tokens, BLOCK_SIZE):
        position = first + tl.arange(0, BLOCK_SIZE)
        mask = position < num_tokens
        tl.store(token_ids_ptr + row * max_tokens + position, tl.load(source_ptr + position, mask=mask), mask=mask)


@jit_with_varying("entries_ptr", "num_entries")
def _set_blocks_kernel(
    entries_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    num_entries: tl.tensor,
    max_blocks: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = index < num_entries
    entry_ptr = entries_ptr + index * _BLOCKS_WIDTH
    row = tl.load(entry_ptr + _BLOCKS_ROW, mask=mask, other=0).to(tl.int64)
    column = tl.load(entry_ptr + _BLOCKS_INDEX, mask=mask, other=0)
    block = tl.load(entry_ptr + _BLOCKS_BLOCK, mask=mask, other=0)
    tl.store(block_tables_ptr + row * max_blocks + column, block, mask=mask)


def close_rows(
    closed: torch.Tensor,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    null_block: int,
    *,
    use_triton: bool | None = None,
) -> None:
    """Makes `closed` [num_closed] int32 one token long, with tables of the null block.

    Written in place: lengths [all_rows] int32, block_tables [all_rows, max_blocks] int32.
    """
    if not runs_triton(lengths, use_triton):
        lengths[closed] = 1
        block_tables[closed] = null_block
        return
    max_blocks = block_tables.shape[1]
    _close_rows_kernel[(len(closed),)](
        closed_ptr=closed,
        lengths_ptr=lengths,
        block_tables_ptr=block_tables,
        null_block=null_block,
        max_blocks=max_blocks,
        BLOCK_SIZE=min(next_power_of_2(max_blocks), _BLOCK_SIZE),
    )


def open_rows_reference(records: torch.Tensor, tokens: torch.Tensor, rows: OpenedRows) -> None:
    """Reference for `open_rows` in plain torch; also used on CPUs."""
    row = records[:, column_of(OPENED, "row")]
    num_tokens = records[:, column_of(OPENED, "num_tokens")]
    rows.lengths[row] = num_tokens
    for name, state in (
        ("temperature", rows.temperatures),
        ("seed", rows.seeds),
        ("truncation", rows.truncations),
        ("logit_edits", rows.logit_edits),
    ):
        words = state.view(torch.int32).view(len(rows.lengths), -1)
        words[row] = records[:, columns_of(OPENED, name)]
    for index, part in zip(row.tolist(), tokens.split(num_tokens.tolist()), strict=True):
        rows.token_ids[index, : len(part)] = part


def open_rows(records: torch.Tensor, tokens: torch.Tensor, rows: OpenedRows, *, use_triton: bool | None = None) -> None:
    """Gives the opened rows their tokens and sampling parameters, in place.

    records [num_opened, words of OPENED] int32; tokens: of all opened rows one after another, [num_tokens] int32.
    """
    if not runs_triton(rows.lengths, use_triton):
        open_rows_reference(records, tokens, rows)
        return
    num_rows = len(rows.lengths)

    def words(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(torch.int32)

    _open_rows_kernel[(len(records),)](
        records_ptr=records,
        tokens_ptr=tokens,
        token_ids_ptr=rows.token_ids,
        lengths_ptr=rows.lengths,
        temperatures_ptr=words(rows.temperatures),
        seeds_ptr=words(rows.seeds),
        truncations_ptr=words(rows.truncations),
        logit_edits_ptr=rows.logit_edits,
        num_opened=len(records),
        max_tokens=rows.token_ids.shape[1],
        BLOCK_OPENED=next_power_of_2(num_rows),  # of all rows: one compilation for any number of them
        BLOCK_SIZE=_BLOCK_SIZE,
        SEED_WORDS=rows.seeds.itemsize // 4,
        TRUNCATION_WORDS=rows.truncations.shape[1],
        EDIT_WORDS=rows.logit_edits.shape[1],
    )


def set_blocks(entries: torch.Tensor, block_tables: torch.Tensor, *, use_triton: bool | None = None) -> None:
    """Writes entries [num_entries, words of BLOCKS] int32 into block_tables [all_rows, max_blocks] int32."""
    if not runs_triton(block_tables, use_triton):
        row, index, block = (entries[:, column_of(BLOCKS, name)] for name in ("row", "index", "block"))
        block_tables[row, index] = block
        return
    _set_blocks_kernel[(-(-len(entries) // _ENTRIES_EACH),)](
        entries_ptr=entries,
        block_tables_ptr=block_tables,
        num_entries=len(entries),
        max_blocks=block_tables.shape[1],
        BLOCK_SIZE=_ENTRIES_EACH,
    )
