"""The gated activations of SwiGLU and GeGLU feed-forward layers.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.triton_support import jit, join_launch_chain, pdl_options, runs_triton, tl

_BLOCK_SIZE = 1024  # columns that a program computes


@jit
def _act_and_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    intermediate_size: tl.tensor,
    IS_GELU: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (token, block of columns)."""
    join_launch_chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = column < intermediate_size
    row_ptr = gate_up_ptr + token * gate_up_stride
    gate = tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + intermediate_size + column, mask=mask, other=0.0).to(tl.float32)
    slope = gate
    if IS_GELU:  # x / 2 · (1 + tanh(u)) is x / (1 + exp(-2 u))
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 · sqrt(2 / π)
    out = gate / (1.0 + tl.exp(-slope)) * up
    tl.store(out_ptr + token * intermediate_size + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Reference for `silu_and_mul` in plain torch; also used on CPUs."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up).to(gate_up.dtype)


def silu_and_mul(gate_up: torch.Tensor, *, use_triton: bool | None = None) -> torch.Tensor:
    """Returns silu(gate) · up, computed in fp32 and rounded once.

    gate_up [num_tokens, 2 · intermediate_size], gate in the first half → [num_tokens, intermediate_size].
    """
    if not runs_triton(gate_up, use_triton):
        return silu_and_mul_reference(gate_up)
    return _launch(gate_up, is_gelu=False)


def gelu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Reference for `gelu_and_mul` in plain torch; also used on CPUs."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up).to(gate_up.dtype)


def gelu_and_mul(gate_up: torch.Tensor, *, use_triton: bool | None = None) -> torch.Tensor:
    """Returns gelu(gate) · up, with GELU's approximation by tanh; otherwise as `silu_and_mul`."""
    if not runs_triton(gate_up, use_triton):
        return gelu_and_mul_reference(gate_up)
    return _launch(gate_up, is_gelu=True)


def _launch(gate_up: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    num_tokens, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, intermediate_size)  # [num_tokens, intermediate_size]
    if num_tokens > 0:
        grid = (num_tokens, -(-intermediate_size // _BLOCK_SIZE))
        _act_and_mul_kernel[grid](
            gate_up_ptr=gate_up,
            out_ptr=out,
            gate_up_stride=gate_up.stride(0),
            intermediate_size=intermediate_size,
            IS_GELU=is_gelu,
            BLOCK_SIZE=_BLOCK_SIZE,
            **pdl_options(out.device),
        )
    return out
