from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from tests.kernels.inputs import DTYPES, check_close


def cos_sin_cache(max_position: int, head_dim: int, device: torch.device) -> torch.Tensor:
    angles = torch.outer(torch.arange(max_position), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)  # [max_position, head_dim]


def rotated_pair_by_pair(head: torch.Tensor, weight: torch.Tensor, position: int, eps: float) -> torch.Tensor:
    """Float64, straight from the papers: pair (i, i + D / 2) turns by position · 10000^(-2i / D)."""
    head = head.double().cpu()
    head = head / (head.square().mean() + eps).sqrt() * weight.double().cpu()
    half = head.shape[0] // 2
    out = torch.empty_like(head)
    for index in range(half):
        turn = torch.polar(torch.tensor(1.0).double(), torch.tensor(position * 10000.0 ** (-index / half)).double())
        pair = torch.complex(head[index], head[index + half]) * turn
        out[index], out[index + half] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 16), (4, 2, 64), (16, 8, 128), (9, 3, 40), (20, 1, 32)]
)
def test_kernel_equals_its_reference_on_views_of_a_fused_projection(
    device, generator, dtype, num_heads, num_kv_heads, head_dim
):
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    fused = torch.randn(5, sum(sizes), generator=generator).to(device, dtype)
    query, key, _ = (part.unflatten(1, (-1, head_dim)) for part in fused.split(sizes, dim=-1))
    query_weight, key_weight = torch.randn(2, head_dim, generator=generator).to(device, dtype)
    positions = torch.tensor([0, 1, 99, 7, 7], device=device)
    cache = cos_sin_cache(100, head_dim, device)
    arguments = (query, key, query_weight, key_weight, cache, positions, 1e-6)
    got = qk_norm_rope(*arguments, use_triton=True)
    exact = qk_norm_rope_reference(query.float(), key.float(), query_weight, key_weight, cache, positions, 1e-6)
    for one, other in zip(got, exact, strict=True):
        assert one.is_contiguous()
        check_close(one, other, dtype)


def test_reference_equals_the_papers(generator):
    query, key = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 1, 8, generator=generator)
    query_weight, key_weight = torch.randn(2, 8, generator=generator)
    positions = torch.tensor([0, 3, 19])
    cache = cos_sin_cache(20, 8, torch.device("cpu"))
    new_query, new_key = qk_norm_rope_reference(query, key, query_weight, key_weight, cache, positions, 1e-6)
    for token, position in enumerate(positions.tolist()):
        for head in range(2):
            expected = rotated_pair_by_pair(query[token, head], query_weight, position, 1e-6)
            torch.testing.assert_close(new_query[token, head].double(), expected, rtol=1e-5, atol=1e-5)
        expected = rotated_pair_by_pair(key[token, 0], key_weight, position, 1e-6)
        torch.testing.assert_close(new_key[token, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_no_tokens_give_no_rows(device):
    weight = torch.ones(8, device=device)
    query, key = torch.empty(0, 2, 8, device=device), torch.empty(0, 1, 8, device=device)
    positions = torch.empty(0, dtype=torch.int64, device=device)
    got = qk_norm_rope(query, key, weight, weight, cos_sin_cache(4, 8, device), positions, 1e-6, use_triton=True)
    assert [part.shape for part in got] == [query.shape, key.shape]
