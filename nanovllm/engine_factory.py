"""What an engine is made of: chooses the executor that runs the steps, and the observers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.diagnostics import make_diagnostics
from nanovllm.diagnostics.function_trace import start_function_trace
from nanovllm.engine.engine_log import EngineLog
from nanovllm.engine.executor import Executor
from nanovllm.engine.in_process_executor import InProcessExecutor
from nanovllm.engine.observer import EngineObserver
from nanovllm.engine.scheduler_log import SchedulerLog
from nanovllm.engine.speculation import Speculation
from nanovllm.engine.statistics_log import StatisticsLine
from nanovllm.errors import OutOfMemoryError
from nanovllm.logs.records import in_engine
from nanovllm.speculative_config import SpeculativeConfig
from nanovllm.tracing.request_metrics import open_request_metrics
from nanovllm.tracing.request_spans import open_request_spans
from nanovllm.tracing.timeline import Timeline
from nanovllm.utils import env
from nanovllm.utils.logger import configure_logging
from nanovllm.utils.stopwatch import Stopwatch


@contextmanager
def reporting_start(observers: Iterable[EngineObserver]) -> Iterator[None]:
    """Tells the observers of an engine that does not start. What it logs leaves no mark on this thread.

    Raises OutOfMemoryError when this process gets too little memory.
    """
    with in_engine(None):
        try:
            yield
        except BaseException as error:
            for observer in observers:
                observer.engine_start_failed(error)
            if isinstance(error, MemoryError):
                raise OutOfMemoryError(
                    "This process gets too little memory to start an engine. Raise its limit (`ulimit -v`, the "
                    "container's)."
                ) from error
            raise


def make_executor(config: EngineConfig, stopwatch: Stopwatch) -> Executor:
    """Returns an executor that runs in this process for one rank, or in one process per rank for more."""
    if config.tensor_parallel_size == 1:
        return InProcessExecutor(config, stopwatch, make_diagnostics)
    from nanovllm.distributed.multi_process_executor import MultiProcessExecutor

    return MultiProcessExecutor(config, stopwatch, make_diagnostics, start_function_trace)


def make_speculation(config: EngineConfig, resolved: ResolvedConfig, observer: EngineObserver) -> Speculation:
    """Returns what drafts tokens, as `speculative_config` asks."""
    speculative = SpeculativeConfig.of(config.speculative_config)
    if speculative is None:
        return Speculation()
    if speculative.method == "draft_model":
        from nanovllm.speculation.draft_model import ModelDrafter

        return ModelDrafter(speculative, resolved, observer)
    from nanovllm.speculation.drafter import Drafter

    return Drafter(speculative, resolved, observer)


def default_observers(config: EngineConfig) -> list[EngineObserver]:
    """Returns the observers that write the log, and those that the environment asks for.

    The latter are the function trace, the timeline and the request spans.
    """
    configure_logging()  # the environment may have changed since the import
    trace_file = env.trace_file()
    function_trace = start_function_trace(rank=0)
    observers: list[EngineObserver | None] = [
        EngineLog(),
        function_trace,
        SchedulerLog(),
        StatisticsLine(env.log_stats_interval()),
        None if trace_file is None else Timeline(trace_file),
        open_request_spans(config.model),
        open_request_metrics(config.model),
    ]
    return [observer for observer in observers if observer is not None]
