"""OutputStream: builds the outputs of a request while it runs, for `LLM.stream` and `AsyncLLM.generate`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.turns import Call
from nanovllm.errors import InvalidArgumentError
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.requests.detokenizer import Detokenizer, StopStrings
from nanovllm.requests.output_builder import NewTokens
from nanovllm.requests.stop_search import StopMatcher
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

News = dict[int, NewTokens]  # the new tokens of a request, by the index of the completion


def extend_news(news: News, newer: News) -> None:
    """Appends `newer` to `news`."""
    for index, tokens in newer.items():
        if index in news:
            news[index].extend(tokens)
        else:
            news[index] = tokens


def kind_of(delta: bool | None, params: SamplingParams | None) -> RequestOutputKind:
    """Returns the kind that `delta` means. Raises InvalidArgumentError if `params` ask for another one."""
    if delta is not None and not isinstance(delta, bool):
        raise InvalidArgumentError("delta", delta, "True, False, or None for what output_kind says")
    asked = params.output_kind if isinstance(params, SamplingParams) else None
    if delta is not None and asked is not None and delta != (asked is RequestOutputKind.DELTA):
        raise InvalidArgumentError("delta", delta, f"left out, or what output_kind={asked.name} says")
    return RequestOutputKind.DELTA if delta else RequestOutputKind.CUMULATIVE


class OutputStream:
    """The outputs of one request, from its first token to its end.

    `grow` and `end` decode the text, once for all tokens since the previous output. `LLM.stream` finds new tokens with
    `read`, which the thread that runs the steps calls.

    tokenizer: None if outputs have no text. sequences: the request's, as `LLMEngine.enqueue` returns them.
    default_kind: what outputs hold if the request's `output_kind` is None. DELTA outputs hold the completions that have
    new tokens, and of them only what is new.
    Text that was shown never changes: an incomplete character is held back, and so is text that may begin a stop
    string. A completion that ends before the others of its request gets its finish_reason in the last output.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        request_id: str,
        sequences: list[Sequence],
        default_kind: RequestOutputKind,
    ) -> None:
        self._request_id = request_id
        self._kind = sequences[0].params.output_kind or default_kind
        self._delta = self._kind is RequestOutputKind.DELTA
        self._sequences = sequences
        for sequence in sequences:
            sequence.streamed = True
        self._completions = [_CompletionStream(tokenizer, *each, self._delta) for each in enumerate(sequences)]

    def read(self, new_tokens: Callable[[Sequence, int], NewTokens]) -> News | None:
        """Returns the tokens since the last call, or None when there are none.

        new_tokens: returns the output tokens of a sequence from an index on.
        """
        if self._kind is RequestOutputKind.FINAL_ONLY:
            return None
        completions = enumerate(self._completions)
        return {index: new for index, each in completions if (new := each.read(new_tokens)) is not None} or None

    def grow(self, news: News) -> RequestOutput:
        """Returns the next output, which includes `news`."""
        wanted = sorted(news) if self._delta else range(len(self._completions))
        first = self._sequences[0]
        return RequestOutput(
            request_id=self._request_id,
            prompt=first.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[self._completions[index].grow(news.get(index)) for index in wanted],
            finished=False,
            num_cached_tokens=first.num_cached_tokens or 0,
            metrics=None,
        )

    def end(self, final: RequestOutput) -> RequestOutput:
        """Returns the last output. final: the output that the engine returned when the request ended."""
        if not self._delta:
            return final
        streams = zip(self._completions, final.outputs, strict=True)
        return replace(final, outputs=[each.end(completion) for each, completion in streams])


class StreamCall(Call):
    """One `LLM.stream`: its streams, and the tokens that steps brought, whichever thread ran them."""

    def __init__(self, engine: LLMEngine) -> None:
        super().__init__()
        self._engine = engine
        self._streams: dict[str, OutputStream] = {}
        self._news: deque[tuple[str, News]] = deque()  # of each step

    def queued(self, request_id: str, sequences: list[Sequence]) -> None:
        self._streams[request_id] = OutputStream(self._engine.tokenizer, request_id, sequences, RequestOutputKind.DELTA)

    def step_ended(self) -> None:
        for request_id, stream in list(self._streams.items()):
            new = stream.read(self._engine.new_tokens)
            if new is not None:
                self._news.append((request_id, new))

    def outputs(self, ended: Iterable[RequestOutput]) -> list[RequestOutput]:
        """Returns the new outputs, first those of the requests in `ended`, which ends their streams."""
        outputs = [self._streams.pop(output.request_id).end(output) for output in ended]
        grown: dict[str, News] = {}
        while self._news:
            request_id, new = self._news.popleft()
            extend_news(grown.setdefault(request_id, {}), new)
        return outputs + [self._streams[name].grow(new) for name, new in grown.items() if name in self._streams]


class _CompletionStream:
    """The outputs of one completion."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, index: int, sequence: Sequence, delta: bool) -> None:
        params = sequence.params
        self._index, self._sequence, self._delta = index, sequence, delta
        self._num_read = 0
        has_text = tokenizer is not None and params.detokenize
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens) if has_text else None
        stop = sequence.stop_strings
        cuts_stop = not params.include_stop_str_in_output
        self._stop = StopMatcher(stop.search) if isinstance(stop, StopStrings) and cuts_stop else None
        self._tokens = NewTokens([], None if params.logprobs is None else [])  # all tokens that `grow` was given
        self._text = ""  # their text
        self._num_shown = 0  # characters of it that outputs may show
        self._logprob = 0.0  # the sum of their log-probabilities

    def read(self, new_tokens: Callable[[Sequence, int], NewTokens]) -> NewTokens | None:
        if self._sequence.finish_reason is not None:  # left to `end`: the last token may not be part of the text
            return None
        new = new_tokens(self._sequence, self._num_read)
        self._num_read += len(new.token_ids)
        return new if new.token_ids else None

    def grow(self, new: NewTokens | None) -> CompletionOutput:
        start = self._num_shown
        if new is not None:
            self._take(new)
        shown = new if self._delta and new is not None else self._tokens
        return CompletionOutput(
            index=self._index,
            text=self._text[start if self._delta else 0 : self._num_shown],
            token_ids=list(shown.token_ids),
            finish_reason=None,
            logprobs=None if shown.logprobs is None else list(shown.logprobs),
            cumulative_logprob=None if shown.logprobs is None else self._logprob,
        )

    def _take(self, new: NewTokens) -> None:
        if self._detokenizer is not None:
            text = self._detokenizer.add(*new.token_ids)
            self._text += text
            if self._stop is not None:
                self._stop.add(text)
        self._tokens.extend(new)
        if new.logprobs is not None:
            rows = zip(new.token_ids, new.logprobs, strict=True)
            self._logprob += sum(row[token_id].logprob for token_id, row in rows)
        self._num_shown = len(self._text) - (0 if self._stop is None else self._stop.num_held)

    def end(self, completion: CompletionOutput) -> CompletionOutput:
        num_tokens = len(self._tokens.token_ids)
        scores = completion.logprobs
        return replace(
            completion,
            text=completion.text[self._num_shown :],
            token_ids=completion.token_ids[num_tokens:],
            logprobs=None if scores is None else scores[num_tokens:],
        )
