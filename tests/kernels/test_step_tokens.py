from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.step_tokens import StepMakeUp, read_step_tokens

NUM_ROWS, MAX_TOKENS, BLOCK_SIZE = 7, 160, 16
NULL_ROW = NUM_ROWS - 1
Chunks = list[tuple[int, int, int]]


def make_up(decode: list[int], chunks: Chunks, max_rows: int, max_chunks: int, device: torch.device) -> StepMakeUp:
    ends = [len(decode)]
    for _, _, length in chunks:
        ends.append(ends[-1] + length)
    padding = max_chunks - len(chunks)
    words = {
        "num_decode": [len(decode)],
        "decode_rows": decode + [NULL_ROW] * (max_rows - len(decode)),
        "chunk_rows": [row for row, _, _ in chunks] + [NULL_ROW] * padding,
        "chunk_starts": [start for _, start, _ in chunks] + [0] * padding,
        "cu_seqlens_q": ends + ends[-1:] * padding,
    }
    return StepMakeUp(**{name: torch.tensor(part, dtype=torch.int32, device=device) for name, part in words.items()})


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize(
    ("decode", "chunks", "num_tokens", "max_chunks"),
    [
        ([], [(2, 0, 1)], 64, 8),
        ([3], [(0, 5, 64)], 128, 8),
        ([0, 1, 4], [(2, 0, 40), (3, 100, 1), (5, 7, 20)], 64, 8),
        ([0], [(row, 3 * row, 17 + row) for row in range(1, 6)], 192, 5),
        ([], [(1, 0, 150)], 150, 1),
    ],
)
def test_each_token_is_where_the_make_up_says(
    device: torch.device,
    generator: torch.Generator,
    decode: list[int],
    chunks: Chunks,
    num_tokens: int,
    max_chunks: int,
    use_triton: bool,
) -> None:
    token_ids = torch.randint(0, 999, (NUM_ROWS, MAX_TOKENS), generator=generator, dtype=torch.int32)
    lengths = torch.randint(2, MAX_TOKENS, (NUM_ROWS,), generator=generator, dtype=torch.int32)
    lengths[NULL_ROW] = 1
    tables = torch.randint(0, 99, (NUM_ROWS, MAX_TOKENS // BLOCK_SIZE), generator=generator, dtype=torch.int32)
    got = read_step_tokens(
        make_up(decode, chunks, 5, max_chunks, device),
        token_ids.to(device),
        lengths.to(device),
        tables.to(device),
        BLOCK_SIZE,
        num_tokens,
        use_triton=use_triton,
    )
    places = [(row, int(lengths[row]) - 1) for row in decode]
    places += [(row, position) for row, start, length in chunks for position in range(start, start + length)]
    places += [(NULL_ROW, 0)] * (num_tokens - len(places))
    assert got.input_ids.tolist() == [int(token_ids[place]) for place in places]
    assert got.positions.tolist() == [position for _, position in places]
    assert got.slot_mapping.tolist() == [
        int(tables[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE for row, position in places
    ]
