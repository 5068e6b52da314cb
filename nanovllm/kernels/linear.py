"""Matrix products with weights laid out for oneDNN, which on a CPU beats the BLAS behind torch's own product.

Only float32 is packed: for half precision torch itself uses oneDNN. The operators are those that torch's own
compiler emits for CPUs; where they are missing, weights stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_TYPICAL_NUM_TOKENS = 64  # oneDNN picks the layout for a batch size; any other works with it too
_MAX_UNPADDED = 64  # tokens; more are padded to one of eight sizes between two powers of two


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Returns weight [output_size, input_size] in oneDNN's layout, which only `linear` reads, or unchanged."""
    if not can_pack(weight):
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_NUM_TOKENS)
    return packed


def can_pack(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns hidden · weightᵀ + bias: [num_tokens, input_size] → [num_tokens, output_size].

    `weight` may come from `pack_weight`.
    """
    if not weight.is_mkldnn:
        return F.linear(hidden, weight, bias)
    num_tokens = len(hidden)
    missing = padded_size(num_tokens) - num_tokens
    if missing:
        hidden = F.pad(hidden, (0, 0, 0, missing))
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return output[:num_tokens] if missing else output


def padded_size(num_tokens: int) -> int:
    """Returns the number of rows that `num_tokens` rows are padded to.

    oneDNN compiles and keeps code for every number of rows, up to half a megabyte each: prompts of all lengths would
    fill gigabytes.
    """
    step = 1 if num_tokens <= _MAX_UNPADDED else 1 << ((num_tokens - 1).bit_length() - 4)
    return -(-num_tokens // step) * step
