"""Triton, where it is installed: every kernel file imports `tl` and `jit` from here.

Triton is not available on Windows and macOS. The kernel files must be importable there too (their torch
references then do the work), so the import and the decorator are guarded in this one place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from nanovllm.errors import BackendUnavailableError

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor as HostDescriptor

    HAS_TRITON = True
    # Fixed when the kernels are defined, as Triton itself fixes it: TRITON_INTERPRET=1 before the first import.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    tl = libdevice = gdc_launch_dependents = gdc_wait = HostDescriptor = None
    HAS_TRITON = False
    INTERPRETED = False

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Experimental: enabled for the releases with which our kernels were tested, on NVIDIA GPUs.
    HAS_GLUON = triton.__version__.startswith(("3.6.", "3.7.")) and torch.version.hip is None and not INTERPRETED
    block_barrier: Any = getattr(gl, "thread_barrier", None) or getattr(gl, "barrier", None)  # in 3.6, in 3.7
except ImportError:
    gl = block_barrier = fence_async_shared = mbarrier = tma = None
    warpgroup_mma = warpgroup_mma_wait = TensorDescriptor = None
    HAS_GLUON = False

__all__ = [
    "HAS_GLUON",
    "HAS_TRITON",
    "INTERPRETED",
    "LOG2_E",
    "HostDescriptor",
    "TensorDescriptor",
    "block_barrier",
    "constant",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "gl",
    "gluon_jit",
    "is_hopper",
    "jit",
    "jit_with_varying",
    "join_launch_chain",
    "let_next_kernel_start",
    "libdevice",
    "mbarrier",
    "multiprocessor_count",
    "next_power_of_2",
    "pdl_options",
    "runs_triton",
    "shared_memory",
    "tl",
    "tma",
    "wait_for_previous_kernel",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


LOG2_E = 1.4426950408889634  # exp2(x · LOG2_E) is exp(x); exp2 is the exponential that the hardware has


def constant(value: float | str) -> Any:
    """Returns a module constant that kernels may use: `tl.constexpr`, or the value itself without Triton."""
    return tl.constexpr(value) if HAS_TRITON else value


def jit(function: Callable[..., Any]) -> Any:
    """Applies `triton.jit`; without Triton, where nothing launches the function, returns it unchanged."""
    return _compiled_once(triton.jit(function)) if HAS_TRITON else function


def jit_with_varying(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` for a kernel whose arguments `names` vary from call to call: it is compiled once for all their values.

    Triton compiles a kernel again for an argument that is 1, a multiple of 16 or an aligned address. These arguments
    gain nothing from that.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if not HAS_TRITON:
            return function
        return _compiled_once(triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names))

    return decorate


def gluon_jit(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit_with_varying` for Gluon, the language below Triton, in which a kernel says what each warp does."""

    def decorate(function: Callable[..., Any]) -> Any:
        if not HAS_GLUON:
            return function
        return _compiled_once(gluon.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names))

    return decorate


def _compiled_once(kernel: Any) -> Any:
    """Lets one thread at a time launch a variant of a kernel. Otherwise every thread that needs it first compiles it.

    Variants, which have other constants, compile beside each other.
    """
    if INTERPRETED:
        return kernel
    locks: dict[tuple[Any, ...], threading.Lock] = {}
    run = kernel.run

    def run_alone(*args: Any, **kwargs: Any) -> Any:
        constants = tuple(value for name, value in kwargs.items() if name.isupper())
        with locks.setdefault(constants, threading.Lock()):
            return run(*args, **kwargs)

    kernel.run = run_alone
    return kernel


def runs_triton(tensor: torch.Tensor, use_triton: bool | None) -> bool:
    """Returns whether a dispatching function launches its kernel (True) or runs its torch reference (False).

    `use_triton` None selects the kernel on CUDA tensors where Triton is installed, else the reference.
    True on a CPU tensor runs the kernel in Triton's interpreter, for tests.

    Raises BackendUnavailableError when `use_triton` is True and the kernel cannot run.
    """
    if use_triton is None:
        return HAS_TRITON and tensor.is_cuda
    if use_triton and not HAS_TRITON:
        raise BackendUnavailableError("Triton is not installed: install triton, or leave use_triton at None.")
    if use_triton and not tensor.is_cuda and not INTERPRETED:
        raise BackendUnavailableError(
            "A Triton kernel runs on a CPU in the interpreter only: set TRITON_INTERPRET=1 before Python starts."
        )
    return use_triton


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of two ≥ number (number ≥ 1)."""
    return 1 << (number - 1).bit_length()


@cache
def multiprocessor_count(device: torch.device) -> int:
    """Returns the multiprocessors of a CUDA device; 1 for a CPU, where the interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def is_hopper(device: torch.device) -> bool:
    """Returns whether `device` is one of the GPUs for whose tensor cores our kernels in Gluon are written."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory that a program may use; for a CPU, those of a Hopper GPU."""
    if device.type != "cuda":
        return 227 << 10
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"]


@cache
def pdl_options(device: torch.device, wanted: bool = True) -> dict[str, bool]:
    """Returns the options for programmatic dependent launch, if `wanted` and the device has it (Hopper and later).

    Such a kernel may start while the kernel ahead of it on the stream still runs. That hides its launch, and its work
    before `wait_for_previous_kernel`. Its programs must call that before they touch memory that another kernel reads
    or writes: the wait covers the kernel ahead, and through that kernel's own wait all before it. Three things may be
    read earlier: weights, a step's metadata (positions, lengths, slots), and the keys and values that earlier steps
    stored, which are not all but the last of a row's: drafts are rows of their own, over tokens of the same step. The
    embedding's kernel lies between the kernels that write the last two and the layers; it is launched as usual and so
    waits for all before it.
    """
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if not (wanted and is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@jit
def let_next_kernel_start(PDL: tl.constexpr) -> None:
    """Allows the next kernel's programs to start once all of this kernel's have started."""
    if PDL:
        gdc_launch_dependents()


@jit
def wait_for_previous_kernel(PDL: tl.constexpr) -> None:
    """Waits for the end of the kernel ahead, and makes its writes visible."""
    if PDL:
        gdc_wait()


@jit
def join_launch_chain(PDL: tl.constexpr) -> None:
    """The first line of a kernel that can do nothing before the kernel ahead ends: only its launch is hidden."""
    let_next_kernel_start(PDL)
    wait_for_previous_kernel(PDL)
