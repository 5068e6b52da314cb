"""Sampler: draws a token for each row from its logits, and computes log-probabilities if a row asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanovllm.engine.batch import StepNeeds
from nanovllm.errors import OutOfMemoryError
from nanovllm.kernels.logit_edits import edit_logits
from nanovllm.kernels.logprobs import SampledTokens, TokenLogprobs, token_logprobs
from nanovllm.kernels.sample import best_candidates, sample, sample_candidates
from nanovllm.kernels.truncate import keep_thresholds
from nanovllm.layers.parallel import TensorParallel
from nanovllm.runner.device_rows import DeviceRows
from nanovllm.utils.device_memory import GB

_PROMPT_LOGPROB_TOKENS = 256  # prompt tokens whose logits are in memory at a time


class Sampler:
    """Edits logits, truncates the distribution and draws, with the parameters of each row in `DeviceRows`.

    Every rank draws the same tokens. Runs inside a captured graph: it launches the same kernels for the same
    `StepNeeds`, and never waits for the device. first_token: the first token of this rank's share of the vocabulary.
    """

    def __init__(self, parallel: TensorParallel, first_token: int) -> None:
        self._parallel = parallel
        self._first_token = first_token

    def takes_all_logits(self, needs: StepNeeds) -> bool:
        """Returns whether `__call__` takes logits of the whole vocabulary, or of this rank's share of it."""
        return self._parallel.size == 1 or needs.all_logits

    def __call__(
        self, logits: torch.Tensor, rows: torch.Tensor, device_rows: DeviceRows, needs: StepNeeds
    ) -> SampledTokens:
        """Draws a token for each of `rows` [num_rows] int32 from logits [num_rows, vocab_size or this rank's share]."""
        state = (device_rows.temperatures, device_rows.seeds, device_rows.lengths, rows)
        if not self.takes_all_logits(needs):  # gathers the best token of each rank, not its logits
            candidates = sample_candidates(logits, *state, first_token=self._first_token)
            return SampledTokens(best_candidates(self._parallel.all_gather(candidates)))
        edited = _edited(logits, rows, device_rows) if needs.edits_logits else logits
        thresholds = None
        if needs.truncates:
            thresholds = keep_thresholds(edited, device_rows.temperatures, device_rows.truncations, rows)
        token_ids = sample(edited, *state, thresholds)
        if needs.num_logprobs is None:
            return SampledTokens(token_ids)
        return SampledTokens(token_ids, token_logprobs(logits, token_ids, needs.num_logprobs))


def _edited(logits: torch.Tensor, rows: torch.Tensor, device_rows: DeviceRows) -> torch.Tensor:
    """Returns the logits after penalties, biases, bans and masks, [num_rows, vocab_size] float32."""
    try:
        return edit_logits(logits, rows, device_rows.token_ids, device_rows.lengths, device_rows.logit_edits)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"Penalties, biases, bans and masks need {logits.numel() * 4 / GB:.2f} GB and more for {len(rows)} "
            f"rows, which {logits.device} does not have left: {error} Lower gpu_memory_utilization, max_num_seqs."
        ) from error


def prompt_logprobs(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    num_top: int,
) -> TokenLogprobs:
    """Returns the log-probabilities of `token_ids` [num_tokens].

    hidden: the state before each of the tokens, [num_tokens, hidden_size]. Logits are computed for a few tokens at a
    time, since those of a whole prompt would not fit in memory.
    """
    parts = zip(hidden.split(_PROMPT_LOGPROB_TOKENS), token_ids.split(_PROMPT_LOGPROB_TOKENS), strict=True)
    return TokenLogprobs.join(token_logprobs(compute_logits(states), ids, num_top) for states, ids in parts)
