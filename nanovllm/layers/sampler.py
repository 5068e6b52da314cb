"""From logits to the next token, on the device, in one pass."""

from __future__ import annotations

import torch

from nanovllm.kernels.sample import sample


def sample_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """One token a row: greedy where the temperature is 0, else drawn by the Gumbel-max trick.

    logits [num_rows, vocab_size]; temperatures [num_rows] float32; seeds [num_rows] int64; positions [num_rows]
    int32 or int64, of the token that is drawn → token ids [num_rows] int32. The noise is a function of seed,
    position and token id alone, so a seeded request draws the same whatever runs beside it.
    """
    return sample(logits, temperatures, seeds, positions)
