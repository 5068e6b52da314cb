"""The process of grammars, as the engine sees it: whose answer is whose, and who fails when it ends."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from nanovllm import StructuredOutputsParams
from nanovllm.errors import EngineDeadError
from nanovllm.requests import grammar_process
from nanovllm.requests.grammar_process import GrammarJob, GrammarLimits, GrammarProcess
from tests.processes import WATCHDOG, until


class Child:
    """Takes jobs and does none."""

    made: list[Child]

    def __init__(self, start: dict[str, Any], make_vocabulary: Any, on_answer: Any, on_end: Any) -> None:
        self.answer, self.end_with = on_answer, on_end
        self.messages: list[dict[str, Any]] = []
        self.outbox = self
        self.slow: set[int] = set()
        self.is_late = self.is_ended = False
        Child.made.append(self)

    def put(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def end(self) -> None:
        self.is_ended = True


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> GrammarProcess:
    Child.made = []
    monkeypatch.setattr(grammar_process, "_Child", Child)
    return GrammarProcess(GrammarLimits(seconds=3, gigabytes=2), 32, lambda: "")


class Asked:
    """A job that is submitted, and its answers."""

    def __init__(self, process: GrammarProcess, number: int, tokens: list[int] | None) -> None:
        self.answers: list[tuple[str | None, bytes]] = []
        params = StructuredOutputsParams(regex="a")
        self.job = GrammarJob(number, params, tokens, lambda allowed, mask: self.answers.append((allowed, mask)))
        process.submit(self.job)


def test_a_process_gets_what_it_does_not_know(process: GrammarProcess) -> None:
    asked = Asked(process, 7, [])
    (first,) = Child.made
    assert first.messages[0].keys() == {"job", "params", "tokens"}
    first.answer(first, {"job": 7}, b"mask")
    assert asked.answers == [(None, b"mask")]
    asked.job.tokens = [1, 2]
    process.submit(asked.job)
    assert first.messages[1] == {"job": 7, "tokens": [1, 2]}
    first.answer(first, {"job": 7}, b"")
    first.end_with(first, "exit code 1")
    assert len(asked.answers) == 2, "what is answered does not fail"
    asked.job.tokens += [3]
    process.submit(asked.job)
    (message,) = Child.made[1].messages
    assert (message["tokens"], message["params"]["regex"]) == ([1, 2, 3], "a")


def test_a_late_job_fails_and_the_others_begin_again_in_the_spare_process(process: GrammarProcess) -> None:
    late, fast, reads = Asked(process, 1, [5]), Asked(process, 2, [6]), Asked(process, 3, None)
    (first,) = Child.made
    first.answer(first, {"slow": 1}, b"")
    spare = Child.made[1]
    first.answer(first, {"job": 1, "late": True}, b"")
    first.answer(first, {"job": 2}, b"in the same message")
    first.end_with(first, "exit code 1")
    ((allowed, _),) = late.answers
    assert allowed == "what xgrammar can follow within 3 s (NANOVLLM_GRAMMAR_SECONDS)"
    assert fast.answers == [(None, b"in the same message")]
    assert [message["job"] for message in spare.messages] == [3]
    spare.answer(spare, {"job": 3, "allowed": "a regex"}, b"")
    assert reads.answers == [("a regex", b"")]


def test_when_it_dies_the_slow_jobs_fail_or_else_all(process: GrammarProcess) -> None:
    for slow in ([1], []):
        one, two = Asked(process, 1, []), Asked(process, 2, [])
        child = Child.made[-1]
        child.slow.update(slow)
        child.end_with(child, "exit code -9")
        ((allowed, _),) = one.answers
        assert "its process ended (exit code -9), as it does beyond NANOVLLM_GRAMMAR_MEMORY_GB=2" in str(allowed)
        assert len(two.answers) == (0 if slow else 1)


def test_closing_ends_both_processes_and_fails_what_waits(process: GrammarProcess) -> None:
    asked = Asked(process, 1, None)
    (first,) = Child.made
    first.answer(first, {"slow": 1}, b"")
    process.close()
    assert asked.answers == [("None now, since the engine has ended", b"")]
    assert all(child.is_ended for child in Child.made)
    with pytest.raises(EngineDeadError):
        Asked(process, 2, None)


def test_a_garbage_collection_while_a_process_starts_may_close_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Collecting(Child):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            process.close()

    monkeypatch.setattr(grammar_process, "_Child", Collecting)
    Child.made = []
    process = GrammarProcess(GrammarLimits(seconds=3, gigabytes=2), 32, lambda: "")
    asks = threading.Thread(target=Asked, args=(process, 1, None), daemon=True)
    asks.start()
    assert until(lambda: not asks.is_alive())
    assert [child.is_ended for child in Child.made] == [True]


def test_a_connection_is_open_as_long_as_something_may_be_sent() -> None:
    """If it were closed earlier, another process's connection might have its number, and get this one's messages."""
    has_sent, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

    def make_vocabulary() -> str:
        has_sent.set()
        assert goes_on.wait(WATCHDOG)
        return ""

    child = grammar_process._Child({}, make_vocabulary, lambda *answer: None, lambda *why: ended.set())
    assert has_sent.wait(WATCHDOG)
    child.end()
    assert ended.wait(WATCHDOG)
    time.sleep(0.2)
    assert not child._connection.closed
    goes_on.set()
    assert until(lambda: child._connection.closed)
    assert not child._sender.is_alive()
