"""AllRanksDiagnostics: what `RankDiagnostics` does, on every rank, asked from rank 0.

A question is a number of `Question` and, for some, a text. An answer is a status and what was asked for. Both are
bytes of fixed layout (nothing is pickled); how they travel is the engine's affair.

    question   uint64 Question · START_PROFILE: the folder, as the file system's bytes
    answer     uint64 0 · MEMORY_REPORT, MEMORY_USE, STEP_TIMES: their record, STOP_PROFILE: the table in UTF-8
               uint64 1 · why not, in UTF-8
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from pathlib import Path

from nanovllm.diagnostics.memory import MemoryReport
from nanovllm.diagnostics.rank import RankDiagnostics
from nanovllm.diagnostics.step_times import StepTime, pack_step_times, unpack_step_times
from nanovllm.errors import InvalidStateError, NanoVLLMError

_WORD = struct.Struct("=Q")
_MEMORY_USE = struct.Struct("=QQ")


class Question(IntEnum):
    MEMORY_REPORT = 1
    MEMORY_USE = 2
    START_PROFILE = 3
    STOP_PROFILE = 4
    CANCEL_PROFILE = 5
    STEP_TIMES = 6


def answer(diagnostics: RankDiagnostics, question: bytes | bytearray) -> bytes:
    """What a rank sends back. An error that says what is wrong is an answer, too: the rank goes on."""
    kind, text = Question(_WORD.unpack_from(question)[0]), bytes(question[_WORD.size :])
    try:
        return _WORD.pack(0) + _answer(diagnostics, kind, text)
    except (NanoVLLMError, OSError) as error:
        return _WORD.pack(1) + str(error).encode("utf-8", "replace")


def _answer(diagnostics: RankDiagnostics, kind: Question, text: bytes) -> bytes:
    if kind == Question.MEMORY_REPORT:
        return diagnostics.memory_report().pack()
    if kind == Question.MEMORY_USE:
        return _MEMORY_USE.pack(*diagnostics.memory_use())
    if kind == Question.STEP_TIMES:
        return pack_step_times(diagnostics.step_times.take())
    if kind == Question.STOP_PROFILE:
        return diagnostics.stop_profile().encode("utf-8", "replace")
    if kind == Question.START_PROFILE:
        diagnostics.start_profile(Path(os.fsdecode(text)))
    else:
        diagnostics.cancel_profile()
    return b""


class AllRanksDiagnostics:
    """`own`: of rank 0, in this process. `ask`: sends a question to the others, returns their answers by rank."""

    def __init__(self, own: RankDiagnostics, ask: Callable[[bytes], list[bytes]]) -> None:
        self._own, self._send = own, ask

    def start_profile(self, folder: Path) -> None:
        """As `RankDiagnostics.start_profile`; all ranks profile then, or none."""
        self._own.start_profile(folder)
        try:
            self._ask(Question.START_PROFILE, os.fsencode(folder.absolute()))
        except InvalidStateError:
            self._own.cancel_profile()
            self._ask(Question.CANCEL_PROFILE)
            raise

    def stop_profile(self) -> str:
        """Each rank writes its trace and its table. The tables, one below the other."""
        own = self._own.stop_profile()
        tables = [own, *(table.decode() for table in self._ask(Question.STOP_PROFILE))]
        return "\n\n".join(f"Rank {rank}\n{table}" for rank, table in enumerate(tables))

    def memory_report(self) -> MemoryReport:
        """Rank 0's, with the others' in `others`."""
        own = self._own.memory_report()
        return replace(own, others=tuple(map(MemoryReport.unpack, self._ask(Question.MEMORY_REPORT))))

    def memory_use(self) -> tuple[int, int]:
        """Summed over the ranks."""
        used = [self._own.memory_use(), *map(_MEMORY_USE.unpack, self._ask(Question.MEMORY_USE))]
        return sum(use[0] for use in used), sum(use[1] for use in used)

    def other_step_times(self) -> dict[int, list[StepTime]]:
        """Rank → its steps since the last call, for all but rank 0, whose steps the engine knows."""
        return {rank: unpack_step_times(data) for rank, data in enumerate(self._ask(Question.STEP_TIMES), start=1)}

    def _ask(self, kind: Question, text: bytes = b"") -> list[bytes]:
        """Raises InvalidStateError where a rank could not."""
        answers = self._send(_WORD.pack(kind) + text)
        for rank, data in enumerate(answers, start=1):
            if _WORD.unpack_from(data)[0]:
                raise InvalidStateError(f"On rank {rank}: {data[_WORD.size :].decode()}")
        return [data[_WORD.size :] for data in answers]
