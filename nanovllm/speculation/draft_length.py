"""DraftRate: how often the drafts of a row were right, and how long a draft pays."""

from __future__ import annotations

import math

_START = 0.7  # the share that is assumed of a row that has had no draft
_STEP = 1 / 8  # weight of the latest token
# What one more row adds to a decode step, as a share of what the step takes without any.
_ROW_COST = 0.03
# Tokens that a step with a draft must bring on average, beside what its rows cost. A row that has drafts is not in the
# step that is planned while its last one runs, so with several steps in flight it runs half as often, and the device
# waits for the host.
_WORTH_A_STEP = 1.25
_WORTH_TWO_STEPS = 2.5


class DraftRate:
    """The share of a row's drafted tokens that were right, the latest ones counting most."""

    def __init__(self) -> None:
        self.share = _START

    def observe(self, *, num_right: int, num_wrong: int) -> None:
        """Takes what became of a draft: so many tokens were right, and then a wrong one, or none."""
        self.share = self.after(num_right)
        self.share *= (1 - _STEP) ** num_wrong

    def after(self, num_right: float) -> float:
        """Returns what the share will be if the next `num_right` tokens are right."""
        return 1 - (1 - self.share) * math.pow(1 - _STEP, num_right)


def draft_length(share: float, num_rows: int, longest: int, *, overlaps: bool, token_cost: float = 0.0) -> int:
    """Returns how many tokens to draft for a row. 0: it gains nothing.

    The token at index i is right with the probability share^(i + 1), and then saves one of the `num_rows` tokens that
    a step brings. It costs a row, and what it takes to draft it. A token that saves less than it costs is not drafted,
    which is why drafts are shorter where many rows run.
    overlaps: whether steps are planned before the step before them is read. token_cost: what drafting one token of each
    row takes, as a share of a step.
    """
    cost = _ROW_COST * num_rows / (1 + _ROW_COST * num_rows) + token_cost
    length, expected, probability = 0, 1.0, share
    while length < longest and probability >= cost:
        length, expected, probability = length + 1, expected + probability, probability * share
    given_up = _WORTH_TWO_STEPS if overlaps else _WORTH_A_STEP
    return length if expected >= given_up + cost * length else 0
