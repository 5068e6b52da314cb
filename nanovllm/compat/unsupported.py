"""What vLLM's interface has and nanovllm does not: the tables behind the errors and docs/api.md.

An argument, a field of SamplingParams or a key of a prompt has values that ask for what is the case anyway. These pass
and have no effect, which a DEBUG line says. Every other value, and every method, is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from nanovllm.errors import InvalidArgumentError, NotSupportedError, shown
from nanovllm.logs import events
from nanovllm.utils.arguments import SWITCH, Rule, is_integer, is_number
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")

WRITTEN_IN = "'Not supported' in docs/api.md"


@dataclass(frozen=True)
class Unsupported:
    """An argument of vLLM without effect here.

    passes: the values that pass. reason: why these have no effect. missing: what is not supported; empty if every
    value of the right type passes. hint: what to do instead.
    """

    passes: Rule
    reason: str
    missing: str = ""
    hint: str = ""


def _only(*values: object) -> Rule:
    def passes(given: object) -> bool:
        return any(type(given) is type(value) and given == value for value in values)

    return Rule(" or ".join(map(repr, values)), passes)


_NONE = _only(None)
_FALSE = _only(False, None)
_ANYTHING = Rule("any value", lambda value: True)
_INTEGER = Rule("an integer", is_integer).or_none()
_SWITCH = SWITCH.or_none()
_ZERO = Rule("0", lambda value: is_number(value) and value == 0)
_ONE = Rule("1", lambda value: is_integer(value) and value == 1)
_NOT_NEGATIVE = Rule("a number ≥ 0", lambda value: is_number(value) and value >= 0)

_LORA = Unsupported(_NONE, "there are no LoRA adapters", "LoRA", "Merge the adapter into the weights.")
_PROCESSORS = Unsupported(
    _NONE,
    "there are no logits processors",
    "Python code that changes logits",
    "Use logit_bias, bad_words, allowed_token_ids, penalties or structured_outputs.",
)
_IMAGES = Unsupported(_NONE, "models read text alone", "images, audio and video")
_POOLING = "embeddings, classification, scoring and rewards"
_MEMORY_OF_LLM = "End the engine with exit() and make it again."

ENGINE_ARGUMENTS: Mapping[str, Unsupported] = {
    "task": Unsupported(_only("generate", "auto", None), "every model generates text", _POOLING),
    "runner": Unsupported(_only("auto", "generate"), "every model generates text", _POOLING),
    "convert": Unsupported(_only("auto", "none"), "every model generates text", _POOLING),
    "pooler_config": Unsupported(_NONE, "every model generates text", _POOLING),
    "enable_chunked_prefill": Unsupported(
        _only(True, None),
        "prompts are always computed in chunks",
        "turning chunked prefill off",
        "Raise max_num_batched_tokens for larger chunks.",
    ),
    "disable_log_stats": Unsupported(_SWITCH, "NANOVLLM_LOG_STATS_INTERVAL controls the statistics line"),
    "disable_log_requests": Unsupported(_SWITCH, "log levels control which requests are logged"),
    "enable_log_requests": Unsupported(_SWITCH, "log levels control which requests are logged"),
    "swap_space": Unsupported(_NOT_NEGATIVE, "preempted requests are computed again, not swapped"),
    "cpu_offload_gb": Unsupported(_ZERO, "all weights are on the device", "weights in host memory"),
    "pipeline_parallel_size": Unsupported(
        _ONE, "each rank has all layers", "pipeline parallelism", "Use tensor_parallel_size."
    ),
    "data_parallel_size": Unsupported(
        _ONE,
        "there is one replica",
        "data parallelism in one object",
        "Use `nanovllm serve --data-parallel-size`, or an engine for each GPU, with device='cuda:N'.",
    ),
    "enable_expert_parallel": Unsupported(
        _FALSE, "each rank has a part of every expert", "expert parallelism", "Use tensor_parallel_size."
    ),
    "distributed_executor_backend": Unsupported(
        _only("mp", None), "ranks are processes of this host", "another executor, such as Ray's"
    ),
    "tokenizer_mode": Unsupported(
        _only("auto"), "transformers chooses the tokenizer", "another tokenizer mode", "Name a tokenizer."
    ),
    "config_format": Unsupported(
        _only("auto"), "checkpoints are in Hugging Face's format", "another checkpoint format"
    ),
    "enable_lora": Unsupported(_FALSE, _LORA.reason, _LORA.missing, _LORA.hint),
    "seed": Unsupported(_NONE, "the seed is then 0"),
    "disable_custom_all_reduce": Unsupported(_SWITCH, "the fastest all-reduce that can run is chosen"),
    "download_dir": Unsupported(
        _NONE, "huggingface_hub chooses the folder", "another folder for downloads", "Set HF_HOME."
    ),
    "compilation_config": Unsupported(_ANYTHING, "models are not compiled; enforce_eager turns CUDA graphs off"),
    "max_seq_len_to_capture": Unsupported(_INTEGER, "a CUDA graph serves every length"),
    "async_scheduling": Unsupported(_SWITCH, "pipeline_depth is the number of steps in flight"),
    "use_tqdm_on_load": Unsupported(_SWITCH, "loading shows no progress bar"),
    "logits_processors": _PROCESSORS,
    "scheduling_policy": Unsupported(
        _only("fcfs"), "requests run in the order of arrival", "another order of requests"
    ),
    "enable_sleep_mode": Unsupported(_FALSE, "the engine never sleeps", "sleep mode", _MEMORY_OF_LLM),
    "enable_prompt_embeds": Unsupported(_FALSE, "prompts are texts or token ids", "embeddings as prompts"),
    "limit_mm_per_prompt": _IMAGES,
    "mm_processor_kwargs": _IMAGES,
    "kv_transfer_config": Unsupported(
        _NONE, "keys and values stay in this engine", "moving the KV cache between engines"
    ),
    "weight_transfer_config": Unsupported(_NONE, "weights are loaded once", "weight updates", _MEMORY_OF_LLM),
    "kv_cache_memory_bytes": Unsupported(
        _NONE,
        "gpu_memory_utilization sizes the KV cache",
        "a size in bytes",
        "Use num_kvcache_blocks, or on a CPU NANOVLLM_CPU_KVCACHE_GB.",
    ),
    "generation_config": Unsupported(
        _only("auto"), "the checkpoint's generation_config.json is read", "another generation_config.json"
    ),
    "code_revision": Unsupported(_NONE, "revision names the version", "another version of the code"),
    "tokenizer_revision": Unsupported(_NONE, "revision names the version", "another version of the tokenizer"),
    "hf_token": Unsupported(_NONE, "huggingface_hub has it", "a token", "Set HF_TOKEN."),
    "model_impl": Unsupported(_only("auto", "vllm"), "models are nanovllm's own", "other implementations of models"),
    "max_logprobs": Unsupported(_only(20), "at most 20, or all, can be asked for", "another limit"),
    "calculate_kv_scales": Unsupported(_SWITCH, "scales of the KV cache are computed for each token"),
    "guided_decoding_backend": Unsupported(_ANYTHING, "xgrammar compiles grammars"),
    "structured_outputs_config": Unsupported(_ANYTHING, "xgrammar compiles grammars"),
    "num_scheduler_steps": Unsupported(_INTEGER, "pipeline_depth is the number of steps in flight"),
    "use_v2_block_manager": Unsupported(_SWITCH, "there is one block manager"),
    "max_num_partial_prefills": Unsupported(_INTEGER, "the engine divides a step between prompts"),
    "max_long_partial_prefills": Unsupported(_INTEGER, "the engine divides a step between prompts"),
    "long_prefill_token_threshold": Unsupported(_INTEGER, "the engine divides a step between prompts"),
    "disable_sliding_window": Unsupported(_FALSE, "windows are the model's", "turning sliding windows off"),
    "disable_cascade_attn": Unsupported(_SWITCH, "a long common prefix is read once for many rows"),
    "cudagraph_capture_sizes": Unsupported(_ANYTHING, "every batch size up to max_num_seqs has a CUDA graph"),
    "optimization_level": Unsupported(_ANYTHING, "models are not compiled; enforce_eager turns CUDA graphs off"),
    "otlp_traces_endpoint": Unsupported(
        _NONE, "a variable names the collector", "this argument", "Set OTEL_EXPORTER_OTLP_ENDPOINT."
    ),
    "logprobs_mode": Unsupported(
        _only("raw_logprobs"), "log-probabilities are those of the raw logits", "other log-probabilities"
    ),
}

# Options of `vllm serve` that are not the engine's.
SERVER_ARGUMENTS: Mapping[str, Unsupported] = {
    "allowed_origins": Unsupported(_NONE, "cors_origin names the origins", "allowed_origins", "Use --cors-origin."),
    "allowed_methods": Unsupported(_ANYTHING, "all methods are allowed to the origins of --cors-origin"),
    "allowed_headers": Unsupported(_ANYTHING, "all headers are allowed to the origins of --cors-origin"),
    "allow_credentials": Unsupported(_FALSE, "keys are in a header", "cookies of other origins"),
    "chat_template_content_format": Unsupported(
        _only("auto", "string"), "chat templates get texts", "contents of other forms"
    ),
    "disable_access_log_for_endpoints": Unsupported(_ANYTHING, "log levels control the access log"),
    "disable_fastapi_docs": Unsupported(_SWITCH, "there are no pages of documentation"),
    "disable_frontend_multiprocessing": Unsupported(_SWITCH, "engine_process says where the engine runs"),
    "disable_uvicorn_access_log": Unsupported(_SWITCH, "the access log is the event http.request"),
    "enable_force_include_usage": Unsupported(
        _FALSE, "requests ask for the usage", "usage without being asked", "Use stream_options of a request."
    ),
    "enable_log_deltas": Unsupported(_SWITCH, "outputs are not logged"),
    "enable_log_outputs": Unsupported(_FALSE, "outputs are not logged", "this switch", "Set NANOVLLM_LOG_PROMPTS=1."),
    "enable_prompt_tokens_details": Unsupported(_SWITCH, "the usage always has them"),
    "enable_reasoning": Unsupported(_SWITCH, "reasoning_parser says how reasoning is read"),
    "enable_request_id_headers": Unsupported(_SWITCH, "answers always have X-Request-Id"),
    "enable_server_load_tracking": Unsupported(_SWITCH, "/load always has the number of requests"),
    "enable_ssl_refresh": Unsupported(_FALSE, "certificates are read once", "new certificates without a restart"),
    "enable_tokenizer_info_endpoint": Unsupported(_SWITCH, "/tokenizer_info is always there"),
    "exclude_tools_when_tool_choice_none": Unsupported(_SWITCH, "tools are left out of the prompt then"),
    "h11_max_header_count": Unsupported(_INTEGER, "httptools reads requests"),
    "h11_max_incomplete_event_size": Unsupported(_INTEGER, "httptools reads requests"),
    "headless": Unsupported(_FALSE, "one process serves one engine", "an engine without a server"),
    "log_config_file": Unsupported(
        _NONE, "variables control the log", "a file with the configuration of the log", "See LOGGING.md."
    ),
    "lora_modules": _LORA,
    "max_log_len": Unsupported(_INTEGER, "prompts are not logged"),
    "middleware": Unsupported(_NONE, "no code is loaded", "further middleware", "Use a proxy."),
    "response_role": Unsupported(_only("assistant"), "answers are the assistant's", "another role"),
    "return_tokens_as_token_ids": Unsupported(
        _FALSE, "requests ask for it", "this for all requests", "Use the field of a request."
    ),
    "ssl_ca_certs": Unsupported(_NONE, "clients have API keys", "certificates of clients", "Use a proxy."),
    "ssl_cert_reqs": Unsupported(_ZERO, "clients have API keys", "certificates of clients", "Use a proxy."),
    "ssl_ciphers": Unsupported(_NONE, "Python's defaults apply", "a list of ciphers", "Use a proxy."),
    "tool_parser_plugin": Unsupported(_only(""), "no code is loaded", "further parsers of tool calls"),
    "tool_server": Unsupported(_NONE, "the server runs no tools", "tools of the server"),
    "uvicorn_log_level": Unsupported(_ANYTHING, "NANOVLLM_LOG_LEVEL sets the log level"),
}

SAMPLING_FIELDS: Mapping[str, Unsupported] = {
    "best_of": Unsupported(
        _NONE, "n completions are returned", "choosing the best completions", "Use n and logprobs, and choose."
    ),
    "use_beam_search": Unsupported(_FALSE, "tokens are sampled", "beam search"),
    "length_penalty": Unsupported(_only(1.0), "tokens are sampled", "beam search"),
    "early_stopping": Unsupported(_FALSE, "tokens are sampled", "beam search"),
    "suffix": Unsupported(_NONE, "text is continued at its end", "text before a suffix"),
    "logits_processors": _PROCESSORS,
    "truncate_prompt_tokens": Unsupported(_NONE, "prompts are not cut", "cutting prompts", "Cut the token ids."),
    "guided_decoding": Unsupported(
        _NONE, "structured_outputs has replaced it", "guided_decoding", "Use structured_outputs."
    ),
    "extra_args": Unsupported(_NONE, "no code reads them", "arguments of plugins"),
    "spaces_between_special_tokens": Unsupported(
        _only(True), "the tokenizer decides it", "special tokens without spaces"
    ),
    "skip_clone": Unsupported(_SWITCH, "parameters are copied when they are used"),
}

REQUEST_ARGUMENTS: Mapping[str, Unsupported] = {
    "lora_request": _LORA,
    "priority": Unsupported(
        Rule("0", lambda value: value is None or (is_integer(value) and value == 0)),
        "requests run in the order of arrival",
        "a priority",
    ),
    "tokenization_kwargs": Unsupported(_NONE, "the tokenizer's defaults apply", "arguments of the tokenizer"),
    "mm_processor_kwargs": _IMAGES,
    "trace_headers": Unsupported(_NONE, "spans belong to the caller's current span", "another parent of a span"),
}

PROMPT_KEYS: Mapping[str, Unsupported] = {
    "multi_modal_data": _IMAGES,
    "multi_modal_uuids": _IMAGES,
    "mm_processor_kwargs": _IMAGES,
    "prompt_embeds": Unsupported(_NONE, "prompts are texts or token ids", "embeddings as prompts"),
    "encoder_prompt": Unsupported(_NONE, "models are decoders", "models with an encoder"),
    "decoder_prompt": Unsupported(_NONE, "models are decoders", "models with an encoder"),
}

# Methods of LLM, AsyncLLM and LLMEngine: what is missing, and what to do instead.
METHODS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("collective_rpc", "apply_model"), ("Python code in the ranks", "")),
    "beam_search": ("beam search", "Use generate with n and logprobs."),
    **dict.fromkeys(("encode", "embed", "classify", "reward", "score"), (_POOLING, "")),
    **dict.fromkeys(("sleep", "wake_up", "is_sleeping"), ("sleep mode", _MEMORY_OF_LLM)),
    **dict.fromkeys(("pause_generation", "resume_generation", "is_paused"), ("pausing", "Abort requests.")),
    **dict.fromkeys(("add_lora", "remove_lora", "list_loras", "pin_lora"), (_LORA.missing, _LORA.hint)),
    **dict.fromkeys(
        ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"),
        ("weight updates", _MEMORY_OF_LLM),
    ),
}


def without_effect(
    callee: str, arguments: Mapping[str, Any], table: Mapping[str, Unsupported], prefix: str = ""
) -> dict[str, Any]:
    """Returns the arguments that are not in `table`. Those that are and pass are logged.

    Raises InvalidArgumentError, which names the argument after `prefix`, for a value that does not pass.
    """
    rest = {}
    for name, value in arguments.items():
        entry = table.get(name)
        if entry is None or (name == "seed" and value is not None):  # a seed is supported, and vLLM allows None
            rest[name] = value
        elif entry.passes.accepts(value):
            events.argument_without_effect.log(
                logger, callee=callee, argument=name, given=shown(value), why=entry.reason
            )
        else:
            raise InvalidArgumentError(prefix + name, value, entry.passes.allowed, _refusal(entry.missing, entry.hint))
    return rest


def _refusal(missing: str, hint: str) -> str:
    return f"Not supported: {missing} (see {WRITTEN_IN}). {hint}".rstrip() if missing else hint


def accepting(table: Mapping[str, Unsupported]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator that makes a function accept the arguments in `table` where their value passes."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        callee = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def accept(*args: P.args, **kwargs: P.kwargs) -> T:
            if not table.keys().isdisjoint(kwargs):
                kwargs = without_effect(callee, kwargs, table)  # type: ignore[assignment]  # fewer than P has
            return function(*args, **kwargs)

        return accept

    return decorate


def accepts_without_effect(table: Mapping[str, Unsupported]) -> Callable[[type[C]], type[C]]:
    """Returns a class decorator: `__init__` accepts the arguments in `table` where their value passes."""

    def decorate(cls: type[C]) -> type[C]:
        setattr(cls, "__init__", accepting(table)(cls.__init__))  # noqa: B010
        return cls

    return decorate


class UnsupportedMethods:
    """Base class: reading a method of `METHODS` raises NotSupportedError, which is an AttributeError too."""

    if not TYPE_CHECKING:  # type checkers would allow every name

        def __getattr__(self, name: str) -> Any:
            cls = type(self).__name__
            if name not in METHODS:
                raise AttributeError(f"{cls!r} object has no attribute {name!r}", name=name, obj=self)
            missing, hint = METHODS[name]
            raise NotSupportedError(f"{cls} has no {name}. {_refusal(missing, hint)}")
