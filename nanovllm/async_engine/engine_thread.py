"""EngineThread: runs the engine of `AsyncLLM` in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from nanovllm.async_engine.engine_loop import EngineLoop
from nanovllm.async_engine.messages import Command, EngineEnded, Event
from nanovllm.config import EngineConfig
from nanovllm.errors import EngineDeadError
from nanovllm.metrics import MetricsSnapshot
from nanovllm.requests.preparation import RequestPreparation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EngineThread:
    """An engine in a thread of its own (an `EngineConnection`).

    It holds no reference to its AsyncLLM, so that this can be garbage-collected.
    """

    tokenizer: PreTrainedTokenizerBase | None
    preparation: RequestPreparation
    first_number = 0

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._made: Future[EngineLoop] = Future()
        self._is_stopped = False
        # A daemon thread: Python would wait for any other before it runs the finalizer that stops this one.
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)

    def start(self, receive: Callable[[Event], None]) -> None:
        self._receive = receive
        self._thread.start()
        engine = self._made.result().engine
        self.tokenizer, self.preparation = engine.tokenizer, engine.preparation

    def send(self, command: Command) -> None:
        self._made.result().send(command)

    def metrics(self) -> MetricsSnapshot:
        engine = self._made.result().engine
        return engine.metrics.snapshot(engine.scheduler.load)

    def stop(self, wait: bool = True) -> None:
        self._is_stopped = True
        if self._made.done() and self._made.exception() is None:
            self._made.result().send(None)
        # Garbage collection may call this on the engine's thread, which cannot join itself.
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            loop = EngineLoop(self._config, self._receive)
        except BaseException as error:
            self._made.set_exception(error)
            return
        self._made.set_result(loop)
        dead: BaseException = EngineDeadError("exit() was called")
        try:
            with loop.engine:
                if not self._is_stopped:  # else Ctrl-C has come while the engine was made
                    loop.run()
        except BaseException as error:
            dead = error
        self._receive(EngineEnded(dead))
