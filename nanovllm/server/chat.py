"""ChatRun: generates the next message of a conversation, and takes it apart. All chat endpoints use it.

    run = await ChatRun.start(service, exchange, body, "chatcmpl", "/v1/chat/completions")
    async for update in run.updates():
        for choice in update:
            ...  # choice.deltas: what is new in the message

The families /v1/messages and /v1/responses turn their requests into a ChatCompletionRequest, and updates into their
own events.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.requests.chat import ChatOptions
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanovllm.server.errors import invalid
from nanovllm.server.exchange import Exchange
from nanovllm.server.parsers import REASONING_PARSERS, TOOL_PARSERS
from nanovllm.server.parsing import Chain, Delta, PlainText, TextParser
from nanovllm.server.protocol.base import FinishReason
from nanovllm.server.protocol.chat import ChatCompletionRequest, ChatMessage, NamedTool
from nanovllm.server.sampling import check_request, make_params
from nanovllm.server.service import Service
from nanovllm.server.tool_choice import forced_parser, forced_schema
from nanovllm.server.tool_parsers.tool_parser import ToolParser
from nanovllm.server.usage import UsageCount


@dataclass(frozen=True)
class ChoiceUpdate:
    """What is new in one completion. finish_reason: in its last update."""

    index: int
    deltas: list[Delta]
    completion: CompletionOutput  # its tokens and log-probabilities
    finish_reason: FinishReason | None

    @property
    def text_alone(self) -> str:
        """The text that is new in a message's content, if nothing else is; otherwise ""."""
        if len(self.deltas) != 1 or self.finish_reason is not None or self.completion.logprobs:
            return ""
        return self.deltas[0].content


class ChatRun:
    """A request that runs. `usage` counts its tokens; `prompt_output` is the newest output of the engine."""

    def __init__(
        self,
        service: Service,
        exchange: Exchange,
        body: ChatCompletionRequest,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
    ) -> None:
        self.service, self.body, self.params, self.request_id = service, body, params, request_id
        self.usage = UsageCount(exchange)
        self.prompt_output: RequestOutput | None = None
        self._exchange, self._prompt = exchange, prompt
        self._parsers: dict[int, TextParser] = {}  # by index
        self._has_called: set[int] = set()  # completions with a tool call

    @classmethod
    async def start(
        cls, service: Service, exchange: Exchange, body: ChatCompletionRequest, id_prefix: str, endpoint: str
    ) -> ChatRun:
        """Returns the run of a request. Raises ApiError or InvalidArgumentError if it is not allowed.

        id_prefix: of the answer's id. endpoint: its path, for the log.
        """
        check_request(service, body, endpoint)
        _check_tools(service, body)
        given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "top_logprobs is for requests with logprobs=true.")
        params = make_params(service, body, max_tokens=given, logprobs=top)
        if is_forced(body):
            params.structured_outputs = forced_schema(body)
        tool_parser = _tool_parser(service, body)
        if tool_parser is not None and tool_parser.needs_special_tokens:
            params.skip_special_tokens = False
        if params.prompt_logprobs is not None:  # they are known at the end
            params.output_kind = RequestOutputKind.FINAL_ONLY
        service.admit(exchange, params.n)
        prompt = await render(service, body)
        salted = prompt if body.cache_salt is None else {"prompt": prompt, "cache_salt": body.cache_salt}
        run = cls(service, exchange, body, salted, params, exchange.name(id_prefix))
        run._parsers = {index: run._make_parser(prompt) for index in range(params.n)}
        return run

    async def updates(self) -> AsyncGenerator[list[ChoiceUpdate], None]:
        """Yields what is new. Closing the generator aborts the request."""
        generate = self.service.generate
        async with aclosing(generate(self._exchange, self._prompt, self.params, self.request_id)) as outputs:
            async for output in outputs:
                self.usage.add(output)
                self.prompt_output = output
                yield [self._update(each) for each in output.outputs]

    def _update(self, completion: CompletionOutput) -> ChoiceUpdate:
        index, parser = completion.index, self._parsers[completion.index]
        deltas = parser.feed(completion.text) if completion.text else []
        if completion.finish_reason is not None:
            deltas = deltas + parser.finish()
        if self.body.include_reasoning is False:
            deltas = [each for each in deltas if not each.reasoning]
        if self.body.parallel_tool_calls is False:
            deltas = [each for each in deltas if each.tool_call is None or each.tool_call.index == 0]
        if any(each.tool_call is not None for each in deltas):
            self._has_called.add(index)
        reason: FinishReason | None = completion.finish_reason
        if reason == "stop" and index in self._has_called and not isinstance(self.body.tool_choice, NamedTool):
            reason = "tool_calls"
        return ChoiceUpdate(index, deltas, completion, reason)

    def _make_parser(self, prompt: str) -> TextParser:
        body, settings = self.body, self.service.settings
        if is_forced(body):
            return forced_parser(body)
        wanted = self.params.structured_outputs
        if isinstance(wanted, StructuredOutputsParams) and wanted.structural_tag is None:
            return PlainText()  # all of the text is what was asked for
        tool_parser = _tool_parser(self.service, body)
        calls = PlainText() if tool_parser is None else tool_parser()
        if settings.reasoning_parser is None:
            return calls
        return Chain(REASONING_PARSERS[settings.reasoning_parser](prompt, _continued(body)), calls)


def chat_request(body: Mapping[str, Any]) -> ChatCompletionRequest:
    """Returns the request with this body. Raises RequestValidationError if a field is not of its type."""
    try:
        return ChatCompletionRequest.model_validate(body)
    except ValidationError as error:
        problems = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(problems) from None


async def render(service: Service, body: ChatCompletionRequest) -> str:
    """Returns the prompt of a request. Raises ApiError or InvalidArgumentError if it is not allowed."""
    variables = {**(service.settings.default_chat_template_kwargs or {}), **(body.chat_template_kwargs or {})}
    if body.documents is not None:
        variables["documents"] = [dict(each) for each in body.documents]
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    continues = bool(body.continue_final_message)
    options = ChatOptions(
        chat_template=body.chat_template,
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        tools=None if body.tool_choice == "none" else tools_of(body) or None,
        chat_template_kwargs=variables,
    )
    messages = [_message(each) for each in body.messages]
    return await service.render_chat(messages, options, bool(body.add_special_tokens))


def tools_of(body: ChatCompletionRequest) -> list[dict[str, Any]]:
    """Returns the tools of a request as JSON."""
    return [tool.model_dump(exclude_none=True) for tool in body.tools or ()]


def is_forced(body: ChatCompletionRequest) -> bool:
    """Whether the model must call a tool."""
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def _tool_parser(service: Service, body: ChatCompletionRequest) -> type[ToolParser] | None:
    """Returns the parser of a request whose model decides whether it calls a tool."""
    name = service.settings.tool_call_parser
    if name is None or not body.tools or body.tool_choice == "none" or is_forced(body):
        return None
    return TOOL_PARSERS[name]


def _continued(body: ChatCompletionRequest) -> str:
    """Returns the text of the message that the model continues, "" if it begins one."""
    content = body.messages[-1].content if body.continue_final_message else None
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else part.text or "" for part in content)
    return content or ""


def _check_tools(service: Service, body: ChatCompletionRequest) -> None:
    settings = service.settings
    if is_forced(body):
        names = [tool.function.name for tool in body.tools or ()]
        if not names:
            raise invalid("tools", "tools must have at least one tool with this tool_choice.")
        if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
            raise invalid("tool_choice.function.name", "tool_choice must name one of the tools.")
        for index, tool in enumerate(body.tools or ()):
            if (tool.function.parameters or {}).get("type", "object") != "object":
                raise invalid(f"tools.{index}.function.parameters", "parameters must be a schema of type 'object'.")
        return
    may_choose = settings.enable_auto_tool_choice and settings.tool_call_parser is not None
    if not may_choose and (body.tool_choice == "auto" or (body.tool_choice is None and body.tools)):
        message = "tool_choice 'auto' needs a server with --enable-auto-tool-choice and --tool-call-parser."
        raise invalid("tool_choice", f"{message} 'required' and 'none' work without.")


def _message(message: ChatMessage) -> Mapping[str, Any]:
    """Returns a message as templates read it."""
    given = message.model_dump(exclude_none=True)
    if message.role == "developer":  # OpenAI's newer name of the role
        given["role"] = "system"
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:
        given |= {"reasoning": reasoning, "reasoning_content": reasoning}
    for call in given.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"].get("arguments"))
    return given


def _arguments(given: Any) -> Any:
    """Returns the arguments of a call as an object, which templates expect. Text that is not JSON stays as it is."""
    try:
        return json.loads(given or "{}") if not isinstance(given, Mapping) else given
    except (ValueError, RecursionError):
        return given
