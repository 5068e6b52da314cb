"""Measures the shared-memory channel between two processes: latency by size, and throughput.

    python tools/bench_channel.py [--messages 20000] [--ring-kb 1024]

Latency is from the call of `send` to the return of `receive` in the other process, on the clock they share, with
messages `--interval-us` apart as in a decoding engine. It means something on a machine with a core for each process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import struct
import time
from multiprocessing.connection import Connection

from nanovllm.distributed.shm_channel import ChannelReader, ChannelWriter

STOP, TIMED, BULK = 0, 1, 2
SIZES = (64, 1024, 16 * 1024, 256 * 1024)
BULK_SIZES = (4 * 1024, 64 * 1024, 1 << 20, 16 << 20)
BULK_BYTES = 1 << 28  # moved to measure a throughput


def percentile(values: list[int], percent: float) -> float:
    """Returns a percentile of nanoseconds, in microseconds."""
    return sorted(values)[min(int(len(values) * percent / 100), len(values) - 1)] / 1e3


def read_messages(name: str, pipe: Connection) -> None:
    """Runs the reader's process: sends back each series' nanoseconds from send to receive, one for each message."""
    channel = ChannelReader(name, 0)
    pipe.send("attached")
    nanoseconds: list[int] = []
    while (message := channel.receive()) is not None and message.kind != STOP:
        now = time.perf_counter_ns()
        if message.payload:
            nanoseconds.append(now - struct.unpack_from("q", message.payload)[0])
        else:  # the end of a series
            pipe.send(nanoseconds)
            nanoseconds = []
    channel.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000, help="of each size, to measure latency")
    parser.add_argument("--interval-us", type=float, default=100.0, help="time between two messages")
    parser.add_argument("--ring-kb", type=int, default=1024)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    channel = ChannelWriter.create(1, arguments.ring_kb * 1024)
    pipe, reader_pipe = context.Pipe()
    process = context.Process(target=read_messages, args=(channel.name, reader_pipe), daemon=True)
    process.start()
    pipe.recv()
    channel.unlink()
    result: dict[str, object] = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "latency_us": {}}
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, a ring of {arguments.ring_kb} KB")
    print(f"{'bytes':>10} {'p50':>9} {'p99':>9} {'max':>9}  µs from send to receive")
    for size, is_warm_up in ((SIZES[0], True), *((size, False) for size in SIZES)):
        payload = bytearray(size)
        for _ in range(arguments.messages // 10 if is_warm_up else arguments.messages):
            until = time.perf_counter() + arguments.interval_us / 1e6
            while time.perf_counter() < until:
                pass
            struct.pack_into("q", payload, 0, time.perf_counter_ns())
            channel.send(TIMED, payload)
        channel.send(TIMED)
        times = pipe.recv()
        if is_warm_up:
            continue
        p50, p99, worst = percentile(times, 50), percentile(times, 99), max(times) / 1e3
        print(f"{size:>10} {p50:>9.1f} {p99:>9.1f} {worst:>9.1f}")
        result["latency_us"][str(size)] = {"p50": p50, "p99": p99, "max": worst}  # type: ignore[index]
    print(f"{'bytes':>10} {'GB/s':>9} {'messages/s':>12}")
    result["gigabytes_per_second"] = {}
    for size in BULK_SIZES:
        payload = bytearray(size)
        count = max(BULK_BYTES // size // 4 if size < 1 << 16 else BULK_BYTES // size, 1)
        started = time.perf_counter()
        for _ in range(count):
            channel.send(BULK, payload)
        channel.send(BULK)
        pipe.recv()
        elapsed = time.perf_counter() - started
        print(f"{size:>10} {count * size / elapsed / 1e9:>9.2f} {count / elapsed:>12.0f}")
        result["gigabytes_per_second"][str(size)] = count * size / elapsed / 1e9  # type: ignore[index]
    channel.send(STOP)
    process.join()
    channel.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
