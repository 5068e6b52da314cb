"""How a model turns positions into rotations, as plain values (no torch, so that reading a config stays cheap)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding of a model; `layers.rotary_embedding` has the formulas."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # yarn, llama3: the length of pre-training
    attention_factor: float | None = None  # yarn: scale of cos and sin; None: derived from factor and mscale
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3

    def max_context_len(self, max_position_embeddings: int) -> int:
        """Returns the longest context that these rotations support.

        linear and yarn stretch the trained length by `factor`. dynamic would have to rotate all keys again when a
        context grows past `max_position_embeddings`. The cache stores rotated keys, so contexts end at that length.
        """
        if self.rope_type == "linear":
            return int(max_position_embeddings * self.factor)
        if self.rope_type == "yarn":
            return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))
        return max_position_embeddings
