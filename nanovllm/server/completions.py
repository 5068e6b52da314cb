"""POST /v1/completions: continues one or several prompts."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.server.errors import fields_named, invalid
from nanovllm.server.exchange import Exchange, exchange_of
from nanovllm.server.logprobs import CompletionRows, prompt_logprobs
from nanovllm.server.merging import merged
from nanovllm.server.protocol.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from nanovllm.server.protocol.errors import RESPONSES
from nanovllm.server.responses import DONE, TextEvents, event, json_answer, stream_answer
from nanovllm.server.sampling import check_request, given_names, make_params
from nanovllm.server.service import Service, service_of
from nanovllm.server.usage import UsageCount

router = APIRouter(responses=RESPONSES)

_MAX_TOKENS = 16  # OpenAI's default


@router.post("/v1/completions", responses={200: {"model": Completion}})
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continues one or several prompts."""
    with fields_named({**given_names(body), "prompt_token_ids": "prompt"}):
        run = _CompletionRun(service_of(request), exchange_of(request), body)
        return await (stream_answer(request, run.events()) if body.stream else json_answer(request, run.answer()))


class _CompletionRun:
    """One request, and the prompts that it continues. Raises ApiError or InvalidArgumentError if it is not allowed."""

    def __init__(self, service: Service, exchange: Exchange, body: CompletionRequest) -> None:
        check_request(service, body, "/v1/completions")
        self._service, self._exchange, self._body = service, exchange, body
        self._prompts = _prompts(body)
        # With echo, 0 tokens are allowed: one is generated, and not shown.
        self._shows_output = not (body.echo and body.max_tokens == 0)
        max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
        self._params = make_params(
            service, body, max_tokens=max_tokens if self._shows_output else 1, logprobs=body.logprobs
        )
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            self._params.prompt_logprobs = body.logprobs
        if self._params.prompt_logprobs is not None:  # they are known at the end
            self._params.output_kind = RequestOutputKind.FINAL_ONLY
        service.admit(exchange, len(self._prompts) * self._params.n)
        self._id, self._created = exchange.name("cmpl"), int(time.time())
        self._count = UsageCount(exchange)
        # Whether the chunks of a choice differ in their text alone, until it ends.
        self._has_text_alone = body.logprobs is None and not (
            body.echo or body.return_token_ids or body.wants_continuous_usage
        )
        self._rows: dict[int, CompletionRows] = {}  # by the index of the choice; those that have begun

    async def answer(self) -> Completion:
        choices: list[CompletionChoice] = []
        async with aclosing(self._outputs()) as outputs:
            async for number, output in outputs:
                self._count.add(output)
                choices += [self._choice(number, output, each) for each in output.outputs]
        choices.sort(key=lambda choice: choice["index"])
        return {**self._chunk(choices), "usage": self._count.usage}

    async def events(self) -> AsyncGenerator[bytes, None]:
        body, texts = self._body, TextEvents("text")
        async with aclosing(self._outputs()) as outputs:
            async for number, output in outputs:
                self._count.add(output)
                first = output.outputs[0]
                if self._has_text_alone and len(output.outputs) == 1 and first.finish_reason is None:
                    index = self._index(number, first)
                    yield texts.event(index, first.text, partial(self._output_chunk, number, output))
                else:
                    yield event(self._output_chunk(number, output))
        if body.wants_usage:
            yield event({**self._chunk([]), "usage": self._count.usage})
        yield DONE

    def _outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        ids = (
            [self._id] if len(self._prompts) == 1 else [f"{self._id}-{number}" for number in range(len(self._prompts))]
        )
        each = zip(self._prompts, ids, strict=True)
        return merged([self._service.generate(self._exchange, prompt, self._params, name) for prompt, name in each])

    def _output_chunk(self, number: int, output: RequestOutput) -> Completion:
        """Returns the chunk with what is new in an output. number: of the prompt."""
        chunk = self._chunk([self._choice(number, output, each) for each in output.outputs])
        if self._body.wants_continuous_usage:
            chunk["usage"] = self._count.usage
        return chunk

    def _index(self, number: int, completion: CompletionOutput) -> int:
        """Returns the index of a completion's choice. number: of the prompt."""
        return number * self._params.n + completion.index

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model,
            "choices": choices,
            "usage": None,
        }

    def _choice(self, number: int, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        """Returns a completion, or what is new in it. number: of the prompt."""
        body, index = self._body, self._index(number, completion)
        begins = index not in self._rows
        if begins:
            self._rows[index] = CompletionRows(bool(body.return_tokens_as_token_ids))
        text = completion.text if self._shows_output else ""
        if begins and body.echo:
            text = self._prompt_text(output) + text
        choice: CompletionChoice = {
            "index": index,
            "text": text,
            "logprobs": None if body.logprobs is None else self._logprobs(output, completion, index, begins),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if body.prompt_logprobs is not None and begins:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
        if body.return_token_ids:
            choice["token_ids"] = completion.token_ids if self._shows_output else []
            if begins:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _logprobs(
        self, output: RequestOutput, completion: CompletionOutput, index: int, begins: bool
    ) -> CompletionLogprobs:
        prompt = (output.prompt_logprobs or []) if self._body.echo and begins else []
        rows = (completion.logprobs or []) if self._shows_output else []
        return self._rows[index].add([*prompt, *rows], self._first_text(output) if prompt else "")

    def _first_text(self, output: RequestOutput) -> str:
        """Returns the text of a prompt's first token, which has no log-probability."""
        token_id = output.prompt_token_ids[0]
        as_id = self._body.return_tokens_as_token_ids
        return f"token_id:{token_id}" if as_id else str(self._service.tokenizer.decode([token_id]))

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return str(self._service.tokenizer.decode(output.prompt_token_ids))


def _prompts(body: CompletionRequest) -> list[Prompt]:
    """Returns the prompts of a request, in order."""
    given = body.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts:
        raise invalid("prompt", "prompt must have at least one text or token.")
    special = body.add_special_tokens is not False
    salt = {} if body.cache_salt is None else {"cache_salt": body.cache_salt}
    return [_prompt(each, special, salt) for each in prompts]


def _prompt(given: Prompt, add_special_tokens: bool, salt: dict[str, str]) -> Prompt:
    prompt = Service.text_prompt(given, add_special_tokens) if isinstance(given, str) else given
    if not salt:
        return prompt
    return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, **salt}
