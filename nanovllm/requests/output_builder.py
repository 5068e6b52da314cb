"""OutputBuilder: turns the tokens of sequences into the outputs that users see."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nanovllm.engine.batch import IntArray
from nanovllm.engine.sequence import Sequence, TokenLogprob
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.requests.detokenizer import decode
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NewTokens(NamedTuple):
    """Output tokens of a sequence, and their log-probabilities as in `CompletionOutput`; None if not requested."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None

    def extend(self, new: NewTokens) -> None:
        """Appends the tokens that follow."""
        self.token_ids.extend(new.token_ids)
        if self.logprobs is not None and new.logprobs is not None:
            self.logprobs.extend(new.logprobs)


class OutputBuilder:
    """Builds outputs. tokenizer: None if they have no text. with_logprobs: False leaves out log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, *, with_logprobs: bool = True) -> None:
        self.tokenizer = tokenizer
        self._with_logprobs = with_logprobs

    def completion(self, sequence: Sequence) -> CompletionOutput:
        """Returns the completion of a sequence that has ended."""
        assert sequence.finish_reason is not None, f"seq_id={sequence.seq_id} goes on"
        token_ids, logprobs = self.new_tokens(sequence, sequence.token_ids)
        stop_reason = _stop_reason(sequence)
        return CompletionOutput(
            index=0,
            text=self._text(sequence, stop_reason),
            token_ids=token_ids,
            finish_reason=sequence.finish_reason if stop_reason is None else "stop",
            logprobs=logprobs,
            cumulative_logprob=None if logprobs is None else sum(own.logprob for own in sequence.logprobs),
            stop_reason=stop_reason,
        )

    def request(self, sequence: Sequence, completion: CompletionOutput) -> RequestOutput:
        """Returns the output of a request with a single completion."""
        metrics = sequence.metrics()
        return RequestOutput(
            request_id=sequence.request_id,
            prompt=sequence.prompt,
            prompt_token_ids=sequence.prompt_token_ids,
            outputs=[completion],
            finished=True,
            num_cached_tokens=metrics.num_cached_tokens,
            metrics=metrics,
            prompt_logprobs=self._prompt_logprobs(sequence),
            error=sequence.error,
        )

    def _text(self, sequence: Sequence, reason: int | str | None) -> str:
        """Returns the text of an output; "" without a tokenizer, or with detokenize=False."""
        params = sequence.params
        if self.tokenizer is None or not params.detokenize:
            return ""
        if isinstance(reason, str) and sequence.stop_strings is not None:
            return sequence.stop_strings.text
        token_ids = sequence.output_token_ids.tolist()
        if sequence.finish_reason == "stop" and (reason is None or not params.include_stop_str_in_output):
            token_ids.pop()  # EOS, or the stop token
        return decode(self.tokenizer, token_ids, params.skip_special_tokens)

    def new_tokens(self, sequence: Sequence, token_ids: IntArray, start: int = 0) -> NewTokens:
        """Returns the output tokens from index `start` on. token_ids: the sequence's prompt and output."""
        new = token_ids[sequence.num_prompt_tokens + start :].tolist()
        return self.tokens(sequence.params, new, sequence.logprobs[start:])

    def tokens(self, params: SamplingParams, token_ids: list[int], scores: list[TokenLogprob]) -> NewTokens:
        """Returns output tokens with their log-probabilities `scores`, if `params` ask for them."""
        asked = self._with_logprobs and params.logprobs is not None
        return NewTokens(token_ids, self._logprobs(token_ids, scores) if asked else None)

    def _prompt_logprobs(self, sequence: Sequence) -> list[dict[int, Logprob] | None] | None:
        """Returns `RequestOutput.prompt_logprobs`. An aborted request has as many as were computed."""
        if not self._with_logprobs or sequence.params.prompt_logprobs is None:
            return None
        scores = sequence.prompt_logprobs
        return [None, *self._logprobs(sequence.prompt_token_ids[1 : len(scores) + 1], scores)]

    def _logprobs(self, token_ids: list[int], scores: list[TokenLogprob]) -> list[dict[int, Logprob]]:
        """Returns, for each token, its own log-probability first, then those of the most likely tokens."""
        rows: list[dict[int, Logprob]] = []
        for token_id, own in zip(token_ids, scores, strict=True):
            row = {token_id: Logprob(own.logprob, own.rank, self._token(token_id))}
            for rank, (top_id, logprob) in enumerate(zip(own.top_ids.tolist(), own.top.tolist(), strict=True), 1):
                if top_id != token_id:
                    row[top_id] = Logprob(logprob, rank, self._token(top_id))
            rows.append(row)
        return rows

    def _token(self, token_id: int) -> str | None:
        return None if self.tokenizer is None else str(self.tokenizer.decode([token_id]))


def _stop_reason(sequence: Sequence) -> int | str | None:
    """Returns the stop string or stop token that ended the sequence, or None.

    The detokenizer may have held back the text of the last tokens. A stop string in it is found here.
    """
    reason = sequence.stop_reason
    if sequence.stop_strings is None or isinstance(reason, str) or sequence.finish_reason == "abort":
        return reason
    found = sequence.stop_strings.end()
    return reason if found is None else found
