"""How one request is sampled and when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from nanovllm.errors import InvalidArgumentError, checks_argument_names

MAX_SEED = 2**63 - 1


@checks_argument_names
@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    temperature: 0 is greedy; up to 2, logits are divided by it before a token is drawn.
    max_tokens: the most tokens to generate; None goes on to the model's length.
    ignore_eos: generate past the end-of-sequence token, for benchmarks.
    seed: a request with a seed draws the same tokens whatever runs beside it; None takes one from
        the engine's seed and the order of arrival.

    Raises InvalidArgumentError (a ValueError) that names the field, for a value that is not allowed.
    """

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not math.isfinite(self.temperature) or not 0 <= self.temperature <= 2:
            raise InvalidArgumentError("temperature", self.temperature, "a number from 0 (greedy) to 2")
        if self.max_tokens is not None and (not _is_integer(self.max_tokens) or self.max_tokens < 1):
            raise InvalidArgumentError(
                "max_tokens", self.max_tokens, "an integer ≥ 1, or None for as many as the model's length allows"
            )
        if not isinstance(self.ignore_eos, bool):
            raise InvalidArgumentError("ignore_eos", self.ignore_eos, "True or False")
        if self.seed is not None and (not _is_integer(self.seed) or not 0 <= self.seed <= MAX_SEED):
            raise InvalidArgumentError("seed", self.seed, "an integer from 0 to 2**63 - 1, or None")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's integers included


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
