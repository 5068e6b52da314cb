"""Where another process stands: told a signal, it writes its Python stack into a pipe, also while it hangs.

It is written by a handler in C, which needs neither the interpreter's lock nor a turn of the loop; a process that does
not answer is stopped, or is in the kernel.
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
_SECONDS = 0.2  # that a process may take to answer
_BYTES = 1 << 16  # more than a pipe holds
# Files whose functions wait for other ranks.
_WAITING_PLACES = ("distributed/process_group.py", "distributed/shm_channel.py", "layers/parallel.py")


@dataclass(frozen=True)
class LateRank:
    """rank: who keeps the others waiting. states: what each is at. stack: Python's, the innermost call first."""

    rank: int
    states: str
    stack: str


def answer_with_stacks(pipe: Connection) -> None:
    """From now on this process writes its stack into `pipe`, which must stay open, when it is asked."""
    faulthandler.register(_SIGNAL, pipe.fileno(), all_threads=False)


def find_late_rank(
    pids: Mapping[int, int], pipes: Mapping[int, Connection], stages: Mapping[int, int], words: Mapping[int, str]
) -> LateRank:
    """Of the ranks that are least far, the one that does not wait for another: as their stacks tell.

    pids, pipes, stages: by rank, 1, 2, …; a rank at stage 0 has not called `answer_with_stacks` yet. words: of each
    stage, in order. Rank 0 it is when all others are as far as can be, and wait. What a GPU does is not seen.
    """
    stacks = _read_stacks(pids, pipes, [rank for rank, stage in stages.items() if stage])
    waits = {rank: any(place in stack for place in _WAITING_PLACES) for rank, stack in stacks.items()}
    late = min(pids, key=lambda rank: (stages[rank], waits.get(rank, False)))
    if stages[late] == max(words) and waits[late]:
        late = 0
    states = []
    for rank, stage in stages.items():
        state = "waits" if waits.get(rank) else "is at work" if stacks.get(rank) else "does not react"
        states.append(f"rank {rank} {words[stage]}{state if stage else ''}")
    return LateRank(late, ", ".join(states), stacks.get(late, ""))


def _read_stacks(pids: Mapping[int, int], pipes: Mapping[int, Connection], ranks: list[int]) -> dict[int, str]:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(pids[rank], _SIGNAL)
    time.sleep(_SECONDS)
    texts = {rank: os.read(pipes[rank].fileno(), _BYTES) for rank in ranks if pipes[rank].poll(0)}
    return {rank: texts.get(rank, b"").decode("utf-8", "replace") for rank in ranks}
