"""The progress bar: what stands on the screen, beside lines of the log and of the program, and on broken streams."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from nanovllm.logs.progress_bar import ProgressBar
from nanovllm.utils.logger import log_event, setup_logger


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """The lines that are seen: a carriage return goes back to the start of the line, and text overwrites."""
        lines = []
        for written in self.getvalue().split("\n"):
            shown = ""
            for part in written.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes a terminal of standard output and standard error (pytest sets them after fixtures). The log goes there."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logging.root, "handlers", [])
    return terminal


def rates() -> str:
    return "in 10 tok/s, out 20 tok/s"


def test_the_bar_is_drawn_in_place_and_ends_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with ProgressBar(2, rates) as bar:
        assert terminal.screen[0].startswith("Generating:   0%|")
        bar.update(1)
        bar.update(1)
    (line, rest) = terminal.screen
    assert line.startswith("Generating: 100%|")
    assert line.endswith("in 10 tok/s, out 20 tok/s]")
    assert "| 2/2 [" in line
    assert rest == ""
    assert sys.stdout is sys.stderr is terminal


def test_a_printed_line_starts_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with ProgressBar(2, rates) as bar:
        print("mine", 1)
        print("mine too", file=sys.stderr)
        bar.update(1)
        assert terminal.screen[2].startswith("Generating:  50%|")
        print("begun", end=" ")
        bar.update()  # does not tear the line apart
        print("and ended")
        log_event(setup_logger("tests"), logging.WARNING, "x", "logged")
        bar.update(1)
    lines = terminal.screen
    assert lines[:3] == ["mine 1", "mine too", "begun and ended"]
    assert lines[3].endswith("logged")
    assert lines[4].startswith("Generating: 100%|")
    assert lines[5:] == [""]


def test_a_line_of_a_handler_of_one_s_own_starts_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    handler = logging.StreamHandler(terminal)  # as basicConfig has made it before the bar
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with ProgressBar(1, rates):
        log_event(setup_logger("tests"), logging.WARNING, "x", "logged")
    assert terminal.screen[0] == "logged"


def test_elsewhere_only_the_last_state_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar(3, rates) as bar:
        bar.update(2)
        assert stream.getvalue() == ""
        assert sys.stderr is stream
    assert stream.getvalue().startswith("Generating:  67%|")
    assert stream.getvalue().count("\n") == 1


def test_a_second_bar_leaves_the_screen_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with ProgressBar(1, rates), ProgressBar(4, rates) as second:
        second.update(4)
        assert terminal.screen[0].startswith("Generating:   0%|")
    assert [line[:17] for line in terminal.screen] == ["Generating: 100%|", "Generating:   0%|", ""]


def test_a_bar_that_is_off_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)

    def never() -> str:
        raise AssertionError("asked for rates")

    with ProgressBar(1, never, is_shown=False) as bar:
        bar.update(1)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("breaks", ["closed", "pipe", "none"])
def test_a_broken_stream_ends_nothing(monkeypatch: pytest.MonkeyPatch, breaks: str) -> None:
    class Pipe(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    stream = {"closed": Terminal(), "pipe": Pipe(), "none": None}[breaks]
    if breaks == "closed":
        assert stream is not None
        stream.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    with ProgressBar(2, rates) as bar:
        bar.update(1)


def test_no_warning_where_a_notebook_has_no_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm.auto, which chooses by the notebook, is not imported."""
    open_terminal(monkeypatch)
    monkeypatch.delitem(sys.modules, "tqdm.auto", raising=False)
    monkeypatch.delitem(sys.modules, "tqdm.autonotebook", raising=False)
    with ProgressBar(1, rates):
        pass
    assert "tqdm.autonotebook" not in sys.modules
