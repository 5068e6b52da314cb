from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear as torch_linear

from nanovllm.kernels.linear import can_pack, linear, pack_weight, padded_size


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 65, 200, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_weight_gives_the_same_product(num_tokens: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(48, 40), torch.randn(num_tokens, 40)
    bias = torch.randn(48) if has_bias else None
    with torch.inference_mode():
        packed = pack_weight(weight)
        assert packed.is_mkldnn == can_pack(weight)
        torch.testing.assert_close(linear(hidden, packed, bias), torch_linear(hidden, weight, bias))


def test_there_are_few_sizes_and_little_padding() -> None:
    sizes = {padded_size(num_tokens) for num_tokens in range(1, 16385)}
    assert len(sizes) == 64 + 8 * 8
    assert all(num_tokens <= padded_size(num_tokens) <= num_tokens * 9 / 8 for num_tokens in range(1, 16385))
    assert [padded_size(num_tokens) for num_tokens in (1, 17, 64, 65, 128, 129, 1000)] == [
        1,
        17,
        64,
        72,
        128,
        144,
        1024,
    ]


def test_half_precision_stays_as_it_is() -> None:
    weight = torch.randn(8, 8).bfloat16()
    assert pack_weight(weight) is weight


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Tokens must be the same under every schedule, so a row's product may not change beyond rounding."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(64, 96), torch.randn(33, 96)
    with torch.inference_mode():
        packed = pack_weight(weight)
        torch.testing.assert_close(linear(hidden, packed)[5:6], linear(hidden[5:6], packed))
