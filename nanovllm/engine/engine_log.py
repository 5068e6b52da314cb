"""EngineLog: the log lines about an engine's start, requests, steps and failures."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import fields

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.observer import CollectedStep, EngineObserver, EngineStart, Preemption
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidLogitsError
from nanovllm.logs import events
from nanovllm.outputs import CompletionOutput
from nanovllm.utils import env
from nanovllm.utils.logger import Listing, log_rule, setup_logger
from nanovllm.utils.versions import device_name, versions

logger = setup_logger("nanovllm.engine.llm_engine")  # the name that users' documents show


class EngineLog(EngineObserver):
    """Writes the lines of the logger `nanovllm.engine.llm_engine`."""

    def __init__(self) -> None:
        self._num_preempted = 0  # preemptions since the last step was collected
        self._has_invalid_logits = False  # which is said once
        self._fatal: BaseException | None = None  # what ended the engine

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
            events.request_added.log(
                logger,
                request_id=sequence.request_id,
                seq_id=sequence.seq_id,
                num_prompt_tokens=sequence.num_prompt_tokens,
                max_tokens=sequence.params.max_tokens,
                **({"prompt": sequence.prompt} if env.log_prompts() else {}),
            )

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        self._num_preempted += 1

    def sequence_finished(self, sequence: Sequence) -> None:
        if isinstance(sequence.error, InvalidLogitsError) and not self._has_invalid_logits:
            self._has_invalid_logits = True
            num_tokens = len(sequence.output_token_ids)
            events.logits_invalid.log(
                logger, request_id=sequence.request_id, output_len=num_tokens, error=str(sequence.error)
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
            events.request_output.log(logger, request_id=sequence.request_id, text=completion.text)

    def engine_start_failed(self, error: BaseException) -> None:
        events.engine_start_failed.log(logger, error=repr(error))

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        events.engine_exit.log(
            logger,
            outcome="clean" if self._fatal is None else "error",
            num_unfinished=len(list(unfinished)),
            **({} if self._fatal is None else {"error": repr(self._fatal)}),
        )

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        self._fatal = None if goes_on else error
        interrupted = not isinstance(error, Exception)
        event = events.engine_interrupted if interrupted else events.engine_error
        event.log(
            logger,
            what="was interrupted" if interrupted else "failed",
            error=repr(error),
            state="goes on" if goes_on else "can not go on",
        )
