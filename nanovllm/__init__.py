"""nanovllm: an LLM inference engine you can read in an afternoon.

    from nanovllm import LLM, SamplingParams
    llm = LLM("tiny")
    print(llm.generate("Hello", SamplingParams(temperature=0))[0].outputs[0].text)

Names are imported when first used, so that `import nanovllm` costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.errors import (
        BackendUnavailableError,
        ChannelError,
        EngineDeadError,
        InvalidArgumentError,
        InvalidStateError,
        ModelLoadError,
        NanoVLLMError,
        OutOfMemoryError,
        RequestTooLargeError,
        StepFailedError,
        UnknownArgumentError,
        WorkerError,
    )
    from nanovllm.llm import LLM
    from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "BackendUnavailableError",
    "ChannelError",
    "CompletionOutput",
    "EngineDeadError",
    "InvalidArgumentError",
    "InvalidStateError",
    "LLMEngine",
    "Logprob",
    "ModelLoadError",
    "NanoVLLMError",
    "OutOfMemoryError",
    "RequestMetrics",
    "RequestOutput",
    "RequestTooLargeError",
    "SamplingParams",
    "StepFailedError",
    "StructuredOutputsParams",
    "UnknownArgumentError",
    "WorkerError",
]

_HOMES = {
    "LLM": "nanovllm.llm",
    "AsyncLLM": "nanovllm.async_llm",
    "LLMEngine": "nanovllm.engine.llm_engine",
    "SamplingParams": "nanovllm.sampling_params",
    "StructuredOutputsParams": "nanovllm.sampling_params",
    "CompletionOutput": "nanovllm.outputs",
    "Logprob": "nanovllm.outputs",
    "RequestMetrics": "nanovllm.outputs",
    "RequestOutput": "nanovllm.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "nanovllm.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
