"""Outputs that grow: what `LLM.stream` and `AsyncLLM.generate` show of a request while it runs."""

from __future__ import annotations

from dataclasses import replace

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.tokenizing import NewTokens
from nanovllm.errors import InvalidArgumentError, StepFailedError
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams


def check_streamable(params: SamplingParams | None) -> None:
    """Raises InvalidArgumentError for what can not be shown while it grows."""
    if isinstance(params, SamplingParams) and params.n > 1:
        hint = "Stream n requests with seeds of their own: they share the prompt's blocks."
        raise InvalidArgumentError("n", params.n, "1 in a stream", hint)


class OutputStream:
    """One request's outputs, from its first token to its end.

    `read` belongs to whoever runs the steps; `grow` and `end` to whoever wants outputs, in another thread if need be:
    text is made there, once for all tokens that came since the last output.

    delta: outputs hold what is new since the one before; else all there is so far. Either way, text that was shown
    never changes: half a character is held back, and so is what may turn out to begin a stop string.
    """

    def __init__(self, engine: LLMEngine, request_id: str, *, delta: bool) -> None:
        sequence = engine.sequence(request_id)
        assert sequence is not None, f"{request_id} has ended"
        params = sequence.params
        self._engine, self._sequence, self._delta = engine, sequence, delta
        self._num_read = 0
        has_text = engine.tokenizer is not None and params.detokenize
        self._detokenizer = Detokenizer(engine.tokenizer, params.skip_special_tokens) if has_text else None
        self._stop = () if params.include_stop_str_in_output else tuple(params.stop or ())
        self._text = ""  # of all tokens that `grow` had
        self._num_shown = 0  # characters of it
        self._tokens = NewTokens([], None if params.logprobs is None else [])  # all that `grow` had
        self._logprob = 0.0  # of them together

    def read(self) -> NewTokens | None:
        """Tokens since the last call; None when there are none. For after a step that did not end the request.

        Raises StepFailedError when a step of somebody else's failed, and the request is lost.
        """
        if self._engine.sequence(self._sequence.request_id) is not self._sequence:
            raise StepFailedError(f"A step failed: request {self._sequence.request_id!r} is lost.")
        new = self._engine.new_tokens(self._sequence, self._num_read)
        self._num_read += len(new.token_ids)
        return new if new.token_ids else None

    def grow(self, new: NewTokens) -> RequestOutput:
        """The output that `new` makes."""
        if self._detokenizer is not None:
            self._text += self._detokenizer.add(*new.token_ids)
        self._tokens.extend(new)
        if new.logprobs is not None:
            rows = zip(new.token_ids, new.logprobs, strict=True)
            self._logprob += sum(row[token_id].logprob for token_id, row in rows)
        start, self._num_shown = self._num_shown, len(self._text) - _num_held(self._text, self._stop)
        shown = new if self._delta else self._tokens
        completion = CompletionOutput(
            index=0,
            text=self._text[start if self._delta else 0 : self._num_shown],
            token_ids=list(shown.token_ids),
            finish_reason=None,
            logprobs=None if shown.logprobs is None else list(shown.logprobs),
            cumulative_logprob=None if shown.logprobs is None else self._logprob,
        )
        return RequestOutput(
            request_id=self._sequence.request_id,
            prompt=self._sequence.prompt,
            prompt_token_ids=self._sequence.prompt_token_ids,
            outputs=[completion],
            finished=False,
            num_cached_tokens=self._sequence.num_cached_tokens or 0,
            metrics=None,
        )

    def end(self, final: RequestOutput) -> RequestOutput:
        """The last output, from what the engine gave when the request ended."""
        if not self._delta:
            return final
        (completion,) = final.outputs
        num_tokens = len(self._tokens.token_ids)
        scores = completion.logprobs
        rest = replace(
            completion,
            text=completion.text[self._num_shown :],
            token_ids=completion.token_ids[num_tokens:],
            logprobs=None if scores is None else scores[num_tokens:],
        )
        return replace(final, outputs=[rest])


def _num_held(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may begin a stop string."""
    longest = min(max(map(len, stop), default=1) - 1, len(text))
    for size in range(longest, 0, -1):
        if any(string.startswith(text[-size:]) for string in stop):
            return size
    return 0
