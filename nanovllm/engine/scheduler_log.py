"""What the scheduler says of its decisions: which steps are worth a line, and what stands in it."""

from __future__ import annotations

import logging

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.logs import events
from nanovllm.logs.decode_rule import DecodeLogPolicy
from nanovllm.outputs import FinishReason
from nanovllm.utils.logger import first_items

# What the log calls the reasons for which a sequence ends.
_LOGGED_REASON: dict[FinishReason, str] = {"stop": "eos", "length": "max_tokens", "abort": "abort"}


class SchedulerLines:
    """Counts a generation's decode steps, and says what it is told at the level that it deserves."""

    def __init__(self, logger: logging.Logger, rows: RowTable) -> None:
        self._logger = logger
        self._rows = rows
        self._decode_log = DecodeLogPolicy()
        self.num_preempted = 0  # since the last decode step
        self.begin_generation()

    def begin_generation(self) -> None:
        """The work had run out: decode steps are counted anew, and the next one is a first one."""
        self._decode_step = 0
        self._decode_log.reset()

    def scheduled(self, batch: ScheduledBatch) -> None:
        if len(batch.chunks) and self._logger.isEnabledFor(logging.INFO):
            size, batched_tokens = len(batch.chunks), batch.num_prefill_tokens
            seqs = first_items(list(batch.chunks), lambda chunk: self._describe(chunk["row"], cached=chunk["start"]))
            events.batch_prefill.log(self._logger, step=batch.step, size=size, batched_tokens=batched_tokens, seqs=seqs)
        if not len(batch.decode_rows):
            return
        self._decode_step += 1
        size = len(batch.decode_rows)
        level = self._decode_log.level_for(self._decode_step, size, self.num_preempted)
        if self._logger.isEnabledFor(level):
            events.batch_decode.log_at(
                level,
                self._logger,
                step=batch.step,
                decode_step=self._decode_step,
                size=size,
                preempted=self.num_preempted,
                shares_prefix=batch.needs.shares_prefix,
                seqs=first_items(batch.decode_rows.tolist(), self._describe),
            )
        self.num_preempted = 0

    def _describe(self, row: int, cached: int | None = None) -> str:
        length = self._rows.num_tokens[row]
        prefilled = "" if cached is None else f",cached={cached}"
        return f"seq_{self._rows.sequence(row).seq_id}(len={length}{prefilled})"

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        if not self._logger.isEnabledFor(logging.DEBUG):
            return
        metrics = sequence.metrics()

        def milliseconds(seconds: float | None) -> float | None:
            return None if seconds is None else seconds * 1e3

        events.sequence_finished.log(
            self._logger,
            seq_id=sequence.seq_id,
            request_id=sequence.request_id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=metrics.num_cached_tokens,
            output_len=metrics.num_output_tokens,
            reason=_LOGGED_REASON[reason],
            arrival=metrics.arrival,
            first_scheduled=metrics.first_scheduled,
            first_token=metrics.first_token,
            finished=metrics.finished,
            queue_ms=milliseconds(metrics.queue_time),
            ttft_ms=milliseconds(metrics.time_to_first_token),
            itl_ms=milliseconds(metrics.inter_token_latency),
            e2e_ms=milliseconds(metrics.end_to_end),
            preemptions=metrics.num_preemptions,
        )
