from __future__ import annotations

import itertools

import pytest
import torch

from nanovllm.kernels.columns import INVALID_TOKEN
from nanovllm.kernels.sample import (
    best_candidates,
    noise_bits_reference,
    sample,
    sample_candidates,
    sample_reference,
)
from tests.kernels.inputs import DTYPES

# Infinities are meant; numpy, below Triton's interpreter, reports them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def draw(logits, temperature, seeds, positions, use_triton):
    """One token a row at one temperature for all."""
    temperatures = torch.full((logits.shape[0],), temperature, device=logits.device)
    rows = torch.arange(logits.shape[0], dtype=torch.int32, device=logits.device)
    return sample(logits, temperatures, seeds, positions, rows, use_triton=use_triton)


def repeated(logits: torch.Tensor, rows: int) -> torch.Tensor:
    """The same logits in every row, without memory for them."""
    return logits.expand(rows, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 3, 4096, 4097, 10007])
def test_kernel_draws_the_tokens_of_its_reference(device, generator, dtype, vocab_size):
    logits = (3 * torch.randn(6, vocab_size, generator=generator)).to(device, dtype)
    temperatures = torch.tensor([0.0, 1e-4, 0.6, 1.0, 2.0, 0.0], device=device)
    seeds = torch.tensor([1, -5, 2**62, 7, 7, 0], device=device)
    positions = torch.tensor([0, 1, 2**31 - 1, 3, 4, 5], dtype=torch.int32, device=device)
    rows = torch.tensor([4, 1, 2, 0, 3, 5], dtype=torch.int32, device=device)
    got = sample(logits, temperatures, seeds, positions, rows, use_triton=True)
    assert got.dtype == torch.int32
    assert got.tolist() == sample_reference(logits, temperatures, seeds, positions, rows).tolist()
    in_order = torch.arange(6, dtype=torch.int32, device=device)
    order = rows.long()
    same = sample(logits, temperatures[order], seeds[order], positions[order], in_order, use_triton=True)
    assert got.tolist() == same.tolist()


def test_noise_bits_are_those_of_the_published_mixers():
    """Against plain Python integers: SplitMix64's finaliser makes the row's keys, a keyed lowbias32 the bits."""

    def mix64(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    def mix32(x: int, key: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32 ^ key
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    seeds, positions = [0, 12345, -1, 2**63 - 1], [0, 7, 99, 2**31 - 1]
    got = noise_bits_reference(torch.tensor(seeds), torch.tensor(positions), 50).long() % 2**32
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        key = mix64(mix64((seed + 0x9E3779B97F4A7C15) % 2**64) ^ position)
        assert got[row].tolist() == [mix32(token ^ key % 2**32, key >> 32) for token in range(50)]


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_lowest_id_among_equals(device, dtype, use_triton):
    logits = torch.zeros(3, 9000, dtype=dtype, device=device)
    logits[0, [8999, 4100, 17]] = 5.0
    logits[1, [4096, 4095]] = 5.0
    rows = torch.arange(3, device=device)
    assert draw(logits, 0.0, rows, rows, use_triton).tolist() == [17, 4095, 0]


@pytest.mark.parametrize("use_triton", [True, False])
def test_a_seeded_token_does_not_depend_on_row_or_batch(device, generator, use_triton):
    logits = torch.randn(7, 5000, generator=generator).to(device)
    seeds, positions = torch.arange(40, 47, device=device), torch.arange(7, device=device)
    together = draw(logits, 1.0, seeds, positions, use_triton)
    order = torch.tensor([6, 2, 0, 5, 3, 1, 4], device=device)
    shuffled = draw(logits[order], 1.0, seeds[order], positions[order], use_triton)
    assert torch.equal(shuffled, together[order])
    alone = [draw(logits[i : i + 1], 1.0, seeds[i : i + 1], positions[i : i + 1], use_triton) for i in range(7)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_follow_the_softmax(device, generator, temperature, vary):
    """Chi-square over 100,000 draws; 63 degrees of freedom exceed 130 once in 10⁶ times."""
    draws = 100_000
    logits = (1.5 * torch.randn(64, generator=generator)).to(device)
    counting, constant = torch.arange(draws, device=device), torch.full((draws,), 3, device=device)
    seeds, positions = (counting, constant) if vary == "seeds" else (constant, counting)
    on_gpu = device.type == "cuda"  # in the interpreter 100,000 programs would take minutes
    tokens = torch.cat(
        [
            draw(repeated(logits, part.shape[0]), temperature, part, other, on_gpu)
            for part, other in zip(seeds.split(50_000), positions.split(50_000), strict=True)
        ]
    )
    expected = (logits.double() / temperature).softmax(dim=0) * draws
    counted = torch.bincount(tokens.long(), minlength=64).double()
    chi_square = float(((counted - expected).square() / expected).sum())
    assert chi_square < 130


@pytest.mark.parametrize("shift", ["seed", "position"])
def test_neighbouring_draws_are_independent(device, shift):
    """Pairs (draw, draw of the next seed or position) over 8 × 8 cells: 63 degrees of freedom."""
    draws = 100_000
    logits = torch.zeros(8, device=device)
    counting, constant = torch.arange(draws + 1, device=device), torch.full((draws + 1,), 11, device=device)
    seeds, positions = (counting, constant) if shift == "seed" else (constant, counting)
    tokens = sample_reference(
        repeated(logits, draws + 1), torch.ones(draws + 1, device=device), seeds, positions, counting
    ).long()
    counted = torch.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64).double()
    assert float(((counted - draws / 64).square() / (draws / 64)).sum()) < 130


def test_noise_of_rare_tokens_has_the_right_tail():
    """4,000 tokens of equal probability: the smallest exponentials decide. 9 degrees of freedom."""
    seeds = torch.arange(1500)
    tokens = sample_reference(torch.zeros(1500, 4000), torch.ones(1500), seeds, seeds, seeds).long()
    counted = torch.bincount(tokens // 400, minlength=10).double()
    assert float(((counted - 150).square() / 150).sum()) < 45


@pytest.mark.parametrize("use_triton", [True, False])
def test_a_tiny_temperature_is_greedy_even_for_close_logits(device, use_triton):
    logits = torch.full((50, 5000), 30.0, device=device)
    logits[:, 4321] = 30.01
    rows = torch.arange(50, device=device)
    assert draw(logits, 1e-4, rows, rows, use_triton).tolist() == [4321] * 50


@pytest.mark.parametrize("use_triton", [True, False])
def test_a_tiny_temperature_still_draws_among_equals(device, use_triton):
    logits = torch.full((64, 2), 30.0, device=device)
    rows = torch.arange(64, device=device)
    assert 10 < int(draw(logits, 1e-4, rows, rows, use_triton).sum()) < 54


def broken_logits(device):
    """Rows with NaN, inf, both in another block, a lone NaN, and two valid ones: nothing but -inf, and one token."""
    logits = torch.zeros(6, 4100, device=device)
    logits[0] = torch.nan
    logits[1] = torch.inf
    logits[2, 77], logits[2, 78] = torch.inf, torch.nan
    logits[3, 4099] = torch.nan
    logits[4] = -torch.inf
    logits[5], logits[5, 4099] = -torch.inf, 0.0
    return logits


def check_broken(tokens):
    assert tokens[:4] == [INVALID_TOKEN] * 4
    assert 0 <= tokens[4] < 4100
    assert tokens[5:] == [4099]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1.0, 2.0])
def test_a_row_with_a_logit_that_is_no_number_has_no_token(device, temperature, use_triton, dtype):
    logits = broken_logits(device).to(dtype)
    rows = torch.arange(6, device=device)
    check_broken(draw(logits, temperature, rows, rows, use_triton).tolist())


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cut", [70, 78, 4099])
def test_ranks_agree_that_a_row_has_no_token(device, temperature, cut, use_triton):
    """Whichever rank has the logit, and whatever score the others' winners have."""
    logits = broken_logits(device)
    rows = torch.arange(6, dtype=torch.int32, device=device)
    state = (torch.full((6,), temperature, device=device), rows.long(), rows, rows)
    parts = [
        sample_candidates(part, *state, first_token=first, use_triton=use_triton)
        for first, part in ((0, logits[:, :cut]), (cut, logits[:, cut:]))
    ]
    check_broken(best_candidates(torch.stack(parts)).tolist())


def test_no_rows_give_no_tokens(device):
    empty = torch.empty(0, dtype=torch.int64, device=device)
    assert draw(torch.empty(0, 10, device=device), 1.0, empty, empty, True).shape == (0,)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("cuts", [[0, 5000, 10007], [0, 1, 4096, 10007, 10007], [0, 10007]])
def test_candidates_of_parts_of_the_vocabulary_give_the_token_of_the_whole(device, generator, cuts, use_triton):
    """The same token wherever it is cut, also where a rank has no part, among equals, and in a row without numbers."""
    logits = (3 * torch.randn(6, cuts[-1], generator=generator)).to(device)
    logits[4] = 1.0
    logits[5] = -torch.inf
    temperatures = torch.tensor([0.0, 1e-4, 0.6, 1.0, 0.0, 0.0], device=device)
    seeds = torch.tensor([1, -5, 2**62, 7, 7, 0], device=device)
    positions = torch.arange(6, dtype=torch.int32, device=device)
    rows = torch.tensor([0, 2, 1, 3, 4, 5], dtype=torch.int32, device=device)
    state = (temperatures, seeds, positions, rows)
    parts = [
        sample_candidates(logits[:, start:stop], *state, first_token=start, use_triton=use_triton)
        for start, stop in itertools.pairwise(cuts)
    ]
    assert {part.dtype for part in parts} == {torch.int32}
    got = best_candidates(torch.stack(parts))
    assert got.tolist() == sample(logits, *state, use_triton=use_triton).tolist()
    assert got[4:].tolist() == [0, 0]
