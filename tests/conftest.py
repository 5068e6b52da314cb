"""What every test needs of its process, set before torch and triton are imported; and what a run leaves out.

With `pytest -n`, this file is also read by the process that hands out the tests. It runs none, so it needs no torch.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

import tests.properties  # noqa: F401  (registers hypothesis's long profile before pytest chooses it)
from nanovllm.utils.logger import configure_logging

# The models here are small: more threads only wait for one another, above all beside other processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

# A job in the background ignores SIGINT, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of these folders take longest: workers begin with them, so that all end at about the same time.
LONG_FOLDERS = ("distributed", "examples", "docs", "diagnostics", "end_to_end", "compat", "api", "kernels")

LEFT_OUT = pytest.StashKey[Counter[str]]()
LOG_LEVEL = "NANOVLLM_LOG_LEVEL"
COMMANDS = {"heavy": "make test-heavy", "gpu": "make gpu-test"}


def hands_out_tests(config: pytest.Config) -> bool:
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


def begins(folder: str) -> int:
    return LONG_FOLDERS.index(folder) if folder in LONG_FOLDERS else len(LONG_FOLDERS)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()
    if hands_out_tests(config):
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def logging_is_on(pytestconfig: pytest.Config) -> Iterator[None]:
    """No test inherits a log that another one has switched off, or a level that a command has set as the default."""
    logging.disable(logging.NOTSET)
    plugin = pytestconfig.pluginmanager.get_plugin("logging-plugin")
    if plugin is not None:
        plugin.caplog_handler.setLevel(logging.NOTSET)
    level = os.environ.get(LOG_LEVEL)
    yield
    if os.environ.get(LOG_LEVEL) != level:
        os.environ.pop(LOG_LEVEL, None)
        if level is not None:
            os.environ[LOG_LEVEL] = level
        configure_logging()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files come first. GPU tests are deselected, and counted as such, where there is no GPU."""
    import torch

    items.sort(key=lambda item: begins(item.path.parent.name))
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


# ---- what is left out is said at the end, with the command that runs it


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in COMMANDS:
            if item.get_closest_marker(marker):
                item.config.stash[LEFT_OUT][marker] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Every worker collects all tests, so the counts of one are those of the run. One that dies leaves its status."""
    if not error:
        node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))
    else:
        process = node.gateway._io.popen
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        print(f"\nworker {node.gateway.id}: exit status {process.returncode} (negative: a signal; None: it runs on)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for marker, number in sorted(config.stash[LEFT_OUT].items()):
        terminalreporter.write_line(f"{number} {marker} tests were left out: `{COMMANDS[marker]}` runs them.")
    if config.getoption("markexpr") == "not heavy":
        terminalreporter.write_line("Property tests drew an eighth of their examples: `make test-heavy` draws all.")
