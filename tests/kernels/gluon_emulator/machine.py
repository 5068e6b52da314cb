"""What runs at the same time in the emulator: partitions, and the work that they have started and not waited for.

Each partition is a thread, of which one runs at a time. A partition may lose its turn where it touches what others see:
the one of highest priority runs. Priorities change at random, rarely or often. Rarely lets one partition run ahead of
another as far as the barriers allow. When a copy or a matrix product takes place is random too: at the latest when its
result is waited for, or when nothing else can go on. The same seed gives the same order.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class Stopped(BaseException):
    """Ends a partition because another one has failed."""


class Partition:
    """A thread of a program; `number` is the program's, `grid` the launch's."""

    def __init__(self, name: str, number: tuple[int, ...], grid: tuple[int, ...], work: Callable[[], Any]) -> None:
        self.name, self.number, self.grid, self.work = name, number, grid, work
        self.priority = 0.0
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""  # what a report of a deadlock says; empty for one that waits for its own partitions
        self.ended = False
        self.result: Any = None
        self.unfenced: list[Any] = []  # stores that asynchronous readers do not see yet


@dataclass(eq=False)
class Operation:
    """Work that a partition has started. Those of one partition and one ordered kind take place in their order."""

    owner: Partition
    kind: str
    in_order: bool
    take_place: Callable[[], None]


class Machine:
    """Runs one launch."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # Four seeds in a row go through both of both.
        self.promptness = (0.01, 0.3)[seed % 2]  # how often work in flight takes place before it must
        self.fickleness = (0.03, 0.4)[seed // 2 % 2]  # how often the partitions get new priorities
        self.host = Partition("host", (), (), lambda: None)
        self.running = self.host
        self.partitions: list[Partition] = []
        self.in_flight: list[Operation] = []
        self.error: BaseException | None = None

    def run(self, works: Sequence[Callable[[], Any]]) -> None:
        """Runs the works side by side. Raises the first error of any partition."""
        try:
            self.run_together([Partition(f"lane {index}", (), (), work) for index, work in enumerate(works)])
        except Stopped:
            assert self.error is not None
            raise self.error from None

    def run_together(self, partitions: list[Partition]) -> None:
        """Returns when all have ended."""
        for partition in partitions:
            partition.priority = self.random.random()
            self.partitions.append(partition)
            threading.Thread(target=self._run, args=(partition,), daemon=True).start()
        self.pause(lambda: all(partition.ended for partition in partitions))
        self.partitions = [partition for partition in self.partitions if partition not in partitions]

    def pause(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Lets others run, and returns some time after `ready` says so."""
        me = self.running
        me.ready, me.waits_for = ready, waits_for
        self._hand_over(me)
        if self.error is not None:
            raise Stopped

    def start(self, kind: str, take_place: Callable[[], None], in_order: bool = True) -> None:
        self.in_flight.append(Operation(self.running, kind, in_order, take_place))
        self.pause()

    def finish(self, kind: str, outstanding: int = 0) -> None:
        """Lets the running partition's work of a kind take place, but for the last `outstanding`."""
        self.pause()
        mine = [work for work in self.in_flight if work.owner is self.running and work.kind == kind]
        for work in mine[: max(len(mine) - outstanding, 0)]:
            self._take_place(work)

    def _take_place(self, work: Operation) -> None:
        self.in_flight.remove(work)
        work.take_place()

    def _run(self, partition: Partition) -> None:
        partition.turn.acquire()
        try:
            if self.error is None:
                partition.result = partition.work()
        except BaseException as error:  # handed to the thread that launched
            if self.error is None:
                self.error = error
        partition.ended = True
        self._hand_over(partition)

    def _hand_over(self, me: Partition) -> None:
        try:
            chosen = self._choose()
        except Exception as error:
            self.error = error
            chosen = self._choose()
        self.running = chosen
        if chosen is not me:
            chosen.turn.release()
            if not me.ended:
                me.turn.acquire()

    def _choose(self) -> Partition:
        alive = [partition for partition in self.partitions if not partition.ended]
        if self.error is not None:
            return alive[-1] if alive else self.host  # children end before those that wait for them
        while True:
            ready = [partition for partition in [*alive, self.host] if partition.ready()]
            if self.in_flight and (not ready or self.random.random() < self.promptness):
                first: dict[Any, Operation] = {}
                for work in self.in_flight:
                    first.setdefault((work.owner, work.kind) if work.in_order else work, work)
                self._take_place(self.random.choice(list(first.values())))
            elif ready:
                if self.random.random() < self.fickleness:
                    for partition in ready:
                        partition.priority = self.random.random()
                return max(ready, key=lambda partition: partition.priority)
            else:
                waits = [f"{partition.name} waits for {partition.waits_for}" for partition in alive]
                raise AssertionError("deadlock: " + "; ".join(wait for wait in waits if not wait.endswith("for ")))


active: list[Machine] = []  # the launch that runs


def machine() -> Machine:
    return active[-1]
