"""Linear layers sharded across the ranks, with the norm before the product and the addition after it.

A column-parallel product gives each rank some of the outputs; the row-parallel product that follows takes them as
its inputs and sums the ranks' results: one all-reduce per pair. Products of the same input are fused: their
checkpoint tensors become row ranges of one weight.

The residual stream passes through as a pair (hidden, residual) that stands for its sum; residual None: `hidden` is all
of it. With few tokens, the product's kernel includes the norm before it and the addition after it; with very many, the
addition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import nn

from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.layers.context import LayerContext
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parallel import Shard

Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class ColumnParallelLinear(LinearLayer):
    """A layer sharded by outputs. `outputs` maps checkpoint modules to this rank's outputs."""

    act: Activation | None = None  # of the product

    def __init__(self, context: LayerContext, input_size: int, outputs: Mapping[str | None, Shard], bias: bool) -> None:
        inputs = Shard.whole(input_size)
        super().__init__(outputs, inputs, method=context.linear_method, dtype=context.dtype, bias=bias)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, norm: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the product with the normed residual stream, and the summed stream.

        hidden, residual [num_tokens, input_size] → [num_tokens, num_outputs] (this rank's outputs, piece by piece; half
        as many if gated) and [num_tokens, input_size]. norm None: the stream, which is `hidden`, is taken as it is.
        """
        act, gated = self.act, self.act is silu_and_mul  # which kernels have
        fuses = self.method.fuses(self, hidden, gated=gated)
        folded = norm if fuses and residual is None and isinstance(norm, RMSNorm) else None
        normed, stream = (hidden, hidden) if norm is None or norm is folded else norm(hidden, residual)
        if fuses:
            output = self.method.multiply_fused(self, normed, self.bias, norm=folded, gated=gated)
            act = None if gated else act
        else:
            output = self.method.multiply(self, normed, self.bias)
        return output if act is None else act(output), stream


class GatedParallelLinear(ColumnParallelLinear):
    """act(gate) · up, where gate and up are products of the same input, each sharded evenly.

    `outputs` maps checkpoint modules to their output sizes over all ranks, the gate first. `act` takes gate and up side
    by side.
    """

    def __init__(
        self, context: LayerContext, input_size: int, outputs: Mapping[str, int], *, bias: bool, act: Activation
    ) -> None:
        shards: dict[str | None, Shard] = {
            name: context.parallel.shard(f"{name} outputs", total) for name, total in outputs.items()
        }
        super().__init__(context, input_size, shards, bias)
        self.act = act


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value in one product, sharded by heads.

    A rank holds the KV heads that its query heads attend to; with fewer KV heads than ranks, neighbouring
    ranks hold the same one.
    """

    def __init__(
        self,
        context: LayerContext,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
    ) -> None:
        parallel = context.parallel
        heads = parallel.shard("num_attention_heads", num_heads)
        first_kv_head = parallel.first_kv_head(num_kv_heads)
        kv_heads = Shard(num_kv_heads, first_kv_head, first_kv_head + parallel.divide_kv_heads(num_kv_heads))
        shards: dict[str | None, Shard] = {
            "q_proj": heads * head_dim,
            "k_proj": kv_heads * head_dim,
            "v_proj": kv_heads * head_dim,
        }
        super().__init__(context, hidden_size, shards, bias)
        self.head_dim = head_dim
        self.output_sizes = [piece.outputs.size for piece in self.pieces]

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns views of query, key and value in `qkv`, each [num_tokens, heads on this rank, head_dim]."""
        query, key, value = torch.split(qkv, self.output_sizes, dim=-1)
        num_tokens = qkv.shape[0]
        return (
            query.view(num_tokens, -1, self.head_dim),
            key.view(num_tokens, -1, self.head_dim),
            value.view(num_tokens, -1, self.head_dim),
        )


class RowParallelLinear(LinearLayer):
    """A layer sharded by inputs: each rank has some columns of the weight, and the ranks' products are summed."""

    def __init__(
        self, context: LayerContext, input_size: int, output_size: int, *, bias: bool = False, name: str | None = None
    ) -> None:
        """name: of the checkpoint's module, where it is not this one's."""
        inputs = context.parallel.shard("input size", input_size)
        outputs: dict[str | None, Shard] = {name: Shard.whole(output_size)}
        super().__init__(outputs, inputs, method=context.linear_method, dtype=context.dtype, bias=bias)
        self.parallel = context.parallel

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, norm: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the residual stream with the product, normed by `norm`, added to it, the same on every rank.

        hidden [num_tokens, share of input_size], residual [num_tokens, output_size] → a pair of residual's shape:
        the sum and None, or the product and the residual, which the next norm adds. The sum may overwrite `residual`.
        """
        if norm is not None:
            return norm(self(hidden, None)[0])[0], residual
        is_alone = self.parallel.size == 1
        fuses = self.method.fuses(self, hidden, only_adds=is_alone and residual is not None and self.bias is None)
        if not is_alone:
            product = (self.method.multiply_fused if fuses else self.method.multiply)(self, hidden)
            if fuses and self.bias is None:  # as below: the next product includes its norm and reads the sum
                return self.parallel.all_reduce(product, residual), None
            output = self.parallel.all_reduce(product)
            return output if self.bias is None else output + self.bias, residual  # bias once, not once per rank
        if fuses:
            return self.method.multiply_fused(self, hidden, self.bias, residual=residual), None
        return self.method.multiply(self, hidden, self.bias), residual
