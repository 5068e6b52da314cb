"""Builds engines for `LLM` and `AsyncLLM`: chooses the executor that runs the steps, and the observers."""

from __future__ import annotations

from nanovllm.config import EngineConfig
from nanovllm.diagnostics import make_diagnostics
from nanovllm.diagnostics.function_trace import start_function_trace
from nanovllm.engine.engine_log import EngineLog
from nanovllm.engine.executor import Executor
from nanovllm.engine.in_process_executor import InProcessExecutor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.metrics import StatisticsLine
from nanovllm.engine.observer import EngineObserver
from nanovllm.engine.scheduler_log import SchedulerLog
from nanovllm.errors import OutOfMemoryError
from nanovllm.tracing.request_spans import open_request_spans
from nanovllm.tracing.timeline import Timeline
from nanovllm.utils import env
from nanovllm.utils.logger import configure_logging
from nanovllm.utils.stopwatch import Stopwatch


def make_engine(config: EngineConfig) -> LLMEngine:
    """Returns an engine with the executor and the observers that the configuration and the environment ask for.

    Raises what loading the model raises, OutOfMemoryError when this process gets too little memory, and
    InvalidArgumentError for an environment variable that is not allowed.
    """
    try:
        return LLMEngine(config, make_executor, default_observers(config))
    except MemoryError as error:
        raise OutOfMemoryError(
            "This process gets too little memory to start an engine. Raise its limit (`ulimit -v`, the container's)."
        ) from error


def make_executor(config: EngineConfig, stopwatch: Stopwatch) -> Executor:
    """Returns an executor that runs in this process for one rank, or in one process per rank for more."""
    if config.tensor_parallel_size == 1:
        return InProcessExecutor(config, stopwatch, make_diagnostics)
    from nanovllm.distributed.multi_process_executor import MultiProcessExecutor

    return MultiProcessExecutor(config, stopwatch, make_diagnostics, start_function_trace)


def default_observers(config: EngineConfig) -> list[EngineObserver]:
    """Returns the observers that write the log, and those that the environment asks for.

    The latter are the function trace, the timeline and the request spans.
    """
    configure_logging()  # the environment may have changed since the import
    trace_file = env.trace_file()
    observers: list[EngineObserver | None] = [
        start_function_trace(rank=0),
        EngineLog(),
        SchedulerLog(),
        StatisticsLine(env.log_stats_interval()),
        None if trace_file is None else Timeline(trace_file),
        open_request_spans(config.model),
    ]
    return [observer for observer in observers if observer is not None]
