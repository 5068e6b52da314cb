"""Reads the rope fields of a config.json: which values each type of scaling has, and their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ModelLoadError, shown
from nanovllm.layers.rope_parameters import RopeParameters

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
MAX_POSITIONS = 1 << 24  # of a context, scaling included: more than any published model has
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
# The smallest and the largest value of each number.
_RANGES: dict[str, tuple[float, float]] = {
    "rope_theta": (2, 1e15),
    "factor": (1, 10_000),
    "original_max_position_embeddings": (1, MAX_POSITIONS),
    "attention_factor": (0.001, 1000),
    "beta_fast": (0.001, 1e6),
    "beta_slow": (0.001, 1e6),
    "mscale": (0, 1000),
    "mscale_all_dim": (0, 1000),
    "low_freq_factor": (0.001, 1e6),
    "high_freq_factor": (0.001, 1e6),
    "partial_rotary_factor": (0, 1),
}
# Written by some publishers, and read neither by transformers nor here.
_WITHOUT_EFFECT = ("attn_factor", "finetuned")


def read_rope_parameters(fields: Mapping[str, Any], max_position_embeddings: int) -> RopeParameters:
    """Reads a config's `rope_parameters` (or `rope_scaling` with `rope_theta` merged in).

    Refuses fields that the type does not read, because ignoring one would rotate by angles other than those of
    training.
    """
    given = {name: value for name, value in fields.items() if value is not None and name not in _WITHOUT_EFFECT}
    rope_type = given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    if not isinstance(rope_type, str) or rope_type not in _FIELDS:
        raise ModelLoadError(
            f"rope: rope_type={shown(rope_type)} is not supported. Supported: {', '.join(ROPE_TYPES)}."
        )
    if rope_type not in ("yarn", "llama3"):  # it may stand beside the scaling of any type
        given.pop("original_max_position_embeddings", None)
    for name in ("beta_fast", "beta_slow"):
        if given.get(name) == 0:  # transformers takes it for absent
            del given[name]
    _check_values(given)
    theta = float(given.pop("rope_theta", 10_000.0))
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError("rope: partial_rotary_factor is not supported, only whole heads are rotated (1.0).")
    required, optional = _FIELDS[rope_type]
    missing = [name for name in required if name not in given]
    unknown = [name for name in given if name not in required + optional]
    if missing or unknown:
        raise ModelLoadError(
            f"rope: rope_type={rope_type!r} needs {list(required)} and may have {list(optional)}; "
            f"missing: {missing}, not supported: {shown(unknown)}."
        )
    if rope_type in ("yarn", "llama3"):
        original = given.setdefault("original_max_position_embeddings", max_position_embeddings)
        given.setdefault("factor", max_position_embeddings / original)
    rope = RopeParameters(theta=theta, rope_type=rope_type, **given)
    if rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ModelLoadError(
            f"rope: high_freq_factor={rope.high_freq_factor} is not supported: it must be larger than "
            f"low_freq_factor={rope.low_freq_factor}."
        )
    if rope.max_context_len(max_position_embeddings) > MAX_POSITIONS:
        raise ModelLoadError(
            f"rope: factor={rope.factor} is not supported: the context must be at most {MAX_POSITIONS} tokens long."
        )
    return rope


def _check_values(fields: Mapping[str, Any]) -> None:
    """Raises ModelLoadError unless every known field has a value of its range."""
    for name, value in fields.items():
        if name == "truncate":
            if not isinstance(value, bool):
                raise ModelLoadError(f"rope: truncate={shown(value)} is not supported: it must be true or false.")
        elif name in _RANGES:
            lowest, highest = _RANGES[name]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not lowest <= value <= highest:
                raise ModelLoadError(
                    f"rope: {name}={shown(value)} is not supported: it must be a number from {lowest:g} to {highest:g}."
                )
