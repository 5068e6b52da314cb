"""Feed: queues the prompts of a `generate` or `stream`, the later ones while the engine computes the first.

    feed = Feed(engine, call, numbers, prompts, sampling_params)
    while feed.num_left or call.request_ids:
        refused = feed.advance()
        ended = engine.next_outputs(call)

A call with a hundred thousand prompts has its first output long before the last prompt is tokenised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.turns import Call
from nanovllm.errors import InvalidArgumentError
from nanovllm.outputs import RequestOutput, failed_output
from nanovllm.requests.batch_arguments import Params, Prompts, params_for_each

_PORTIONS = 16  # in which the prompts of a later step are queued: each takes less time than a step


class Feed:
    """The prompts of `call`, in order. All count as arrived now, whenever they are queued.

    numbers: those at the end of the request ids. A prompt may be an error: then it is refused.
    Raises InvalidArgumentError for `sampling_params` that are neither one for all nor one for each.
    """

    def __init__(
        self, engine: LLMEngine, call: Call, numbers: Iterator[int], prompts: Prompts, sampling_params: Params
    ) -> None:
        self.num_left, self.names = len(prompts), [f"generate-{next(numbers)}" for _ in prompts]
        self._engine, self._call, self._arrival = engine, call, engine.clock()
        self._requests = zip(self.names, prompts, params_for_each(sampling_params, len(prompts)), strict=True)
        self._waiting: deque[Sequence] = deque()  # of what is queued
        self._num_waiting_tokens = 0
        # Prompts of two steps: then each step can be full. More would only delay the first one.
        self._enough = 2 * engine.resolved.max_num_batched_tokens
        self._portion = engine.resolved.max_num_batched_tokens // _PORTIONS
        self._first_error: InvalidArgumentError | None = None

    def advance(self) -> list[RequestOutput]:
        """Queues prompts of this call: as many as the next step takes, and a portion of those of the step after it.

        Returns the outputs of the refused ones. Raises the first error if all prompts of the call are refused.
        """
        engine, call = self._engine, self._call
        refused: list[RequestOutput] = []
        waiting = self._waiting
        while waiting and waiting[0].status is not SequenceStatus.WAITING:
            self._num_waiting_tokens -= waiting.popleft().num_prompt_tokens
        is_first = not call.num_prompt_tokens
        if not waiting and not is_first:  # steps take more: prefixes are cached
            self._enough *= 2
        missing = self._enough - self._num_waiting_tokens
        room = missing if is_first else max(missing - self._enough // 2, min(missing, self._portion))
        while self.num_left and room > 0:
            request_id, prompt, params = next(self._requests)
            self.num_left -= 1
            try:
                if isinstance(prompt, InvalidArgumentError):
                    raise prompt
                request = engine.prepare(prompt, params)
            except InvalidArgumentError as error:
                engine.refuse_request(request_id, error)
                refused.append(failed_output(request_id, error, prompt=prompt if isinstance(prompt, str) else None))
                self._first_error = self._first_error or error
                continue
            call.num_prompt_tokens += len(request.token_ids)
            call.request_ids[request_id] = None  # before it is queued, so that Ctrl-C leaves no request without a call
            sequences = engine.enqueue(request_id, request, self._arrival)
            waiting.append(sequences[0])
            self._num_waiting_tokens += len(request.token_ids)
            room -= len(request.token_ids)
            call.queued(request_id, sequences)
        if self._first_error is not None and not self.num_left and not call.num_prompt_tokens:
            raise self._first_error
        return refused
