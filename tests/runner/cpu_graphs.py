"""CUDA graphs without a GPU: capturing notes the step and its tensors, a replay runs it again on them.

As with real graphs, what a replay reads is what lies in the captured tensors at that moment, and what it
writes stays there until the next replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nanovllm import LLM
from nanovllm.kernels.logprobs import SampledTokens
from nanovllm.runner.cuda_graph import DecodeGraphs
from nanovllm.runner.mixed_graphs import MixedGraphs


class CpuGraph:
    replay: Callable[[], object]


class CpuGraphPool:
    """Stands in for `GraphPool`."""

    device = torch.device("cpu")
    handle = None

    def capture(self, step: Callable[[], Any], run_first: bool = True) -> tuple[CpuGraph, Any]:
        captured, graph = step(), CpuGraph()

        def replay() -> None:
            result = step()
            if isinstance(captured, SampledTokens):
                for tensor, new in zip(captured.tensors(), result.tensors(), strict=True):
                    tensor.copy_(new)

        graph.replay = replay
        return graph, captured


def use_cpu_graphs(llm: LLM) -> None:
    """Lets a CPU engine, with one step in flight, run through `DecodeGraphs` and `MixedGraphs`."""
    runner: Any = llm.llm_engine.executor._runner  # type: ignore[attr-defined]
    pool: Any = CpuGraphPool()
    resolved, null_row = llm.llm_engine.resolved, runner.rows.null_row
    runner._graphs = DecodeGraphs(pool, runner._decode, resolved.max_num_seqs, null_row)
    runner._mixed_graphs = MixedGraphs(
        pool,
        runner._hidden,
        runner._sample,
        max_tokens=resolved.max_num_batched_tokens,
        max_num_seqs=resolved.max_num_seqs,
        hidden_size=runner.model.model.norm.weight.shape[0],
        dtype=runner.model.model.norm.weight.dtype,
        null_row=null_row,
    )
