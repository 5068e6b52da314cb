"""PeerMemory: GPU memory that the processes of other GPUs on this host read and write, by CUDA's inter-process handles.

It calls the CUDA driver directly. torch's symmetric memory counts its exchanges per process, so a second engine in one
process would never meet its workers; torch's shared tensors leave counters in /dev/shm when a process is killed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class PeerMemory:
    """A zeroed buffer of `num_bytes` on each rank's GPU, accessible from this rank.

    addresses: of each rank's buffer, by rank. exchange: takes this rank's bytes and returns every rank's, in order.
    Raises RuntimeError when the GPUs or the system do not allow it, after taking part in the exchange so that the other
    ranks do not wait.
    """

    def __init__(self, rank: int, num_bytes: int, device: torch.device, exchange: Callable[[bytes], list[bytes]]):
        self._opened: list[int] = []
        self._own = ctypes.c_uint64()
        handle = _Handle()
        error: RuntimeError | None = None
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # torch creates the CUDA context on first use
            try:
                self._driver: Any = ctypes.CDLL("libcuda.so.1")
                self._call("cuMemAlloc_v2", ctypes.byref(self._own), ctypes.c_size_t(num_bytes))
                self._call("cuMemsetD8_v2", self._own, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes))
                torch.cuda.synchronize()  # the memset may still run when the call returns
                self._call("cuIpcGetMemHandle", ctypes.byref(handle), self._own)
            except (OSError, RuntimeError) as failure:
                error = RuntimeError(str(failure))
            handles = exchange(bytes(handle))
            if error is not None:
                raise error
            self.addresses = [self._own.value if other == rank else self._open(x) for other, x in enumerate(handles)]

    def _open(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        self._opened.append(address.value)
        return address.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} gave CUDA error {status}")

    def close(self) -> None:
        """Frees this rank's buffer, which other ranks must no longer use. Calling it again does nothing."""
        opened, self._opened = self._opened, []
        for address in opened:
            self._driver.cuIpcCloseMemHandle(ctypes.c_uint64(address))
        if opened:
            self._driver.cuMemFree_v2(self._own)
