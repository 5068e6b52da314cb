"""The process of grammars: reads, compiles and follows them, apart from the engine, which it can then not hold up.

A message is a list of jobs, as JSON; one back is a list of answers, with the bytes of their masks after it. Jobs run in
threads, since xgrammar releases Python's lock. A grammar that takes more than its time ends the process: nothing else
can stop xgrammar. The engine then starts another one, in which the other grammars go on.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from nanovllm.errors import InvalidArgumentError
from nanovllm.requests.grammar_matcher import grammar_error
from nanovllm.requests.grammar_reader import read_grammar
from nanovllm.sampling_params import StructuredOutputsParams

_NUM_THREADS = 4
_CACHE_BYTES = 2**28
_LOOK_SECONDS = 0.05
_HOLD_SECONDS = 1e-3  # how long an answer waits for others to go with


@dataclass
class _Followed:
    """One output on its way through its grammar. seconds: time spent on it."""

    params: StructuredOutputsParams
    matcher: Any
    num_tokens: int = 0
    seconds: float = 0.0


def serve(descriptor: int) -> None:
    """Answers the messages of the engine until it closes the connection."""
    connection = Connection(descriptor)
    start = json.loads(connection.recv_bytes())
    _Server(connection, start, connection.recv_bytes().decode()).run()


class _Server:
    def __init__(self, connection: Connection, start: dict[str, Any], vocabulary: str) -> None:
        import xgrammar

        info = xgrammar.TokenizerInfo.deserialize_json(vocabulary)
        # Its own cache makes the first compilation five times as slow.
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=_NUM_THREADS, cache_enabled=False)
        self._read = functools.lru_cache(maxsize=16)(read_grammar)  # until it is compiled
        self._compiled: dict[StructuredOutputsParams, tuple[Any, int]] = {}  # and its bytes, the last used at the end
        self._connection = connection
        self._jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._answering = threading.Lock()
        self._answers: list[dict[str, Any]] = []  # guarded by the lock, as are
        self._masks: list[bytes] = []
        self._seconds: float = start["seconds"]
        self._mask = np.zeros(-(-start["vocab_size"] // 32), dtype=np.int32)
        self._last_word = 2 ** (start["vocab_size"] % 32) - 1 or -1  # xgrammar leaves bits past the vocabulary set
        self._followed: dict[int, _Followed] = {}
        self._running: dict[int, float] = {}  # job → when it must end
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        _limit_memory(start["gigabytes"])

    def run(self) -> None:
        watched, named = 0.0, set[int]()
        while True:
            now = time.monotonic()
            if now > watched + self._seconds / 10:  # a C thread, in case Python's lock is held
                faulthandler.dump_traceback_later(1.2 * self._seconds, exit=True)
                watched = now
            if self._connection.poll(_LOOK_SECONDS):
                try:
                    messages = json.loads(self._connection.recv_bytes())
                except (EOFError, OSError):
                    os._exit(0)
                for message in messages:
                    self._jobs.put(message)
            else:
                self._send_answers()
            if not self._jobs.empty():  # new ones, or some behind a slow one
                self._threads.submit(self._work)
            for job, end in list(self._running.items()):
                if now > end:
                    self._answer({"job": job, "late": True})
                    self._send_answers()
                    os._exit(1)
                if job not in named and now > end - 0.9 * self._seconds:  # in case it ends the process
                    named.add(job)
                    self._answer({"slow": job})
                    self._send_answers()

    def _work(self) -> None:
        """Does the jobs there are."""
        sent = time.monotonic()
        while True:
            try:
                message = self._jobs.get_nowait()
            except queue.Empty:
                break
            if "drop" in message:
                self._followed.pop(message["drop"], None)
                continue
            self._do(message)
            if time.monotonic() > sent + _HOLD_SECONDS:
                self._send_answers()
                sent = time.monotonic()
        self._send_answers()

    def _do(self, message: dict[str, Any]) -> None:
        job, began = message["job"], time.monotonic()
        followed = self._followed.get(job)
        self._running[job] = began + self._seconds - (followed.seconds if followed is not None else 0)
        params = StructuredOutputsParams(**message["params"]) if followed is None else followed.params
        answer, mask = {"job": job}, b""
        try:
            if "tokens" not in message:
                self._read(params)
            else:
                if followed is None:
                    followed = self._followed[job] = self._start(params)
                mask = self._follow(followed, message["tokens"])
                followed.seconds += time.monotonic() - began
        except Exception as error:  # xgrammar raises many kinds
            known = error if isinstance(error, InvalidArgumentError) else grammar_error(params, error or repr(error))
            answer["allowed"] = known.allowed
        del self._running[job]
        self._answer(answer, mask)

    def _start(self, params: StructuredOutputsParams) -> _Followed:
        import xgrammar

        compiled, size = self._compiled.pop(params, (None, 0))
        if compiled is None:
            compiled = self._compiler.compile_grammar(self._read(params))
            size = compiled.memory_size_bytes
        self._compiled[params] = compiled, size
        while sum(size for _, size in list(self._compiled.values())) > _CACHE_BYTES:
            self._compiled.pop(next(iter(self._compiled)), None)
        return _Followed(params, xgrammar.GrammarMatcher(compiled))

    def _follow(self, followed: _Followed, tokens: list[int]) -> bytes:
        """Takes tokens. Returns the mask of those that may come next; raises ValueError if there is none."""
        mask = self._mask.copy()
        accepted = all(map(followed.matcher.accept_token, tokens))
        followed.num_tokens += len(tokens)
        if accepted:
            followed.matcher.fill_next_token_bitmask(mask)
            mask[-1] &= self._last_word
            if mask.any():
                return mask.tobytes()
        count = followed.num_tokens
        raise ValueError(f"no token may follow the first {count} of this output" if count else "no text fits it")

    def _answer(self, answer: dict[str, Any], mask: bytes = b"") -> None:
        with self._answering:
            self._answers.append(answer | {"mask": len(mask)})
            self._masks.append(mask)

    def _send_answers(self) -> None:
        with self._answering:
            if self._answers:
                self._connection.send_bytes(b"".join([json.dumps(self._answers).encode(), b"\n", *self._masks]))
                self._answers, self._masks = [], []


def _limit_memory(gigabytes: float) -> None:
    try:
        import resource

        limit = int(gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    except (ImportError, ValueError, OSError):  # not every system has it
        pass
