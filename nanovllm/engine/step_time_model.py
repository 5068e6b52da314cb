"""StepTimeModel: predicts how long a step takes, from the steps that were measured."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

# A step's time has three parts, in the order of the arrays below: a constant, reading the context of the decode rows,
# and computing prompt tokens. These units bring all three to the same order of magnitude.
_CONTEXT_UNIT = 100_000  # tokens
_PROMPT_UNIT = 1_000  # tokens
_WINDOW = 32  # steps of each kind


class StepTimeModel:
    """Predicts `constant + a · context + b · prompt tokens` seconds. context: tokens that the decode rows read.

    The coefficients are a least-squares fit to the last 32 steps with prompt tokens and the last 32 without, so that
    the cost of prompts is still known after a long time without any. Errors count relative to the measured time, or to
    the median if that is longer, so that one odd step, such as one that captures a CUDA graph, weighs little. Equal
    measurements give equal predictions.
    """

    def __init__(self) -> None:
        self._steps: dict[bool, deque[tuple[float, float, float, float]]] = {
            has_prompts: deque(maxlen=_WINDOW) for has_prompts in (False, True)
        }  # the three parts of each step, and its seconds
        self._coefficients: npt.NDArray[np.float64] = np.zeros(3)  # seconds, none negative
        self._largest = 0  # most prompt tokens of a measured step
        self._is_current = True  # whether the two above are those of all measured steps

    def observe(self, context: int, num_prompt_tokens: int, seconds: float) -> None:
        """Takes the time of a step."""
        step = (1.0, context / _CONTEXT_UNIT, num_prompt_tokens / _PROMPT_UNIT, seconds)
        self._steps[num_prompt_tokens > 0].append(step)
        self._is_current = False

    def seconds(self, context: int, num_prompt_tokens: int) -> float:
        """Returns how long a step takes."""
        if not self._is_current:
            self._fit()
        return float(self._coefficients @ (1.0, context / _CONTEXT_UNIT, num_prompt_tokens / _PROMPT_UNIT))

    def num_prompt_tokens(self, context: int, seconds: float, most: int) -> int:
        """Returns how many prompt tokens a step of `seconds` can compute.

        At most `most`, and at most twice as many as one of the measured steps, since a fit says little beyond those.
        """
        left = seconds - self.seconds(context, 0)
        if left <= 0:
            return 0
        per_token = float(self._coefficients[2]) / _PROMPT_UNIT
        most = min(most, 2 * self._largest)
        return most if left >= per_token * most else int(left / per_token)

    def _fit(self) -> None:
        steps = np.array([*self._steps[False], *self._steps[True]])  # [num_steps, 4]
        parts, seconds = steps[:, :3], steps[:, 3]
        self._largest = round(parts[:, 2].max() * _PROMPT_UNIT)
        scale = np.maximum(seconds, max(float(np.median(seconds)), 1e-9))
        fitted = [0, 1, 2]
        while fitted:
            found = np.linalg.lstsq(parts[:, fitted] / scale[:, None], seconds / scale)[0]
            self._coefficients = np.zeros(3)
            self._coefficients[fitted] = np.maximum(found, 0.0)
            if found.min() >= 0:
                break
            del fitted[int(found.argmin())]
        self._is_current = True
