from __future__ import annotations

import math

import pytest
import torch

from nanovllm.kernels.columns import NO_TRUNCATION
from nanovllm.kernels.sample import sample
from nanovllm.kernels.truncate import keep_thresholds
from tests.kernels.inputs import DTYPES
from tests.kernels.test_sample import broken_logits, check_broken

# Infinities are meant; numpy, below Triton's interpreter, reports them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ON = [(1.0, 1.0, 0.0), (7.0, 1.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.95, 0.0), (0.0, 1.0, 0.2), (50.0, 0.9, 0.01)]


def kept_by_the_rules(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """In plain Python, token by token; ties with the last one stay."""
    best = max(logits)
    weights = [math.exp((x - best) / temperature) for x in logits]
    kept = sorted((i for i, w in enumerate(weights) if w >= min_p), key=lambda i: -weights[i])
    if 0 < top_k < len(kept):
        kept = [i for i in kept if weights[i] >= weights[kept[top_k - 1]]]
    if top_p < 1:
        total, mass = sum(weights[i] for i in kept), 0.0
        for i in kept:
            mass += weights[i]
            if mass >= top_p * total:
                kept = [j for j in kept if weights[j] >= weights[i]]
                break
    return sorted(kept)


def kept(logits, temperatures, truncations, use_triton, rows=None):
    """Which tokens are not below their row's threshold: [num_rows, vocab_size] bool."""
    device = logits.device
    rows = torch.arange(len(logits), dtype=torch.int32, device=device) if rows is None else rows
    state = (torch.tensor(temperatures, device=device), torch.tensor(truncations, device=device), rows)
    return logits.float() >= keep_thresholds(logits, *state, use_triton=use_triton).unsqueeze(1)


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 3, 300, 2500])
def test_keeps_what_the_rules_say(device, generator, dtype, vocab_size, use_triton):
    logits = (2 * torch.randn(len(ON), vocab_size, generator=generator)).to(device, dtype)
    got = kept(logits, [0.7] * len(ON), ON, use_triton)
    for row, (top_k, top_p, min_p) in enumerate(ON):
        expected = kept_by_the_rules(logits[row].float().tolist(), 0.7, int(top_k), top_p, min_p)
        assert got[row].nonzero().squeeze(1).tolist() == expected, ON[row]


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_level_with_the_last_kept_are_kept(device, dtype, use_triton):
    logits = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, -0.0, 1.0, -5.0], device=device, dtype=dtype)
    truncations = [(3.0, 1.0, 0.0), (2.0, 1.0, 0.0), (6.0, 1.0, 0.0), (0.0, 1e-30, 0.0), (0.0, 1.0, 1.0)]
    got = kept(logits.expand(5, -1), [1.0] * 5, truncations, use_triton).int().tolist()
    assert got == [
        [1, 1, 1, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],  # both zeros
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("use_triton", [True, False])
def test_top_p_counts_what_top_k_and_min_p_leave(device, use_triton):
    """Of weights 4, 3, 2, 1, two have 0.7 of all; of the first three, 0.77."""
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0], device=device).log().expand(3, -1)
    got = kept(logits, [1.0] * 3, [(0.0, 0.75, 0.0), (3.0, 0.75, 0.0), (0.0, 0.75, 0.4)], use_triton)
    assert got.sum(dim=1).tolist() == [3, 2, 2]


@pytest.mark.parametrize("use_triton", [True, False])
def test_rows_that_do_not_ask_and_greedy_rows_keep_everything(device, generator, use_triton):
    logits = torch.randn(3, 1500, generator=generator).to(device)
    got = kept(logits, [1.0, 0.0, 1.0], [NO_TRUNCATION, (5.0, 0.1, 0.5), (5.0, 1.0, 0.0)], use_triton)
    assert got.sum(dim=1).tolist() == [1500, 1500, 5]


@pytest.mark.parametrize("use_triton", [True, False])
def test_a_row_finds_its_parameters_and_not_its_neighbours(device, generator, use_triton):
    logits = torch.randn(3, 2000, generator=generator).to(device)[:, :1999]  # strided rows
    rows = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    got = kept(logits, [1.0] * 3, [(1.0, 1.0, 0.0), (20.0, 1.0, 0.0), (300.0, 1.0, 0.0)], use_triton, rows)
    assert got.sum(dim=1).tolist() == [300, 1, 20]


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("temperature", [1e-45, 1.0])
def test_a_row_with_a_logit_that_is_no_number_has_no_token(device, temperature, use_triton):
    logits = broken_logits(device)
    rows = torch.arange(6, device=device)
    temperatures = torch.full((6,), temperature, device=device)
    for truncation in ON:
        truncations = torch.tensor([truncation] * 6, device=device)
        thresholds = keep_thresholds(logits, temperatures, truncations, rows, use_triton=use_triton)
        check_broken(sample(logits, temperatures, rows, rows, rows, thresholds, use_triton=use_triton).tolist())


@pytest.mark.parametrize("use_triton", [True, False])
def test_a_draw_is_the_one_without_truncation_where_that_is_kept(device, generator, use_triton):
    logits = (2 * torch.randn(1, 3000, generator=generator)).to(device).expand(40, -1)
    ones, rows = torch.ones(40, device=device), torch.arange(40, device=device)
    truncations = torch.tensor([(200.0, 1.0, 0.0)] * 40, device=device)
    thresholds = keep_thresholds(logits, ones, truncations, rows, use_triton=use_triton)
    free = sample(logits, ones, rows, rows, rows, use_triton=use_triton).long()
    cut = sample(logits, ones, rows, rows, rows, thresholds, use_triton=use_triton).long()
    stays = logits[0, free] >= thresholds
    assert 0 < int(stays.sum()) < 40
    assert torch.equal(cut[stays], free[stays])
    assert bool((logits[0, cut] >= thresholds).all())


def test_no_rows_give_no_thresholds(device):
    rows = torch.empty(0, dtype=torch.int32, device=device)
    state = (torch.ones(1, device=device), torch.tensor([NO_TRUNCATION], device=device), rows)
    assert keep_thresholds(torch.empty(0, 10, device=device), *state, use_triton=True).shape == (0,)
