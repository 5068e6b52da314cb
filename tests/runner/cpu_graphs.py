"""Engines whose steps are graphs, for tests; and CUDA graphs without a GPU.

Without one, capturing notes the step and its tensors, and a replay runs it again on them.

As with real graphs, what a replay reads is what lies in the captured tensors at that moment, and what it
writes stays there until the next replay.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM
from nanovllm.kernels.logprobs import SampledTokens
from nanovllm.layers.parallel import CurrentStep
from nanovllm.runner.cuda_graph import DecodeGraphs
from nanovllm.runner.mixed_graphs import MixedGraphs, missing_graphs


class CpuGraph:
    replay: Callable[[], object]


class CpuGraphPool:
    """Stands in for `GraphPool`."""

    device = torch.device("cpu")
    handle = None

    def __init__(self, step: CurrentStep) -> None:
        self.step = step

    def capture(self, step: Callable[[], Any]) -> tuple[CpuGraph, Any]:
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
    pool: Any = CpuGraphPool(runner.parallel.step)
    resolved, null_row = llm.llm_engine.resolved, runner.rows.null_row
    runner._graphs = DecodeGraphs(pool, runner._decode, null_row, null_row)
    norm = getattr(runner.model, "target", runner.model).model.norm  # of the model that has a draft model beside it
    runner._mixed_graphs = MixedGraphs(
        pool,
        runner._hidden,
        runner._sample,
        max_tokens=resolved.max_num_batched_tokens,
        max_num_rows=null_row,
        hidden_size=norm.weight.shape[0],
        dtype=norm.weight.dtype,
        null_row=null_row,
    )
    draft_graphs = runner._drafts.make_graphs(runner._graphs)
    runner._missing_graphs = missing_graphs(pool.device, runner._graphs, draft_graphs, runner._mixed_graphs)


class GraphLoader:
    """Makes engines that run eagerly or through graphs, in float32, and notes the arguments of each replay.

    graphs: the attribute of the runner whose replays are noted, `_graphs` or `_mixed_graphs`.
    """

    def __init__(self, folder: Path, device: str, graphs: str, **defaults: Any) -> None:
        self.folder, self.device, self._graphs = folder, device, graphs
        backend = "triton" if device == "cuda" else "torch"
        self._defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 96, "device": device}
        self._defaults |= {"attention_backend": backend, "num_kvcache_blocks": 200, **defaults}
        self.replays: list[tuple[Any, ...]] = []

    def __call__(self, use_graphs: bool, **arguments: Any) -> LLM:
        llm = LLM(str(self.folder), **{**self._defaults, **arguments}, enforce_eager=not use_graphs)
        if use_graphs:
            if self.device == "cpu":
                use_cpu_graphs(llm)
            graphs = getattr(llm.llm_engine.executor._runner, self._graphs)  # type: ignore[attr-defined]
            replay = graphs.replay

            def note_and_replay(*arguments: Any) -> SampledTokens:
                self.replays.append(arguments)
                sampled: SampledTokens = replay(*arguments)
                return sampled

            graphs.replay = note_and_replay
        return llm
