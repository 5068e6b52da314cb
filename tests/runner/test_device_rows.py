"""The device's rows against a plain Python model, over random batches, and padding that touches nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.batch import Chunk, LogitEdits, OpenedRow, ScheduledBatch
from nanovllm.kernels.columns import LOGIT_EDITS
from nanovllm.requests.logit_edits import token_mask
from nanovllm.runner.device_batch import DeviceBatch
from nanovllm.runner.device_rows import DeviceRows, ModelInputs

NUM_ROWS, MAX_MODEL_LEN, NUM_BLOCKS, VOCAB_SIZE = 4, 10, 100, 100
CPU = torch.device("cpu")


@dataclass
class Row:
    tokens: list[int]
    table: list[int] = field(default_factory=list)
    computed: int = 0
    temperature: float = 0.0
    seed: int = 0
    truncation: tuple[float, float, float] = (0.0, 1.0, 0.0)


class Model:
    """Rows as lists, and what a forward pass over them must be given."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.max_blocks = -(-MAX_MODEL_LEN // block_size)
        self.rows: dict[int, Row] = {}
        self.next_block = 0

    def padded_table(self, row: int) -> list[int]:
        table = self.rows[row].table if row in self.rows else []
        return table + [NUM_BLOCKS] * (self.max_blocks - len(table))

    def slot(self, row: int, position: int) -> int:
        return self.padded_table(row)[position // self.block_size] * self.block_size + position % self.block_size

    def extend_table(self, row: int, num_tokens: int) -> list[tuple[int, int, int]]:
        """New blocks, of the next unused numbers, until the row has room for `num_tokens`."""
        added = []
        table = self.rows[row].table
        while len(table) * self.block_size < num_tokens:
            added.append((row, len(table), self.next_block % NUM_BLOCKS))
            table.append(self.next_block % NUM_BLOCKS)
            self.next_block += 1
        return added


def draw_batch(data: st.DataObject, model: Model, step: int) -> ScheduledBatch:
    """A batch that the scheduler could plan for the rows as they stand; the model makes its changes at once."""
    closed = data.draw(st.lists(st.sampled_from(sorted(model.rows)), unique=True)) if model.rows else []
    for row in closed:
        del model.rows[row]
    opened, blocks = [], []
    for row in sorted(set(range(NUM_ROWS)) - model.rows.keys()):
        if not data.draw(st.booleans()):
            continue
        tokens = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=MAX_MODEL_LEN - 1))
        new = Row(tokens, temperature=data.draw(st.floats(0, 2, width=32)), seed=data.draw(st.integers(0, 2**63 - 1)))
        new.truncation = data.draw(st.sampled_from([(0.0, 1.0, 0.0), (5.0, 0.5, 0.25)]))
        model.rows[row] = new
        opened.append(OpenedRow(row, np.array(tokens, dtype=np.int32), new.temperature, new.seed, new.truncation))
        blocks += model.extend_table(row, len(tokens))
        # A cached prefix leaves at least one token to compute.
        new.computed = data.draw(st.integers(0, len(tokens) - 1))
    decode_rows, final, others = [], [], []
    for row, state in sorted(model.rows.items()):
        left = len(state.tokens) - state.computed
        if left == 0 or not data.draw(st.booleans()):
            continue
        if left == 1 and data.draw(st.booleans()):
            blocks += model.extend_table(row, len(state.tokens))
            decode_rows.append(row)
        else:
            length = data.draw(st.integers(1, left))
            (final if length == left else others).append(Chunk(row, state.computed, length))
    return ScheduledBatch.build(
        step,
        closed=closed,
        opened=opened,
        blocks=blocks,
        chunks=final + others,
        num_final_chunks=len(final),
        decode_rows=decode_rows,
    )


def upload(batch: ScheduledBatch) -> DeviceBatch:
    return DeviceBatch(batch, torch.from_numpy(batch.buffer))


def check_inputs(inputs: ModelInputs, batch: ScheduledBatch, model: Model) -> None:
    decode = [(row, len(model.rows[row].tokens) - 1, 1) for row in batch.decode_rows.tolist()]
    work = decode + [tuple(chunk) for chunk in batch.chunks.tolist()]
    places = [(row, position) for row, start, length in work for position in range(start, start + length)]
    assert inputs.input_ids.tolist() == [model.rows[row].tokens[position] for row, position in places]
    assert inputs.positions.tolist() == [position for _, position in places]
    attention = inputs.attention
    assert attention.slot_mapping.tolist() == [model.slot(row, position) for row, position in places]
    assert attention.num_decode_tokens == len(decode)
    assert inputs.sampled_rows.tolist() == batch.sampled_rows.tolist()
    last = [place for place, (row, position) in enumerate(places) if position == len(model.rows[row].tokens) - 1]
    where = inputs.sampled_tokens
    assert (list(range(len(places))) if where is None else where.tolist()) == last
    if decode:
        assert attention.decode is not None
        assert attention.decode.context_lens.tolist() == [position + 1 for _, position, _ in decode]
        assert attention.decode.block_tables.tolist() == [model.padded_table(row) for row, _, _ in decode]
        assert attention.decode.max_context_len == MAX_MODEL_LEN
    else:
        assert attention.decode is None
    if len(batch.chunks):
        prefill = attention.prefill
        assert prefill is not None
        rows, starts, lengths = (batch.chunks[name].tolist() for name in ("row", "start", "length"))
        assert prefill.cu_seqlens_q.tolist() == [0, *np.cumsum(lengths).tolist()]
        assert prefill.context_lens.tolist() == [s + length for s, length in zip(starts, lengths, strict=True)]
        assert prefill.block_tables.tolist() == [model.padded_table(row) for row in rows]
        assert prefill.max_seqlen_q == max(lengths)
        assert prefill.max_seqlen_k == max(prefill.context_lens.tolist())
    else:
        assert attention.prefill is None


def check_rows(rows: DeviceRows, model: Model) -> None:
    for row in range(NUM_ROWS):
        assert rows.block_tables[row].tolist() == model.padded_table(row), "a free row points at the null block"
        if row in model.rows:
            state = model.rows[row]
            assert int(rows.lengths[row]) == len(state.tokens)
            assert rows.token_ids[row, : len(state.tokens)].tolist() == state.tokens
            assert float(rows.temperatures[row]) == state.temperature
            assert tuple(rows.truncations[row].tolist()) == state.truncation
            assert int(rows.seeds[row]) == state.seed
        else:
            assert int(rows.lengths[row]) == 1
    assert int(rows.lengths[rows.null_row]) == 1
    assert set(rows.block_tables[rows.null_row].tolist()) == {NUM_BLOCKS}


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_random_batches_against_the_model(data: st.DataObject, block_size: int) -> None:
    model = Model(block_size)
    rows = DeviceRows(NUM_ROWS, MAX_MODEL_LEN, block_size, NUM_BLOCKS, VOCAB_SIZE, CPU)
    for step in range(data.draw(st.integers(1, 6))):
        batch = draw_batch(data, model, step)
        uploaded = upload(batch)
        rows.apply(uploaded)
        check_rows(rows, model)
        if len(batch.chunks):
            inputs = rows.mixed_inputs(upload(batch))
        elif len(batch.decode_rows):
            padding = data.draw(st.integers(0, 3))  # what a captured graph adds
            padded = torch.cat([uploaded.values("decode_rows"), torch.full((padding,), rows.null_row)])
            check_inputs(rows.decode_inputs(padded[: len(batch.decode_rows)]), batch, model)
            inputs = rows.decode_inputs(padded.int())
        else:
            continue
        if len(batch.chunks) or not padding:
            check_inputs(inputs, batch, model)
        tokens = data.draw(st.lists(st.integers(0, 99), min_size=len(inputs.sampled_rows), max_size=99))
        sampled = torch.tensor(tokens[: len(inputs.sampled_rows)], dtype=torch.int32)
        rows.append(inputs.sampled_rows, sampled)
        for row in batch.decode_rows.tolist():
            model.rows[row].computed += 1
        for row, _, length in batch.chunks.tolist():
            model.rows[row].computed += length
        for row, token in zip(inputs.sampled_rows.tolist(), sampled.tolist(), strict=True):
            if row != rows.null_row:
                model.rows[row].tokens.append(token)
        for row in [row for row, state in model.rows.items() if len(state.tokens) >= MAX_MODEL_LEN]:
            model.rows[row].computed = len(model.rows[row].tokens)  # at the model's length: no further step
        check_rows(rows, model)


@pytest.fixture
def two_rows() -> DeviceRows:
    """Row 0 with five tokens in blocks 3 and 4, row 2 with two tokens in block 7; blocks of four tokens."""
    rows = DeviceRows(NUM_ROWS, MAX_MODEL_LEN, 4, NUM_BLOCKS, VOCAB_SIZE, CPU)
    tokens = [np.array(t, dtype=np.int32) for t in ([1, 2, 3, 4, 5], [6, 7])]
    batch = ScheduledBatch.build(
        1,
        opened=[OpenedRow(0, tokens[0], 0.5, 2**62 + 1), OpenedRow(2, tokens[1], 1.0, 9)],
        blocks=[(0, 0, 3), (0, 1, 4), (2, 0, 7)],
    )
    rows.apply(upload(batch))
    return rows


def test_padding_touches_nothing_of_anybody(two_rows: DeviceRows) -> None:
    padded = torch.tensor([2, 0, *[two_rows.null_row] * 3], dtype=torch.int32)
    inputs = two_rows.decode_inputs(padded)
    alone = two_rows.decode_inputs(padded[:2])
    decode, decode_alone = inputs.attention.decode, alone.attention.decode
    assert decode is not None
    assert decode_alone is not None
    for with_padding, without in [
        (inputs.input_ids, alone.input_ids),
        (inputs.positions, alone.positions),
        (inputs.attention.slot_mapping, alone.attention.slot_mapping),
        (decode.context_lens, decode_alone.context_lens),
        (decode.block_tables, decode_alone.block_tables),
    ]:
        assert torch.equal(with_padding[:2], without)
    # What padding writes goes into the null block; what it reads is one token of it.
    assert inputs.attention.slot_mapping[2:].tolist() == [NUM_BLOCKS * 4] * 3
    assert decode.context_lens[2:].tolist() == [1] * 3
    assert set(decode.block_tables[2:].flatten().tolist()) == {NUM_BLOCKS}

    before = two_rows.token_ids.clone()
    two_rows.append(padded, torch.tensor([70, 71, 90, 91, 92], dtype=torch.int32))
    assert two_rows.lengths.tolist() == [6, 1, 3, 1, 1]
    before[2, 2], before[0, 5] = 70, 71
    assert torch.equal(two_rows.token_ids[:NUM_ROWS], before[:NUM_ROWS])
    again = two_rows.decode_inputs(padded)
    assert again.attention.slot_mapping[2:].tolist() == [NUM_BLOCKS * 4] * 3


def test_a_closed_row_points_at_the_null_block_and_its_neighbours_stay(two_rows: DeviceRows) -> None:
    batch = ScheduledBatch.build(2, closed=[0])
    two_rows.apply(upload(batch))
    assert set(two_rows.block_tables[0].tolist()) == {NUM_BLOCKS}
    assert two_rows.lengths.tolist() == [1, 1, 2, 1, 1]
    assert two_rows.block_tables[2, 0] == 7


def test_a_row_reused_in_one_batch_keeps_nothing_of_the_last(two_rows: DeviceRows) -> None:
    """A table of two blocks gives way to one of one block: the second entry must not linger."""
    batch = ScheduledBatch.build(
        2,
        closed=[0],
        opened=[OpenedRow(0, np.array([8], dtype=np.int32), 0.0, 0)],
        blocks=[(0, 0, 50)],
        chunks=[Chunk(0, 0, 1)],
        num_final_chunks=1,
    )
    two_rows.apply(upload(batch))
    assert two_rows.block_tables[0].tolist() == [50, NUM_BLOCKS, NUM_BLOCKS]
    inputs = two_rows.mixed_inputs(upload(batch))
    assert inputs.input_ids.tolist() == [8]
    assert inputs.attention.slot_mapping.tolist() == [200]


def test_dtypes_are_those_the_kernels_read(two_rows: DeviceRows) -> None:
    batch = ScheduledBatch.build(2, chunks=[Chunk(2, 0, 2)], num_final_chunks=1, decode_rows=[0])
    inputs = two_rows.mixed_inputs(upload(batch))
    prefill, decode = inputs.attention.prefill, inputs.attention.decode
    assert prefill is not None
    assert decode is not None
    int32 = [prefill.cu_seqlens_q, prefill.context_lens, prefill.block_tables, decode.context_lens, decode.block_tables]
    assert {tensor.dtype for tensor in [inputs.input_ids, inputs.sampled_rows, *int32]} == {torch.int32}
    assert {tensor.dtype for tensor in [inputs.positions, inputs.attention.slot_mapping]} == {torch.int64}
    assert two_rows.seeds[0] == 2**62 + 1


def test_a_row_has_the_logit_edits_it_was_opened_with_and_the_last_mask_that_came(two_rows: DeviceRows) -> None:
    def apply(**changes: Any) -> None:
        batch = ScheduledBatch.build(2, **changes)
        two_rows.apply(upload(batch))

    def settings(row: int) -> list[float]:
        own = two_rows.logit_edits.settings.numpy().view(LOGIT_EDITS)[row, 0]
        return list(own.item())

    state = two_rows.logit_edits
    assert all(settings(row)[:4] == [0, 0, 0, 0] for row in range(NUM_ROWS + 1)), "rows without edits"
    token = np.array([8], dtype=np.int32)
    masks = [token_mask(allowed, VOCAB_SIZE) for allowed in ([31], [0, 99], [32])]
    edits = LogitEdits(1, (1.5, -0.5, 0.25), 2, (1, 2, 3, 4, 5, 6), masks[0])
    apply(closed=[2], opened=[OpenedRow(2, token, 0.0, 0, logit_edits=edits), OpenedRow(1, token, 0.0, 0)])
    assert settings(2) == [1, 2, 1, 1, 1.5, -0.5, 0.25]
    assert state.token_biases[2, :6].tolist() == [1, 2, 3, 4, 5, 6]
    assert state.masks[2].tolist() == masks[0].tolist() == [-(2**31), 0, 0, 0]
    apply(token_masks={2: masks[1], 0: masks[2]})
    assert state.masks[2].tolist() == masks[1].tolist() == [1, 0, 0, 8]
    assert state.masks[0].tolist() == [0, 1, 0, 0]
    assert [settings(row)[3] for row in range(NUM_ROWS + 1)] == [1, 0, 1, 0, 0]
    assert settings(1)[:4] == [0, 0, 0, 0]
    apply(closed=[2], opened=[OpenedRow(2, token, 0.0, 0)])
    assert settings(2)[1:4] == [0, 0, 0], "nothing of the last request is left"
