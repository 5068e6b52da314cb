"""The channel between processes: every message whole, in order, to every reader; errors instead of hangs."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nanovllm.distributed.shm_channel import ChannelReader, ChannelWriter, remove_stale_segments
from nanovllm.errors import ChannelError
from tests.distributed.rank_processes import SHARED_MEMORY, segments
from tests.properties import examples

STOP = 0
NUM_READERS = 2


def digest(payload: bytes | bytearray) -> str:
    return hashlib.blake2b(payload, digest_size=8).hexdigest()


def read_channels(pipe: Connection, reader: int) -> None:
    """A reader's process: name and delay of a channel come through the pipe, and what it read goes back."""
    while (order := pipe.recv()) is not None:
        name, delay = order
        channel = ChannelReader(name, reader)
        pipe.send("attached")
        got = []
        while (message := channel.receive()) is not None and message.kind != STOP:
            got.append((message.kind, message.sequence, digest(message.payload)))
            time.sleep(delay)
        pipe.send(got)
        channel.close()


@pytest.fixture(scope="module")
def readers() -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for reader in range(NUM_READERS):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=read_channels, args=(theirs, reader), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    yield pipes
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(10)
        process.kill()  # where it hangs
        process.join()
        assert process.exitcode == 0


@pytest.fixture
def channel() -> Iterator[ChannelWriter]:
    writer = ChannelWriter.create(1, 1024)
    yield writer
    writer.unlink()
    writer.close()


@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=examples(60),
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    lines=st.integers(8, 200) | st.just(1 << 14),
    sizes=st.lists(
        st.integers(0, 300) | st.sampled_from([63, 64, 65, 191, 192, 193, 4096]) | st.integers(0, 100_000),
        min_size=1,
        max_size=30,
    ),
    delays=st.tuples(*[st.sampled_from([0.0, 0.0, 0.001])] * NUM_READERS),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_reader_gets_every_message(
    readers: list[Connection], lines: int, sizes: list[int], delays: tuple[float, ...], seed: int
) -> None:
    exchange(readers, 64 * lines, sizes, delays, seed)


def record_sizes(size: int, capacity: int) -> list[int]:
    """Bytes of the ring that the pieces of a message take: each a header's line and whole lines of content."""
    limit = capacity // 4 - 64
    pieces = [min(limit, size - offset) for offset in range(0, size, limit)] or [0]
    return [64 + -(-piece // 64) * 64 for piece in pieces]


READ = st.tuples(st.just("read"), st.integers(0, 2))
SEND = st.tuples(st.just("send"), st.integers(0, 300) | st.integers(0, 3000))


@settings(derandomize=True, deadline=None, database=None, max_examples=examples(300))
@given(
    lines=st.integers(8, 64),
    num_readers=st.integers(1, 3),
    actions=st.lists(SEND | READ, min_size=10, max_size=60),
)
def test_the_ring_is_a_queue_that_takes_a_message_exactly_when_the_slowest_reader_has_made_room(
    lines: int, num_readers: int, actions: list[tuple[str, int]]
) -> None:
    """Nobody waits here: every step's outcome is known from counting bytes. Readers stop between pieces, too."""
    writer = ChannelWriter.create(num_readers, 64 * lines)
    readers = [ChannelReader(writer.name, number) for number in range(num_readers)]
    writer.unlink()
    sent: list[bytes] = []
    got: list[list[bytes]] = [[] for _ in readers]
    acknowledged = [0] * num_readers
    head = 0
    is_broken = False
    try:
        for action, number in [*actions, *(("read", reader) for reader in range(num_readers))]:
            if action == "read":
                reader = number % num_readers
                while (message := readers[reader].receive(timeout=0)) is not None:
                    assert (message.kind, message.sequence) == (7, len(got[reader]))
                    got[reader].append(bytes(message.payload))
                acknowledged[reader] = head
                assert got[reader] == sent
                continue
            payload = np.random.default_rng(head).bytes(number)
            fitting = list(itertools.accumulate(record_sizes(number, 64 * lines)))
            room = 64 * lines - (head - min(acknowledged))
            if not is_broken and fitting[-1] <= room:
                writer.send(7, payload, timeout=0)
                sent.append(payload)
                head += fitting[-1]
                continue
            with pytest.raises(ChannelError, match="cut short" if is_broken else "have not made room"):
                writer.send(7, payload, timeout=0)
            if not is_broken and fitting[0] <= room:  # its first pieces are in the ring, and nothing follows them
                is_broken = True
                head += max(size for size in fitting if size <= room)
    finally:
        for channel in (writer, *readers):
            channel.close()


def test_a_writer_that_stops_in_the_middle_holds_no_reader_up(channel: ChannelWriter) -> None:
    """A reader that looks now and then gets the message whole, once it is."""
    reader = ChannelReader(channel.name, 0)
    payload = np.random.default_rng(0).bytes(2000)  # in eleven pieces, of which four find room
    looks = []

    def look() -> None:
        looks.append(reader.receive(timeout=0))

    channel.send(1, payload, while_waiting=look)
    assert set(looks) == {None}
    assert len(looks) >= 2
    message = reader.receive(timeout=0)
    assert message is not None
    assert message.payload == payload
    with pytest.raises(ChannelError, match="have not made room"):
        channel.send(1, payload, timeout=0)
    for timeout in (0, 0.01):  # the rest never comes
        assert reader.receive(timeout=timeout) is None
    reader.close()


@pytest.mark.parametrize("capacity", [4096, 1 << 20])
def test_messages_of_many_mebibytes(readers: list[Connection], capacity: int) -> None:
    exchange(readers, capacity, [5 << 20, 0, (16 << 20) + 1, 1], (0.0, 0.002), 1)


def answer(pipe: Connection) -> object:
    assert pipe.poll(60), "a reader waits for ever"
    return pipe.recv()


def exchange(readers: list[Connection], capacity: int, sizes: list[int], delays: tuple[float, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    writer = ChannelWriter.create(NUM_READERS, capacity)
    try:
        for pipe, delay in zip(readers, delays, strict=True):
            pipe.send((writer.name, delay))
        assert [answer(pipe) for pipe in readers] == ["attached"] * NUM_READERS
        writer.unlink()
        expected = []
        for index, size in enumerate(sizes):
            payload = generator.bytes(size)
            kind = 1 + index % 7
            writer.send(kind, payload, timeout=30)
            expected.append((kind, index, digest(payload)))
        writer.send(STOP)
        for pipe in readers:
            assert answer(pipe) == expected
    finally:
        writer.unlink()
        writer.close()


def test_any_buffer_is_a_payload(channel: ChannelWriter) -> None:
    reader = ChannelReader(channel.name, 0)
    for payload in (np.arange(7, dtype=np.int32), np.empty(0, dtype=np.int32), b"", bytearray(b"abc")):
        channel.send(3, payload)
        message = reader.receive(timeout=1)
        assert message is not None
        assert message.payload == bytes(payload)
    assert reader.receive(timeout=0) is None
    reader.close()


def test_a_slow_reader_holds_the_writer_back_until_the_deadline(channel: ChannelWriter) -> None:
    reader = ChannelReader(channel.name, 0)
    for number in range(8):  # a line for the header, one for the payload, of 16
        channel.send(1, bytes([number]) * 64)
    started = time.monotonic()
    with pytest.raises(ChannelError, match=r"readers \[0\] have not made room for 64 bytes in time"):
        channel.send(1, bytes([8]) * 64, timeout=0.05)
    assert time.monotonic() - started >= 0.05
    first = reader.receive()
    assert first is not None
    channel.send(1, bytes([8]) * 64, timeout=0.05)  # nothing was written of the one that did not fit
    assert [first.payload[0], *(reader.receive().payload[0] for _ in range(8))] == list(range(9))  # type: ignore[union-attr]
    reader.close()


def test_nothing_follows_a_message_that_was_cut_short(channel: ChannelWriter) -> None:
    with pytest.raises(ChannelError, match="have not made room"):
        channel.send(1, bytes(5000), timeout=0)
    with pytest.raises(ChannelError, match="cut short"):
        channel.send(1, b"x")


def test_waiting_may_be_broken_off(channel: ChannelWriter) -> None:
    reader = ChannelReader(channel.name, 0)

    def lost() -> None:
        raise ProcessLookupError

    with pytest.raises(ProcessLookupError):
        reader.receive(while_waiting=lost)
    for _ in range(16):
        channel.send(1)
    with pytest.raises(ProcessLookupError):
        channel.send(1, while_waiting=lost)
    reader.close()


def test_waiting_costs_no_core(channel: ChannelWriter) -> None:
    reader = ChannelReader(channel.name, 0)
    used = time.thread_time()
    assert reader.receive(timeout=0.5) is None
    assert time.thread_time() - used < 0.1
    reader.close()


def test_what_is_no_channel_is_refused(channel: ChannelWriter) -> None:
    with pytest.raises(ChannelError, match="There is no channel nanovllm-nothing"):
        ChannelReader("nanovllm-nothing", 0)
    with pytest.raises(ChannelError, match="has 1 readers, there is no reader 1"):
        ChannelReader(channel.name, 1)
    channel._words[1] = 7
    with pytest.raises(ChannelError, match=r"is no channel of version 1 \(it has version 7\)"):
        ChannelReader(channel.name, 0)


def test_a_record_that_is_none_is_an_error(channel: ChannelWriter) -> None:
    reader = ChannelReader(channel.name, 0)
    channel.send(1, b"x")
    channel._headers[0] = 5
    with pytest.raises(ChannelError, match="expected message 0 from byte 0 on, found 5 from 0 on"):
        reader.receive()
    reader.close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="process start times come from /proc")
def test_segments_of_dead_processes_are_removed_and_no_others(channel: ChannelWriter, tmp_path: Path) -> None:
    assert channel.name.startswith(f"nanovllm-{os.getpid()}-")
    alive = channel.name
    reused = f"nanovllm-{os.getpid()}-1-00000000"  # the same process id, of a process that began earlier
    dead = "nanovllm-999999999-1-00000000"
    foreign = ["nanovllm-x-y-z", "other-1-2-3", "nanovllm"]
    for name in (alive, reused, dead, *foreign):
        (tmp_path / name).write_bytes(b"")
    assert sorted(remove_stale_segments(tmp_path)) == sorted([reused, dead])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive, *foreign])


def test_names_are_unique_and_closing_leaves_nothing() -> None:
    before = segments(os.getpid())
    channels = [ChannelWriter.create(1, 512) for _ in range(5)]
    names = {channel.name for channel in channels}
    assert len(names) == 5
    assert names <= set(segments(os.getpid())) or not SHARED_MEMORY.is_dir()
    for channel in channels:
        channel.unlink()
        channel.unlink()
        channel.close()
        channel.close()
    assert set(segments(os.getpid())) <= set(before)
