"""What a forked child cannot use of the torch that its parent had loaded: OpenMP's threads, and CUDA.

A fork copies the calling thread alone. GNU OpenMP in the child waits forever for the others as soon as an operator uses
more than one thread. Processes of multiprocessing's method "spawn" have no such limit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nanovllm.errors import InvalidStateError

_FORKED_WITHOUT_EXEC = 0x40  # a flag of Linux for processes


def _was_forked() -> bool:
    """Returns whether this process still runs its parent's program, as far as the system tells."""
    try:
        flags = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[6]
    except OSError:
        return False
    return bool(int(flags) & _FORKED_WITHOUT_EXEC)


class _Torch:
    """Whether torch may have been loaded by the parent, before a fork."""

    may_be_inherited = "torch" in sys.modules and _was_forked()  # this module may be imported after the fork

    @classmethod
    def after_fork(cls) -> None:
        cls.may_be_inherited = "torch" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Torch.after_fork)


def may_have_torch_of_parent() -> bool:
    """Returns whether this process was forked, and torch may have been loaded by its parent."""
    return _Torch.may_be_inherited


def check_cuda_usable(device: str) -> None:
    """Raises InvalidStateError if `device` may be a GPU, and this process was forked from one that had used CUDA."""
    import torch

    if device != "cpu" and torch.cuda._is_in_bad_fork():
        raise InvalidStateError(
            f"device={device!r} cannot be used here: this process was forked from one that had used CUDA. Start it "
            "with multiprocessing.get_context('spawn'), make the engine before the parent uses CUDA, or give "
            "device='cpu'."
        )
