"""Turns an out-of-memory error of torch into an OutOfMemoryError that says what to change."""

from __future__ import annotations

import torch

from nanovllm.config import ResolvedConfig
from nanovllm.errors import OutOfMemoryError
from nanovllm.utils.device_memory import describe_memory


def step_out_of_memory(
    error: torch.OutOfMemoryError, num_tokens: int, device: torch.device, resolved: ResolvedConfig
) -> OutOfMemoryError:
    """Returns the error for a step of `num_tokens` tokens, with the numbers and the settings to change."""
    blocks, tokens = resolved.num_blocks, resolved.max_num_batched_tokens
    return OutOfMemoryError(
        f"A step of {num_tokens} tokens ran out of memory: {error} {describe_memory(device)[0]}. The largest "
        "steps fitted when the engine started: end other processes on this device, or leave steps more room, with "
        f"num_kvcache_blocks={blocks * 9 // 10} instead of {blocks} (or gpu_memory_utilization a tenth lower), or "
        f"max_num_batched_tokens={max(tokens // 2, resolved.max_num_seqs)} instead of {tokens}."
    )
