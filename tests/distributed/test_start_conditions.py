"""A process that cannot start several ranks says so, and what to do, before it starts one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm import ChannelError, InvalidArgumentError, OutOfMemoryError, WorkerError
from nanovllm.distributed.shm_channel import ChannelWriter
from tests.distributed.rank_processes import ONLY_LINUX, SHARED_MEMORY, folder, nothing_stays_behind, segments
from tests.processes import run_python
from tests.small_llm import load

__all__ = ["folder", "nothing_stays_behind"]  # fixtures
pytestmark = [ONLY_LINUX, pytest.mark.usefixtures("nothing_stays_behind")]


@contextmanager
def refused(match: str) -> Iterator[None]:
    before = multiprocessing.active_children()
    with pytest.raises(InvalidArgumentError, match=f"tensor_parallel_size=2 is not allowed: it must be 1 {match}"):
        yield
    assert multiprocessing.active_children() == before


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, limits)


def test_few_descriptors(folder: Path) -> None:
    few = len(os.listdir("/proc/self/fd")) + 20
    match = r"with \d+ free file descriptors. It needs 48: raise the limit, as with `ulimit -n 1024`"
    with limited(resource.RLIMIT_NOFILE, few), refused(match):
        load(folder, tensor_parallel_size=2)


def test_little_address_space(folder: Path) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    match = r"with 0\.\d+ GB of free address space. Each rank needs 1 GB and the model: raise the limit, as with"
    with limited(resource.RLIMIT_AS, used + 800_000_000), refused(match):
        load(folder, tensor_parallel_size=2)


@pytest.mark.parametrize("size", [1, 2])
def test_no_memory_left(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    def full(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("nanovllm.runner.startup.load_weights", full)
    with pytest.raises(OutOfMemoryError, match=r"This process gets too little memory to start an engine. Raise its"):
        load(folder, tensor_parallel_size=size)


def test_no_further_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("multiprocessing.context.SpawnProcess._Popen", full)
    with pytest.raises(WorkerError, match=r"Rank 1 cannot be started \(Resource temporarily .* raise its limits"):
        load(folder, tensor_parallel_size=2)


def test_a_script_without_a_guard(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(f"from tests.small_llm import *\nload({str(folder)!r}, tensor_parallel_size=2)")
    run = run_python(str(path), NANOVLLM_LOG_LEVEL="ERROR")
    assert run.returncode == 1
    assert "tensor_parallel_size=2 is not allowed: it must be 1 while another process reads the script." in run.stderr
    assert "freeze_support" not in run.stderr
    assert run.stderr.splitlines()[-1].endswith("must stand below if __name__ == '__main__'.")


def test_no_loopback_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    with refused(r"without a loopback network \(Network is unreachable\)\. .* run `ip link set lo up`"):
        load(folder, tensor_parallel_size=2)


def test_a_daemonic_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with refused(r"in a daemonic process, .* daemon=False"):
        load(folder, tensor_parallel_size=2)


def test_a_script_on_standard_input(folder: Path) -> None:
    script = f"from tests.small_llm import *\nload({str(folder)!r}, tensor_parallel_size=2)"
    run = run_python("-", stdin=script, NANOVLLM_LOG_LEVEL="ERROR")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith(
        "tensor_parallel_size=2 is not allowed: it must be 1 for a script that is not a file (<stdin>). Each rank "
        "reads the script: write it to a file."
    )
    assert run.stderr.count("Traceback") == 1


@pytest.mark.parametrize("place", ["SharedMemory", "posix_fallocate"])
def test_too_little_shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = os if place == "posix_fallocate" else "nanovllm.distributed.shm_channel.SharedMemory"
    monkeypatch.setattr(*((owner, place, full) if owner is os else (owner, full)))
    with pytest.raises(ChannelError) as caught:
        load(folder, tensor_parallel_size=2)
    text = "1048768 bytes of shared memory are not available in /dev/shm (No space left on device). Make it writable"
    assert text in str(caught.value)
    assert segments(os.getpid()) == []


def test_a_segment_has_its_memory_from_the_start_and_is_the_user_s_alone() -> None:
    channel = ChannelWriter.create(1, 1 << 18)
    try:
        status = (SHARED_MEMORY / channel.name).stat()
        assert status.st_blocks * 512 >= 1 << 18
        assert status.st_mode & 0o777 == 0o600
    finally:
        channel.unlink()
        channel.close()
