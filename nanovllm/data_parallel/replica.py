"""Replica: an engine in a process of its own, which is started again when it dies or hangs."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Protocol

from nanovllm.async_engine.engine_process import EngineProcess
from nanovllm.async_llm import AsyncLLM, connected
from nanovllm.data_parallel.placement import Placement
from nanovllm.data_parallel.step_watch import StepWatch
from nanovllm.logs import events
from nanovllm.metrics import MetricsSnapshot
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_LOOK_SECONDS = 0.1  # between looks at the engine
_GRACE_SECONDS = 5.0  # beyond step_timeout, for several ranks to find the one that is late
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0  # seconds before another attempt to start it


class ReplicaObserver(Protocol):
    """What a replica tells about its state, in a thread of its own."""

    def lost(self, replica: Replica) -> None:
        """Its engine has died."""

    def restarted(self, replica: Replica) -> None:
        """It has a new engine."""


class Replica:
    """Engine number `index`, with the connection to its process. Both are there once `start` has returned."""

    engine: AsyncLLM
    connection: EngineProcess

    def __init__(self, index: int, placement: Placement) -> None:
        self.index, self._placement = index, placement
        self._closing = threading.Event()
        self._lock = threading.Lock()  # of the attributes that change when an engine is started again
        self._counts = MetricsSnapshot()  # of earlier engines, and of the requests that were lost with them

    def start(self) -> None:
        """Starts the engine. Raises what that raises."""
        self.connection, self.engine = self._make_engine()

    def watch(self, observer: ReplicaObserver) -> None:
        """From now on, ends the engine when it hangs, and starts it again whenever it has died."""
        name = f"nanovllm-replica-{self.index}"
        threading.Thread(target=self._watch, args=(observer,), name=name, daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return not self.engine.is_dead

    def count_lost_request(self) -> None:
        """Counts a request that ended with its engine, which cannot count it any more."""
        with self._lock:
            self._counts += MetricsSnapshot(finished={"error": 1})

    def metrics(self) -> MetricsSnapshot:
        """Returns the figures of its engine, with the counts of those before it."""
        with self._lock:
            counts, connection, engine = self._counts, self.connection, self.engine
        return counts + _metrics_of(connection, engine)  # waits for a step

    def exit(self) -> None:
        """Ends the engine. Calling it again does nothing."""
        self._closing.set()
        with self._lock:
            self.engine.exit()

    def _make_engine(self) -> tuple[EngineProcess, AsyncLLM]:
        config = self._placement.config.for_serving()
        connection = EngineProcess(config, variables=self._placement.variables, replica=self.index)
        return connection, connected(config, connection)

    def _watch(self, observer: ReplicaObserver) -> None:
        steps = self._watch_steps()
        while self.is_alive or not self._closing.is_set():
            time.sleep(_LOOK_SECONDS)
            if self.is_alive:
                if steps.hangs():
                    seconds = self._placement.config.step_timeout
                    self.connection.kill(f"made no step for step_timeout={seconds:g} s and was ended")
            elif not self._closing.is_set():
                steps.stop()
                observer.lost(self)
                self.engine.exit()
                if self._restart():
                    steps = self._watch_steps()
                    observer.restarted(self)
        steps.stop()

    def _watch_steps(self) -> StepWatch:
        return StepWatch(self.connection, self._placement.config.step_timeout + _GRACE_SECONDS)

    def _restart(self) -> bool:
        """Makes a new engine, at the first attempt that succeeds. Returns False if `exit` was called before that."""
        delay = _FIRST_DELAY
        while not self._closing.is_set():
            try:
                connection, engine = self._make_engine()
            except Exception as error:
                events.replica_not_started.log(logger, replica=self.index, error=str(error), seconds=delay)
                self._closing.wait(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
                continue
            with self._lock:
                self._counts += _metrics_of(self.connection, self.engine)
                self.connection, self.engine = connection, engine
                if self._closing.is_set():
                    engine.exit()
            return not self._closing.is_set()
        return False


def _metrics_of(connection: EngineProcess, engine: AsyncLLM) -> MetricsSnapshot:
    """Returns the figures of an engine. One that is dead uses nothing."""
    snapshot = connection.metrics()
    if not engine.is_dead:
        return snapshot
    return replace(snapshot, num_running=0, num_waiting=0, used_blocks=0, num_blocks=0)
