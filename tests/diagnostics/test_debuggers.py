"""Under a debugger: logging holds no lock that stepping could wait for, and there is one thread and one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import run_python

GENERATE = """
import os, threading
started, start = [], threading.Thread.start
threading.Thread.start = lambda thread: started.append(thread.name) or start(thread)
from nanovllm import LLM, SamplingParams
with LLM("tiny", device="cpu", max_model_len=256, num_kvcache_blocks=64) as llm:
    llm.generate(["count from 3 to 9"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        processes = children.read().split()
print("\\nTHREADS", started, "PROCESSES", processes)
"""


def run(arguments: list[str], commands: str, log_file: Path) -> str:
    log = {"NANOVLLM_LOG_LEVEL": "DEBUG", "NANOVLLM_LOG_FILE": str(log_file), "NANOVLLM_LOG_FORMAT": "json"}
    done = run_python(*arguments, stdin=commands, **log)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_one_thread_and_one_process(tmp_path: Path) -> None:
    """With all of the log on, and the progress bar."""
    assert "\nTHREADS [] PROCESSES []\n" in run(["-c", GENERATE], "", tmp_path / "run.jsonl")


@pytest.mark.parametrize(
    "place",
    [
        "nanovllm.logs.formats:JsonFormatter.format",  # with the handler's lock
        "nanovllm.logs.handlers:ConsoleHandler.emit",  # with the handler's lock
        "nanovllm.engine.scheduler:Scheduler.schedule",  # with none
    ],
)
def test_what_one_types_at_a_breakpoint_may_log(tmp_path: Path, place: str) -> None:
    """Stopped where a lock is held, an expression that logs itself returns, and the run goes on to its end."""
    module, _, function = place.partition(":")
    script = tmp_path / "script.py"
    script.write_text(GENERATE)
    log = "__import__('nanovllm.utils.logger').utils.logger"
    commands = [
        f"import {module}",
        f"tbreak {module}.{function}",
        "continue",
        f"p {log}.log_event({log}.setup_logger('typed'), 40, 'typed', 'typed at the breakpoint')",
        "next",
        "continue",
        "quit",
    ]
    output = run(["-m", "pdb", str(script)], "\n".join(commands) + "\n", tmp_path / "run.jsonl")
    assert f"){function.rpartition('.')[2]}()" in output, "it did not stop there"
    assert "\nTHREADS" in output, "it did not go on"
    assert (tmp_path / "run.jsonl").read_text().count('"message": "typed at the breakpoint"') == 1
