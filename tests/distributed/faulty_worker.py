"""A worker that dies, raises or hangs at a place of choice. Tests have the pool start it instead of `run_worker`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nanovllm.distributed import worker_pool
from nanovllm.distributed.shm_channel import ChannelWriter
from nanovllm.distributed.worker_process import WorkerStart, run_worker
from nanovllm.engine.batch import ScheduledBatch

if TYPE_CHECKING:
    from nanovllm.runner.step_handle import DeviceStepHandle


@dataclass(frozen=True)
class Fault:
    rank: int
    place: str  # see `_prepare`
    how: str  # kill, quit, raise, spin, or stop
    diary: Path  # a file that is there once it has happened


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Engines that start from now on have it."""
    monkeypatch.setattr(worker_pool, "run_worker", partial(run_faulty_worker, fault))


def run_faulty_worker(fault: Fault, start: WorkerStart) -> None:
    """A worker's process, from beginning to end."""
    if start.rank == fault.rank:
        if fault.place == "before":
            happen(fault)
        _prepare(fault)
    run_worker(start)


def happen(fault: Fault) -> None:
    fault.diary.touch()
    if fault.how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.how == "quit":
        os._exit(3)
    elif fault.how == "raise":
        raise LookupError(f"on purpose: {fault.place}")
    while fault.how == "spin":
        pass


def _prepare(fault: Fault) -> None:
    from nanovllm.distributed import process_group as rank_group
    from nanovllm.distributed import worker_process as worker
    from nanovllm.engine import model_runner
    from nanovllm.layers.parallel import TensorParallel
    from nanovllm.runner import startup
    from nanovllm.runner.kv_cache import KVCacheShape

    place = fault.place
    if place == "attached":
        _happens_in(fault, worker._Worker, "run")
    elif place == "join":
        _happens_in(fault, rank_group, "join_ranks")
    elif place == "load":
        _happens_in(fault, startup, "load_weights")
    elif place == "cache":
        _happens_in(fault, KVCacheShape, "allocate")
    elif place in ("prefill", "decode"):
        _happens_in(fault, model_runner.ModelRunner, "submit", lambda _, batch: batch.kind == place)
    elif place == "gather":
        _happens_in(fault, TensorParallel, "all_gather", lambda _, tensor: tensor.dim() == 2)
    elif place == "answer":
        _happens_in(fault, model_runner.ModelRunner, "synchronize")
    elif place == "last word":
        model_runner.ModelRunner.synchronize = _fail_at_length  # type: ignore[method-assign]
        _happens_in(fault, ChannelWriter, "_write", lambda _, kind, length, offset, *rest: offset > 0)
    elif place == "exit":
        _happens_in(fault, model_runner.ModelRunner, "shutdown")


def _happens_in(
    fault: Fault, owner: Any, name: str, condition: Callable[..., bool] = lambda *_arguments, **_named: True
) -> None:
    function = getattr(owner, name)

    def faulty(*arguments: Any, **named: Any) -> Any:
        if condition(*arguments, **named):
            happen(fault)
        return function(*arguments, **named)

    setattr(owner, name, faulty)


def _fail_at_length(_: object) -> None:
    raise LookupError("many kilobytes of reasons, " * 4000)


def run_leaking_worker(start: WorkerStart) -> None:
    """A worker that keeps eleven objects of each step."""
    from nanovllm.engine.model_runner import ModelRunner

    submit = ModelRunner.submit
    kept: list[object] = []

    def leaking(runner: ModelRunner, batch: ScheduledBatch) -> DeviceStepHandle:
        kept.extend([number, kept] for number in range(11))
        return submit(runner, batch)

    ModelRunner.submit = leaking  # type: ignore[method-assign]
    run_worker(start)
