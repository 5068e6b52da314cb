"""An engine on the tiny checkpoint whose insides a lesson may look at, and a way to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanovllm import RequestOutput, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.diagnostics import make_diagnostics
from nanovllm.engine.executor import InProcessExecutor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner


class OpenExecutor(InProcessExecutor):
    """The engine's own executor, with its runner in sight."""

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "the executor was shut down"
        return self._runner


def open_engine(**settings: Any) -> tuple[LLMEngine, ModelRunner]:
    """`settings` are LLM's arguments. The engine is a context manager; the runner is its one rank."""
    config = EngineConfig.from_arguments("tiny", {"device": "cpu", **settings})
    executor = OpenExecutor(config, make_diagnostics=make_diagnostics)
    return LLMEngine(config, lambda config, stopwatch: executor), executor.runner


def run(
    engine: LLMEngine,
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams],
    after_step: Callable[[], object] = lambda: None,
) -> list[RequestOutput]:
    """What `LLM.generate` does: adds all prompts, steps until the last has ended, gives results in order."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = [engine.add_request(f"request-{i}", *request) for i, request in enumerate(zip(prompts, each, strict=True))]
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        after_step()
    return [outputs[request_id] for request_id in ids]
