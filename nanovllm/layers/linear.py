"""Matrix products whose weight is cut over the ranks, and where each rank's piece lies in the checkpoint.

A column-parallel product gives each rank some of the outputs; the row-parallel product that follows takes them as
its inputs and adds the ranks' results up: one all-reduce for the pair. Products of the same input are fused: their
checkpoint tensors become row ranges of one weight.

The residual stream passes through as a pair (hidden, residual) that stands for its sum; residual None: `hidden` is all
of it. With few tokens the norm ahead of a product and the addition behind it are part of the product's kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from nanovllm.kernels.linear import linear, pack_weight
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.kernels.skinny_linear import skinny_linear, suits_skinny_linear
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.parameter import WeightPart, empty_parameter


def pack_linear_weights(model: nn.Module) -> None:
    """Lets every product of a loaded model lay out its weight for the device."""
    for module in model.modules():
        if isinstance(module, _Linear):
            module.pack()


def sibling(prefix: str, name: str) -> str:
    """The name of the module `name` beside the module `prefix`."""
    return f"{prefix.rpartition('.')[0]}.{name}".removeprefix(".")


class _Linear(nn.Module):
    weight: nn.Parameter

    def pack(self) -> None:
        """Called once the weights are loaded: on a CPU they take the layout that computes fastest."""
        self.weight = nn.Parameter(pack_weight(self.weight), requires_grad=False)


class _ColumnParallel(_Linear):
    """A weight that stacks rows of several checkpoint tensors: `pieces` is (name, its outputs, start, stop) of each."""

    is_gated = False

    def __init__(
        self, input_size: int, pieces: Sequence[tuple[str, int, int, int]], bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.pieces = tuple(pieces)
        self.output_sizes = [stop - start for _, _, start, stop in pieces]  # on this rank
        self.weight = empty_parameter(sum(self.output_sizes), input_size, dtype=dtype)
        self.bias = empty_parameter(sum(self.output_sizes), dtype=dtype) if bias else None

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed residual stream times the weight, and the stream itself, summed.

        hidden, residual [num_tokens, input_size] → [num_tokens, sum(output_sizes)]: this rank's outputs of each piece
        in turn (gated: half as many), [num_tokens, input_size].
        """
        if residual is None and suits_skinny_linear(hidden, self.weight):
            weight, bias = self.weight, self.bias
            fused = skinny_linear(hidden, weight, bias, norm_weight=norm.weight, eps=norm.eps, gated=self.is_gated)
            return fused, hidden
        normed, residual = norm(hidden, residual)
        output = linear(normed, self.weight, self.bias)
        return silu_and_mul(output) if self.is_gated else output, residual

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        weight: list[WeightPart] = []
        bias: list[WeightPart] = []
        row = 0
        for name, total, start, stop in self.pieces:
            source = sibling(prefix, name)
            weight.append(WeightPart(f"{source}.weight", (total, self.input_size), 0, start, stop, row))
            bias.append(WeightPart(f"{source}.bias", (total,), 0, start, stop, row))
            row += stop - start
        return {f"{prefix}.weight": weight} | ({} if self.bias is None else {f"{prefix}.bias": bias})


class GatedParallelLinear(_ColumnParallel):
    """silu(gate) · up of two products of one input, each cut evenly: checkpoint name → output size over all ranks.

    `outputs` names the gate first.
    """

    is_gated = True

    def __init__(
        self,
        input_size: int,
        outputs: Mapping[str, int],
        tensor_parallel: TensorParallel,
        dtype: torch.dtype,
        bias: bool = False,
    ) -> None:
        pieces = []
        for name, total in outputs.items():
            share = tensor_parallel.divide(f"{name} outputs", total)
            start = tensor_parallel.rank * share
            pieces.append((name, total, start, start + share))
        super().__init__(input_size, pieces, bias, dtype)


class QKVParallelLinear(_ColumnParallel):
    """Query, key and value in one product, cut by heads.

    A rank holds the KV heads that its query heads attend to; with fewer KV heads than ranks, neighbours hold the
    same one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tensor_parallel: TensorParallel,
        dtype: torch.dtype,
        bias: bool = False,
    ) -> None:
        heads = tensor_parallel.divide("num_attention_heads", num_heads)
        kv_heads = tensor_parallel.divide_kv_heads(num_kv_heads)
        first_kv_head = tensor_parallel.first_kv_head(num_kv_heads)

        def piece(name: str, total: int, first: int, count: int) -> tuple[str, int, int, int]:
            return name, total * head_dim, first * head_dim, (first + count) * head_dim

        pieces = (
            piece("q_proj", num_heads, tensor_parallel.rank * heads, heads),
            piece("k_proj", num_kv_heads, first_kv_head, kv_heads),
            piece("v_proj", num_kv_heads, first_kv_head, kv_heads),
        )
        super().__init__(hidden_size, pieces, bias, dtype)
        self.head_dim = head_dim

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """forward's output → views of query, key and value, each [num_tokens, heads on this rank, head_dim]."""
        query, key, value = torch.split(qkv, self.output_sizes, dim=-1)
        num_tokens = qkv.shape[0]
        return (
            query.view(num_tokens, -1, self.head_dim),
            key.view(num_tokens, -1, self.head_dim),
            value.view(num_tokens, -1, self.head_dim),
        )


class RowParallelLinear(_Linear):
    """A product whose inputs are cut over the ranks: each rank has some columns of the weight, the results add up."""

    def __init__(
        self, input_size: int, output_size: int, tensor_parallel: TensorParallel, dtype: torch.dtype, bias: bool = False
    ) -> None:
        super().__init__()
        self.input_size = input_size  # over all ranks
        self.output_size = output_size
        self.tensor_parallel = tensor_parallel
        self.share = tensor_parallel.divide("input size", input_size)
        self.weight = empty_parameter(output_size, self.share, dtype=dtype)
        self.bias = empty_parameter(output_size, dtype=dtype) if bias else None

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream with the product added to it, the same on every rank.

        hidden [num_tokens, share of input_size], residual [num_tokens, output_size] → as residual, both: the sum and
        None, or the product and the residual, for the norm that follows to add.
        """
        is_skinny = suits_skinny_linear(hidden, self.weight)
        if self.tensor_parallel.size > 1:
            product = skinny_linear(hidden, self.weight) if is_skinny else linear(hidden, self.weight)
            if is_skinny and self.bias is None:  # as below: the product that follows norms its rows itself
                return self.tensor_parallel.all_reduce(product, residual), None
            output = self.tensor_parallel.all_reduce(product)
            return output if self.bias is None else output + self.bias, residual  # bias once, not once a rank
        if is_skinny:
            return skinny_linear(hidden, self.weight, self.bias, residual=residual), None
        return linear(hidden, self.weight, self.bias), residual

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        start = self.tensor_parallel.rank * self.share
        shape = (self.output_size, self.input_size)
        parts = {f"{prefix}.weight": [WeightPart(f"{prefix}.weight", shape, 1, start, start + self.share)]}
        if self.bias is not None:
            parts[f"{prefix}.bias"] = [WeightPart(f"{prefix}.bias", (self.output_size,))]
        return parts
