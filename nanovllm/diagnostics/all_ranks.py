"""AllRanksDiagnostics: does on every rank what `RankDiagnostics` does on one, at the request of rank 0.

A question is a `Question` number, followed by a text for some. An answer is a status and the result. Both are bytes
of a fixed layout, without pickle; the executor carries them.

    question   uint64 Question · START_PROFILE: the folder, as bytes of the file system
    answer     uint64 0 · MEMORY_REPORT, MEMORY_USE: their record, STOP_PROFILE: the table in UTF-8
               uint64 1 · the error's text in UTF-8
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.diagnostics.memory import MemoryReport
from nanovllm.errors import InvalidStateError, NanoVLLMError

if TYPE_CHECKING:
    from nanovllm.engine.executor import Diagnostics

_WORD = struct.Struct("=Q")
_MEMORY_USE = struct.Struct("=QQ")


class Question(IntEnum):
    MEMORY_REPORT = 1
    MEMORY_USE = 2
    START_PROFILE = 3
    STOP_PROFILE = 4
    CANCEL_PROFILE = 5


def answer(diagnostics: Diagnostics, question: bytes | bytearray) -> bytes:
    """Returns a rank's answer. Expected errors are answers too, so the rank continues."""
    kind, text = Question(_WORD.unpack_from(question)[0]), bytes(question[_WORD.size :])
    try:
        return _WORD.pack(0) + _answer(diagnostics, kind, text)
    except (NanoVLLMError, OSError) as error:
        return _WORD.pack(1) + str(error).encode("utf-8", "replace")


def _answer(diagnostics: Diagnostics, kind: Question, text: bytes) -> bytes:
    if kind == Question.MEMORY_REPORT:
        report: MemoryReport = diagnostics.memory_report()
        return report.pack()
    if kind == Question.MEMORY_USE:
        return _MEMORY_USE.pack(*diagnostics.memory_use())
    if kind == Question.STOP_PROFILE:
        return diagnostics.stop_profile().encode("utf-8", "replace")
    if kind == Question.START_PROFILE:
        diagnostics.start_profile(Path(os.fsdecode(text)))
    else:
        diagnostics.cancel_profile()
    return b""


class AllRanksDiagnostics:
    """The profiler and the memory of all ranks.

    own: the diagnostics of rank 0, in this process. ask: sends a question to the other ranks and returns their
    answers in rank order.
    """

    def __init__(self, own: Diagnostics, ask: Callable[[bytes], list[bytes]]) -> None:
        self._own, self._send = own, ask

    def start_profile(self, folder: Path) -> None:
        """Starts a profile as `RankDiagnostics.start_profile` does, on all ranks or on none."""
        self._own.start_profile(folder)
        try:
            self._ask(Question.START_PROFILE, os.fsencode(folder.absolute()))
        except InvalidStateError:
            self.cancel_profile()
            raise

    def stop_profile(self) -> str:
        """Writes each rank's trace and table. Returns the tables of all ranks."""
        own = self._own.stop_profile()
        tables = [own, *(table.decode() for table in self._ask(Question.STOP_PROFILE))]
        return "\n\n".join(f"Rank {rank}\n{table}" for rank, table in enumerate(tables))

    def cancel_profile(self) -> None:
        """Ends a running profile on every rank without writing it."""
        self._own.cancel_profile()
        self._ask(Question.CANCEL_PROFILE)

    def memory_report(self) -> MemoryReport:
        """Returns rank 0's report, with those of the other ranks in `others`."""
        own: MemoryReport = self._own.memory_report()
        return replace(own, others=tuple(map(MemoryReport.unpack, self._ask(Question.MEMORY_REPORT))))

    def memory_use(self) -> tuple[int, int]:
        """Returns bytes and Python objects, summed over the ranks."""
        used = [self._own.memory_use(), *map(_MEMORY_USE.unpack, self._ask(Question.MEMORY_USE))]
        return sum(use[0] for use in used), sum(use[1] for use in used)

    def _ask(self, kind: Question, text: bytes = b"") -> list[bytes]:
        """Returns the results in rank order. Raises InvalidStateError when a rank answers with an error."""
        answers = self._send(_WORD.pack(kind) + text)
        for rank, data in enumerate(answers, start=1):
            if _WORD.unpack_from(data)[0]:
                raise InvalidStateError(f"On rank {rank}: {data[_WORD.size :].decode()}")
        return [data[_WORD.size :] for data in answers]
