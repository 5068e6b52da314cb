"""Which attention backend serves prefill and which decode, and why.

`decide` is a pure table over what can run; `select_attention` finds out what can, builds the backends and logs the
choice in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nanovllm.attention.flash_attn_backend import (
    FA4_TILE,
    PAGE_MULTIPLE,
    FlashAttention4Prefill,
    FlashAttentionBackend,
    flash_attn_4_problem,
    flash_attn_problem,
)
from nanovllm.attention.interface import DecodeBackend, PrefillBackend
from nanovllm.attention.torch_backend import TorchBackend
from nanovllm.attention.triton_backend import TritonBackend
from nanovllm.errors import BackendUnavailableError, InvalidArgumentError
from nanovllm.kernels.triton_support import HAS_TRITON, INTERPRETED
from nanovllm.utils.logger import log_event, setup_logger

REQUESTS = ("auto", "flash_attn", "triton", "torch")

# Best first, with what speaks for each where it is the first that can run.
_PREFILL_ORDER = {
    "flash_attn_4": "the fastest prefill measured on Hopper",
    "flash_attn": "FlashAttention 2 of the package flash-attn",
    "triton": "our own kernel, which needs no further package",
    "torch": "runs everywhere",
}
_DECODE_ORDER = {
    "flash_attn": "FlashAttention 2 of the package flash-attn",
    "triton": "our own kernel, which needs no further package",
    "torch": "runs everywhere",
}
_DEFAULT_BLOCK_SIZE = {"flash_attn_4": FA4_TILE, "flash_attn": PAGE_MULTIPLE, "triton": 16, "torch": 16}

_logger = setup_logger(__name__)


@dataclass(frozen=True)
class AttentionSelection:
    """The two backends, the page size both can read, and a sentence for each choice."""

    prefill: PrefillBackend
    decode: DecodeBackend
    block_size: int
    prefill_reason: str
    decode_reason: str


@dataclass(frozen=True)
class Decision:
    """The same by name: what `decide` returns."""

    prefill: str
    decode: str
    block_size: int
    prefill_reason: str
    decode_reason: str


def select_attention(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int | None
) -> AttentionSelection:
    """Choose, build and log the attention backends.

    `requested` is one of "auto", "flash_attn", "triton", "torch"; block_size None leaves the page size to the choice.
    Raises BackendUnavailableError when what was asked for by name cannot run, InvalidArgumentError for another name.
    """
    problems = find_problems(requested, device, dtype, head_dim, block_size)
    decision = decide(requested, block_size, problems)
    log_event(
        _logger,
        logging.INFO,
        "attention.selected",
        "Attention backends: prefill={prefill} ({prefill_reason}), decode={decode} ({decode_reason}), "
        "block_size={block_size}",
        prefill=decision.prefill,
        prefill_reason=decision.prefill_reason,
        decode=decision.decode,
        decode_reason=decision.decode_reason,
        block_size=decision.block_size,
    )
    prefill_backends: dict[str, Callable[[], PrefillBackend]] = {
        "flash_attn_4": FlashAttention4Prefill,
        "flash_attn": FlashAttentionBackend,
        "triton": TritonBackend,
        "torch": TorchBackend,
    }
    decode_backends: dict[str, Callable[[], DecodeBackend]] = {
        "flash_attn": FlashAttentionBackend,
        "triton": TritonBackend,
        "torch": TorchBackend,
    }
    return AttentionSelection(
        prefill=prefill_backends[decision.prefill](),
        decode=decode_backends[decision.decode](),
        block_size=decision.block_size,
        prefill_reason=decision.prefill_reason,
        decode_reason=decision.decode_reason,
    )


def find_problems(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int | None
) -> dict[str, str]:
    """Why a backend cannot run here, by name; a backend without an entry can. Imports only what may be chosen."""
    problems: dict[str, str] = {}
    if device.type == "cuda":
        if not HAS_TRITON:
            problems["triton"] = "package triton is not installed"
    elif requested == "auto":
        problems["triton"] = "no CUDA device"
    elif not INTERPRETED:
        problems["triton"] = "no CUDA device, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    flash = static_flash_attn_problem(device.type, dtype, head_dim)
    pages = None
    if block_size is not None and block_size % PAGE_MULTIPLE != 0:
        pages = f"block_size={block_size} is not a multiple of {PAGE_MULTIPLE}"
    if requested in ("auto", "flash_attn"):
        flash_2 = flash or pages or flash_attn_problem(device, dtype, head_dim)
        flash_4 = flash or flash_attn_4_problem(device)
        if flash_2:
            problems["flash_attn"] = flash_2
        if flash_4:
            problems["flash_attn_4"] = flash_4
    return problems


def static_flash_attn_problem(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What rules out both FlashAttention packages without a look at them, or None."""
    if device_type != "cuda":
        return "no CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {str(dtype).removeprefix('torch.')} (it takes bfloat16 and float16)"
    if head_dim > 256 or head_dim % 8 != 0:
        return f"head_dim {head_dim} (it takes multiples of 8 up to 256)"
    return None


def decide(requested: str, block_size: int | None, problems: Mapping[str, str]) -> Decision:
    """The decision table: `problems` says, by backend, why it cannot run; what is not in it can."""
    if requested not in REQUESTS:
        raise InvalidArgumentError("attention_backend", requested, "one of " + ", ".join(REQUESTS))
    prefill, prefill_reason = _first_that_runs(requested, _PREFILL_ORDER, problems)
    decode, decode_reason = _first_that_runs(requested, _DECODE_ORDER, problems)
    if block_size is None:
        block_size = max(_DEFAULT_BLOCK_SIZE[prefill], _DEFAULT_BLOCK_SIZE[decode])
    return Decision(prefill, decode, block_size, prefill_reason, decode_reason)


def _first_that_runs(requested: str, order: Mapping[str, str], problems: Mapping[str, str]) -> tuple[str, str]:
    candidates = [name for name in order if requested == "auto" or name.removesuffix("_4") == requested]
    passed_over: list[str] = []
    for name in candidates:
        if name not in problems:
            reason = order[name] if requested == "auto" else f"attention_backend={requested}"
            return name, "; ".join([reason, *passed_over])
        passed_over.append(f"{name} passed over: {problems[name]}")
    raise BackendUnavailableError(
        f"attention_backend={requested!r} cannot run here: {problems[requested]}. "
        "Change that, or leave attention_backend at 'auto', which takes the best backend that can run."
    )
