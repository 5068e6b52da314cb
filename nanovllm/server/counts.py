"""Counts: how many requests a server answers, over all its API processes."""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

_COLUMNS = 2


class Counts:
    """The HTTP requests that are being answered, and the completions that were admitted.

    Each API process changes a row of its own, so none waits for another. table: [num_processes, 2] of int64, shared by
    them. process: the row of this one.
    """

    def __init__(self, table: npt.NDArray[np.int64] | None = None, process: int = 0) -> None:
        self._table = np.zeros((1, _COLUMNS), np.int64) if table is None else table
        self._process = process

    @property
    def own_requests(self) -> int:
        """The requests of this process."""
        return int(self._table[self._process, 0])

    @property
    def requests(self) -> int:
        """The requests of all processes."""
        return int(self._table[:, 0].sum())

    @property
    def completions(self) -> int:
        """The completions of all processes."""
        return int(self._table[:, 1].sum())

    def add(self, *, requests: int = 0, completions: int = 0) -> None:
        self._table[self._process] += requests, completions

    def clear(self, process: int) -> None:
        """Forgets what a process has counted that has ended."""
        self._table[process] = 0


def shared_table(descriptor: int, num_processes: int) -> npt.NDArray[np.int64]:
    """Returns the table in a file that processes share. A new file gets its size."""
    size = num_processes * _COLUMNS * np.dtype(np.int64).itemsize
    os.ftruncate(descriptor, size)
    return np.frombuffer(mmap.mmap(descriptor, size), np.int64).reshape(num_processes, _COLUMNS)
