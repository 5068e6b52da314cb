"""GenerationLog: the log lines and the progress bar of one `LLM.generate`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.turns import Call
from nanovllm.feed import Feed
from nanovllm.logs import events
from nanovllm.logs.progress_bar import ProgressBar
from nanovllm.logs.records import in_engine
from nanovllm.outputs import RequestOutput
from nanovllm.utils.logger import flush_timed_sections, log_gpu_memory, log_rule, setup_logger

logger = setup_logger("nanovllm.engine.llm_engine")  # the name that users' documents show


class GenerationLog:
    """A context manager around the steps of a generation. If they raise, only the bar ends."""

    def __init__(self, engine: LLMEngine, call: Call, feed: Feed, *, use_tqdm: bool) -> None:
        self._engine, self._call, self._feed = engine, call, feed
        self._num_prompts = len(call.request_ids) + feed.num_left
        self._is_queued = False  # whether all prompts are
        self._before = engine.statistics.copy()
        self._num_output_tokens = 0
        # A silent log silences the bar too.
        self._bar = ProgressBar(self._num_prompts, self._rates, is_shown=use_tqdm and logger.isEnabledFor(logging.INFO))

    def __enter__(self) -> GenerationLog:
        with in_engine(self._engine.engine_id):
            log_rule(logger, "-")
            events.generation_start.log(logger, num_prompts=self._num_prompts)
        self._look_at_queue()
        self._bar.__enter__()
        return self

    def step(self, ended: Sequence[RequestOutput]) -> Sequence[RequestOutput]:
        """Takes the outputs that a step has brought, and those of refused prompts, and returns them."""
        self._num_output_tokens += sum(len(each.token_ids) for output in ended for each in output.outputs)
        self._bar.update(len(ended))
        self._look_at_queue()
        return ended

    def _look_at_queue(self) -> None:
        """Logs the number of prompt tokens as soon as it is known."""
        if not self._is_queued and not self._feed.num_left:
            self._is_queued = True
            with in_engine(self._engine.engine_id):
                events.generation_prompt_tokens.log(logger, num_prompt_tokens=self._call.num_prompt_tokens)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._bar.__exit__()
        if kind is not None:
            return
        done = self._engine.statistics.since(self._before)
        with in_engine(self._engine.engine_id):
            flush_timed_sections()
            events.generation_complete.log(
                logger,
                num_steps=done.num_steps,
                total_output_tokens=self._num_output_tokens,
                prefill_time=done.prefill_seconds,
                decode_time=done.decode_seconds,
            )
            log_gpu_memory(logger, device=self._engine.resolved.device, event=events.generation_memory)

    def _rates(self) -> str:
        done = self._engine.statistics.since(self._before)
        seconds = max(done.prefill_seconds + done.decode_seconds, 1e-9)
        return f"in {done.num_prompt_tokens / seconds:.0f} tok/s, out {done.num_output_tokens / seconds:.0f} tok/s"
