"""From an architecture's name to the class that runs it. A model's module is imported when its class is needed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nanovllm.models.architectures import MODELS, check_architecture

if TYPE_CHECKING:
    from nanovllm.models.causal_lm import CausalLM


def get_model_class(architecture: str) -> type[CausalLM]:
    """Returns the class for an architecture. Raises ModelLoadError when it is not supported."""
    check_architecture(architecture)
    model_class: type[CausalLM] = getattr(
        importlib.import_module(f"nanovllm.models.{MODELS[architecture]}"), architecture
    )
    return model_class
