"""A server in a thread, whose model writes what a test says."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import uvicorn
from transformers import AutoTokenizer

from nanovllm import AsyncLLM, CompletionOutput, RequestOutput, SamplingParams
from nanovllm.outputs import FinishReason, Logprob
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.server.app import make_app
from nanovllm.server.service import Service
from nanovllm.server.settings import ServerSettings

TINY = Path(__file__).parents[2] / "nanovllm/assets/tiny-qwen3"
# Writes all that a conversation can have, so that tests can read what reaches the model.
TEMPLATE = """
{%- for tool in tools or [] %}[tool {{ tool.function.name }} {{ tool.function.parameters | tojson }}]{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{%- if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}
{%- if m.reasoning_content %} think:{{ m.reasoning_content }}{% endif %}
{%- if m.content %} {{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %} call:{{ c.id }}:{{ c.function.name }}:{{ c.function.arguments | tojson }}{% endfor %}
{%- if not loop.last or add_generation_prompt %}<|im_end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


class ScriptedEngine:
    """Stands for an AsyncLLM that answers each request with `text`, three characters an output."""

    is_dead = False
    resolved = SimpleNamespace(max_model_len=4096, max_num_seqs=8, vocab_size=512)

    def __init__(self) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(TINY)
        self._tokenizer.chat_template = TEMPLATE
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.reset()

    def reset(self) -> None:
        """Forgets the script of the test before."""
        self.text = ""
        self.finish_reason: FinishReason = "stop"
        self.stop_reason: str | None = None
        self.error: Exception | None = None  # raised after the first output

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams()

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, client_request_id: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        text = str(prompt)
        self.prompts.append(text)
        self.params.append(params)
        size = 3 if params.output_kind is RequestOutputKind.DELTA else len(self.text) or 1
        pieces = [self.text[at : at + size] for at in range(0, len(self.text), size)] or [""]
        for number, piece in enumerate(pieces):
            if number and self.error is not None:
                raise self.error
            is_last = number == len(pieces) - 1
            completion = CompletionOutput(
                index=0,
                text=piece,
                token_ids=[1] * len(piece),
                finish_reason=self.finish_reason if is_last else None,
                logprobs=None if params.logprobs is None else [{1: Logprob(-0.5, 1, each)} for each in piece],
                stop_reason=self.stop_reason if is_last else None,
            )
            yield RequestOutput(
                request_id=request_id,
                prompt=text,
                prompt_token_ids=[1] * 20,
                outputs=[completion],
                finished=is_last,
                num_cached_tokens=16,
                metrics=None,
            )


def scripted_service(engine: ScriptedEngine, **settings: Any) -> Service:
    return Service(ServerSettings(served_model_name=("scripted",), **settings), cast(AsyncLLM, engine))


@contextmanager
def live_server(service: Service) -> Iterator[str]:
    """Serves `service` at a free port of the loopback interface. Yields the URL."""
    config = uvicorn.Config(make_app(service), host="127.0.0.1", port=0, log_config=None)
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def start(*arguments: Any, **options: Any) -> None:
        await startup(*arguments, **options)
        started.set()

    server.startup = start  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
