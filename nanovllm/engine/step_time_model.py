"""StepTimeModel: predicts how long a step takes, from the steps that were measured."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# The parts of a step's time, in the order of the arrays below: a constant, reading the context of the decode rows,
# computing prompt tokens, and their attention to the tokens before them. The units bring all four to the same order of
# magnitude.
_UNITS = np.array([1, 100_000, 1_000, 10_000_000])
_WINDOW = 32  # steps of each kind


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


class StepTimeModel:
    """Predicts how long a step takes: a constant, plus a time for each of the three counts of its `StepSize`.

    These four are a least-squares fit to the last 32 steps with prompt tokens and the last 32 without, so that the cost
    of prompts is still known after a long time without any. Errors count relative to the measured time, or to the
    median if that is longer, so that one odd step, such as one that captures a CUDA graph, weighs little. Equal
    measurements give equal predictions.
    """

    def __init__(self) -> None:
        self._steps: dict[bool, deque[tuple[npt.NDArray[np.float64], float]]] = {
            has_prompts: deque(maxlen=_WINDOW) for has_prompts in (False, True)
        }  # the parts of each measured step, and its seconds
        self._coefficients: npt.NDArray[np.float64] = np.zeros(4)  # seconds, none negative
        self._largest = 0  # most prompt tokens of a measured step
        self._is_current = True  # whether the two above are those of all measured steps

    def observe(self, size: StepSize, seconds: float) -> None:
        """Takes the time of a step."""
        self._steps[size.num_prompt_tokens > 0].append((size.parts, seconds))
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
        steps = [*self._steps[False], *self._steps[True]]
        parts = np.array([parts for parts, _ in steps])  # [num_steps, 4]
        seconds = np.array([seconds for _, seconds in steps])
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
