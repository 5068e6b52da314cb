"""Assembles an engine: which executor runs its steps, and who observes it."""

from __future__ import annotations

from nanovllm.config import EngineConfig
from nanovllm.diagnostics import make_diagnostics
from nanovllm.diagnostics.function_trace import start_function_trace
from nanovllm.engine.executor import Executor, InProcessExecutor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.utils.stopwatch import Stopwatch


def make_engine(config: EngineConfig) -> LLMEngine:
    """Returns an engine as `LLM` and `AsyncLLM` use it. Raises what loading the model raises."""
    trace = start_function_trace(rank=0)
    return LLMEngine(config, make_executor, on_exit=(lambda: None) if trace is None else trace.stop)


def make_executor(config: EngineConfig, stopwatch: Stopwatch) -> Executor:
    """Returns an executor in this process for one rank, and one of several processes for more."""
    if config.tensor_parallel_size == 1:
        return InProcessExecutor(config, stopwatch, make_diagnostics)
    from nanovllm.distributed.multi_process_executor import MultiProcessExecutor

    return MultiProcessExecutor(config, stopwatch, make_diagnostics, start_function_trace)
