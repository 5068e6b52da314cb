"""ServerSettings: the options of `nanovllm serve` that are not the engine's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidArgumentError, NanoVLLMError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.parsers import REASONING_PARSERS, TOOL_PARSERS
from nanovllm.utils.arguments import (
    COUNT,
    SWITCH,
    Rule,
    argument,
    check_arguments,
    choice,
    is_integer,
    is_number,
    lists_arguments,
)

_TEXT = Rule("a text", lambda value: isinstance(value, str) and value != "")
_TEXTS = Rule(
    "a list of texts, none of them empty",
    lambda value: isinstance(value, (list, tuple)) and all(isinstance(each, str) and each for each in value),
    tuple,
)
_PORT = Rule("an integer from 0 (any free port) to 65535", lambda value: is_integer(value) and 0 <= value <= 65535, int)
_SECONDS = Rule("a number of seconds ≥ 0", lambda value: is_number(value) and 0 <= value < float("inf"), float)
_ROOT_PATH = Rule(
    "a path such as /llm", lambda value: isinstance(value, str) and (value == "" or value.startswith("/"))
)


_OVERRIDABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _accepts_overrides(value: object) -> bool:
    if not isinstance(value, Mapping) or not value.keys() <= set(_OVERRIDABLE):
        return False
    try:
        SamplingParams(**value)
    except NanoVLLMError:
        return False
    return True


def _is_template(value: object) -> bool:
    return isinstance(value, str) and ("{" in value or os.path.isfile(value))


def _read_template(value: str) -> str:
    return value if "{" in value else Path(value).read_text("utf-8")


def _name_in(table: Mapping[str, object]) -> Rule:
    return choice(*table).or_none()


@lists_arguments
@dataclass(frozen=True)
class ServerSettings:
    """How the server listens, whom it answers, and within which limits.

    Raises InvalidArgumentError, which names the field, for a value that is not allowed.
    """

    host: str = argument("127.0.0.1", _TEXT, "Address to listen on. 0.0.0.0: all interfaces.")
    port: int = argument(8000, _PORT, "Port to listen on.")
    uds: str | None = argument(None, _TEXT.or_none(), "Path of a Unix domain socket to listen on instead.")
    api_server_count: int = argument(
        1, COUNT, "Number of processes that answer HTTP requests, all with the same engine. See docs/serving.md."
    )
    ssl_keyfile: str | None = argument(None, _TEXT.or_none(), "Key file of the TLS certificate.")
    ssl_certfile: str | None = argument(None, _TEXT.or_none(), "File of the TLS certificate.")
    root_path: str = argument("", _ROOT_PATH, "Path under which a reverse proxy serves the API.")
    data_parallel_size: int = argument(
        1,
        COUNT,
        "Number of engines that share the requests, each with its own process, copy of the model and GPUs, or share of "
        "the CPU's cores. One that dies is started again.",
    )
    served_model_name: tuple[str, ...] = argument(
        (), _TEXTS, "Names of the model in the API; answers have the first. None given: the argument `model`."
    )
    api_key: tuple[str, ...] = argument(
        (), _TEXTS, "Keys, of which a request needs one, except for /, /health and /ping. See also NANOVLLM_API_KEY."
    )
    cors_origin: tuple[str, ...] = argument(
        (), _TEXTS, "Origins whose web pages may use the API; `*` for all. None given: no other origin may."
    )
    max_queue: int | None = argument(
        None,
        Rule("an integer ≥ 0", lambda value: is_integer(value) and value >= 0, int).or_none(" for no limit"),
        "Completions that may wait beyond the max_num_seqs that run. A request above that gets status 429.",
    )
    max_body: int = argument(
        32, COUNT, "Largest body of a request, in MB (10⁶ bytes). A request above that gets status 413."
    )
    drain_timeout: float = argument(
        30.0, _SECONDS, "Seconds that running requests have to end after SIGTERM. Then they are aborted."
    )
    dev: bool = argument(
        False, SWITCH, "Serve /abort, /reset_prefix_cache, /start_profile and /stop_profile, for development."
    )
    exit_on_death: bool = argument(
        False, SWITCH, "End the process, with status 1, when the engine has died. Otherwise requests get status 500."
    )
    generation_config: str = argument(
        "auto",
        choice("auto", "vllm"),
        "Default sampling parameters of requests. 'auto': those of the checkpoint's generation_config.json. 'vllm': "
        "those of the OpenAI API.",
    )
    override_generation_config: Mapping[str, Any] | None = argument(
        None,
        Rule(f"an object with values of {', '.join(_OVERRIDABLE)}", _accepts_overrides).or_none(),
        "Default sampling parameters of requests, before those of generation_config.",
        hash=False,
    )
    chat_template: str | None = argument(
        None,
        Rule("a file with a Jinja template, or a template", _is_template, _read_template).or_none(),
        "Chat template of requests without one. None: the checkpoint's.",
    )
    default_chat_template_kwargs: Mapping[str, Any] | None = argument(
        None,
        Rule("an object", lambda value: isinstance(value, Mapping)).or_none(),
        'Values of the chat template\'s variables, such as {"enable_thinking": false}. chat_template_kwargs of a '
        "request come before them.",
        hash=False,
    )
    reasoning_parser: str | None = argument(
        None,
        _name_in(REASONING_PARSERS),
        "Form in which the model writes its reasoning, which answers then show separately.",
    )
    tool_call_parser: str | None = argument(None, _name_in(TOOL_PARSERS), "Form in which the model writes tool calls.")
    enable_auto_tool_choice: bool = argument(
        False, SWITCH, "Allow tool_choice 'auto': the model decides whether it calls a tool. Needs tool_call_parser."
    )
    trust_request_chat_template: bool = argument(
        False, SWITCH, "Render chat templates that requests bring. They run in a sandbox, for at most 10 seconds."
    )

    def __post_init__(self) -> None:
        check_arguments(self)
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise InvalidArgumentError("tool_call_parser", None, "given with enable_auto_tool_choice")
        if self.api_server_count > 1 and self.data_parallel_size > 1:
            hint = "Each API process would choose replicas without knowing of the others' requests."
            raise InvalidArgumentError("api_server_count", self.api_server_count, "1 with several replicas", hint)
