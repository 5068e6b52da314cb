"""Threads on a CPU: one where more are slower, and what the user has set stays."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from nanovllm.runner import cpu_threads
from nanovllm.utils import env


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def choose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ms: dict[int, float], **fresh: bool
) -> str:
    monkeypatch.setattr(cpu_threads, "_product_ms", ms.get)
    with caplog.at_level("INFO", logger="nanovllm"):
        cpu_threads.choose_cpu_threads(fresh.get("is_fresh", True), num_ranks=2)
    (record,) = caplog.records
    assert record.fields["num_threads"] == torch.get_num_threads()  # type: ignore[attr-defined]
    return record.getMessage()


@pytest.mark.parametrize(("ms", "num_threads"), [({1: 0.1, 2: 4.0}, 1), ({1: 0.1, 2: 0.15}, 2), ({1: 0.2, 2: 0.1}, 2)])
def test_one_thread_where_more_are_slower(
    two_threads: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ms: dict[int, float],
    num_threads: int,
) -> None:
    message = choose(monkeypatch, caplog, ms)
    assert message.startswith(f"CPU threads: {num_threads} (a small product takes {ms[2]:.2f} ms with 2 threads")
    assert message.endswith("; 1 in each further rank)")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", None])
def test_what_the_user_has_set_stays(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    if name is not None:
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(env, "num_usable_cores", lambda: 8)  # so that 2 is a number that somebody set
    message = choose(monkeypatch, caplog, {1: 0.1, 2: 4.0}, is_fresh=name is not None)
    assert message.startswith("CPU threads: 2 (set before the engine started;")


def test_a_product_is_measured_and_torch_is_loaded_once(two_threads: None) -> None:
    assert cpu_threads._product_ms(1) > 0
    assert not cpu_threads.load_torch("cpu")


def test_the_spin_count_is_set_only_for_the_import(two_threads: None) -> None:
    with env.openmp_spins_briefly():
        assert os.environ["GOMP_SPINCOUNT"] == "10000"
    assert "GOMP_SPINCOUNT" not in os.environ
