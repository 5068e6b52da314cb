from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from nanovllm.kernels.attention_inputs import LayerKVCache
from nanovllm.kernels.qk_norm_rope_store import QKNorm, qk_norm_rope_store
from tests.kernels.inputs import DTYPES, check_close

EPS = 1e-6


def cos_sin_cache(max_position: int, head_dim: int, device: torch.device) -> torch.Tensor:
    angles = torch.outer(torch.arange(max_position), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)  # [max_position, head_dim]


def rotated_pair_by_pair(head: torch.Tensor, weight: torch.Tensor | None, position: int) -> torch.Tensor:
    """Float64, straight from the papers: pair (i, i + D / 2) turns by position · 10000^(-2i / D)."""
    head = head.double().cpu()
    if weight is not None:
        head = head / (head.square().mean() + EPS).sqrt() * weight.double().cpu()
    half = head.shape[0] // 2
    out = torch.empty_like(head)
    for index in range(half):
        turn = torch.polar(torch.tensor(1.0).double(), torch.tensor(position * 10000.0 ** (-index / half)).double())
        pair = torch.complex(head[index], head[index + half]) * turn
        out[index], out[index + half] = pair.real, pair.imag
    return out


@dataclass
class Case:
    """Tokens of a fused projection, and pages of ones to store them in."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor] | tuple[None, None]
    positions: torch.Tensor
    slots: list[int]
    caches: torch.Tensor  # [key and value, num_blocks, block_size, num_kv_heads, head_dim]

    @classmethod
    def of(cls, device, generator, dtype, heads=(4, 2, 16), block_size=4, slots=(49, 0, 17, 16, 15), with_norm=True):
        num_heads, num_kv_heads, head_dim = heads
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        fused = torch.randn(len(slots), sum(sizes), generator=generator).to(device, dtype)
        query, key, value = (part.unflatten(1, (-1, head_dim)) for part in fused.split(sizes, dim=-1))
        weights = tuple(torch.randn(2, head_dim, generator=generator).to(device, dtype)) if with_norm else (None, None)
        positions = torch.tensor([0, 1, 99, 7, 7][: len(slots)], device=device, dtype=torch.int64)
        caches = torch.ones(2, -(-50 // block_size), block_size, num_kv_heads, head_dim, dtype=dtype, device=device)
        return cls(query, key, value, weights, positions, list(slots), caches)

    def run(self, use_triton: bool, kv_cache: LayerKVCache | None = None, has_rope: bool = True) -> torch.Tensor:
        """Stores into `kv_cache`, or the case's own caches; returns the query."""
        device = self.query.device
        query_weight, key_weight = self.weights
        has_norm = query_weight is not None and key_weight is not None
        return qk_norm_rope_store(
            self.query,
            self.key,
            self.value,
            norm=QKNorm(query_weight, key_weight, EPS) if has_norm else None,
            cos_sin_cache=cos_sin_cache(100, self.query.shape[-1], device) if has_rope else None,
            positions=self.positions,
            kv_cache=kv_cache or LayerKVCache(*self.caches),
            slot_mapping=torch.tensor(self.slots, device=device, dtype=torch.int64),
            use_triton=use_triton,
        )

    def rotated(self, heads: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """What the papers say of query or key: [num_tokens, heads, head_dim] float64."""
        rows = [
            torch.stack([rotated_pair_by_pair(head, weight, position) for head in token])
            for token, position in zip(heads, self.positions.tolist(), strict=True)
        ]
        return torch.stack(rows).to(heads.device)


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1, 16), (4, 2, 64), (16, 8, 128), (9, 3, 40), (20, 1, 32), (5, 17, 8)])
def test_query_and_keys_as_the_papers_say_and_values_as_they_are(device, generator, dtype, heads, use_triton):
    case = Case.of(device, generator, dtype, heads)
    query = case.run(use_triton)
    stored_key, stored_value = case.caches.flatten(1, 2)[:, case.slots]
    check_close(query, case.rotated(case.query, case.weights[0]), dtype)
    check_close(stored_key, case.rotated(case.key, case.weights[1]), dtype)
    assert torch.equal(stored_value, case.value)


@pytest.mark.parametrize("use_triton", [True, False])
def test_without_a_norm_heads_are_rotated_alone(device, generator, use_triton):
    case = Case.of(device, generator, torch.float32, with_norm=False)
    check_close(case.run(use_triton), case.rotated(case.query, None), torch.float32)
    check_close(case.caches[0].flatten(0, 1)[case.slots], case.rotated(case.key, None), torch.float32)


@pytest.mark.parametrize("use_triton", [True, False])
def test_without_a_norm_and_a_rope_heads_stay_as_they_are(device, generator, use_triton):
    case = Case.of(device, generator, torch.float16, heads=(5, 3, 40), with_norm=False)
    assert torch.equal(case.run(use_triton, has_rope=False), case.query)
    for cache, heads in zip(case.caches, (case.key, case.value), strict=True):
        assert torch.equal(cache.flatten(0, 1)[case.slots], heads)


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_each_token_lands_in_its_slot_and_nowhere_else(device, generator, block_size, use_triton):
    case = Case.of(device, generator, torch.float32, (3, 3, 20), block_size)
    case.run(use_triton)
    flat = case.caches.flatten(1, 2)
    assert torch.equal(flat[1, case.slots], case.value)
    untouched = [slot for slot in range(flat.shape[1]) if slot not in case.slots]
    assert bool((flat[:, untouched] == 1).all())


@pytest.mark.parametrize("use_triton", [True, False])
def test_of_tokens_with_one_slot_one_is_stored_and_nothing_else(device, generator, use_triton):
    """As padding does, whose rows all point at one slot of the null block."""
    case = Case.of(device, generator, torch.float32, slots=(9, 6, 9))
    case.run(use_triton)
    flat = case.caches[1].flatten(0, 1)
    assert torch.equal(flat[6], case.value[1])
    assert torch.equal(flat[9], case.value[0]) or torch.equal(flat[9], case.value[2])
    assert int((flat != 1).any(dim=-1).any(dim=-1).sum()) == 2


@pytest.mark.parametrize("use_triton", [True, False])
def test_no_tokens_give_no_rows_and_store_nothing(device, generator, use_triton):
    case = Case.of(device, generator, torch.float32, slots=())
    assert case.run(use_triton).shape == case.query.shape == (0, 4, 16)
    assert bool((case.caches == 1).all())


def fp8_caches(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages of ones with scales of one, instead of the case's own."""
    _, num_blocks, block_size, num_kv_heads, _ = case.caches.shape
    pages = torch.ones_like(case.caches, dtype=torch.float32).to(torch.float8_e4m3fn)
    scales = torch.ones(2, num_blocks, num_kv_heads, block_size, device=case.caches.device)
    return pages[0], pages[1], scales[0], scales[1]


def restored(pages: torch.Tensor, scales: torch.Tensor, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is stored times its scale, the scales [num_tokens, num_kv_heads]), of these slots, in float64."""
    per_slot = scales.transpose(1, 2).flatten(0, 1)[slots].double()
    return pages.flatten(0, 1)[slots].double() * per_slot.unsqueeze(-1), per_slot


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "block_size"), [((4, 2, 64), 4), ((16, 8, 128), 16), ((9, 3, 40), 1), ((5, 17, 8), 3)]
)
def test_an_fp8_cache_holds_each_head_to_a_sixteenth_of_a_component(
    device, generator, dtype, heads, block_size, use_triton
):
    case = Case.of(device, generator, dtype, heads, block_size)
    caches = fp8_caches(case)
    check_close(case.run(use_triton, LayerKVCache(*caches)), case.rotated(case.query, case.weights[0]), dtype)
    expected = (case.rotated(case.key, case.weights[1]), case.value.double())
    for pages, scales, exact in ((caches[0], caches[2], expected[0]), (caches[1], caches[3], expected[1])):
        got, per_slot = restored(pages, scales, case.slots)
        torch.testing.assert_close(per_slot, exact.abs().amax(-1) / 448, rtol=1e-5, atol=0)
        # e4m3 has four significant bits; below its smallest normal number, 2**-6, steps of 2**-9.
        allowed = (exact.abs() / 16).maximum(per_slot.unsqueeze(-1) * 2**-10) * 1.0001
        share_wrong = float(((got - exact).abs() > allowed).double().mean())
        # Triton's interpreter rounds to e4m3 wrongly where the rounding carries into the exponent, and near zero.
        assert share_wrong <= (0.1 if use_triton and device.type == "cpu" else 0.0)
        untouched = [slot for slot in range(scales.shape[0] * block_size) if slot not in case.slots]
        assert bool((restored(pages, scales, untouched)[0] == 1).all())


@pytest.mark.parametrize("use_triton", [True, False])
def test_a_head_of_zeros_is_stored_as_zeros(device, generator, use_triton):
    case = Case.of(device, generator, torch.float32)
    case.key.zero_(), case.value.zero_()
    caches = fp8_caches(case)
    case.run(use_triton, LayerKVCache(*caches))
    for pages, scales in ((caches[0], caches[2]), (caches[1], caches[3])):
        got, per_slot = restored(pages, scales, case.slots)
        assert bool((got == 0).all())
        assert bool(per_slot.isfinite().all())
