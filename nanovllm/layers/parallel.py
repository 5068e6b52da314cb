"""Tensor parallelism (Megatron-LM, Shoeybi et al., 2019, arXiv:1909.08053): who this rank is, and the collectives.

Every layer is handed its `TensorParallel` when it is built; at size 1 the collectives do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanovllm.errors import InvalidArgumentError


@dataclass(frozen=True)
class TensorParallel:
    """Rank `rank` of `size`; `group` is the process group that joins them (None at size 1)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def divide(self, field: str, value: int) -> int:
        """This rank's share of `value`. Raises InvalidArgumentError when it cannot be shared evenly."""
        if value % self.size:
            raise InvalidArgumentError("tensor_parallel_size", self.size, f"a divisor of the model's {field}={value}")
        return value // self.size

    def divide_kv_heads(self, num_kv_heads: int) -> int:
        """KV heads on this rank; ranks share one head when there are fewer heads than ranks."""
        if self.size > num_kv_heads and self.size % num_kv_heads == 0:
            return 1
        if num_kv_heads % self.size:
            raise InvalidArgumentError(
                "tensor_parallel_size", self.size, f"a divisor or a multiple of the model's num_kv_heads={num_kv_heads}"
            )
        return num_kv_heads // self.size

    def first_kv_head(self, num_kv_heads: int) -> int:
        """The first KV head of this rank, among all of the model's."""
        return self.rank * num_kv_heads // self.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors [rows, n] side by side: [rows, size · n]."""
        if self.size == 1:
            return tensor
        stacked = tensor.new_empty((self.size, *tensor.shape))  # [size, rows, n]
        dist.all_gather_into_tensor(stacked, tensor.contiguous(), group=self.group)
        return stacked.movedim(0, -2).flatten(-2)
