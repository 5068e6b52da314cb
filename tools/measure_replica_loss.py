"""Kills one of two replicas in the middle of 200 streams: `python tools/measure_replica_loss.py`.

Starts `nanovllm serve --data-parallel-size 2` on the tiny checkpoint and a CPU. Prints how the streams ended, how long
requests that come after that take, and when the replica is back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).resolve().parent.parent


async def stream(client: httpx2.AsyncClient, index: int, max_tokens: int, chunks: list[float]) -> str:
    """Reads one stream, notes when its chunks came, and returns how it ended."""
    body = {"prompt": f"count from {index}", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    last = ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last = line
                chunks.append(time.perf_counter())
    event = json.loads(last.removeprefix("data: "))
    return str(event["error"]["code"] if "error" in event else event["choices"][0]["finish_reason"])


async def load(client: httpx2.AsyncClient) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.get("/load")).json()
    return answer


async def measure(url: str, log: Path, num_streams: int, max_tokens: int) -> None:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        chunks: list[list[float]] = [[] for _ in range(num_streams)]
        streams = [asyncio.create_task(stream(client, index, max_tokens, each)) for index, each in enumerate(chunks)]
        while sum(map(bool, chunks)) < num_streams // 2:
            await asyncio.sleep(0.01)
        num_begun = sum(map(bool, chunks))
        (pid,) = {record["pid"] for record in records(log, "engine.init") if record["engine_id"] == 1}
        os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter()
        response = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        after = time.perf_counter() - killed
        while (await load(client))["degraded"] is False and not records(log, "replica.restarted"):
            await asyncio.sleep(0.05)
        while (await load(client))["degraded"]:
            await asyncio.sleep(0.05)
        back = time.perf_counter() - killed
        endings = await asyncio.gather(*streams)
    ends = Counter(endings)
    print(f"{num_streams} streams of {max_tokens} tokens, {num_begun} with an output when replica 1 was killed")
    print(f"    ended by length              {ends['length']:5d}")
    print(f"    of these run a second time   {len(records(log, 'request.repeated')):5d}")
    print(f"    ended with replica_lost      {ends['replica_lost']:5d}")
    print(f"    ended otherwise              {num_streams - ends['length'] - ends['replica_lost']:5d}")
    whole = [each for each, ending in zip(chunks, endings, strict=True) if ending == "length"]
    went_on = [each for each in whole if each[0] < killed]
    before, later = (longest_gap(went_on, *span) for span in ((0.0, killed), (killed, float("inf"))))
    print(f"longest pause of {len(went_on)} streams that went on: {before:.2f} s before, {later:.2f} s after")
    print(f"the next request: status {response.status_code} after {after:.2f} s; replica 1 back after {back:.1f} s")


def longest_gap(streams: list[list[float]], begin: float, end: float) -> float:
    """Returns the longest time between two chunks of a stream of which the second came from `begin` to `end`."""
    gaps = [second - first for each in streams for first, second in pairwise(each) if begin <= second < end]
    return max(gaps, default=0.0)


def records(log: Path, event: str) -> list[dict[str, Any]]:
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n") and f'"event": "{event}"' in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        variables = {"NANOVLLM_LOG_FILE": str(log), "NANOVLLM_LOG_FILE_FORMAT": "json", "NANOVLLM_LOG_LEVEL": "INFO"}
        options = ["--port", str(port), "--device", "cpu", "--data-parallel-size", "2", "--num-kvcache-blocks", "4096"]
        options += ["--max-num-seqs", str(args.max_num_seqs)]
        command = [sys.executable, "-m", "nanovllm", "serve", "tiny", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
            try:
                while not records(log, "server.started"):
                    if server.poll() is not None:
                        sys.exit("the server did not start")
                    time.sleep(0.1)
                asyncio.run(measure(f"http://127.0.0.1:{port}", log, args.streams, args.max_tokens))
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
