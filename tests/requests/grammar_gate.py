"""A gate before the compiler of grammars."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from nanovllm.errors import EngineDeadError
from nanovllm.requests.grammar_process import GrammarJob, GrammarProcess


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is compiled before it is set."""
    gate = threading.Event()
    submit = GrammarProcess.submit

    def later(self: GrammarProcess, job: GrammarJob) -> None:
        gate.wait(60)
        with suppress(EngineDeadError):
            submit(self, job)

    def held(self: GrammarProcess, job: GrammarJob) -> None:
        if job.tokens == []:
            threading.Thread(target=later, args=(self, job), daemon=True).start()
        else:
            submit(self, job)

    monkeypatch.setattr(GrammarProcess, "submit", held)
    yield gate
    gate.set()
