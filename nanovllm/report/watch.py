"""Watch: what a question needs from a log beyond the figures that are always collected."""

from __future__ import annotations

from dataclasses import dataclass

BY_FIELD = {"ttft": "ttft_s", "e2e": "e2e_s", "stall": "longest_stall_s", "queue": "queue_s"}
BY = tuple(BY_FIELD)  # what the slowest requests can be sorted by


@dataclass(frozen=True)
class Watch:
    request_id: str | None = None
    step: int | None = None
    by: str = "e2e"
    num_slowest: int = 10
