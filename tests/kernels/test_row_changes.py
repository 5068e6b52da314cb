from __future__ import annotations

import numpy as np
import pytest
import torch

from nanovllm.engine.batch import LogitEdits, OpenedRow, ScheduledBatch
from nanovllm.kernels.row_changes import OpenedRows, close_rows, open_rows, set_blocks
from nanovllm.runner.device_batch import DeviceBatch

NUM_ROWS, MAX_TOKENS = 9, 3001


def opened_rows(device: torch.device) -> OpenedRows:
    return OpenedRows(
        token_ids=torch.full((NUM_ROWS, MAX_TOKENS), -7, dtype=torch.int32, device=device),
        lengths=torch.ones(NUM_ROWS, dtype=torch.int32, device=device),
        temperatures=torch.zeros(NUM_ROWS, device=device),
        seeds=torch.zeros(NUM_ROWS, dtype=torch.int64, device=device),
        truncations=torch.zeros(NUM_ROWS, 3, device=device),
        logit_edits=torch.zeros(NUM_ROWS, 7, dtype=torch.int32, device=device),
    )


def batch(opened: list[OpenedRow], device: torch.device) -> DeviceBatch:
    host = ScheduledBatch.build(1, opened=opened, blocks=[(3, 0, 5), (3, 1, 99), (0, 1, 7)])
    return DeviceBatch(host, torch.from_numpy(host.buffer).to(device))


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("lengths", [{4: 1}, {0: 3000, 8: 1024, 3: 17}, {row: 5 + row for row in range(9)}])
def test_opened_rows_get_their_tokens_and_parameters(
    device: torch.device, lengths: dict[int, int], use_triton: bool
) -> None:
    edits = LogitEdits(num_prompt_tokens=11, penalties=(1.5, 0.25, -0.5))
    opened = [
        OpenedRow(
            row=row,
            token_ids=np.arange(length, dtype=np.int32) + 1000 * row,
            temperature=0.5 + row,
            seed=2**62 + row,
            truncation=(5.0, 0.75, 0.125),
            logit_edits=edits if row % 2 else None,
        )
        for row, length in lengths.items()
    ]
    rows, uploaded = opened_rows(device), batch(opened, device)
    open_rows(uploaded.records("opened"), uploaded.values("opened_tokens"), rows, use_triton=use_triton)
    for row in range(NUM_ROWS):
        length = lengths.get(row)
        if length is None:
            assert (int(rows.lengths[row]), float(rows.temperatures[row])) == (1, 0)
            assert (rows.token_ids[row] == -7).all()
            continue
        assert int(rows.lengths[row]) == length
        assert rows.token_ids[row, :length].tolist() == [1000 * row + position for position in range(length)]
        assert (rows.token_ids[row, length:] == -7).all()
        assert float(rows.temperatures[row]) == 0.5 + row
        assert int(rows.seeds[row]) == 2**62 + row
        assert rows.truncations[row].tolist() == [5.0, 0.75, 0.125]
        record = torch.tensor(edits.record()[:4], dtype=torch.int32).tolist() if row % 2 else [0, 0, 0, 0]
        assert rows.logit_edits[row, :4].tolist() == record
        penalties = rows.logit_edits[row, 4:].cpu().view(torch.float32).tolist()
        assert penalties == ([1.5, 0.25, -0.5] if row % 2 else [1.0, 0.0, 0.0])


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("max_blocks", [2, 1500])
def test_closed_rows_and_new_blocks(device: torch.device, max_blocks: int, use_triton: bool) -> None:
    tables = torch.full((NUM_ROWS, max_blocks), 3, dtype=torch.int32, device=device)
    lengths = torch.full((NUM_ROWS,), 12, dtype=torch.int32, device=device)
    closed = torch.tensor([6, 0], dtype=torch.int32, device=device)
    close_rows(closed, lengths, tables, 77, use_triton=use_triton)
    assert lengths.tolist() == [1, 12, 12, 12, 12, 12, 1, 12, 12]
    set_blocks(batch([], device).records("blocks"), tables, use_triton=use_triton)
    expected = torch.full((NUM_ROWS, max_blocks), 3)
    expected[[0, 6]] = 77
    expected[3, :2] = torch.tensor([5, 99])
    expected[0, 1] = 7
    assert tables.cpu().equal(expected.int())
