"""GrammarProcess: the process of grammars (`grammar_server`) as the engine sees it, started again whenever it ends."""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any

from nanovllm.errors import EngineDeadError
from nanovllm.logs import events
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.utils.child_process import start_interpreter
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_MAIN = """
from nanovllm.utils import env
env.leave_logging_alone()
from nanovllm.requests.grammar_server import serve
serve(descriptor)
"""


@dataclass(frozen=True)
class GrammarLimits:
    """What grammars may take. seconds: of each request; gigabytes: of all together, with their process."""

    seconds: float
    gigabytes: float


@dataclass(eq=False)
class GrammarJob:
    """A grammar to read, or one to compile and follow.

    tokens: of the output so far; None: only read it. answered: called by a thread with what completes "it must be …" in
    the error, or None, and with the mask of the tokens that may come next.
    """

    number: int
    params: StructuredOutputsParams
    tokens: list[int] | None
    answered: Callable[[str | None, bytes], None]
    num_sent: int = 0
    child: _Child | None = None  # the process that knows it

    def message(self, child: _Child) -> dict[str, Any]:
        """Returns what `child` needs to go on with it: everything, or only the tokens that it does not know."""
        message: dict[str, Any] = {"job": self.number}
        if self.child is not child:
            self.child, self.num_sent = child, 0
            message["params"] = dataclasses.asdict(self.params)
        if self.tokens is not None:
            message["tokens"] = self.tokens[self.num_sent :]
            self.num_sent = len(self.tokens)
        return message


class GrammarProcess:
    """Does jobs in another process, which it starts for the first of them. Any thread may call it.

    make_vocabulary: returns the vocabulary as xgrammar serialises it.
    """

    def __init__(self, limits: GrammarLimits, vocab_size: int, make_vocabulary: Callable[[], str]) -> None:
        self._limits = limits
        self._start = dataclasses.asdict(limits) | {"vocab_size": vocab_size}
        self._make_vocabulary = make_vocabulary
        self._lock = threading.RLock()  # a garbage collection may call `close`
        # Guarded by the lock:
        self._child: _Child | None = None
        self._spare: _Child | None = None  # takes over at once; started when a job is slow
        self._unanswered: dict[int, GrammarJob] = {}
        self._is_closed = False

    def submit(self, job: GrammarJob) -> None:
        """Begins a job, or goes on with one that was answered."""
        with self._lock:
            self._send(job)

    def close(self) -> None:
        """Ends the process. Jobs that are not answered fail."""
        with self._lock:
            self._is_closed = True
            children = [child for child in (self._child, self._spare) if child is not None]
            lost, self._unanswered = list(self._unanswered.values()), {}
        for child in children:
            child.end()
        for job in lost:
            job.answered("None now, since the engine has ended", b"")

    def _send(self, job: GrammarJob) -> None:
        if self._is_closed:
            raise EngineDeadError("This engine has ended: make a new one.")
        if self._child is None:
            self._child, self._spare = self._spare or self._new_child(), None
        self._unanswered[job.number] = job
        self._child.outbox.put(job.message(self._child))

    def _new_child(self) -> _Child:
        child = _Child(self._start, self._make_vocabulary, self._on_answer, self._on_end)
        if self._is_closed:  # meanwhile, by a garbage collection
            child.end()
        return child

    def _on_answer(self, child: _Child, answer: dict[str, Any], mask: bytes) -> None:
        with self._lock:
            if "slow" in answer:
                child.slow.add(answer["slow"])
                with suppress(OSError):  # no other process can be started now
                    self._spare = self._spare or (None if self._is_closed else self._new_child())
                return
            child.is_late |= "late" in answer
            job = self._unanswered.pop(answer["job"], None)
        if job is not None:
            limit = f"what xgrammar can follow within {self._limits.seconds:g} s (NANOVLLM_GRAMMAR_SECONDS)"
            job.answered(limit if "late" in answer else answer.get("allowed"), mask)

    def _on_end(self, child: _Child, why: str) -> None:
        """Fails the job that ended the process, and starts the others again."""
        with self._lock:
            self._child = None if self._child is child else self._child
            self._spare = None if self._spare is child else self._spare
            jobs = [job for job in self._unanswered.values() if job.child is child]
            failed = [] if child.is_late else [job for job in jobs if job.number in child.slow] or jobs
            for job in jobs:
                try:
                    if job not in failed:
                        self._send(job)
                except OSError as error:  # no other process can be started
                    failed, why = [*failed, job], str(error)
            for job in failed:
                self._unanswered.pop(job.number, None)
        limits = self._limits
        hint = f"NANOVLLM_GRAMMAR_MEMORY_GB={limits.gigabytes:g} or NANOVLLM_GRAMMAR_SECONDS={limits.seconds:g}"
        for job in failed:
            job.answered(f"what xgrammar can follow: its process ended ({why}), as it does beyond {hint}", b"")


class _Child:
    """One process, with threads that send what is in `outbox`, take its answers and log its stderr."""

    def __init__(
        self,
        start: dict[str, Any],
        make_vocabulary: Callable[[], str],
        on_answer: Callable[[_Child, dict[str, Any], bytes], None],
        on_end: Callable[[_Child, str], None],
    ) -> None:
        self.outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()  # None: no more
        self.slow: set[int] = set()  # jobs that took longer than most
        self.is_late = False  # a job took longer than it may
        self._failure = ""
        self._connection, theirs = Pipe()
        self._process = start_interpreter(
            _MAIN,
            theirs,
            "-W",
            "ignore",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the engine alone
        )
        self._sender = _thread(self._send, start, make_vocabulary)
        self._sender.start()
        _thread(self._receive, on_answer, on_end).start()
        _thread(self._log).start()

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()

    def _send(self, start: dict[str, Any], make_vocabulary: Callable[[], str]) -> None:
        try:
            self._connection.send_bytes(json.dumps(start).encode())
            self._connection.send_bytes(make_vocabulary().encode())
            messages: list[dict[str, Any] | None] = []
            while None not in messages:
                messages = [self.outbox.get()]
                while not self.outbox.empty():
                    messages.append(self.outbox.get())
                self._connection.send_bytes(json.dumps([each for each in messages if each is not None]).encode())
        except OSError:
            pass  # it has ended, which `_receive` notices
        except Exception as error:  # xgrammar cannot use the tokenizer
            self._failure = f"{type(error).__name__}: {error}"
            self._process.kill()

    def _receive(
        self,
        on_answer: Callable[[_Child, dict[str, Any], bytes], None],
        on_end: Callable[[_Child, str], None],
    ) -> None:
        with suppress(EOFError, OSError):
            while True:
                header, _, masks = self._connection.recv_bytes().partition(b"\n")
                start = 0
                for answer in json.loads(header):
                    on_answer(self, answer, masks[start : (start := start + answer["mask"])])
        self._process.kill()
        self._process.wait()
        self.outbox.put(None)
        on_end(self, self._failure or f"exit code {self._process.returncode}")
        self._sender.join()  # else it might write to whatever has the closed descriptor's number by then
        self._connection.close()

    def _log(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                events.grammar_output.log(logger, stderr=line.decode(errors="replace").rstrip())


def _thread(target: Callable[..., object], *arguments: object) -> threading.Thread:
    return threading.Thread(target=target, args=arguments, name="nanovllm-grammar", daemon=True)
