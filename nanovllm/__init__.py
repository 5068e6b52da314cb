"""nanovllm: an LLM inference engine whose main path you can read in an afternoon.

    from nanovllm import LLM, SamplingParams
    llm = LLM("tiny")
    print(llm.generate("Hello", SamplingParams(temperature=0))[0].outputs[0].text)

Names are imported on first use, so that `import nanovllm` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The module that defines each public name. The imports below say the same to type checkers.
_MODULE_OF = {
    "LLM": "nanovllm.llm",
    "AsyncLLM": "nanovllm.async_llm",
    "AsyncLLMEngine": "nanovllm.engine.async_llm_engine",
    "LLMEngine": "nanovllm.engine.llm_engine",
    "EngineArgs": "nanovllm.engine_args",
    "AsyncEngineArgs": "nanovllm.engine_args",
    "SamplingParams": "nanovllm.sampling_params",
    "RequestOutputKind": "nanovllm.sampling_params",
    "StructuredOutputsParams": "nanovllm.sampling_params",
    "TextPrompt": "nanovllm.inputs",
    "TokensPrompt": "nanovllm.inputs",
    "CompletionOutput": "nanovllm.outputs",
    "Logprob": "nanovllm.outputs",
    "RequestMetrics": "nanovllm.outputs",
    "RequestOutput": "nanovllm.outputs",
    "BackendUnavailableError": "nanovllm.errors",
    "ChannelError": "nanovllm.errors",
    "EngineDeadError": "nanovllm.errors",
    "InvalidArgumentError": "nanovllm.errors",
    "InvalidLogitsError": "nanovllm.errors",
    "InvalidStateError": "nanovllm.errors",
    "ModelLoadError": "nanovllm.errors",
    "NanoVLLMError": "nanovllm.errors",
    "NotSupportedError": "nanovllm.errors",
    "OutOfMemoryError": "nanovllm.errors",
    "ReplicaLostError": "nanovllm.errors",
    "RequestTooLargeError": "nanovllm.errors",
    "StepFailedError": "nanovllm.errors",
    "UnknownArgumentError": "nanovllm.errors",
    "WorkerError": "nanovllm.errors",
}
__all__ = list(_MODULE_OF)

if TYPE_CHECKING:  # "import X as X" marks a name as public
    from nanovllm.async_llm import AsyncLLM as AsyncLLM
    from nanovllm.engine.async_llm_engine import AsyncLLMEngine as AsyncLLMEngine
    from nanovllm.engine.llm_engine import LLMEngine as LLMEngine
    from nanovllm.engine_args import AsyncEngineArgs as AsyncEngineArgs
    from nanovllm.engine_args import EngineArgs as EngineArgs
    from nanovllm.errors import BackendUnavailableError as BackendUnavailableError
    from nanovllm.errors import ChannelError as ChannelError
    from nanovllm.errors import EngineDeadError as EngineDeadError
    from nanovllm.errors import InvalidArgumentError as InvalidArgumentError
    from nanovllm.errors import InvalidLogitsError as InvalidLogitsError
    from nanovllm.errors import InvalidStateError as InvalidStateError
    from nanovllm.errors import ModelLoadError as ModelLoadError
    from nanovllm.errors import NanoVLLMError as NanoVLLMError
    from nanovllm.errors import NotSupportedError as NotSupportedError
    from nanovllm.errors import OutOfMemoryError as OutOfMemoryError
    from nanovllm.errors import ReplicaLostError as ReplicaLostError
    from nanovllm.errors import RequestTooLargeError as RequestTooLargeError
    from nanovllm.errors import StepFailedError as StepFailedError
    from nanovllm.errors import UnknownArgumentError as UnknownArgumentError
    from nanovllm.errors import WorkerError as WorkerError
    from nanovllm.inputs import TextPrompt as TextPrompt
    from nanovllm.inputs import TokensPrompt as TokensPrompt
    from nanovllm.llm import LLM as LLM
    from nanovllm.outputs import CompletionOutput as CompletionOutput
    from nanovllm.outputs import Logprob as Logprob
    from nanovllm.outputs import RequestMetrics as RequestMetrics
    from nanovllm.outputs import RequestOutput as RequestOutput
    from nanovllm.sampling_params import RequestOutputKind as RequestOutputKind
    from nanovllm.sampling_params import SamplingParams as SamplingParams
    from nanovllm.sampling_params import StructuredOutputsParams as StructuredOutputsParams


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
