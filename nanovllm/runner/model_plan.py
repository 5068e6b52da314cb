"""ModelPlan: which model runs, on which device, in which dtype, up to which length. Made before anything is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidArgumentError, ModelLoadError, OutOfMemoryError
from nanovllm.logs import events
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.checkpoint import num_tokenizer_tokens, resolve_model_folder
from nanovllm.models.model_config import ModelConfig
from nanovllm.speculative_config import SpeculativeConfig
from nanovllm.utils.env import overlap
from nanovllm.utils.logger import setup_logger

if TYPE_CHECKING:
    from nanovllm.quantization.scheme import Quantization

logger = setup_logger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """The choices that follow from the configuration and the checkpoint's config.json."""

    name: str  # the folder, or the name of a built-in shape
    folder: Path | None  # None for a built-in shape, which has no files
    model_config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    kv_cache_dtype: torch.dtype
    quantization: Quantization | None  # None: all weights are in `dtype`
    draft: ModelPlan | None = None  # of the draft model, if there is one

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def has_fp8_cache(self) -> bool:
        return self.kv_cache_dtype is torch.float8_e4m3fn

    @property
    def kv_cache_dtype_name(self) -> str:
        return "fp8_e4m3" if self.has_fp8_cache else self.dtype_name

    @classmethod
    def of(cls, config: EngineConfig) -> ModelPlan:
        """Returns the plan for `config`.

        Raises a NanoVLLMError when the model is missing or not supported, or when it cannot run on the device or with
        the length that `config` asks for.
        """
        folder: Path | None = None
        if config.model in BUILTIN_SHAPES:
            if config.load_format != "dummy":
                raise ModelLoadError(
                    f"model={config.model!r} is a shape without weights: give load_format='dummy' for random ones, "
                    "or a folder or a Hugging Face id such as 'Qwen/Qwen3-0.6B'."
                )
            model_config = BUILTIN_SHAPES[config.model]
        else:
            with_weights = config.load_format != "dummy"
            folder = resolve_model_folder(config.model, config.revision, with_weights=with_weights)
            model_config = ModelConfig.from_folder(folder, config.hf_overrides)
        check_tensor_parallel_size(config.tensor_parallel_size, model_config)
        device = _resolve_device(config.device)
        dtype = _resolve_dtype(config.dtype, model_config.dtype, device)
        plan = cls(
            name=str(folder or config.model),
            folder=folder,
            model_config=model_config,
            device=device,
            dtype=dtype,
            max_model_len=_resolve_max_model_len(config.max_model_len, model_config),
            kv_cache_dtype=_resolve_kv_cache_dtype(config.kv_cache_dtype, dtype, device),
            quantization=_resolve_quantization(config.quantization, model_config),
        )
        return replace(plan, draft=_plan_draft_model(config, plan))

    def pipeline_depth(self, config: EngineConfig) -> int:
        """Returns the number of steps in flight.

        On a CPU it is 1 by default: steps do not overlap there, and a second one would only compute superfluous tokens.
        """
        if not overlap():
            return 1
        return config.pipeline_depth or (2 if self.device.type == "cuda" else 1)

    def fit_max_model_len(self, config: EngineConfig, num_slots: int) -> int:
        """Returns the maximum length of a request when the cache holds `num_slots` tokens, as each must fit alone."""
        if self.max_model_len <= num_slots:
            return self.max_model_len
        if num_slots < 2:
            raise OutOfMemoryError(
                f"The KV cache holds {num_slots} token, and a request needs 2: raise "
                + (
                    "its memory."
                    if (asked := config.num_kvcache_blocks) is None
                    else f"num_kvcache_blocks={asked} to 2."
                )
            )
        level = logging.INFO if config.max_model_len is None else logging.WARNING
        events.engine_max_model_len.log_at(level, logger, wanted=self.max_model_len, max_model_len=num_slots)
        return num_slots


def _plan_draft_model(config: EngineConfig, target: ModelPlan) -> ModelPlan | None:
    """Returns the plan of the draft model, on the same device and up to the same length; None without one."""
    speculative = SpeculativeConfig.of(config.speculative_config)
    if speculative is None or speculative.model is None:
        return None
    field, name = "speculative_config.model", speculative.model
    own = replace(
        config,
        model=name,
        revision=speculative.revision,
        quantization=speculative.quantization,
        dtype=target.dtype_name,
        max_model_len=None,
        hf_overrides=None,
        speculative_config=None,
        block_size=None,
        num_gpu_blocks_override=None,
    )
    try:
        plan = ModelPlan.of(own)
    except InvalidArgumentError as error:
        hint = f"{error.hint} This is about the draft model, {field}={name!r}.".lstrip()
        raise InvalidArgumentError(error.field, error.value, error.allowed, hint) from error
    wanted, found = target.model_config.vocab_size, plan.model_config.vocab_size
    if found != wanted:
        hint = f"Its vocab_size is {found}. Models of one family usually have the same."
        raise InvalidArgumentError(
            field, name, f"a model with the vocabulary of model={config.model!r}: {wanted}", hint
        )
    tokens = [None if each.folder is None else num_tokenizer_tokens(each.folder) for each in (target, plan)]
    if None not in tokens and tokens[0] != tokens[1]:
        hint = f"Its tokenizer has {tokens[1]} tokens, that of model={config.model!r} has {tokens[0]}."
        raise InvalidArgumentError(field, name, "a model with the same tokenizer", hint)
    if plan.max_model_len < target.max_model_len:
        allowed = f"a model whose context has at least max_model_len={target.max_model_len} tokens"
        hint = f"Its context has {plan.max_model_len}: give max_model_len={plan.max_model_len}, or another model."
        raise InvalidArgumentError(field, name, allowed, hint)
    return replace(plan, max_model_len=target.max_model_len)


def check_tensor_parallel_size(size: int, model: ModelConfig) -> None:
    """Raises InvalidArgumentError, which names the possible sizes, when a dimension cannot be divided evenly."""
    divided = {"num_attention_heads": model.num_heads, **model.mlp_sizes}

    def fits(size: int) -> bool:
        kv_heads = model.num_kv_heads
        return not any(value % size for value in divided.values()) and (kv_heads % size == 0 or size % kv_heads == 0)

    if not fits(size):
        possible = ", ".join(str(other) for other in range(1, model.num_heads + 1) if fits(other))
        raise InvalidArgumentError(
            "tensor_parallel_size",
            size,
            f"one of {possible} for this model",
            f"It divides {' and '.join(f'{name}={value}' for name, value in divided.items())}, and "
            f"divides num_key_value_heads={model.num_kv_heads} or is a multiple of it.",
        )


def _resolve_device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "auto":
        wanted = "cuda" if available else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not available:
        raise InvalidArgumentError("device", wanted, "'cpu' or 'auto' here", "torch finds no CUDA device.")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = torch.device("cuda", torch.cuda.device_count())
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InvalidArgumentError("device", wanted, f"'cuda:N' with N below {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def _resolve_dtype(wanted: str, checkpoint: str, device: torch.device) -> torch.dtype:
    # On a CPU float32 is exact for every checkpoint and faster than half precision on most.
    name = wanted if wanted != "auto" else "float32" if device.type == "cpu" else checkpoint
    dtype: torch.dtype = getattr(torch, name)
    if dtype is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise InvalidArgumentError(
            "dtype", wanted, "'float16' or 'float32' on this GPU", "It has no bfloat16 arithmetic."
        )
    return dtype


def _resolve_kv_cache_dtype(wanted: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return dtype
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise InvalidArgumentError(
            "kv_cache_dtype",
            wanted,
            "'auto' on this GPU",
            f"{name} has compute capability {capability[0]}.{capability[1]}; FP8 begins with 8.9 (Ada, Hopper).",
        )
    return torch.float8_e4m3fn


def _resolve_quantization(wanted: str | None, model_config: ModelConfig) -> Quantization | None:
    if wanted is None and model_config.quantization_config is None:
        return None
    from nanovllm.quantization.registry import read_quantization

    return read_quantization(wanted, model_config.quantization_config)


def _resolve_max_model_len(wanted: int | None, model_config: ModelConfig) -> int:
    longest = model_config.max_context_len
    if wanted is None:
        return longest
    if wanted < 2 or wanted > longest:
        raise InvalidArgumentError(
            "max_model_len",
            wanted,
            f"an integer from 2 to {longest}, the longest context of this model",
            "A longer context needs rope scaling: hf_overrides={'rope_scaling': …}.",
        )
    return wanted
