"""`nanovllm serve tiny` in a process of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.processes import PATIENCE, WATCHDOG, start_python, until

OPTIONS = ["--num-kvcache-blocks", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--port", "0"]
LONG = {"prompt": "count", "ignore_eos": True, "stream": True, "temperature": 1}


class Process:
    """`nanovllm serve tiny` in a process of its own."""

    def __init__(self, log: Path, *options: str, **variables: str) -> None:
        variables |= {"NANOVLLM_LOG_FILE": str(log), "NANOVLLM_LOG_FILE_FORMAT": "json", "NANOVLLM_API_KEY": "secret"}
        self._log = log
        self.process = start_python("-m", "nanovllm", "serve", "tiny", *OPTIONS, *options, **variables)
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert until(lambda: bool(self.records("server.started")) or self.process.poll() is not None), self.errors
        (started,) = self.records("server.started")
        headers = {"Authorization": "Bearer secret"}
        self.client = httpx2.Client(base_url=started["address"], headers=headers, timeout=PATIENCE, trust_env=False)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.errors += self.process.stderr

    def records(self, event: str) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines(keepends=True) if self._log.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if record["event"] == event]

    def end(self) -> int:
        """Waits for the process, and returns its status."""
        status = self.process.wait(WATCHDOG)
        self._reader.join()
        return status


@contextmanager
def serving(log: Path, *options: str, **variables: str) -> Iterator[Process]:
    """Yields a server that writes its log to a file. variables: further ones of its environment."""
    process = Process(log, *options, **variables)
    try:
        with process.client:
            yield process
    finally:
        process.process.kill()
        process.process.wait()
        for stream in (process.process.stdout, process.process.stderr):
            assert stream is not None
            stream.close()
