"""EngineLog: the log lines about an engine's start, requests, steps and failures."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import CollectedStep, Delay, EngineObserver, EngineStart, Preemption, SampledStep
from nanovllm.engine.request_end import COMPLETE, CompletionEnd, RequestEnd, error_text
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidLogitsError
from nanovllm.logs import events
from nanovllm.outputs import CompletionOutput
from nanovllm.utils import env
from nanovllm.utils.logger import Listing, log_rule, setup_logger
from nanovllm.utils.versions import device_name, versions

logger = setup_logger("nanovllm.engine.llm_engine")  # the name that users' documents show


_MAX_REQUESTS = 64  # that an error names
_DELAY_SECONDS = 60.0  # between two warnings of delays of one kind
_MAX_TRACEBACK = 20_000  # characters, from its end


class EngineLog(EngineObserver):
    """Writes the lines of the logger `nanovllm.engine.llm_engine`."""

    def __init__(self) -> None:
        self._num_preempted = 0  # preemptions since the last step was collected
        self._has_invalid_logits = False  # which is said once
        self._fatal: BaseException | None = None  # what ended the engine
        self._planned = self._submitted = self._collected = 0  # the last steps, by number
        self._delays_logged: dict[str, float] = {}  # when the last warning of a delay was logged, by its kind

    def engine_starting(self, config: EngineConfig) -> None:
        if logger.isEnabledFor(logging.INFO):
            events.engine_versions.log(
                logger,
                schema=events.SCHEMA,
                versions=Listing(versions()),
                device=device_name(config.device),
                variables=env.variables_in_force(),
            )
        log_rule(logger)
        events.engine_init.log(logger)
        events.engine_model.log(logger, model=config.model)
        names = ["tensor_parallel_size", "max_model_len", *(f.name for f in fields(config) if f.name != "model")]
        events.engine_config.log(logger, **{name: getattr(config, name) for name in names})
        log_rule(logger, in_summary=False)

    def engine_resolved(self, resolved: ResolvedConfig) -> None:
        events.engine_resolved.log(logger, **{f.name: getattr(resolved, f.name) for f in fields(resolved)})

    def engine_started(self, start: EngineStart) -> None:
        stopwatch = start.stopwatch
        events.engine_startup.log(
            logger, total_seconds=stopwatch.total, parts=str(stopwatch), seconds=stopwatch.seconds
        )

    def request_added(self, sequence: Sequence) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            more: dict[str, Any] = {"prompt": sequence.prompt} if env.log_prompts() else {}
            more |= sequence.caller.fields
            events.request_added.log(
                logger,
                request_id=sequence.request_id,
                seq_id=sequence.seq_id,
                num_prompt_tokens=sequence.num_prompt_tokens,
                max_tokens=sequence.params.max_tokens,
                **more,
            )

    def request_finished(self, end: RequestEnd) -> None:
        if end.is_error:
            events.request_failed.log(
                logger,
                in_summary=not end.lost,  # `engine.error` names the requests of a failed step
                request_id=end.request_id,
                others="with all others" if end.lost else "the others go on",
                error=error_text(end.error),
                cause=end.cause,
                **end.caller.fields,
            )
        if logger.isEnabledFor(logging.INFO):
            in_summary = end.streamed or end.cause not in COMPLETE
            events.request_finished.log(logger, in_summary=in_summary, **_request_fields(end))

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        self._planned = batch.step

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        self._submitted = batch.step

    def tokens_sampled(self, step: SampledStep) -> None:
        self._collected = step.batch.step

    def delayed(self, delay: Delay) -> None:
        if delay.now - self._delays_logged.get(delay.kind, -math.inf) < _DELAY_SECONDS:
            return
        self._delays_logged[delay.kind] = delay.now
        events.engine_slow.log(
            logger,
            what=delay.kind,
            seconds=delay.seconds,
            threshold=env.log_slow_seconds(),
            slow_reason=delay.reason,
            step=delay.step,
            request_id=delay.request_id,
        )

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        self._num_preempted += 1

    def sequence_finished(self, sequence: Sequence) -> None:
        if isinstance(sequence.error, InvalidLogitsError) and not self._has_invalid_logits:
            self._has_invalid_logits = True
            num_tokens = len(sequence.output_token_ids)
            events.logits_invalid.log(
                logger,
                request_id=sequence.request_id,
                step=self._collected,
                output_len=num_tokens,
                error=str(sequence.error),
                **sequence.caller.fields,
            )

    def step_collected(self, step: CollectedStep) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            batch, load = step.batch, step.load
            events.step_done.log(
                logger,
                step=batch.step,
                kind=batch.kind,
                num_prefill_tokens=batch.num_prefill_tokens,
                num_prefill_seqs=len(batch.chunks),
                num_decode_seqs=len(batch.decode_rows),
                num_output_tokens=len(batch.sampled_rows),
                preempted=self._num_preempted,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                used_blocks=load.used_blocks,
                num_blocks=load.num_blocks,
                wall_ms=(step.collected - step.submitted) * 1e3,
                gpu_ms=step.gpu_ms,
            )
        self._num_preempted = 0

    def output_built(self, sequence: Sequence, completion: CompletionOutput) -> None:
        if logger.isEnabledFor(logging.DEBUG) and env.log_prompts():
            events.request_output.log(
                logger, request_id=sequence.request_id, text=completion.text, **sequence.caller.fields
            )

    def engine_start_failed(self, error: BaseException) -> None:
        events.engine_start_failed.log(logger, error=repr(error))

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        error: dict[str, Any] = {} if self._fatal is None else {"error": repr(self._fatal)}
        outcome = "error" if error else "clean"
        events.engine_exit.log(logger, outcome=outcome, num_unfinished=len(list(unfinished)), **error)

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        self._fatal = None if goes_on else error
        interrupted = not isinstance(error, Exception)
        event = events.engine_interrupted if interrupted else events.engine_error
        names = [sequence.request_id for sequence in lost]
        is_launched = self._planned == self._submitted
        event.log(
            logger,
            what="was interrupted" if interrupted else "failed",
            error=repr(error),
            state="goes on" if goes_on else "cannot go on",
            step=min(self._collected + 1, self._planned) or None if is_launched else self._planned,
            request_ids=names[:_MAX_REQUESTS],
            num_requests=len(names),
            traceback="".join(traceback.format_exception(error))[-_MAX_TRACEBACK:],
        )
        self._submitted = self._collected = self._planned  # the steps in flight are lost


def _request_fields(end: RequestEnd) -> dict[str, Any]:
    """Returns the fields of `request.finished`."""
    last, stall = end.last, end.stall
    times = None if last is None else last.times
    first_steps = [each.first_step for each in end.completions if each.first_step is not None]
    values: dict[str, Any] = {
        "request_id": end.request_id,
        "seq_ids": [each.seq_id for each in end.completions],
        "cause": end.cause,
        "finish_reason": "abort" if last is None else last.finish_reason,
        "stop_reason": None if last is None else last.stop_reason,
        "e2e_s": end.end_to_end,
        "queue_s": 0.0 if times is None else times.queue,
        "prefill_s": 0.0 if times is None else times.prefill,
        "decode_s": 0.0 if times is None else times.decode,
        "preempted_s": 0.0 if times is None else times.preempted,
        "ttft_s": end.to_first_token,
        "itl_s": end.inter_token_latency,
        "longest_stall_s": None if stall is None else stall.seconds,
        "stall_cause": None if stall is None else stall.cause,
        "stall_step": None if stall is None else stall.step,
        "stall_reason": None if stall is None else stall.reason,
        "num_prompt_tokens": end.num_prompt_tokens,
        "num_cached_tokens": end.num_cached_tokens,
        "num_output_tokens": end.num_output_tokens,
        "num_preemptions": sum(each.num_preemptions for each in end.completions),
        "queued_behind": end.queued_behind,
        "kv_cache_usage": end.kv_cache_usage,
        "arrival": end.arrival,
        "finished": end.arrival if last is None else last.finished,
        "first_step": min(first_steps, default=None),
        "last_step": max((each.last_step for each in end.completions if each.last_step is not None), default=None),
    }
    if num_draft_tokens := sum(each.num_draft_tokens for each in end.completions):
        values["num_draft_tokens"] = num_draft_tokens
        values["num_accepted_tokens"] = sum(each.num_accepted_tokens for each in end.completions)
    if len(end.completions) > 1:
        values["completions"] = [_completion_fields(*each, end.arrival) for each in enumerate(end.completions)]
    if end.error is not None:
        values["error"] = error_text(end.error)
    return values | end.caller.fields


def _completion_fields(index: int, end: CompletionEnd, arrival: float) -> dict[str, object]:
    return {
        "index": index,
        "seq_id": end.seq_id,
        "cause": end.cause,
        "finish_reason": end.finish_reason,
        "stop_reason": end.stop_reason,
        "num_output_tokens": end.num_output_tokens,
        "num_preemptions": end.num_preemptions,
        "e2e_s": end.finished - arrival,
    }
