"""Chooses where the engine of an `AsyncLLM` runs: in a process of its own, or in a thread."""

from __future__ import annotations

from pathlib import Path

from nanovllm.async_engine.consumers import EngineConnection
from nanovllm.async_engine.engine_process import EngineProcess
from nanovllm.async_engine.engine_thread import EngineThread
from nanovllm.config import EngineConfig
from nanovllm.utils import env

_GPUS = ("nvidia[0-9]*", "dxg")  # files in /dev, the second one of Windows' subsystem for Linux


def make_connection(config: EngineConfig) -> EngineConnection:
    """Returns the connection to an engine that is not started yet."""
    chosen = config.engine_process
    if chosen is None:
        chosen = env.engine_process()
    if chosen is None:  # a step on a CPU leaves the interpreter to others for most of its time
        chosen = config.device.startswith("cuda") or (config.device == "auto" and has_gpu())
    return EngineProcess(config) if chosen else EngineThread(config)


def has_gpu() -> bool:
    """Returns whether this machine seems to have a GPU. Loads no torch, which takes seconds."""
    return any(path for pattern in _GPUS for path in Path("/dev").glob(pattern))
