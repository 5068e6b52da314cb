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

from nanovllm.layers.parallel import TensorParallel

_HOST = "127.0.0.1"
_LEAVE_SECONDS = 5.0
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a lost rank is noticed long before, by its process


def open_store(size: int, timeout: float, port: int | None = None) -> Any:
    """Rank 0 opens the store on a free port (`port` None); the others come with that port."""
    limit = timedelta(seconds=timeout)
    return TCPStore(_HOST, port or 0, size, is_master=port is None, wait_for_workers=False, timeout=limit)


def join_ranks(store: Any, rank: int, size: int, device: torch.device) -> TensorParallel:
    """Blocks until all ranks are here. `device`: where this rank computes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL works on the current device
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _COLLECTIVE_TIMEOUT
        nccl: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        nccl.eager_connect_single_device(device)
        return TensorParallel(rank, size, nccl)
    gloo: Any = dist.ProcessGroupGloo
    gloo_options = gloo._Options()  # to stay on this machine, whatever its name resolves to
    gloo_options._devices = [gloo.create_device(hostname=_HOST)]
    gloo_options._timeout = _COLLECTIVE_TIMEOUT
    return TensorParallel(rank, size, gloo(store, rank, size, gloo_options))


def leave_ranks(parallel: TensorParallel) -> None:
    """Ends the group, and with it collectives that hang because a rank is gone. May be called from another thread.

    Never raises, and waits a limited time: the group may be in any state.
    """
    group: Any = parallel.group
    if type(group).__name__ != "ProcessGroupNCCL":  # gloo's collectives end with the other processes
        return

    def abort() -> None:
        with suppress(Exception):  # it may have failed already
            group.abort()

    thread = threading.Thread(target=abort, name="nanovllm-leave", daemon=True)
    thread.start()
    thread.join(_LEAVE_SECONDS)
