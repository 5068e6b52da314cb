"""Tensor parallelism (Megatron-LM, Shoeybi et al., 2019, arXiv:1909.08053): a rank's shares, and the collectives.

Every layer gets its `TensorParallel` when it is built; at size 1 the collectives do nothing.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nanovllm.errors import InvalidArgumentError
from nanovllm.kernels.one_shot_all_reduce import OneShotAllReduce
from nanovllm.utils.logger import log_communication, setup_logger

logger = setup_logger(__name__)


class Group(Protocol):
    """The collectives of torch's `ProcessGroup`, or of one of its backends (`ProcessGroupNCCL`, `ProcessGroupGloo`).

    Calling them directly needs no process-wide default group, so that two engines can live in one process.
    """

    def allreduce(self, tensors: list[torch.Tensor], /) -> Any: ...

    def _allgather_base(self, output: torch.Tensor, tensor: torch.Tensor, /) -> Any: ...


@dataclass(frozen=True)
class Shard:
    """A rank's part of a dimension of `total` entries: those from `start` up to, but not including, `stop`."""

    total: int
    start: int
    stop: int

    @classmethod
    def whole(cls, total: int) -> Shard:
        return cls(total, 0, total)

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_cut(self) -> bool:
        return self.size < self.total

    def __mul__(self, width: int) -> Shard:
        """Returns the shard with each entry replaced by `width` entries, as from heads to their components."""
        return Shard(self.total * width, self.start * width, self.stop * width)


class CurrentStep:
    """The step that a rank runs, for the log. None: none, as at start-up."""

    number: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The field `step` of a log record; no field without a step."""
        return {} if self.number is None else {"step": self.number}


@dataclass(frozen=True)
class TensorParallel:
    """Rank `rank` of `size`. `group` joins the ranks (None at size 1); `one_shot`, if present, sums small tensors."""

    rank: int = 0
    size: int = 1
    group: Group | None = None
    one_shot: OneShotAllReduce | None = None
    step: CurrentStep = field(default_factory=CurrentStep, compare=False)

    def divide(self, field: str, value: int) -> int:
        """Returns this rank's share of `value`. Raises InvalidArgumentError when it cannot be shared evenly."""
        if value % self.size:
            raise InvalidArgumentError("tensor_parallel_size", self.size, f"a divisor of the model's {field}={value}")
        return value // self.size

    def shard(self, field: str, total: int) -> Shard:
        """Returns this rank's share of a dimension. Raises InvalidArgumentError when it cannot be shared evenly."""
        share = self.divide(field, total)
        return Shard(total, self.rank * share, (self.rank + 1) * share)

    def divide_kv_heads(self, num_kv_heads: int) -> int:
        """Returns the number of KV heads on this rank. Ranks share a head when there are fewer heads than ranks."""
        if self.size > num_kv_heads and self.size % num_kv_heads == 0:
            return 1
        if num_kv_heads % self.size:
            raise InvalidArgumentError(
                "tensor_parallel_size", self.size, f"a divisor or a multiple of the model's num_kv_heads={num_kv_heads}"
            )
        return num_kv_heads // self.size

    def first_kv_head(self, num_kv_heads: int) -> int:
        """Returns the index of this rank's first KV head among all of the model's."""
        return self.rank * num_kv_heads // self.size

    def all_reduce(self, tensor: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sum over the ranks, plus `residual` (the same on every rank). Sums in place."""
        if self.size > 1:
            started = time.monotonic()
            if self.one_shot is not None and self.one_shot.takes(tensor):
                self.one_shot(tensor, residual)
                residual = None
            else:
                self._members.allreduce([tensor]).wait()
            self._log("all_reduce", tensor, started)
        return tensor if residual is None else tensor.add_(residual)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the ranks' tensors [...] one after another: [size, ...]."""
        stacked = tensor.new_empty((self.size, *tensor.shape))
        started = time.monotonic()
        self._members._allgather_base(stacked.flatten(0, 1), tensor.contiguous()).wait()
        self._log("all_gather", tensor, started)
        return stacked

    def all_gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the ranks' tensors [rows, n] side by side: [rows, size · n]."""
        return tensor if self.size == 1 else self.all_gather(tensor).movedim(0, -2).flatten(-2)

    def minimum(self, value: int, device: torch.device) -> int:
        """Returns the smallest of the ranks' values. Waits for all ranks."""
        return value if self.size == 1 else int(self.all_gather(torch.tensor([value], device=device)).min())

    @property
    def _members(self) -> Group:
        assert self.group is not None, "a rank among several needs a group"
        return self.group

    def _log(self, operation: str, tensor: torch.Tensor, started: float) -> None:
        if logger.isEnabledFor(logging.DEBUG):  # on a GPU the call only launches the work, whose time is not known
            known = started if tensor.device.type == "cpu" else None
            log_communication(logger, operation, [tensor], self.rank, self.size, started=known, step=self.step.number)
