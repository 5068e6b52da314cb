"""Architecture name (as config.json spells it) → the class that runs it.

A new model is one file in this folder and one line below. Only `get_model_class` imports the classes, so that the
list of supported architectures needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nanovllm.errors import ModelLoadError

if TYPE_CHECKING:
    from nanovllm.models.causal_lm import CausalLM

_MODELS = {
    "Qwen3ForCausalLM": "nanovllm.models.qwen3",
}


def supported_architectures() -> tuple[str, ...]:
    return tuple(_MODELS)


def check_architecture(architecture: str) -> None:
    """Raises ModelLoadError, with the supported architectures, when `architecture` is not one of them."""
    if architecture not in _MODELS:
        raise ModelLoadError(
            f"architectures=[{architecture!r}] is not supported. Supported: {', '.join(_MODELS)}. "
            "A new one is a file in nanovllm/models and a line in nanovllm/models/registry.py."
        )


def get_model_class(architecture: str) -> type[CausalLM]:
    """Returns the class for an architecture. Raises ModelLoadError when it is not supported."""
    check_architecture(architecture)
    model_class: type[CausalLM] = getattr(importlib.import_module(_MODELS[architecture]), architecture)
    return model_class
