"""Compares `AsyncLLM` alone with `nanovllm serve`: what HTTP costs, with one API process and with several.

    python tools/bench_http.py --step-ms 12                                # no device: an engine of a given pace
    python tools/bench_http.py --model Qwen/Qwen3-0.6B --servers 0,1,2,4   # a real one

`--streams` clients send requests one after another, each as soon as its last one has ended, to `/v1/completions` or
`/v1/chat/completions` (`--chat`). Their lengths are random around `--tokens`, so that they do not end together. The
clients run in `--clients` processes, which read the stream and parse no JSON. With `AsyncLLM` alone, coroutines in one
process read the deltas. All start together, and are then measured one after another, `--rounds` times. Each line of the
table covers `--seconds`, after as many seconds of warm-up.

CPU is the time of the processes in microseconds a token: of the engine, and of all others without the clients, with
the part of it in the system's calls. `busy` is the share of the time in which the busiest API process ran.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.engine_args import AsyncEngineArgs
from nanovllm.utils.argparse_utils import FlexibleArgumentParser

_ROW = "{:>14} {:>9} {:>12} {:>8} {:>8} {:>8} {:>8} {:>10} {:>7} {:>7} {:>6}"
_TITLES = [
    "",
    "tokens/s",
    "tokens/delta",
    "TTFT p50",
    "p99 ms",
    "ITL p50",
    "p99 ms",
    "engine us",
    "API us",
    "system",
    "busy",
]
_ENGINE = b"async_engine.process_main"
_WARM_SECONDS = 2.0


@dataclass
class Seen:
    """What clients saw in the time that is measured. Times in ms."""

    num_tokens: int = 0
    num_deltas: int = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add(self, other: dict[str, Any]) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + other[name])


@dataclass(frozen=True)
class Load:
    """What one process of clients does. start, end: of what is measured, in seconds of the monotonic clock."""

    url: str
    chat: bool
    num_streams: int
    prompt_tokens: int
    tokens: int
    start: float
    end: float
    seed: int

    def requests(self, stream: int) -> Iterator[tuple[str, int]]:
        """Yields prompts, with the number of tokens to generate."""
        choose = random.Random(f"{self.seed}, {stream}")
        while time.monotonic() < self.end:
            words = " ".join(f"{choose.randrange(100)}" for _ in range(self.prompt_tokens // 3))
            yield f"{words} =", choose.randrange(self.tokens // 2, self.tokens * 3 // 2)


class Timer:
    """Notes when the deltas of one request arrive."""

    def __init__(self, load: Load, seen: Seen) -> None:
        self._load, self._seen = load, seen
        self._last, self._is_first = time.monotonic(), True

    def arrived(self, num_deltas: int) -> None:
        now = time.monotonic()
        if self._load.start <= now < self._load.end:
            self._seen.num_deltas += num_deltas
            (self._seen.ttft if self._is_first else self._seen.gaps).append((now - self._last) * 1e3)
        self._last, self._is_first = now, False

    def ended(self, num_tokens: int) -> None:
        if self._load.start <= self._last < self._load.end:
            self._seen.num_tokens += num_tokens


class HttpStream(asyncio.Protocol):
    """One connection, which asks for one stream after another."""

    def __init__(self, load: Load, stream: int, seen: Seen) -> None:
        self._load, self._requests, self._seen = load, load.requests(stream), seen
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it
        self._ask()

    def _ask(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._transport.close()
            return
        prompt, self._num_tokens = request
        body: dict[str, Any] = {"stream": True, "ignore_eos": True, "temperature": 0, "max_tokens": self._num_tokens}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self._load.chat else {"prompt": prompt}
        data = json.dumps(body).encode()
        path = "/v1/chat/completions" if self._load.chat else "/v1/completions"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._timer, self._tail = Timer(self._load, self._seen), b""
        self._transport.write(head.encode() + data)

    def data_received(self, data: bytes) -> None:
        num_deltas = data.count(b"data: {")
        if self._tail == b"" and not data.startswith(b"HTTP/1.1 200"):
            print(f"The server answers {data[:400]!r}.", file=sys.stderr)
            os._exit(1)
        if num_deltas:
            self._timer.arrived(num_deltas)
        self._tail = self._tail[-8:] + data[-8:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            self._timer.ended(self._num_tokens)
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


async def ask_server(load: Load) -> Seen:
    seen, loop = Seen(), asyncio.get_running_loop()
    host, port = load.url.removeprefix("http://").split(":")
    made = [
        await loop.create_connection(lambda number=number: HttpStream(load, number, seen), host, int(port))
        for number in range(load.num_streams)
    ]
    await asyncio.wait([stream.closed for _, stream in made], timeout=load.end - time.monotonic())
    return seen


async def ask_engine(engine: AsyncLLM, load: Load) -> Seen:
    seen = Seen()

    async def stream(number: int) -> None:
        for prompt, num_tokens in load.requests(number):
            timer = Timer(load, seen)
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            messages = [{"role": "user", "content": prompt}]
            outputs = (
                engine.chat(messages, params, delta=True) if load.chat else engine.generate(prompt, params, delta=True)
            )
            async for _ in outputs:
                timer.arrived(1)
            timer.ended(num_tokens)

    streams = [asyncio.ensure_future(stream(number)) for number in range(load.num_streams)]
    await asyncio.wait(streams, timeout=load.end - time.monotonic())
    for each in streams:
        each.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return seen


# The processes that are measured, and their CPU time


def descendants(pid: int) -> list[int]:
    """Returns a process and all that it has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(each for file in children for child in file.read_text().split() for each in descendants(int(child)))]


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Returns the CPU time of a process so far, without that of children: all of it, and that in the system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:13])
    return user + system, system


@dataclass(frozen=True)
class CpuSeconds:
    """CPU time of the engine, of the other processes, of these in the system, and of the busiest of them."""

    engine: float
    api: float
    api_system: float
    busiest: float


class CpuClock:
    """The CPU time of a process and its descendants between two moments."""

    def __init__(self, pid: int) -> None:
        self._pids = descendants(pid)
        self._engine = {each for each in self._pids if _ENGINE in Path(f"/proc/{each}/cmdline").read_bytes()}
        self._before = {each: cpu_seconds(each) for each in self._pids}

    def seconds(self) -> CpuSeconds:
        spent: dict[int, tuple[float, float]] = {}
        for pid, before in self._before.items():
            total, system = cpu_seconds(pid)
            spent[pid] = total - before[0], system - before[1]
        others = [seconds for pid, seconds in spent.items() if pid not in self._engine]
        return CpuSeconds(
            engine=sum(spent[pid][0] for pid in self._engine),
            api=sum(total for total, _ in others),
            api_system=sum(system for _, system in others),
            busiest=max(total for total, _ in others),
        )


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options
    )


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values) or [0.0]
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


@dataclass
class Started:
    """A process that is measured. url: of a server."""

    name: str
    process: subprocess.Popen[str]
    url: str | None = None

    def wait(self) -> None:
        """Waits until it takes requests."""
        if self.process.stderr is None:
            assert self.process.stdout is not None
            assert self.process.stdout.readline() == "ready\n", "AsyncLLM has not started"
            return
        told = []
        for line in self.process.stderr:
            told.append(line)
            found = re.search(r"http://[\d.]+:\d+", line)
            if found is not None:
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                self.url = found.group()
                return
        raise SystemExit("The server has ended:\n" + "".join(told[-20:]))


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._common = ["--model", options.model, "--step-ms", str(options.step_ms), *options.engine_options]

    def load(self, **changes: Any) -> Load:
        given = self._options
        start = time.monotonic() + _WARM_SECONDS + given.seconds
        values = {"url": "", "chat": given.chat, "num_streams": given.streams, "tokens": given.tokens, "seed": 0}
        values |= {"prompt_tokens": given.prompt_tokens, "start": start, "end": start + given.seconds}
        return Load(**{**values, **changes})

    @contextmanager
    def started(self, num_processes: int) -> Iterator[Started]:
        """Starts a server with so many API processes; 0: a process with AsyncLLM."""
        if num_processes == 0:
            started = Started("AsyncLLM", python("--as-engine", *self._common, stderr=subprocess.DEVNULL))
        else:
            several = ["--api-server-count", str(num_processes)] if num_processes > 1 else []
            process = python("--as-server", *self._common, *several, stderr=subprocess.PIPE)
            started = Started(f"server, {num_processes} API", process)
        try:
            yield started
        finally:
            started.process.terminate()
            started.process.wait()

    def measure(self, started: Started) -> None:
        """Prints a line of the table."""
        if started.url is None:
            clients, load = [started.process], self.load()
        else:
            clients = [python("--as-client") for _ in range(self._options.clients)]
            load = self.load(url=started.url, num_streams=self._options.streams // len(clients))
        for number, client in enumerate(clients):
            assert client.stdin is not None
            print(json.dumps({**asdict(load), "seed": number}), file=client.stdin, flush=True)
        self._report(started.name, load, started.process.pid, clients)

    def _report(self, name: str, load: Load, pid: int, clients: list[subprocess.Popen[str]]) -> None:
        time.sleep(max(load.start - time.monotonic(), 0))
        clock = CpuClock(pid)
        time.sleep(max(load.end - time.monotonic(), 0))
        seconds = load.end - load.start
        cpu = clock.seconds()
        seen = Seen()
        for client in clients:
            assert client.stdout is not None
            seen.add(take_result(client.stdout.readline()))
        cells = [f"{seen.num_tokens / seconds:.0f}", f"{seen.num_tokens / max(seen.num_deltas, 1):.2f}"]
        for values in (seen.ttft, seen.gaps):
            cells += [f"{quantile(values, share):.1f}" for share in (0.5, 0.99)]
        per_token = 1e6 / max(seen.num_tokens, 1)
        cells += [f"{each * per_token:.1f}" for each in (cpu.engine, cpu.api, cpu.api_system)]
        print(_ROW.format(name, *cells, f"{cpu.busiest / seconds:.0%}"), flush=True)


# What the started processes do


def give_result(seen: Seen) -> None:
    """Prints the name of a file with the result, which is longer than what a pipe holds."""
    with NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(asdict(seen), file)
    print(file.name, flush=True)


def take_result(line: str) -> dict[str, Any]:
    """Returns what `give_result` wrote, and deletes its file."""
    file = Path(line.strip())
    result: dict[str, Any] = json.loads(file.read_text())
    file.unlink()
    return result


def be_engine(options: argparse.Namespace) -> None:
    import uvloop

    parser = FlexibleArgumentParser()
    AsyncEngineArgs.add_cli_args(parser)
    given = parser.parse_args(["--model", options.model, "--engine-process", "true", *options.engine_options])
    with AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(given)) as engine:
        print("ready", flush=True)
        for line in sys.stdin:
            give_result(uvloop.run(ask_engine(engine, Load(**json.loads(line)))))


def be_client() -> None:
    import uvloop

    load = Load(**json.loads(sys.stdin.readline()))
    give_result(uvloop.run(ask_server(load)))


def be_server(options: argparse.Namespace) -> int:
    from nanovllm.cli.main import main

    engine = ["--model", options.model, "--engine-process", "true", *options.engine_options]
    return main(["serve", "--port", "0", *engine])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Other options: the engine's."
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--step-ms", type=float, default=0.0, help="run an engine without a device at this pace")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--servers", default="0,1", help="numbers of API processes; 0: AsyncLLM alone")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=1)
    for name in ("engine", "server", "client"):
        parser.add_argument(f"--as-{name}", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    options, engine_options = make_parser().parse_known_args()
    options.engine_options = engine_options or ["--max-num-seqs", str(options.streams), "--max-model-len", "1024"]
    if options.as_client:
        be_client()
        return 0
    if options.step_ms:
        import paced_engine

        paced_engine.install(options.step_ms)
    if options.as_engine:
        be_engine(options)
        return 0
    if options.as_server:
        return be_server(options)
    bench = Bench(options)
    with ExitStack() as stack:
        targets = [stack.enter_context(bench.started(int(number))) for number in options.servers.split(",")]
        for each in targets:
            each.wait()
        print(_ROW.format(*_TITLES), flush=True)
        for each in options.rounds * targets:
            bench.measure(each)
    return 0


if __name__ == "__main__":
    sys.exit(main())
