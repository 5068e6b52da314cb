"""Joins the ranks' processes: NCCL between GPUs, gloo between processes on a CPU.

The groups are created directly, not as torch's process-wide default, so that one process can hold several engines.
The ranks meet at a store, which is open to processes of this machine only, on a port that the system chooses.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from nanovllm.config import EngineConfig
from nanovllm.distributed.peer_memory import PeerMemory
from nanovllm.kernels.one_shot_all_reduce import BUFFER_BYTES, MAX_RANKS, OneShotAllReduce
from nanovllm.kernels.triton_support import HAS_TRITON
from nanovllm.layers.parallel import TensorParallel
from nanovllm.utils import env

_HOST = "127.0.0.1"
_MEETING_SLEEP = 2e-3
_LEAVE_SECONDS = 5.0


def open_server(config: EngineConfig) -> Any:
    """Returns the store's server; its `port` is for `open_store`. It closes, with its connections, with the object."""
    with socket.create_server((_HOST, 0)) as listener:  # TCPStore itself would listen on all interfaces
        port = listener.getsockname()[1]
        return _tcp_store(config, port, is_master=True, master_listen_fd=listener.detach())


def open_store(config: EngineConfig, port: int) -> Any:
    """Returns the store whose server listens on `port`."""
    return _tcp_store(config, port)


def _tcp_store(config: EngineConfig, port: int, **arguments: Any) -> Any:
    timeout = timedelta(seconds=config.startup_timeout)
    return TCPStore(_HOST, port, config.tensor_parallel_size, timeout=timeout, wait_for_workers=False, **arguments)


def join_ranks(
    store: Any, rank: int, config: EngineConfig, device: torch.device, check: Callable[[], None] = lambda: None
) -> TensorParallel:
    """Returns the group once all ranks have joined. device: of this rank. check: called meanwhile; may raise."""
    size = config.tensor_parallel_size
    # Torch's own wait for the others could not be broken off.
    store.set(f"joined/{rank}", b"")
    while not store.check([f"joined/{other}" for other in range(size)]):
        check()
        time.sleep(_MEETING_SLEEP)
    # Longer than rank 0's watch waits, because the watch knows which rank is late.
    timeout = timedelta(seconds=config.startup_timeout + config.step_timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL uses the current device
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        with env.nccl_stays_on_this_machine():
            nccl: Any = dist.ProcessGroupNCCL(store, rank, size, options)
            nccl.eager_connect_single_device(device)
        return TensorParallel(rank, size, nccl, _one_shot_all_reduce(store, rank, size, device, nccl))
    gloo: Any = dist.ProcessGroupGloo
    gloo_options = gloo._Options()  # stays on this machine, whatever the host name resolves to
    gloo_options._devices = [gloo.create_device(hostname=_HOST)]
    gloo_options._timeout = timeout
    return TensorParallel(rank, size, gloo(store, rank, size, gloo_options))


def _one_shot_all_reduce(store: Any, rank: int, size: int, device: torch.device, nccl: Any) -> OneShotAllReduce | None:
    """Returns None when it is not available, as when the GPUs cannot access each other's memory."""

    def exchange(own: bytes) -> list[bytes]:
        store.set(f"peer-memory/{rank}", own)
        return [store.get(f"peer-memory/{other}") for other in range(size)]

    memory: PeerMemory | None = None
    if HAS_TRITON and size <= MAX_RANKS:
        with suppress(RuntimeError):
            memory = PeerMemory(rank, BUFFER_BYTES, device, exchange)
    if not TensorParallel(rank, size, nccl).minimum(int(memory is not None), device) or memory is None:
        return None
    return OneShotAllReduce(rank, memory, device)


def leave_ranks(parallel: TensorParallel, seconds: float = _LEAVE_SECONDS) -> bool:
    """Ends the group, and collectives that hang because a rank is lost. Any thread may call it, more than once.

    Never raises. Returns whether the device has finished the group's work, after at most `seconds`.
    """
    group: Any = parallel.group
    if type(group).__name__ != "ProcessGroupNCCL":  # gloo's collectives end when the other processes do
        return True
    if parallel.one_shot is not None:
        parallel.one_shot.break_off()

    def leave() -> None:
        with suppress(Exception):  # the group may have failed already
            group.abort()
            if parallel.one_shot is not None:
                parallel.one_shot.close()

    thread = threading.Thread(target=leave, name="nanovllm-leave", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
