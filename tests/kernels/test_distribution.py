"""Draws follow the exact distribution, for every combination of what changes it."""

from __future__ import annotations

import math

import pytest
import torch

from nanovllm.kernels.logit_edits import edit_logits
from nanovllm.kernels.sample import sample
from nanovllm.kernels.truncate import keep_thresholds
from tests.kernels.test_logit_edits import ALWAYS, Asked, expected, state_of
from tests.kernels.test_truncate import kept_by_the_rules

VOCAB_SIZE, DRAWS = 32, 100_000
PENALTIES = (1.4, 0.6, 0.3)
EDITS = [(3, 1.5, ALWAYS, []), (4, -2.0, ALWAYS, []), (5, -1e29, 100, []), (6, -1e29, ALWAYS, [8, 9])]
ALLOWED = {token for token in range(VOCAB_SIZE) if token % 3}


def exact(logits: list[float], row: Asked, temperature: float, truncation: tuple[float, float, float]) -> list[float]:
    """Each token's probability, in plain Python."""
    shaped = expected(logits, row)
    best = max(shaped)
    kept = kept_by_the_rules(shaped, temperature, int(truncation[0]), *truncation[1:])
    weights = [math.exp((logit - best) / temperature) if token in kept else 0.0 for token, logit in enumerate(shaped)]
    return [weight / sum(weights) for weight in weights]


def check_chi_square(counted: list[int], probabilities: list[float]) -> None:
    """Fails once in 10⁶ times by chance. Tokens that are hardly ever drawn are counted as one."""
    expected_counts = [probability * DRAWS for probability in probabilities]
    bins = [(got, want) for got, want in zip(counted, expected_counts, strict=True) if want >= 5]
    rest = [(got, want) for got, want in zip(counted, expected_counts, strict=True) if want < 5]
    assert not any(got for got, want in rest if want == 0), "a token that cannot be drawn"
    if (others := sum(want for _, want in rest)) > 0:
        bins.append((sum(got for got, _ in rest), max(others, 1.0)))
    degrees = len(bins) - 1
    if not degrees:
        return
    statistic = sum((got - want) ** 2 / want for got, want in bins)
    # Wilson and Hilferty, "The distribution of chi-square", 1931
    bound = degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < bound


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("is_edited", [False, True])
@pytest.mark.parametrize("is_penalised", [False, True])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("top_k", [0.0, 10.0])
@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_draws_follow_the_exact_distribution(
    device, generator, temperature, top_k, top_p, min_p, is_penalised, is_edited, is_masked
):
    """Chi-square over 100,000 draws, and nothing else drawn."""
    logits = 1.5 * torch.randn(VOCAB_SIZE, generator=generator)
    row = Asked(prompt=[1, 2, 3, 4, 2, 0], output=[7, 9, 7, 3, 7, 11, 8, 9])
    row.penalties = PENALTIES if is_penalised else row.penalties
    row.edits = EDITS if is_edited else row.edits
    row.allowed = ALLOWED if is_masked else row.allowed
    rows, *state = state_of([row], VOCAB_SIZE, device, [0])
    on_gpu = device.type == "cuda"  # in the interpreter 100,000 programs would take minutes
    temperatures = torch.tensor([temperature], device=device)
    truncations = torch.tensor([(top_k, top_p, min_p)], device=device)
    tokens = []
    for seeds in torch.arange(DRAWS, device=device).split(50_000):  # a launch has at most 65,535 rows
        num_rows = len(seeds)
        num_shaped = num_rows if on_gpu else 1  # the reference goes row by row
        same = torch.zeros(num_rows, dtype=torch.int32, device=device)
        given = logits.to(device).expand(num_shaped, -1)
        shaped = edit_logits(given, rows.expand(num_shaped).contiguous(), *state, use_triton=on_gpu)
        thresholds = keep_thresholds(shaped, temperatures, truncations, same[:num_shaped], use_triton=on_gpu)
        order = torch.arange(num_rows, dtype=torch.int32, device=device)
        drawn_from = shaped.expand(num_rows, -1), temperatures.repeat(num_rows), seeds, same + 3, order
        tokens.append(sample(*drawn_from, thresholds.expand(num_rows).contiguous(), use_triton=on_gpu))
    counted = torch.bincount(torch.cat(tokens).long(), minlength=VOCAB_SIZE).tolist()
    check_chi_square(counted, exact(logits.tolist(), row, temperature, (top_k, top_p, min_p)))


def test_the_check_sees_a_wrong_distribution():
    """A bias of 0.1 on a token that is drawn once in ten times."""
    probabilities = [0.1] * 10
    wrong = [math.exp(0.1 * (token == 0)) for token in range(10)]
    check_chi_square([DRAWS // 10] * 10, probabilities)
    with pytest.raises(AssertionError):
        check_chi_square([round(DRAWS * weight / sum(wrong)) for weight in wrong], probabilities)
    with pytest.raises(AssertionError, match="cannot be drawn"):
        check_chi_square([1, DRAWS - 1], [0.0, 1.0])
