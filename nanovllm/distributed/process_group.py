"""Joins the ranks' processes: NCCL between GPUs, gloo between processes on a CPU.

The groups are made directly, not as torch's process-wide default, so that one process can hold several engines. They
meet at a store whose port the system chose.
"""

from __future__ import annotations

import threading
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

_HOST = "127.0.0.1"
_LEAVE_SECONDS = 5.0


def open_store(config: EngineConfig, port: int | None = None) -> Any:
    """Rank 0 opens the store on a free port (`port` None); the others come with that port."""
    size, limit = config.tensor_parallel_size, timedelta(seconds=config.startup_timeout)
    return TCPStore(_HOST, port or 0, size, is_master=port is None, wait_for_workers=False, timeout=limit)


def join_ranks(store: Any, rank: int, config: EngineConfig, device: torch.device) -> TensorParallel:
    """Blocks until all ranks are here. `device`: where this rank computes."""
    size = config.tensor_parallel_size
    # Later than rank 0's watch would: it is the one that knows which rank is late.
    timeout = timedelta(seconds=config.startup_timeout + config.step_timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL works on the current device
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        nccl.eager_connect_single_device(device)
        return TensorParallel(rank, size, nccl, _one_shot_all_reduce(store, rank, size, device, nccl))
    gloo: Any = dist.ProcessGroupGloo
    gloo_options = gloo._Options()  # to stay on this machine, whatever its name resolves to
    gloo_options._devices = [gloo.create_device(hostname=_HOST)]
    gloo_options._timeout = timeout
    return TensorParallel(rank, size, gloo(store, rank, size, gloo_options))


def _one_shot_all_reduce(store: Any, rank: int, size: int, device: torch.device, nccl: Any) -> OneShotAllReduce | None:
    """None where it can not be had: the ranks' GPUs may not reach each other's memory."""

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
    """Ends the group, and with it collectives that hang because a rank is gone. May be called from any thread, again.

    Never raises. Returns whether the device is free of the group, which is waited for no longer than `seconds`.
    """
    group: Any = parallel.group
    if type(group).__name__ != "ProcessGroupNCCL":  # gloo's collectives end with the other processes
        return True
    if parallel.one_shot is not None:
        parallel.one_shot.break_off()

    def leave() -> None:
        with suppress(Exception):  # it may have failed already
            group.abort()
            if parallel.one_shot is not None:
                parallel.one_shot.close()

    thread = threading.Thread(target=leave, name="nanovllm-leave", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
