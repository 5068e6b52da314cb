"""StepTimeModel: predicts how long a step takes, from the steps that were measured."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# The parts of a step's time, in the order of the arrays below: a constant, reading the context of the decode rows,
# computing prompt tokens, and their attention to the tokens before them. The units bring all four to the same order of
# magnitude.
_UNITS = np.array([1, 100_000, 1_000, 10_000_000])
_DECODE_WINDOW = 32  # steps without prompt tokens
_PROMPT_WINDOW = 8  # steps with prompt tokens, for each power of two of their number …
_MEMORY = 128  # … among the last so many


@dataclass(frozen=True)
class StepSize:
    """What the time of a step depends on."""

    context: int  # tokens that the decode rows read
    num_prompt_tokens: int = 0
    num_pairs: float = 0.0  # of a prompt token and one before it

    @property
    def parts(self) -> npt.NDArray[np.float64]:
        parts: npt.NDArray[np.float64] = (1.0, self.context, self.num_prompt_tokens, self.num_pairs) / _UNITS
        return parts


class _Measured(NamedTuple):
    parts: npt.NDArray[np.float64]
    seconds: float
    number: int  # of steps with prompt tokens up to this one


class StepTimeModel:
    """Predicts how long a step takes: a constant, plus a time for each of the three counts of its `StepSize`.

    These four are a least-squares fit to the last 32 steps without prompt tokens and, of the last 128 with some, the
    last 8 for each power of two of their number. So the cost of prompts is still known after a long time without any,
    and that of long ones after some short ones. Errors count relative to the measured time, or to the
    median if that is longer, so that one odd step, such as one that captures a CUDA graph, weighs little. Equal
    measurements give equal predictions.
    """

    def __init__(self) -> None:
        self._decode_steps: deque[_Measured] = deque(maxlen=_DECODE_WINDOW)
        self._prompt_steps: dict[int, deque[_Measured]] = {}  # by the power of two of their prompt tokens
        self._num_prompt_steps = 0
        self._coefficients: npt.NDArray[np.float64] = np.zeros(4)  # seconds, none negative
        self._largest = 0  # most prompt tokens of a measured step
        self._is_current = True  # whether the two above are those of all measured steps

    def observe(self, size: StepSize, seconds: float) -> None:
        """Takes the time of a step."""
        steps = self._decode_steps
        if size.num_prompt_tokens:
            self._num_prompt_steps += 1
            power = size.num_prompt_tokens.bit_length()
            steps = self._prompt_steps.setdefault(power, deque(maxlen=_PROMPT_WINDOW))
        steps.append(_Measured(size.parts, seconds, self._num_prompt_steps))
        self._is_current = False

    def seconds(self, size: StepSize) -> float:
        """Returns how long a step takes."""
        if not self._is_current:
            self._fit()
        return float(self._coefficients @ size.parts)

    def num_prompt_tokens(self, context: int, start: int, seconds: float, most: int) -> int:
        """Returns how many tokens of a prompt, from position `start` on, a step of `seconds` can compute.

        At most `most`, and at most twice as many as one of the measured steps, since a fit says little beyond those.
        """
        left = seconds - self.seconds(StepSize(context))
        if left <= 0:
            return 0
        most = min(most, 2 * self._largest)
        _, _, per_token, per_pair = (self._coefficients / _UNITS).tolist()
        per_token += per_pair * start
        # n tokens take `per_token · n + per_pair · n² / 2` seconds.
        slowest = per_token + math.sqrt(per_token**2 + 2 * per_pair * left)
        return most if 2 * left >= slowest * most else int(2 * left / slowest)

    def _fit(self) -> None:
        oldest = self._num_prompt_steps - _MEMORY
        prompt_steps = itertools.chain.from_iterable(self._prompt_steps.values())
        steps = [*self._decode_steps, *(step for step in prompt_steps if step.number > oldest)]
        parts = np.array([step.parts for step in steps])  # [num_steps, 4]
        seconds = np.array([step.seconds for step in steps])
        self._largest = round(float(parts[:, 2].max() * _UNITS[2]))
        scale = np.maximum(seconds, max(float(np.median(seconds)), 1e-9))
        fitted = list(range(len(_UNITS)))
        while fitted:
            found = np.linalg.lstsq(parts[:, fitted] / scale[:, None], seconds / scale)[0]
            self._coefficients = np.zeros(len(_UNITS))
            self._coefficients[fitted] = np.maximum(found, 0.0)
            if found.min() >= 0:
                break
            del fitted[int(found.argmin())]
        self._is_current = True
