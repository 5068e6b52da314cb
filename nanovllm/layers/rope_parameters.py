"""How a model turns positions into rotations, as plain values (no torch, so that reading a config stays cheap)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ModelLoadError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# What each type reads beside rope_type and rope_theta: (required, optional).
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}


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

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], max_position_embeddings: int) -> RopeParameters:
        """Reads a config's `rope_parameters` (or `rope_scaling` with `rope_theta` merged in).

        Refuses fields that the type does not read, because ignoring one would rotate by angles other than those of
        training.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        for name, value in given.items():
            if name not in ("rope_type", "type") and not (isinstance(value, (int, float)) and value >= 0):
                raise ModelLoadError(f"rope: {name}={value!r} is not supported: it must be a number ≥ 0.")
        rope_type = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        theta = float(given.pop("rope_theta", 10_000.0))
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ModelLoadError("rope: partial_rotary_factor is not supported, only whole heads are rotated (1.0).")
        if rope_type not in _FIELDS:
            raise ModelLoadError(f"rope: rope_type={rope_type!r} is not supported. Supported: {', '.join(ROPE_TYPES)}.")
        required, optional = _FIELDS[rope_type]
        missing = [name for name in required if name not in given]
        unknown = [name for name in given if name not in required + optional]
        if missing or unknown:
            raise ModelLoadError(
                f"rope: rope_type={rope_type!r} needs {list(required)} and may have {list(optional)}; "
                f"missing: {missing}, not supported: {unknown}."
            )
        if rope_type in ("yarn", "llama3"):
            original = given.setdefault("original_max_position_embeddings", max_position_embeddings)
            given.setdefault("factor", max_position_embeddings / original)
        return cls(theta=theta, rope_type=rope_type, **given)

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
