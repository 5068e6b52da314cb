from __future__ import annotations

import pytest

from nanovllm.utils import stopwatch
from nanovllm.utils.stopwatch import Stopwatch


def test_laps_share_out_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.5, 12.5, 13.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    for name in ("imports", "weights", "imports"):
        watch.lap(name)
    assert watch.seconds == {"imports": 1.0, "weights": 2.0}
    assert watch.total == 3.0
    assert str(watch) == "imports 1.00s, weights 2.00s"
