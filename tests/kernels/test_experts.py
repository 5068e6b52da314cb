from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.chosen_experts import chosen_experts
from nanovllm.kernels.expert_routing import route
from nanovllm.kernels.experts import experts_mlp, experts_mlp_reference
from nanovllm.kernels.grouped_experts import grouped_experts
from nanovllm.kernels.rms_norm import rms_norm_reference
from tests.kernels.graphs import capture
from tests.kernels.inputs import DTYPES, TOLERANCES, relative_error

KERNELS = [chosen_experts, grouped_experts]
# The inner activations and the grouped kernel's outputs are rounded too.
ROUNDINGS = 3


def random_layer(generator, device, dtype, num_tokens, num_experts, top_k, hidden_size, inner_size):
    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    x, residual = normal(num_tokens, hidden_size), normal(num_tokens, hidden_size)
    gate_up = normal(num_experts, 2 * inner_size, hidden_size, scale=hidden_size**-0.5)
    down = normal(num_experts, hidden_size, inner_size, scale=inner_size**-0.5)
    routing = route(normal(num_tokens, num_experts), top_k, True, use_triton=True)
    return x, gate_up, down, routing, residual


def oracle(x, gate_up, down, routing, residual=None):
    """In float64, one pair after another."""
    rows = []
    for index, (token, experts) in enumerate(zip(x.double(), routing.topk_ids.tolist(), strict=True)):
        row = torch.zeros_like(token)
        for choice, expert in enumerate(experts):
            gate, up = (gate_up[expert].double() @ token).chunk(2)
            inner = gate * torch.sigmoid(gate) * up
            row = row + routing.topk_weights[index, choice].double() * (down[expert].double() @ inner)
        rows.append(row if residual is None else row + residual[index].double())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "num_tokens"), [(chosen_experts, 1), (chosen_experts, 3), (grouped_experts, 3), (grouped_experts, 33)]
)
@pytest.mark.parametrize(("num_experts", "top_k", "hidden_size", "inner_size"), [(8, 2, 32, 24), (6, 3, 20, 12)])
def test_the_sum_of_a_tokens_experts(
    device, generator, dtype, kernel, num_tokens, num_experts, top_k, hidden_size, inner_size
):
    layer = random_layer(generator, device, dtype, num_tokens, num_experts, top_k, hidden_size, inner_size)
    for arguments in (layer, layer[:4]):  # with a residual, and without
        got = kernel(*arguments)
        assert got.dtype == dtype
        assert relative_error(got, oracle(*arguments)) <= ROUNDINGS * TOLERANCES[dtype]


@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize(("hidden_size", "inner_size"), [(300, 20), (20, 300)])
def test_long_rows(device, generator, num_tokens, hidden_size, inner_size):
    """A program reads them in several parts, the last of which is not full."""
    layer = random_layer(generator, device, torch.float32, num_tokens, 4, 1, hidden_size, inner_size)
    for kernel in KERNELS[num_tokens > 1 :]:
        assert relative_error(kernel(*layer), oracle(*layer)) <= ROUNDINGS * TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_the_same_function(device, generator, dtype):
    layer = random_layer(generator, device, dtype, 9, 8, 2, 32, 24)
    for arguments in (layer, layer[:4]):
        expected = oracle(*arguments)
        got = experts_mlp(*arguments, use_triton=False)
        assert got.dtype == dtype
        assert relative_error(got, expected) <= ROUNDINGS * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_folded_in_for_few_tokens(device, generator, dtype):
    x, *others = random_layer(generator, device, dtype, 3, 8, 2, 32, 24)
    norm_weight = (torch.rand(32, generator=generator) + 0.5).to(device, dtype)
    expected = oracle(rms_norm_reference(x.double(), norm_weight.double(), 0.1), *others)
    for use_triton in (True, False):
        got = experts_mlp(x, *others, norm_weight=norm_weight, eps=0.1, use_triton=use_triton)
        assert relative_error(got, expected) <= ROUNDINGS * TOLERANCES[dtype]


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
def test_tiles_of_every_size(device, generator, block_rows):
    layer = random_layer(generator, device, torch.float16, 40, 8, 2, 64, 32)
    got = grouped_experts(*layer, block_rows=block_rows)
    assert relative_error(got, oracle(*layer)) <= ROUNDINGS * TOLERANCES[torch.float16]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_does_not_depend_on_its_neighbours(device, generator, dtype, kernel):
    x, gate_up, down, routing, residual = random_layer(generator, device, dtype, 9, 8, 2, 32, 24)
    alone = kernel(x, gate_up, down, routing, residual)
    x[3] = torch.nan
    routing.topk_weights[8] = torch.nan
    beside = kernel(x, gate_up, down, routing, residual)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(alone[others], beside[others])
    assert beside[[3, 8]].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_the_input_and_the_residual_may_be_strided(device, generator, kernel):
    x, gate_up, down, routing, residual = random_layer(generator, device, torch.float32, 5, 8, 2, 32, 24)
    wide = torch.cat((x, x + 1), dim=1)
    wide_residual = torch.cat((residual, residual), dim=1)
    got = kernel(wide[:, :32], gate_up, down, routing, wide_residual[:, :32])
    assert torch.equal(got, kernel(x, gate_up, down, routing, residual))


@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_any_number_of_tokens(device, generator, num_tokens):
    layer = random_layer(generator, device, torch.float32, num_tokens, 8, 2, 32, 24)
    got = experts_mlp(*layer, use_triton=True)
    assert got.shape == (num_tokens, 32)
    torch.testing.assert_close(got, experts_mlp_reference(*layer), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 64, 256, 1100])
def test_a_graph_follows_the_router(generator, num_tokens):
    """A replay with other inputs routes other tokens to other experts, in the same launches."""
    device, sizes = torch.device("cuda"), (32, 4, 512, 256)
    x, gate_up, down, _, _ = random_layer(generator, device, torch.bfloat16, num_tokens, *sizes)
    logits = torch.zeros(num_tokens, 32, device=device)

    def run():
        hidden = x
        for _ in range(4):
            hidden = experts_mlp(hidden, gate_up, down, route(logits, 4, True), hidden)
        return hidden

    graph, out = capture(run)
    for _ in range(20):
        logits.copy_(torch.randn(num_tokens, 32, generator=generator))
        graph.replay()
        assert torch.equal(out, run())
