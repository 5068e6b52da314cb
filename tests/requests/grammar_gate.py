"""A gate before the compiler of grammars."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is compiled before it is set."""
    xgrammar = pytest.importorskip("xgrammar")
    gate = threading.Event()
    compile_grammar = xgrammar.GrammarCompiler.compile_grammar

    def slow(self: Any, grammar: Any) -> Any:
        assert gate.wait(60)
        return compile_grammar(self, grammar)

    monkeypatch.setattr(xgrammar.GrammarCompiler, "compile_grammar", slow)
    yield gate
    gate.set()
