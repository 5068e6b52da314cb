"""StepLog: the DEBUG lines of a model runner's steps."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

import torch

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.layers.parallel import TensorParallel
from nanovllm.logs import events
from nanovllm.runner.device_rows import ModelInputs
from nanovllm.utils.logger import setup_logger, shapes_of, timed_section

logger = setup_logger("nanovllm.engine.model_runner")  # the name that users' documents show


class StepLog:
    """Writes the lines of one rank's steps."""

    def __init__(self, parallel: TensorParallel, device: torch.device) -> None:
        self._step, rank = parallel.step, parallel.rank
        self._rank = rank
        self._device = device
        section = f"[Rank {rank}] Model forward"
        self._sections = {
            "prefill": f"{section} PREFILL",
            "decode": f"{section} DECODE",
            "mixed": f"{section} PREFILL+DECODE",
        }

    @property
    def is_detailed(self) -> bool:
        """Whether the log is at DEBUG."""
        return logger.isEnabledFor(logging.DEBUG)

    @property
    def is_timed(self) -> bool:
        """Whether the statistics at INFO show the GPU time of the steps."""
        return self._rank == 0 and logger.isEnabledFor(logging.INFO)

    def forward(self, batch: ScheduledBatch) -> AbstractContextManager[object]:
        """Returns a context that times the part of a step that runs the model."""
        return timed_section(logger, self._sections[batch.kind], device=self._device, step=batch.step)

    def eager(self, batch: ScheduledBatch, reason: str) -> None:
        events.step_eager.log(logger, step=batch.step, why_eager=reason)

    def preparing(self, batch: ScheduledBatch) -> None:
        self._step.number = batch.step
        rank, step, num_prefill, num_decode = self._rank, batch.step, len(batch.chunks), len(batch.decode_rows)
        if num_prefill:
            events.runner_prepare_prefill.log(logger, rank=rank, step=step, kind="PREFILL", num_seqs=num_prefill)
        if num_decode:
            events.runner_prepare_decode.log(logger, rank=rank, step=step, kind="DECODE", num_seqs=num_decode)

    def inputs(self, inputs: ModelInputs) -> None:
        if not self.is_detailed:
            return
        rank, step, attention = self._rank, self._step.number, inputs.attention
        prefill, decode = attention.prefill, attention.decode
        tensors = {"input_ids": inputs.input_ids, "positions": inputs.positions}
        if prefill is not None:
            tensors["slot_mapping"] = attention.slot_mapping
            events.runner_prefill_tensors.log(logger, rank=rank, step=step, shapes=shapes_of(tensors))
            events.runner_prefill_shape.log(
                logger,
                rank=rank,
                step=step,
                max_seqlen_q=prefill.max_seqlen_q,
                max_seqlen_k=prefill.max_seqlen_k,
                total_tokens=len(inputs.input_ids),
            )
        elif decode is not None:
            tensors |= {"context_lens": decode.context_lens, "block_tables": decode.block_tables}
            events.runner_decode_tensors.log(logger, rank=rank, step=step, shapes=shapes_of(tensors))

    def logits(self, logits: torch.Tensor) -> None:
        events.runner_output.log(logger, rank=self._rank, step=self._step.number, logits=list(logits.shape))
