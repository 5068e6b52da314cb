from __future__ import annotations

import pytest
import torch

from nanovllm.config import MAX_BIAS_WORDS
from nanovllm.kernels.columns import DRAFTS, LOGIT_EDITS, column_of, num_words
from nanovllm.kernels.draft_rows import accept_drafts, open_draft_rows
from nanovllm.kernels.logit_edits import RowLogitEdits
from nanovllm.kernels.row_changes import OpenedRows

NUM_ROWS, FIRST_DRAFT, MAX_TOKENS, MAX_BLOCKS, MASK_WORDS = 12, 4, 3000, 1500, 1100
# Rows 0 … 3 are those of sequences. Rows 0, 1 and 3 edit their logits, by penalties, by biases and by a mask.
LENGTHS = {0: 2500, 1: 7, 2: 1, 3: 40}
DRAFTS_OF = {0: [901, 902, 903], 1: [911, 912], 3: [931]}


def records(device: torch.device) -> torch.Tensor:
    items, row = [], FIRST_DRAFT
    for source, draft in DRAFTS_OF.items():
        for offset, token_id in enumerate(draft):
            items.append([row, source, offset, LENGTHS[source] + offset, token_id])
            row += 1
    assert num_words(DRAFTS) == len(items[0])
    return torch.tensor(items, dtype=torch.int32, device=device)


def state(device: torch.device) -> tuple[OpenedRows, torch.Tensor, RowLogitEdits]:
    """Rows in which every value tells its row. Draft rows still have those of an earlier step."""
    row = torch.arange(NUM_ROWS, device=device).unsqueeze(1)
    edits = (100 * row + torch.arange(num_words(LOGIT_EDITS), device=device)).int()
    edits[:, column_of(LOGIT_EDITS, "has_penalties")] = (row[:, 0] == 0).int()
    edits[:, column_of(LOGIT_EDITS, "num_token_biases")] = (row[:, 0] == 1).int()
    edits[:, column_of(LOGIT_EDITS, "has_mask")] = (row[:, 0] == 3).int()
    rows = OpenedRows(
        token_ids=(10_000 * row + torch.arange(MAX_TOKENS, device=device)).int(),
        lengths=torch.tensor([LENGTHS.get(each, 77) for each in range(NUM_ROWS)], dtype=torch.int32, device=device),
        temperatures=(0.5 + row[:, 0]).float(),
        seeds=2**62 + row[:, 0],
        truncations=(row + torch.tensor([0.25, 0.5, 0.75], device=device)).float(),
        logit_edits=edits,
    )
    tables = (10_000 * row + torch.arange(MAX_BLOCKS, device=device)).int()
    biases = (10_000 * row + torch.arange(MAX_BIAS_WORDS, device=device)).int()
    masks = (10_000 * row + torch.arange(MASK_WORDS, device=device)).int()
    return rows, tables, RowLogitEdits(edits, biases, masks)


@pytest.mark.parametrize("use_triton", [True, False])
def test_a_draft_row_is_its_source_with_the_draft_appended(device: torch.device, use_triton: bool) -> None:
    rows, tables, edits = state(device)
    open_draft_rows(records(device), rows, edits, tables, use_triton=use_triton)
    row = FIRST_DRAFT
    for source, draft in DRAFTS_OF.items():
        for end in range(1, len(draft) + 1):
            length = LENGTHS[source] + end
            assert int(rows.lengths[row]) == length
            for column in (rows.temperatures, rows.seeds, rows.truncations, rows.logit_edits, tables):
                assert column[row].equal(column[source])
            assert rows.token_ids[row, LENGTHS[source] : length].tolist() == draft[:end]
            if source in (0, 1):  # edits read all tokens
                own = LENGTHS[source]
                assert rows.token_ids[row, :own].equal(rows.token_ids[source, :own])
            if source == 1:
                assert edits.token_biases[row].equal(edits.token_biases[source])
            if source == 3:
                assert edits.masks[row].equal(edits.masks[source])
            row += 1
    before, tables_before, edits_before = state(device)
    for source in LENGTHS:  # nothing of a sequence's row changes
        for column, old in ((rows.token_ids, before.token_ids), (rows.lengths, before.lengths)):
            assert column[source].equal(old[source])
        assert tables[source].equal(tables_before[source])
        assert edits.token_biases[source].equal(edits_before.token_biases[source])


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("num_right", [(0, 0, 0), (1, 0, 1), (2, 2, 0), (3, 1, 1)])
def test_tokens_after_right_drafts_are_kept(device: torch.device, num_right: tuple[int, ...], use_triton: bool) -> None:
    """After a draft that is wrong none is right, even if its tokens happen to be what follows."""
    rows, tables, edits = state(device)
    drafts = records(device)
    open_draft_rows(drafts, rows, edits, tables, use_triton=use_triton)
    sampled: dict[int, int] = {}  # by row
    for (source, draft), right in zip(DRAFTS_OF.items(), num_right, strict=True):
        drafted = [row for row, own, *_ in drafts.tolist() if own == source]
        for index, row in enumerate([source, *drafted]):
            sampled[row] = draft[index] if index < len(draft) and index != right else 5000 + row
    for row, token_id in {**sampled, 2: 5002}.items():
        rows.token_ids[row, int(rows.lengths[row])] = token_id
        rows.lengths[row] += 1
    accept_drafts(drafts, rows.token_ids, rows.lengths, use_triton=use_triton)
    for (source, draft), right in zip(DRAFTS_OF.items(), num_right, strict=True):
        length = LENGTHS[source] + right + 1
        assert int(rows.lengths[source]) == length
        new = rows.token_ids[source, LENGTHS[source] : length].tolist()
        assert new[:-1] == draft[:right]
        assert new[-1] >= 5000
    assert int(rows.lengths[2]) == LENGTHS[2] + 1
