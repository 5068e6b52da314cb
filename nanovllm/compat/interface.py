"""VllmInterface: what `LLM` and `AsyncLLM` have because vLLM's classes have it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from nanovllm.compat.unsupported import UnsupportedMethods
from nanovllm.config import EngineConfig

V = TypeVar("V", bound="VllmInterface")


class VllmInterface(UnsupportedMethods):
    """Base class of `LLM` and `AsyncLLM`."""

    if TYPE_CHECKING:  # they take the arguments of EngineConfig

        def __init__(self, model: str, **arguments: object) -> None: ...

    @classmethod
    def from_engine_args(cls: type[V], engine_args: EngineConfig) -> V:
        """Returns an engine with the arguments of an EngineArgs or an EngineConfig."""
        return cls(**asdict(engine_args))
