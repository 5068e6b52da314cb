"""The engine's arguments (`EngineConfig`) and the settings that follow from them (`ResolvedConfig`).

Both are frozen: a value is checked when the object is made and never changes after that.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field, replace
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from nanovllm.compat.unsupported import ENGINE_ARGUMENTS, WRITTEN_IN, without_effect
from nanovllm.errors import InvalidArgumentError, UnknownArgumentError
from nanovllm.speculative_config import QUANTIZATIONS, SpeculativeConfig
from nanovllm.utils.arguments import (
    COUNT,
    SWITCH,
    Rule,
    argument,
    arguments_doc,
    arguments_of,
    check_arguments,
    choice,
    declaration,
    is_integer,
    is_number,
    lists_arguments,
)

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = ("bfloat16", "float16", "float32")
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
ATTENTION_BACKENDS = ("auto", "flash_attn", "triton", "torch")
MIN_SHARED_PREFIX = 256  # tokens; looking for a shorter shared prefix costs more than reading it once for each row
MAX_BIAS_WORDS = 8192  # int32 words on the device for the token biases of one request
ALIASES = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}  # vLLM's names
_MAX_TIMEOUT = 86400


def _is_text(value: object) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(str(value))


def _dtype_name(value: object) -> str:
    name = str(value).removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def _device_name(value: object) -> str:
    return f"cuda:{value}" if is_integer(value) else str(value)


# Besides strings, the rules accept paths, a torch.dtype, a torch.device, and an index such as 0 for "cuda:0".
_MODEL = Rule("a folder, a Hugging Face id, or 'tiny'", _is_text, str)
_TOKENIZER = Rule("a folder, a Hugging Face id", _is_text, str).or_none()
_REVISION = Rule("a tag, a branch or a commit", _is_text, str).or_none()
_DTYPE = replace(
    choice("auto", *DTYPES), accepts=lambda value: _dtype_name(value) in ("auto", *DTYPES), convert=_dtype_name
)
_DEVICE = Rule(
    "'auto', 'cpu', 'cuda' or 'cuda:N'",
    lambda value: re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", _device_name(value)) is not None,
    convert=_device_name,
)
_KV_CACHE_DTYPE = replace(
    choice("auto", "fp8", "fp8_e4m3"),
    convert=lambda value: "fp8_e4m3" if value == "fp8" else value,
    hint="'auto' is the model's dtype.",
)
_MEMORY_SHARE = Rule("a number above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1, float)
_SECONDS = Rule(
    f"a number of seconds > 0, at most {_MAX_TIMEOUT} (a day)",
    lambda value: is_number(value) and 0 < value <= _MAX_TIMEOUT,
    float,
)
_MILLISECONDS = Rule(
    "'auto', a number of milliseconds from 0 to 60000 (a minute)",
    lambda value: value == "auto" if isinstance(value, str) else is_number(value) and 0 <= value <= 60_000,
    lambda value: value if value == "auto" else float(value),
).or_none()
_SEED = Rule("an integer from 0 to 2**63 - 1", lambda value: is_integer(value) and 0 <= value < 2**63, int)
_OVERRIDES = Rule(
    "a dictionary of fields of config.json",
    lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
).or_none()
_PROFILER_CONFIG = Rule(
    "{'profiler': 'torch', 'torch_profiler_dir': a folder}",
    lambda value: (
        isinstance(value, Mapping)
        and value.keys() <= {"profiler", "torch_profiler_dir"}
        and value.get("profiler", "torch") == "torch"
        and _is_text(value.get("torch_profiler_dir"))
    ),
).or_none()
_SPECULATIVE_CONFIG = Rule(
    "a dictionary with 'method'",
    lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and not value.keys().isdisjoint({"method", "model"})
    ),
    hint="Such as {'method': 'ngram', 'num_speculative_tokens': 7}.",
).or_none()
_COUNT_OR_NONE = COUNT.or_none()


@lists_arguments
@dataclass(frozen=True)
class EngineConfig:
    """The arguments of `LLM` and `AsyncLLM`, under the names that nano-vllm and vLLM use.

    Each field declares its default, the values it allows and its help text. `help(LLM)`, the errors and the table in
    docs/api.md are generated from these declarations.

    Raises InvalidArgumentError, which names the field, for a value that is not allowed.
    """

    model: str = field(
        metadata=declaration(
            _MODEL,
            "A folder, a Hugging Face id, or 'tiny', the checkpoint that comes with the package. With "
            "load_format='dummy' also a built-in shape, such as 'llama-3.1-8b'.",
        )
    )
    _: KW_ONLY
    tokenizer: str | None = argument(None, _TOKENIZER, "Where to load the tokenizer from. None: from the model.")
    dtype: str | Any = argument(  # a name, or a torch.dtype
        "auto", _DTYPE, "Data type of weights and activations. 'auto': the checkpoint's, and float32 on a CPU."
    )
    max_model_len: int | None = argument(
        None,
        _COUNT_OR_NONE,
        "Maximum number of tokens of a prompt and its output together. None: the model's limit, or less if the KV "
        "cache holds less.",
    )
    max_num_seqs: int = argument(512, COUNT, "Maximum number of sequences that run at the same time.")
    max_num_batched_tokens: int = argument(
        16384, COUNT, "Maximum number of tokens computed in one step. Longer prompts are computed in chunks."
    )
    gpu_memory_utilization: float = argument(
        0.9,
        _MEMORY_SHARE,
        "Fraction of the GPU's memory that the engine may use for weights, activations and KV cache.",
    )
    kvcache_block_size: int | None = argument(
        None, _COUNT_OR_NONE, "Tokens in a block of the KV cache. None: the attention backend's choice."
    )
    num_kvcache_blocks: int | None = argument(
        None, _COUNT_OR_NONE, "Number of blocks of the KV cache. None: as many as fit into memory."
    )
    enable_prefix_caching: bool = argument(
        True, SWITCH, "Reuse the KV cache of prompts that begin with the same tokens."
    )
    tensor_parallel_size: int = argument(
        1,
        COUNT,
        "Number of processes that share the model. Each uses a GPU of its own, from `device` on, or all use the CPU.",
    )
    startup_timeout: float = argument(
        600.0, _SECONDS, "Seconds until all processes must be ready. The error names the rank that is not."
    )
    step_timeout: float = argument(
        300.0,
        _SECONDS,
        "Seconds that a step may take on several ranks or in a replica. Then the rank that holds up the others, or the "
        "replica, has failed.",
    )
    enforce_eager: bool = argument(False, SWITCH, "Run without CUDA graphs.")
    device: str | Any = argument(  # a name, an index, or a torch.device
        "auto", _DEVICE, "Device to run on. 'auto': the GPU if there is one, otherwise the CPU."
    )
    attention_backend: str = argument(
        "auto", choice(*ATTENTION_BACKENDS), "Attention implementation. 'auto': the fastest that can run here."
    )
    kv_cache_dtype: str = argument(
        "auto",
        _KV_CACHE_DTYPE,
        "Data type of the KV cache. 'auto': the model's. 'fp8' takes half the memory of bfloat16, on GPUs with FP8.",
    )
    quantization: str | None = argument(
        None,
        choice(*QUANTIZATIONS).or_none(),
        "How weights are quantised. 'fp8', 'int8' and 'int4' make such weights from unquantised ones when they are "
        "loaded. None: as the checkpoint has them; the others only confirm what that is.",
    )
    load_format: str = argument(
        "auto",
        replace(
            choice("auto", "safetensors", "dummy"), hint=f"Not supported: GGUF and other formats (see {WRITTEN_IN})."
        ),
        "How weights are loaded. 'dummy': random weights made from `seed`, without reading a checkpoint.",
    )
    skip_tokenizer_init: bool = argument(
        False, SWITCH, "Do not load a tokenizer. Prompts must then be token ids, and outputs have no text."
    )
    seed: int = argument(0, _SEED, "Seed of requests without a seed of their own, and of random weights.")
    trust_remote_code: bool = argument(False, SWITCH, "Run Python code that comes with the tokenizer's repository.")
    revision: str | None = argument(None, _REVISION, "Version of the Hugging Face repository. None: the latest.")
    hf_overrides: Mapping[str, Any] | None = argument(
        None, _OVERRIDES, "Values that replace those in the checkpoint's config.json."
    )
    pipeline_depth: int | None = argument(
        None,
        _COUNT_OR_NONE,
        "Steps in flight at the same time. 1 reads the tokens of each step before the next one is launched. 2 launches "
        "the next one first, so that the GPU does not wait for the host. None: 2 on a GPU, 1 on a CPU.",
    )
    max_prefill_tokens_beside_decode: int | None = argument(
        None,
        _COUNT_OR_NONE,
        "Maximum number of prompt tokens computed in a step that also decodes. It bounds the time between the tokens "
        "of running requests. None: what max_num_batched_tokens leaves, which gives the best throughput.",
    )
    inter_token_latency_target_ms: float | Literal["auto"] | None = argument(
        None,
        _MILLISECONDS,
        "Target for the time of a step that also decodes, which is the time between the tokens of running requests. "
        "The engine computes as many prompt tokens in such a step as fit, judging by the time that earlier steps took, "
        "but at least 64, so that prompts make progress. 'auto': 2.2 times what decoding alone takes, at least 12 ms, "
        "and up to three times as much for prompts that have waited for long. 0: no target, which gives the best "
        "throughput. None: 'auto' for AsyncLLM and the server, 0 for LLM.",
    )
    profiler_config: Mapping[str, Any] | None = argument(
        None,
        _PROFILER_CONFIG,
        "Where `start_profile()` writes, in vLLM's form. None: a new temporary folder, which the log names.",
    )
    fast_start: bool | None = argument(
        None,
        SWITCH.or_none(),
        "True: capture CUDA graphs when they are first needed, some 50 ms each. False: capture those of all batch "
        "sizes at start-up, which takes some seconds, so that no request waits for them. None: True for LLM, False "
        "for AsyncLLM.",
    )
    engine_process: bool | None = argument(
        None,
        SWITCH.or_none(),
        "True: AsyncLLM runs its engine in a process of its own, so that it does not share Python's lock with what "
        "reads the outputs. False: in a thread, for debugging. None: True on a GPU, False on a CPU. LLM ignores it.",
    )
    speculative_config: Mapping[str, Any] | None = argument(
        None,
        _SPECULATIVE_CONFIG,
        "Speculative decoding, in vLLM's form: {'method': 'ngram', 'suffix' or 'draft_model', "
        "'num_speculative_tokens': …, …} (see docs/speculation.md). It changes no token. None: off.",
    )
    block_size: InitVar[int | None] = argument(None, _COUNT_OR_NONE, "vLLM's name of kvcache_block_size.")
    num_gpu_blocks_override: InitVar[int | None] = argument(None, _COUNT_OR_NONE, "vLLM's name of num_kvcache_blocks.")

    def __post_init__(self, block_size: int | None, num_gpu_blocks_override: int | None) -> None:
        self._set_alias("block_size", block_size)
        self._set_alias("num_gpu_blocks_override", num_gpu_blocks_override)
        check_arguments(self)
        if self.model.endswith(".gguf"):
            hint = f"Not supported: GGUF (see {WRITTEN_IN})."
            raise InvalidArgumentError("model", self.model, "a folder with safetensors files", hint)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidArgumentError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"at least max_num_seqs={self.max_num_seqs}",
                "A decode step computes one token of each running sequence: raise it, or lower max_num_seqs.",
            )
        SpeculativeConfig.of(self.speculative_config)

    @property
    def max_num_rows(self) -> int:
        """How many tokens the decode rows and the draft rows of a step have at most."""
        speculative = SpeculativeConfig.of(self.speculative_config)
        return self.max_num_seqs + (0 if speculative is None else speculative.num_draft_rows(self.max_num_seqs))

    def for_serving(self) -> EngineConfig:
        """Returns a copy in which what is None has the default for requests that arrive over time."""
        fast_start = False if self.fast_start is None else self.fast_start
        target = self.inter_token_latency_target_ms
        return replace(
            self,
            fast_start=fast_start,
            inter_token_latency_target_ms="auto" if target is None else target,
            block_size=None,
            num_gpu_blocks_override=None,
        )

    def _set_alias(self, alias: str, value: int | None) -> None:
        if value is None:
            return
        name = ALIASES[alias]
        if getattr(self, name) is not None:
            raise InvalidArgumentError(alias, value, f"given once: it is another name of {name}")
        object.__setattr__(self, name, value)


def check_names(callee: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments without those that have no effect. Raises UnknownArgumentError for an unknown name."""
    known = [each.name for each in arguments_of(EngineConfig)]
    arguments = without_effect(callee, arguments, ENGINE_ARGUMENTS)
    for name in arguments:
        if name not in known:
            raise UnknownArgumentError(callee, name, known)
    return arguments


def _takes_arguments_of(
    make_config: Callable[P, EngineConfig],
) -> Callable[[Callable[[T, EngineConfig], None]], Callable[Concatenate[T, P], None]]:
    """Returns `takes_engine_arguments`. The ParamSpec of `make_config` tells type checkers the arguments."""

    def decorate(init: Callable[[T, EngineConfig], None]) -> Any:
        @functools.wraps(init)
        def init_from_arguments(self: T, model: str, **arguments: Any) -> None:
            init(self, EngineConfig(model, **check_names(type(self).__name__, arguments)))

        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(EngineConfig).parameters.values()
        untyped = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
        setattr(init_from_arguments, "__signature__", inspect.Signature([this, *untyped]))  # noqa: B010
        init_from_arguments.__doc__ = arguments_doc(EngineConfig)
        return init_from_arguments

    return decorate


# A decorator for the `__init__` of a class that starts an engine. Callers pass the arguments of EngineConfig, which
# `help` lists; the decorated function gets the EngineConfig. An unknown name raises UnknownArgumentError (a TypeError).
takes_engine_arguments = _takes_arguments_of(EngineConfig)


@dataclass(frozen=True)
class ResolvedConfig:
    """The settings that the engine runs with, chosen once at start-up."""

    model: str  # the folder, or a built-in shape's name
    device: str
    dtype: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_tokens_beside_decode: int | None
    inter_token_latency_target_ms: float | Literal["auto"] | None
    block_size: int
    num_blocks: int
    kv_cache_dtype: str
    enable_prefix_caching: bool
    use_cuda_graphs: bool
    prefill_backend: str
    decode_backend: str
    pipeline_depth: int
    quantization: str | None = None
    draft_cost: float = 0.0  # of one token from the draft model, as a share of a step; 0: no draft model
