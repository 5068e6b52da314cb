"""Finds the rank that holds up the others, from the Python stacks of the workers.

On a signal a worker writes its stack into a pipe, even while it hangs: the handler is written in C and needs neither
the interpreter's lock nor the main thread. A process that does not answer is stopped, or is inside the kernel.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

_SIGNAL = signal.SIGUSR1
_SECONDS = 0.2  # for a process to answer
_BYTES = 1 << 16  # more than a pipe holds
# Files whose functions wait for other ranks.
_WAITING_PLACES = ("distributed/process_group.py", "distributed/shm_channel.py", "layers/parallel.py")


@dataclass(frozen=True)
class LateRank:
    """rank: the rank that holds up the others. states: what each rank does. stack: of Python, innermost call first."""

    rank: int
    states: str
    stack: str


def answer_with_stacks(pipe: Connection) -> None:
    """Makes this process write its stack into `pipe` on the signal. `pipe` must stay open."""
    faulthandler.register(_SIGNAL, pipe.fileno(), all_threads=False)


def find_late_rank(
    pids: Mapping[int, int], pipes: Mapping[int, Connection], stages: Mapping[int, int], stage_texts: Mapping[int, str]
) -> LateRank:
    """Returns the rank at the earliest stage that does not wait for another rank, as far as the stacks show.

    That is rank 0 when all others are at the last stage and wait. The work of a GPU is not visible.

    pids, pipes, stages: by rank, 1, 2, …; a rank at stage 0 has not called `answer_with_stacks` yet.
    stage_texts: the description of each stage.
    """
    stacks = _read_stacks(pids, pipes, [rank for rank, stage in stages.items() if stage])
    waits = {rank: any(place in stack for place in _WAITING_PLACES) for rank, stack in stacks.items()}
    late = min(pids, key=lambda rank: (stages[rank], waits.get(rank, False)))
    if stages[late] == max(stage_texts) and waits[late]:
        late = 0
    states = []
    for rank, stage in stages.items():
        state = "waits" if waits.get(rank) else "is at work" if stacks.get(rank) else "does not react"
        states.append(f"rank {rank} {stage_texts[stage]}{state if stage else ''}")
    return LateRank(late, ", ".join(states), stacks.get(late, ""))


def _read_stacks(pids: Mapping[int, int], pipes: Mapping[int, Connection], ranks: list[int]) -> dict[int, str]:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(pids[rank], _SIGNAL)
    time.sleep(_SECONDS)
    texts = {rank: os.read(pipes[rank].fileno(), _BYTES) for rank in ranks if pipes[rank].poll(0)}
    return {rank: texts.get(rank, b"").decode("utf-8", "replace") for rank in ranks}
