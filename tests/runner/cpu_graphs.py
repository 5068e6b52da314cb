"""CUDA graphs without a GPU: capturing notes the step and its tensors, a replay runs it again on them.

As with real graphs, what a replay reads is what lies in the captured tensors at that moment, and what it
writes stays there until the next replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine.batch import StepNeeds
from nanovllm.kernels.logprobs import SampledTokens
from nanovllm.runner.cuda_graph import DecodeGraphs


class CpuGraph:
    replay: Callable[[], object]


class CpuStream:
    def __init__(self, device: torch.device | None = None) -> None: ...

    def wait_stream(self, other: CpuStream) -> None: ...


def use_cpu_graphs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU engine, with one step in flight, decode through `DecodeGraphs`."""
    runner: Any = llm.llm_engine.executor._runner  # type: ignore[attr-defined]
    capturing: list[CpuGraph] = []

    @contextlib.contextmanager
    def capture(graph: CpuGraph, pool: object, stream: object) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.clear()

    def decode_step(rows: torch.Tensor, needs: StepNeeds) -> SampledTokens:
        captured = runner._decode(rows, needs)

        def replay() -> None:
            for tensor, new in zip(captured.tensors(), runner._decode(rows, needs).tensors(), strict=True):
                tensor.copy_(new)

        for graph in capturing:
            graph.replay = replay
        return captured

    for name, stand_in in {
        "CUDAGraph": CpuGraph,
        "graph": capture,
        "Stream": CpuStream,
        "current_stream": CpuStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph_pool_handle": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with torch.inference_mode():
        max_num_seqs = llm.llm_engine.resolved.max_num_seqs
        runner._graphs = DecodeGraphs(decode_step, max_num_seqs, runner.rows.null_row, runner.device)
