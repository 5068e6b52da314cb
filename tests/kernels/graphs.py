"""CUDA graphs of kernels that are launched as each other's dependents."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Runs once, so that kernels are compiled, and captures another run. Returns the graph, and what it writes."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def same_of_replays(run: Callable[[], torch.Tensor], times: int) -> torch.Tensor:
    """Returns what each of `times` replays of a graph gives; AssertionError if one differs."""
    graph, out = capture(run)
    results = []
    for _ in range(times):
        graph.replay()
        results.append(out.clone())
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]
