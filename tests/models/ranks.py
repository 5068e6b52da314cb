"""Runs the ranks of a model in threads, with real sums between them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.model_config import ModelConfig
from tests.models.paged_model import PagedModel, load_model
from tests.processes import WATCHDOG


class ThreadGroup:
    """A process group of threads: the collectives that `TensorParallel` uses, over a barrier."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=WATCHDOG)
        self.local = threading.local()
        self.slots: list[Any] = [None] * size

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        self.slots[self.local.rank] = tensor.clone()
        self.barrier.wait()
        stacked = torch.stack(self.slots)
        self.barrier.wait()
        return stacked

    def allreduce(self, tensors: list[torch.Tensor]) -> ThreadGroup:
        tensors[0].copy_(self.exchange(tensors[0]).sum(0))
        return self

    def _allgather_base(self, output: torch.Tensor, tensor: torch.Tensor) -> ThreadGroup:
        output.copy_(self.exchange(tensor).flatten(0, 1))
        return self

    def wait(self) -> None:
        """The work is done when it returns."""


def logits_of_ranks(folder: Path, size: int, tokens: dict[int, list[int]]) -> list[dict[int, torch.Tensor]]:
    """The logits that each rank gives for a prefill of `tokens`. Each loads its own part of the folder."""
    config = ModelConfig.from_folder(folder)
    group = ThreadGroup(size)
    results: list[Any] = [None] * size

    def run_rank(rank: int) -> None:
        group.local.rank = rank
        parallel = TensorParallel(rank, size, group)
        model = load_model(folder, parallel)
        run = PagedModel(model, config, parallel.divide_kv_heads(config.num_kv_heads))
        results[rank] = run.step(tokens)

    threads = [threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=WATCHDOG)
    return results
