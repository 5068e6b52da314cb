"""A session of debugpy, as Visual Studio Code leads it, with the configuration of .vscode/launch.json.

Protocol: Microsoft, "Debug Adapter Protocol", https://microsoft.github.io/debug-adapter-protocol/specification.
"""

from __future__ import annotations

import ast
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.processes import PATIENCE, ROOT, until

pytest.importorskip("debugpy", reason="pip install debugpy")

PARALLEL = ROOT / "nanovllm" / "layers" / "parallel.py"


class Session:
    """One debugged process: requests go out, answers and events come back."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader, self._writer = reader, writer
        self._number = 0
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self.events: dict[str, queue.Queue[dict[str, Any]]] = {}
        self._new_event = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while header := self._reader.readline():
            size = int(header.split(b":")[1])
            self._reader.readline()  # the empty line behind the header
            message = json.loads(self._reader.read(size))
            if message["type"] == "response":
                self._answers.put(message)
            elif message["type"] == "event":
                with self._new_event:
                    self._queue(message["event"]).put(message.get("body") or {})
                    self._new_event.notify_all()

    def _queue(self, name: str) -> queue.Queue[dict[str, Any]]:
        return self.events.setdefault(name, queue.Queue())

    def send(self, command: str, **arguments: Any) -> int:
        self._number += 1
        message = {"seq": self._number, "type": "request", "command": command, "arguments": arguments}
        text = json.dumps(message).encode()
        self._writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))
        self._writer.flush()
        return self._number

    def answer(self, number: int) -> dict[str, Any]:
        """Answers need not come in order: those to others are dropped, which nobody waits for."""
        while True:
            answer = self._answers.get(timeout=PATIENCE)
            if answer["request_seq"] == number:
                assert answer["success"], answer
                body: dict[str, Any] = answer.get("body") or {}
                return body

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return self.answer(self.send(command, **arguments))

    def event(self, name: str) -> dict[str, Any]:
        with self._new_event:
            assert self._new_event.wait_for(lambda: not self._queue(name).empty(), PATIENCE), f"no {name}"
            return self._queue(name).get()

    def has(self, name: str) -> bool:
        with self._new_event:
            return not self._queue(name).empty()

    def begin(self, command: str, configuration: dict[str, Any], path: Path, line: int) -> None:
        """From the first message until the program runs, with one breakpoint."""
        self.ask("initialize", adapterID="debugpy", pathFormat="path", linesStartAt1=True, columnsStartAt1=True)
        number = self.send(command, **configuration)
        self.event("initialized")
        self.ask("setBreakpoints", source={"path": str(path)}, breakpoints=[{"line": line}])
        self.ask("configurationDone")
        self.answer(number)

    def evaluate(self, thread: int, expression: str) -> str:
        frame = self.ask("stackTrace", threadId=thread, levels=1)["stackFrames"][0]
        return str(self.ask("evaluate", expression=expression, frameId=frame["id"])["result"])


@pytest.fixture
def adapter() -> Iterator[Session]:
    """What the editor starts: it starts the program, and tells of its child processes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "debugpy.adapter"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    session = Session(process.stdout, process.stdin)  # type: ignore[arg-type]
    yield session
    session.send("disconnect", terminateDebuggee=True)
    process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def configured(name: str, **others: Any) -> dict[str, Any]:
    """One of .vscode/launch.json, as an editor fills it in."""
    text = (ROOT / ".vscode" / "launch.json").read_text(encoding="utf-8").replace("${workspaceFolder}", str(ROOT))
    (configuration,) = [c for c in json.loads(text)["configurations"] if c["name"] == name]
    configuration["env"]["OMP_NUM_THREADS"] = "1"
    return {**configuration, "console": "internalConsole", "python": [sys.executable], **others}


def first_line(function: str) -> int:
    """Of the function's body, behind its docstring."""
    for node in ast.walk(ast.parse(PARALLEL.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return node.body[1].lineno
    raise AssertionError(f"no {function} in {PARALLEL}")


def test_a_step_lets_all_threads_run(adapter: Session, tmp_path: Path) -> None:
    """One that waits for another thread ends at once; were the others stopped, it would wait for its whole limit."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import threading, time\n"
        "asked, done = threading.Event(), threading.Event()\n"
        "def work():\n"
        "    asked.wait()\n"
        "    for _ in range(20):\n"
        "        time.sleep(0.001)\n"
        "    done.set()\n"
        "threading.Thread(target=work).start()\n"
        "asked.set()\n"
        "came = done.wait(10)\n"
        "print(came)\n"
    )
    adapter.begin("launch", configured("the open file", program=str(script)), script, line=9)
    thread = adapter.event("stopped")["threadId"]
    for _ in range(2):
        adapter.ask("next", threadId=thread)
        adapter.event("stopped")
    assert adapter.evaluate(thread, "came") == "True"
    adapter.ask("continue", threadId=thread)
    adapter.event("terminated")


@pytest.mark.skipif(sys.platform != "linux", reason="process groups")
def test_both_ranks_stop_and_one_steps_over_a_collective(adapter: Session) -> None:
    configuration = configured("learn: step2_tensor_parallel", args=["--max-tokens", "3"])
    line = first_line("all_reduce")
    adapter.begin("launch", configuration, PARALLEL, line)

    children: list[Session] = []  # the worker, and Python's resource tracker, which never comes to the breakpoint

    def a_child_stopped() -> bool:
        if adapter.has("debugpyAttach"):
            attach = adapter.event("debugpyAttach")
            stream = socket.create_connection((attach["connect"]["host"], attach["connect"]["port"]))
            children.append(Session(stream.makefile("rb"), stream.makefile("wb")))  # type: ignore[arg-type]
            children[-1].begin("attach", attach, PARALLEL, line)
        return any(child.has("stopped") for child in children)

    assert until(a_child_stopped)
    (worker,) = [child for child in children if child.has("stopped")]
    threads = [session.event("stopped")["threadId"] for session in (adapter, worker)]
    assert adapter.evaluate(threads[0], "self.rank, self.size") == "(0, 2)"
    assert worker.evaluate(threads[1], "self.rank, self.size") == "(1, 2)"

    for session in (adapter, *children):
        session.ask("setBreakpoints", source={"path": str(PARALLEL)}, breakpoints=[])
    worker.ask("continue", threadId=threads[1])
    before = adapter.evaluate(threads[0], "tensor.sum().item()")
    for _ in range(8):  # over the collective, in which rank 0 waits for another process and for gloo's threads
        adapter.ask("next", threadId=threads[0])
        adapter.event("stopped")
        if adapter.evaluate(threads[0], "tensor.sum().item()") != before:
            break
    else:
        pytest.fail("the sum of both ranks never came")
    adapter.ask("continue", threadId=threads[0])

    adapter.event("terminated")
    output = ""
    while adapter.has("output"):
        event = adapter.event("output")
        output += event["output"] if event.get("category") == "stdout" else ""
    assert "the same tokens: True" in output
