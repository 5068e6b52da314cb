"""vLLM's place of `EngineArgs` and `AsyncEngineArgs`."""

from nanovllm.engine_args import AsyncEngineArgs as AsyncEngineArgs
from nanovllm.engine_args import EngineArgs as EngineArgs
