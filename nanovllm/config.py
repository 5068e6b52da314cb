"""What a user asks of the engine (`EngineConfig`) and what the engine decided (`ResolvedConfig`).

Both are frozen: a value is checked where it is made and never changes after.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, TypedDict

from nanovllm.errors import InvalidArgumentError, UnknownArgumentError

# vLLM's spelling → ours.
_ALIASES = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}

DTYPES = ("bfloat16", "float16", "float32")
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
_LOAD_FORMATS = ("auto", "safetensors", "dummy")
ATTENTION_BACKENDS = ("auto", "flash_attn", "triton", "torch")


class EngineArguments(TypedDict, total=False):
    """Keyword arguments of `LLM`, for type checkers and editors; `EngineConfig` says what they mean."""

    tokenizer: str | None
    dtype: Any  # a name, or a torch.dtype
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kvcache_block_size: int | None
    num_kvcache_blocks: int | None
    enable_prefix_caching: bool
    tensor_parallel_size: int
    startup_timeout: float
    step_timeout: float
    enforce_eager: bool
    device: Any  # a name, an index, or a torch.device
    attention_backend: str
    kv_cache_dtype: str
    load_format: str
    skip_tokenizer_init: bool
    seed: int
    trust_remote_code: bool
    revision: str | None
    hf_overrides: Mapping[str, Any] | None
    pipeline_depth: int | None
    max_prefill_tokens_beside_decode: int | None
    block_size: int | None
    num_gpu_blocks_override: int | None


_MAX_TIMEOUT = 86400
MIN_SHARED_PREFIX = 256  # tokens; a shorter one costs less to read in each row than to look for
MAX_BIAS_WORDS = 8192  # int32 on the device for a request's token biases


@dataclass(frozen=True)
class EngineConfig:
    """Arguments of `LLM`, under the names that nano-vllm and vLLM use.

    model: a folder, a Hugging Face id, or "tiny", the checkpoint that ships with the package; with
        load_format="dummy" also a built-in shape ("qwen3-0.6b", "qwen3-8b", "qwen3-32b").
    tokenizer: a folder or an id when it is not the model's own.
    dtype: "auto" takes the checkpoint's, except on a CPU, which computes in float32.
    max_model_len: the most tokens of prompt and output together; None takes the model's, at most what
        the KV cache holds.
    max_num_seqs: sequences that run at a time.
    max_num_batched_tokens: tokens computed in one step; longer prompts run in chunks.
    gpu_memory_utilization: share of the GPU's memory the engine may use, everything included.
    kvcache_block_size: tokens a page of the KV cache; None lets the attention backend choose.
    num_kvcache_blocks: pages of the KV cache; None measures what fits.
    tensor_parallel_size: processes that share the model, one a GPU (from `device` on), or all on the CPU.
    startup_timeout: seconds within which all of them must be ready; the error names the one that the others wait for.
    step_timeout: seconds that they may take over a step; then the one that keeps the others waiting is given up.
    enforce_eager: no CUDA graphs.
    attention_backend: "auto", "flash_attn", "triton" or "torch".
    kv_cache_dtype: "auto" is the model's; "fp8" (or "fp8_e4m3") halves bf16's bytes, on GPUs that have FP8.
    load_format: "dummy" fills the model with random weights of `seed`.
    pipeline_depth: steps in flight at a time: 1 reads each step's tokens before the next is launched, 2 launches the
        next first, so that the GPU never waits for the host; None takes 2 on a GPU and 1 on a CPU.
    max_prefill_tokens_beside_decode: prompt tokens computed in a step that decodes too, which bounds the time between
        a running request's tokens; None leaves them what max_num_batched_tokens has left: best for throughput.

    Raises InvalidArgumentError that names the field, for a value that is not allowed.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    kvcache_block_size: int | None = None
    num_kvcache_blocks: int | None = None
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    startup_timeout: float = 600.0
    step_timeout: float = 300.0
    enforce_eager: bool = False
    device: str = "auto"
    attention_backend: str = "auto"
    kv_cache_dtype: str = "auto"
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    seed: int = 0
    trust_remote_code: bool = False
    revision: str | None = None
    hf_overrides: Mapping[str, Any] | None = None
    pipeline_depth: int | None = None
    max_prefill_tokens_beside_decode: int | None = None

    @classmethod
    def from_arguments(cls, model: str, arguments: Mapping[str, Any]) -> EngineConfig:
        """From `LLM`'s keyword arguments, vLLM's spellings included.

        Raises UnknownArgumentError (a TypeError) for a name that does not exist.
        """
        known = {field.name for field in fields(cls)} - {"model"}
        values: dict[str, Any] = {}
        for given, value in arguments.items():
            name = _ALIASES.get(given, given)
            if name not in known:
                raise UnknownArgumentError("LLM", given, sorted(known | _ALIASES.keys()))
            if name in values:
                raise InvalidArgumentError(given, value, f"given once: it is another name of {name}")
            values[name] = value
        return cls(model=model, **values)

    def __post_init__(self) -> None:
        # Paths, torch.bfloat16, torch.device("cpu") and 0 are as good as texts, "bfloat16", "cpu" and "cuda:0".
        for name in ("model", "tokenizer", "revision"):
            object.__setattr__(self, name, _as_text(name, getattr(self, name), is_needed=name == "model"))
        dtype = str(self.dtype).removeprefix("torch.")
        dtype = _DTYPE_ALIASES.get(dtype, dtype)
        if dtype not in ("auto", *DTYPES):  # said in the words of the user
            _check_choice("dtype", self.dtype, ("auto", *DTYPES))
        object.__setattr__(self, "dtype", dtype)
        device = f"cuda:{self.device}" if _is_integer(self.device) else str(self.device)
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
            raise InvalidArgumentError("device", self.device, "'auto', 'cpu', 'cuda' or 'cuda:N'")
        object.__setattr__(self, "device", device)
        overrides: object = self.hf_overrides
        if overrides is not None and not (
            isinstance(overrides, Mapping) and all(isinstance(k, str) for k in overrides)
        ):
            raise InvalidArgumentError("hf_overrides", overrides, "a dictionary of fields of config.json, or None")
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            _check_count(name, getattr(self, name))
        for name in (
            *("max_model_len", "num_kvcache_blocks", "kvcache_block_size"),
            *("pipeline_depth", "max_prefill_tokens_beside_decode"),
        ):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("enable_prefix_caching", "enforce_eager", "skip_tokenizer_init", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(name, getattr(self, name), "True or False")
        _check_choice("load_format", self.load_format, _LOAD_FORMATS)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES, "'auto' is the model's dtype.")
        if self.kv_cache_dtype == "fp8":
            object.__setattr__(self, "kv_cache_dtype", "fp8_e4m3")
        share = self.gpu_memory_utilization
        if (
            not isinstance(share, (int, float))
            or isinstance(share, bool)
            or not math.isfinite(share)
            or not 0 < share <= 1
        ):
            raise InvalidArgumentError("gpu_memory_utilization", share, "a number above 0, at most 1")
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**63:
            raise InvalidArgumentError("seed", self.seed, "an integer from 0 to 2**63 - 1")
        _check_count("tensor_parallel_size", self.tensor_parallel_size)
        for name in ("startup_timeout", "step_timeout"):
            timeout = getattr(self, name)
            if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not 0 < timeout <= _MAX_TIMEOUT:
                raise InvalidArgumentError(name, timeout, f"a number of seconds > 0, at most {_MAX_TIMEOUT} (a day)")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidArgumentError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"at least max_num_seqs={self.max_num_seqs}",
                "A decode step computes one token of each running sequence: raise it, or lower max_num_seqs.",
            )


@dataclass(frozen=True)
class ResolvedConfig:
    """What the engine runs with, decided once when it starts."""

    model: str  # the folder, or a built-in shape's name
    device: str
    dtype: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_tokens_beside_decode: int | None
    block_size: int
    num_blocks: int
    kv_cache_dtype: str
    enable_prefix_caching: bool
    use_cuda_graphs: bool
    prefill_backend: str
    decode_backend: str
    pipeline_depth: int


def _check_count(name: str, value: Any) -> None:
    if not _is_integer(value) or value < 1:
        raise InvalidArgumentError(name, value, "an integer ≥ 1")


def _as_text(name: str, value: object, *, is_needed: bool) -> str | None:
    if value is None and not is_needed:
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        what = "a tag, a branch or a commit" if name == "revision" else "a folder, a Hugging Face id"
        raise InvalidArgumentError(name, value, what + (", or 'tiny'" if is_needed else ", or None"))
    return str(value)


def _check_choice(name: str, value: object, choices: tuple[str, ...], hint: str = "") -> None:
    if value not in choices:
        raise InvalidArgumentError(name, value, "one of " + ", ".join(map(repr, choices)), hint)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
