"""Interrupts a call at each of its lines in turn, as Ctrl-C could."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import nanovllm

PACKAGE = str(Path(nanovllm.__file__).parent)
Place = tuple[str, int, int]  # file, line, and how often it ran before


class Interrupter:
    """Traces the functions `names` of nanovllm (None: of `files`). Raises KeyboardInterrupt at `place`, once."""

    def __init__(self, files: tuple[str, ...], place: Place | None = None) -> None:
        self._files = files
        self.place = place
        self.seen: dict[Place, None] = {}  # in order
        self._times: dict[tuple[str, int], int] = {}
        self.has_fired = False

    @contextmanager
    def tracing(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if self.has_fired or not name.startswith(PACKAGE) or not name.endswith(self._files):
            return None
        entered: set[int] = set()

        def line(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            number = frame.f_lineno
            if event != "line" or self.has_fired:
                return line
            text = linecache.getline(name, number).strip()
            # Python looks for signals neither at a `try:` nor where it leaves a `with` block, yet reports both lines.
            if text == "try:" or (text.startswith("with ") and number in entered):
                return line
            entered.add(number)
            times = self._times[name, number] = self._times.get((name, number), 0) + 1
            place = (name, number, times - 1)
            self.seen[place] = None
            if place == self.place:
                self.has_fired = True
                raise KeyboardInterrupt
            return line

        return line


def places(files: tuple[str, ...], run: Callable[[], object], most: int = 1) -> list[Place]:
    """Returns the lines of `files` that `run` executes, each as often as it does, at most `most` times."""
    interrupter = Interrupter(files)
    with interrupter.tracing():
        run()
    return [place for place in interrupter.seen if place[2] < most]
