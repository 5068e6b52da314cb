"""An engine on the tiny checkpoint, with its runner, and a loop that runs requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanovllm import RequestOutput, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.diagnostics import make_diagnostics
from nanovllm.engine.in_process_executor import InProcessExecutor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.observer import EngineObserver
from nanovllm.engine_factory import default_observers, make_speculation


class OpenExecutor(InProcessExecutor):
    """The engine's own executor, with access to its runner."""

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "the executor was shut down"
        return self._runner


def open_engine(observers: Sequence[EngineObserver] = (), **settings: Any) -> tuple[LLMEngine, ModelRunner]:
    """Returns an engine, which is a context manager, and the runner of its one rank.

    observers: further ones. settings: LLM's arguments.
    """
    config = EngineConfig("tiny", **{"device": "cpu", **settings})
    executor = OpenExecutor(config, make_diagnostics=make_diagnostics)
    all_observers = [*default_observers(config), *observers]
    engine = LLMEngine(config, lambda config, stopwatch: executor, all_observers, make_speculation=make_speculation)
    return engine, executor.runner


def run(
    engine: LLMEngine,
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams],
    after_step: Callable[[], object] = lambda: None,
) -> list[RequestOutput]:
    """Runs all prompts as `LLM.generate` does. Returns the outputs in the order of the prompts."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = [engine.add_request(f"request-{i}", *request) for i, request in enumerate(zip(prompts, each, strict=True))]
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        after_step()
    return [outputs[request_id] for request_id in ids]
