"""ProgressBar: how many prompts of a generation are done, on standard error.

On a terminal the bar is redrawn in place. Whatever else is printed removes it first, and so starts on a line of its
own; the next step draws it again. Elsewhere, in a file or a pipe, only its last state is written. tqdm's own bar does
neither, has a thread, and raises when standard error is closed: only its format is used.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["ProgressBar", "clear_progress_bar"]

_REDRAW_SECONDS = 0.1


class ProgressBar:
    """A context manager around the work. rates: returns the text behind the bar, and is called when it is drawn."""

    def __init__(self, total: int, rates: Callable[[], str], *, is_shown: bool = True) -> None:
        self._total, self._rates, self._is_shown = total, rates, is_shown
        self._done = 0
        self._stream: Any = sys.stderr
        self._is_drawn = False
        self._line_is_open = False  # something else has printed a line without its end
        self._began = self._drawn_at = time.monotonic()
        self._lock = threading.RLock()
        self._guards: dict[str, _Guard] = {}

    def __enter__(self) -> ProgressBar:
        if self._is_shown and not _ACTIVE and _draws_in_place(self._stream):
            _ACTIVE.append(self)
            for name in ("stdout", "stderr"):
                if (stream := getattr(sys, name)) is not None:
                    self._guards[name] = _Guard(stream, self)
                    setattr(sys, name, self._guards[name])
            self.update()
        return self

    def __exit__(self, *exception: object) -> None:
        for name, guard in self._guards.items():
            if getattr(sys, name) is guard:
                setattr(sys, name, guard.stream)
        if self in _ACTIVE:
            _ACTIVE.remove(self)
            self.clear()
        if self._is_shown:
            self._write(self._text() + "\n")

    def update(self, num_done: int = 0) -> None:
        """Counts prompts as done, and draws the bar if it was removed or is old."""
        self._done += num_done
        if self in _ACTIVE:
            with self._lock:
                now = time.monotonic()
                if not self._line_is_open and (not self._is_drawn or now - self._drawn_at >= _REDRAW_SECONDS):
                    self._write("\r" + self._text())
                    self._is_drawn, self._drawn_at = True, now

    def clear(self) -> None:
        """Removes the bar from the terminal."""
        with self._lock:
            if self._is_drawn:
                self._write("\r" + " " * self._columns() + "\r")
                self._is_drawn = False

    def write_instead(self, stream: Any, text: str) -> Any:
        """Writes something else to the terminal. The bar is not drawn again before its line has ended."""
        with self._lock:
            self.clear()
            if text:
                self._line_is_open = not text.endswith("\n")
            return stream.write(text)

    def _text(self) -> str:
        from tqdm import tqdm  # here, so that logging alone does not import it

        text: str = tqdm.format_meter(
            self._done,
            self._total,
            time.monotonic() - self._began,
            ncols=self._columns(),
            prefix="Generating",
            postfix=self._rates(),
            ascii=not str(getattr(self._stream, "encoding", "")).lower().startswith("utf"),
        )
        return text

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns - 1
        except (AttributeError, OSError, ValueError):
            return 79

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except Exception:  # standard error is closed, or a pipe that nobody reads: the work goes on
            return


class _Guard:
    """Stands for standard output or standard error while a bar is drawn: what is printed removes the bar first."""

    def __init__(self, stream: Any, bar: ProgressBar) -> None:
        self.stream, self._bar = stream, bar

    def write(self, text: str) -> Any:
        return self._bar.write_instead(self.stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


# The bar on the terminal, at most one: those of other threads show their last state alone.
_ACTIVE: list[ProgressBar] = []


def clear_progress_bar() -> None:
    """Removes the bar from the terminal, for a line that is not written through `sys.stdout` or `sys.stderr`."""
    for bar in _ACTIVE:
        bar.clear()


def _draws_in_place(stream: Any) -> bool:
    """Returns whether a carriage return moves to the start of the line: on a terminal, and in a notebook."""
    try:
        return bool(stream.isatty()) or "ipykernel" in sys.modules
    except (AttributeError, ValueError):
        return False
