from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.expert_routing import Routing, route, route_reference
from nanovllm.kernels.expert_tiles import sort_by_expert
from tests.kernels.inputs import DTYPES

SHAPES = [(8, 2), (6, 3), (5, 1), (128, 8)]  # (num_experts, top_k)


def random_logits(generator, device, dtype, num_tokens, num_experts):
    return (2 * torch.randn(num_tokens, num_experts, generator=generator)).to(device, dtype)


def check_equal(got: Routing, expected: Routing) -> None:
    assert torch.equal(got.topk_ids, expected.topk_ids)
    torch.testing.assert_close(got.topk_weights, expected.topk_weights, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 50])
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_the_likeliest_experts(device, generator, dtype, renormalize, num_tokens, num_experts, top_k):
    logits = random_logits(generator, device, dtype, num_tokens, num_experts)
    got = route(logits, top_k, renormalize, use_triton=True)
    probabilities, expert_ids = logits.double().softmax(-1).sort(descending=True, stable=True)
    weights = probabilities[:, :top_k]
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    check_equal(got, Routing(expert_ids[:, :top_k].int(), weights.float(), num_experts))
    check_equal(route(logits, top_k, renormalize, use_triton=False), got)


def test_of_equal_experts_the_lowest_come_first(device):
    logits = torch.zeros(2, 6, device=device)
    logits[1, 2::2] = 1.0
    for use_triton in (True, False):
        got = route(logits, 3, True, use_triton=use_triton)
        assert got.topk_ids.tolist() == [[0, 1, 2], [2, 4, 0]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_without_a_softmax_give_valid_experts_and_no_weights(device, generator, value):
    """The result of such a token is NaN, which ends its request. The other tokens do not change."""
    logits = random_logits(generator, device, torch.float32, 5, 8)
    expected = route_reference(logits, 2, True)
    logits[3, 4] = value
    for use_triton in (True, False):
        got = route(logits, 2, True, use_triton=use_triton)
        assert got.topk_ids[3].tolist() == [0, 1]
        assert got.topk_weights[3].isnan().all()
        others = [0, 1, 2, 4]
        check_equal(
            Routing(got.topk_ids[others], got.topk_weights[others], 8),
            Routing(expected.topk_ids[others], expected.topk_weights[others], 8),
        )


def test_minus_infinity_is_never_chosen_before_another(device):
    logits = torch.full((1, 8), -torch.inf, device=device)
    logits[0, 5], logits[0, 6] = 1.0, -3.0
    got = route(logits, 2, False, use_triton=True)
    assert got.topk_ids.tolist() == [[5, 6]]


def test_rows_may_be_strided(device, generator):
    wide = random_logits(generator, device, torch.float32, 5, 16)
    check_equal(route(wide[:, :8], 2, True, use_triton=True), route_reference(wide[:, :8], 2, True))


@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 8, 2), (5, 6, 3), (50, 5, 1), (50, 128, 8), (1100, 8, 2)]
)
def test_tiles_cover_every_pair_once_in_the_order_of_experts(
    device, generator, num_tokens, block_rows, num_experts, top_k
):
    logits = random_logits(generator, device, torch.float32, num_tokens, num_experts)
    routing = route(logits, top_k, True, use_triton=True)
    check_equal(routing, route_reference(logits, top_k, True))
    order = sort_by_expert(routing, block_rows)
    expert_ids, pairs = routing.topk_ids.flatten().sort(stable=True)
    assert torch.equal(order.pairs, pairs.int())
    rows = [
        (row, expert)
        for expert, first, end in order.tiles.tolist()
        for row in range(first, min(first + block_rows, end))
    ]
    assert rows == list(enumerate(expert_ids.tolist()))


def test_all_tokens_may_choose_the_same_experts(device):
    logits = torch.zeros(70, 8, device=device)
    order = sort_by_expert(route(logits, 2, True, use_triton=True), 16)
    used = [tile for tile in order.tiles.tolist() if tile[1] < tile[2]]
    assert used == [[expert, expert * 70 + 16 * index, (expert + 1) * 70] for expert in (0, 1) for index in range(5)]


def test_no_tokens_have_no_experts(device):
    routing = route(torch.empty(0, 8, device=device), 2, True, use_triton=True)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (0, 2)
