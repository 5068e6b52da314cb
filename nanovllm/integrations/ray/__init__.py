"""Ray: batch inference with Ray Data (`data`), and the server as a deployment of Ray Serve (`serve`).

Names are imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("ray") is None:
    raise ImportError('nanovllm.integrations.ray needs Ray, which is not installed: pip install "nanovllm[ray]"')

_MODULE_OF = {
    "LLMPredictor": "nanovllm.integrations.ray.data",
    "generate": "nanovllm.integrations.ray.data",
    "build_app": "nanovllm.integrations.ray.serve",
}
__all__ = list(_MODULE_OF)

if TYPE_CHECKING:  # "import X as X" marks a name as public
    from nanovllm.integrations.ray.data import LLMPredictor as LLMPredictor
    from nanovllm.integrations.ray.data import generate as generate
    from nanovllm.integrations.ray.serve import build_app as build_app


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
