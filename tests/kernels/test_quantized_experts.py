"""Experts with weights of 8 or 4 bits, against the product with the weights that they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanovllm.kernels.expert_matrices import ExpertMatrices
from nanovllm.kernels.expert_routing import route
from nanovllm.kernels.int4_packing import pack_int4
from nanovllm.kernels.quantized_chosen_experts import quantized_chosen_experts
from nanovllm.kernels.quantized_experts import quantized_experts_mlp
from nanovllm.kernels.quantized_grouped_experts import quantized_grouped_experts
from nanovllm.kernels.quantized_linear import fp8_activations
from nanovllm.kernels.rms_norm import rms_norm_reference
from tests.kernels.inputs import DTYPES, TOLERANCES, relative_error
from tests.kernels.test_experts import ROUNDINGS, oracle

KERNELS = [quantized_chosen_experts, quantized_grouped_experts]
NUM_EXPERTS, TOP_K = 6, 3
# Blocks of outputs and inputs, which gate and up have, and down; None: all inputs.
BLOCKS = {
    "fp8": ((1, None), (1, None)),
    "fp8 blocks": ((128, 128), (128, 128)),
    "fp8 blocks, long": ((128, 128), (128, 128)),
    "fp8 blocks, cut": ((32, 128), (128, 32)),
    "int8": ((1, None), (1, None)),
    "int4": ((1, 32), (1, None)),
    "int4 zeros": ((1, None), (1, 64)),
}
SIZES = {  # hidden and inner
    "fp8": (20, 12),
    "fp8 blocks": (24, 136),
    "fp8 blocks, long": (136, 24),
    "fp8 blocks, cut": (24, 96),
    "int8": (20, 12),
    "int4": (160, 40),
    "int4 zeros": (24, 192),
}


def random_matrices(generator, device, dtype, scheme, outputs, inputs, block, num_pieces):
    block = (block[0], block[1] or inputs)
    if scheme.startswith("fp8"):
        values = torch.randn(NUM_EXPERTS, outputs, inputs, generator=generator).to(torch.float8_e4m3fn)
        spread = 1.0
    elif scheme == "int8":
        values = torch.randint(-127, 128, (NUM_EXPERTS, outputs, inputs), generator=generator, dtype=torch.int8)
        spread = 73.0
    else:
        values = torch.randint(0, 16, (NUM_EXPERTS * outputs, inputs), generator=generator)
        values, spread = pack_int4(values).unflatten(0, (NUM_EXPERTS, outputs)), 4.6
    rows = num_pieces * -(-outputs // num_pieces // block[0])
    shape = (NUM_EXPERTS, -(-inputs // block[1]), rows)  # as INT4 has it in memory: outputs side by side
    scale = (torch.rand(shape, generator=generator) + 0.5) * inputs**-0.5 / spread
    scale = scale.half() if scheme.startswith("int4") and dtype is not torch.float32 else scale  # as the engine has it
    zeros = torch.randint(0, 16, shape, generator=generator).to(scale.dtype) if "zeros" in scheme else None
    return ExpertMatrices(
        values.to(device),
        scale.to(device).transpose(1, 2),
        None if zeros is None else zeros.to(device).transpose(1, 2),
        inputs,
        block,
        num_pieces,
    )


def random_layer(generator, device, dtype, scheme, num_tokens):
    hidden_size, inner_size = SIZES[scheme]
    x, residual = (torch.randn(num_tokens, hidden_size, generator=generator).to(device, dtype) for _ in range(2))
    blocks = BLOCKS[scheme]
    gate_up = random_matrices(generator, device, dtype, scheme, 2 * inner_size, hidden_size, blocks[0], 2)
    down = random_matrices(generator, device, dtype, scheme, hidden_size, inner_size, blocks[1], 1)
    routing = route(torch.randn(num_tokens, NUM_EXPERTS, generator=generator).to(device), TOP_K, True, use_triton=True)
    return x, gate_up, down, routing, residual


def dense(matrices: ExpertMatrices) -> list[torch.Tensor]:
    return [matrices[expert] for expert in range(NUM_EXPERTS)]


@pytest.mark.parametrize("scheme", BLOCKS)
@pytest.mark.parametrize(("kernel", "num_tokens"), [(KERNELS[0], 1), (KERNELS[1], 33)])
def test_the_product_is_that_of_the_dequantised_weights(device, generator, scheme, kernel, num_tokens):
    x, gate_up, down, routing, residual = random_layer(generator, device, torch.float32, scheme, num_tokens)
    expected = oracle(x, dense(gate_up), dense(down), routing, residual)
    reference = quantized_experts_mlp(x, gate_up, down, routing, residual, use_triton=False)
    for got in (kernel(x, gate_up, down, routing, residual), reference):
        assert relative_error(got, expected) <= ROUNDINGS * TOLERANCES[torch.float32]


def oracle_with_fp8_activations(x, gate_up, down, routing, residual):
    """Each token and expert on its own; activations are rounded as those of linear layers."""
    out = residual.double().cpu()
    inputs = fp8_activations(x.cpu(), gate_up.block[1]).double()
    for token, (experts, weights) in enumerate(zip(routing.topk_ids.tolist(), routing.topk_weights.cpu(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (gate_up[expert].double().cpu() @ inputs[token]).chunk(2)
            inner = (torch.nn.functional.silu(gate) * up).to(x.dtype)
            inner = fp8_activations(inner[None], down.block[1])[0].double()
            out[token] += weight.double() * (down[expert].double().cpu() @ inner)
    return out


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("block_rows", [16, 128])
@pytest.mark.parametrize("scheme", [name for name in BLOCKS if name.startswith("fp8")])
def test_fp8_weights_are_multiplied_by_fp8_activations_of_many_tokens(device, generator, dtype, block_rows, scheme):
    x, gate_up, down, routing, residual = random_layer(generator, device, dtype, scheme, 33)
    got = quantized_grouped_experts(x, gate_up, down, routing, residual, block_rows=block_rows)
    assert got.dtype == dtype
    expected = oracle_with_fp8_activations(x, gate_up, down, routing, residual)
    assert relative_error(got.cpu(), expected) <= ROUNDINGS * TOLERANCES[dtype]
    assert relative_error(got.cpu(), oracle(x, dense(gate_up), dense(down), routing, residual).cpu()) < 4e-2


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("kernel", "num_tokens", "scheme"),
    [(KERNELS[0], 2, scheme) for scheme in ("fp8 blocks", "int8", "int4 zeros")]
    + [(KERNELS[1], 9, scheme) for scheme in ("int8", "int4 zeros")],
)
def test_16_bit_activations_without_a_residual(device, generator, dtype, kernel, num_tokens, scheme):
    x, gate_up, down, routing, _ = random_layer(generator, device, dtype, scheme, num_tokens)
    got = kernel(x, gate_up, down, routing)
    assert got.dtype == dtype
    assert relative_error(got, oracle(x, dense(gate_up), dense(down), routing)) <= ROUNDINGS * TOLERANCES[dtype]


@pytest.mark.parametrize("scheme", ["fp8 blocks", "int4 zeros"])
def test_the_norm_is_folded_in_for_few_tokens(device, generator, scheme):
    x, gate_up, down, routing, residual = random_layer(generator, device, torch.float32, scheme, 2)
    norm_weight = (torch.rand(x.shape[1], generator=generator) + 0.5).to(device)
    normed = rms_norm_reference(x.double(), norm_weight.double(), 0.1)
    expected = oracle(normed, dense(gate_up), dense(down), routing, residual)
    for use_triton in (True, False):
        got = quantized_experts_mlp(
            x, gate_up, down, routing, residual, norm_weight=norm_weight, eps=0.1, use_triton=use_triton
        )
        assert relative_error(got, expected) <= ROUNDINGS * TOLERANCES[torch.float32]


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("scheme", ["fp8", "fp8 blocks, cut", "int4 zeros"])
def test_tiles_of_every_size(device, generator, scheme, block_rows):
    x, gate_up, down, routing, residual = random_layer(generator, device, torch.float32, scheme, 40)
    got = quantized_grouped_experts(x, gate_up, down, routing, residual, block_rows=block_rows)
    expected = oracle(x, dense(gate_up), dense(down), routing, residual)
    assert relative_error(got, expected) <= ROUNDINGS * TOLERANCES[torch.float32]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("scheme", ["fp8 blocks", "int4 zeros"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_does_not_depend_on_its_neighbours(device, generator, scheme, kernel):
    x, gate_up, down, routing, residual = random_layer(generator, device, torch.float32, scheme, 4)
    alone = kernel(x, gate_up, down, routing, residual)
    x[3] = torch.nan
    beside = kernel(x, gate_up, down, routing, residual)
    others = [0, 1, 2]
    assert torch.equal(alone[others], beside[others])
    assert beside[3].isnan().all()


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_experts_that_no_token_chose_are_not_read(device, generator, use_triton, num_tokens):
    x, gate_up, down, _, residual = random_layer(generator, device, torch.float32, "fp8", num_tokens)
    logits = torch.zeros(num_tokens, NUM_EXPERTS, device=device)
    logits[:, :TOP_K] = 1.0
    routing = route(logits, TOP_K, True, use_triton=True)
    poisoned = [replace(each, scale=each.scale.clone()) for each in (gate_up, down)]
    for matrices in poisoned:
        matrices.scale[TOP_K:] = torch.nan
    got = quantized_experts_mlp(x, *poisoned, routing, residual, use_triton=use_triton)
    assert torch.equal(got, quantized_experts_mlp(x, gate_up, down, routing, residual, use_triton=use_triton))


@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_any_number_of_tokens(device, generator, num_tokens):
    layer = random_layer(generator, device, torch.float32, "int8", num_tokens)
    got = quantized_experts_mlp(*layer, use_triton=True)
    torch.testing.assert_close(got, quantized_experts_mlp(*layer, use_triton=False), rtol=1e-4, atol=1e-5)
