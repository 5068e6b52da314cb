"""Tensor parallelism: worker processes, and what they share. `cleanup_dist_env_and_memory` is here as in vLLM."""

from __future__ import annotations

import gc


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Frees the memory of engines that nothing refers to any more. `exit()` of an engine does it at once.

    shutdown_ray: has no effect, as engines do not start Ray.
    """
    import torch

    gc.collect()  # runs the finalizers of engines
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
