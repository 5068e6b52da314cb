"""Chooses how many threads torch uses on a CPU, and how long they spin.

OpenMP threads spin while they wait for one another, by default for milliseconds. When other work uses the cores, a
spinning thread keeps the thread that it waits for from running, and each of the many small operators of a step takes
milliseconds. The engine therefore makes GNU OpenMP spin only briefly, a setting that is read once, when torch is
imported. It uses one thread if a measurement shows that more are slower. Settings made by the user are kept.
"""

from __future__ import annotations

import importlib
import sys
import time

from nanovllm.logs import events
from nanovllm.runner.forked_process import check_cuda_usable, may_have_torch_of_parent
from nanovllm.utils import env
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_ROUNDS, _PRODUCTS = 4, 8
_SLOWER = 3.0  # one thread is used if all threads take more than this many times as long


def load_torch(device: str) -> bool:
    """Imports torch for an engine on `device`. Returns False if it was imported before.

    Raises InvalidStateError in a forked child that cannot use the device.
    """
    if "torch" in sys.modules:
        check_cuda_usable(device)
        return False
    if device.startswith("cuda") or env.omp_wait_policy() or env.gomp_spincount():
        importlib.import_module("torch")
    else:
        with env.openmp_spins_briefly():
            importlib.import_module("torch")
    return True


def uses_cpu(device: str) -> bool:
    """Returns whether an engine with the argument `device` computes on a CPU."""
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def choose_cpu_threads(is_fresh: bool, num_ranks: int = 1) -> None:
    """Sets torch's number of threads in this process unless the user has set it, and logs the number and the reason.

    is_fresh: what `load_torch` returned. If it is False, the code that imported torch may have set the number.
    num_ranks: for the log; each further rank gets its share of the number.
    """
    import torch

    num_threads = torch.get_num_threads()
    if may_have_torch_of_parent():  # more threads could wait forever
        num_threads, reason = 1, "this process was forked, and torch may be its parent's: spawn it to use more"
        torch.set_num_threads(num_threads)
    elif env.omp_num_threads() or env.mkl_num_threads() or (not is_fresh and num_threads != env.num_usable_cores()):
        reason = "set before the engine started"
    elif num_threads == 1:
        reason = "one core"
    else:
        num_threads, reason = _measured_choice(num_threads)
        torch.set_num_threads(num_threads)
    if num_ranks > 1:
        reason += f"; {max(1, num_threads // num_ranks)} in each further rank"
    events.cpu_threads.log(logger, num_threads=num_threads, threads_reason=reason)


def _measured_choice(num_threads: int) -> tuple[int, str]:
    """Returns `num_threads`, or 1 if that is much faster, and what was measured."""
    times = {1: 0.0, num_threads: 0.0}
    for _ in range(_ROUNDS):  # alternating, so that other work slows both
        for count in times:
            times[count] += _product_ms(count) / _ROUNDS
    measured = f"a small product takes {times[num_threads]:.2f} ms with {num_threads} threads, {times[1]:.2f} ms with 1"
    if times[num_threads] > _SLOWER * times[1]:
        return 1, f"{measured}: other work uses the cores; OMP_NUM_THREADS sets another number"
    return num_threads, measured


def _product_ms(num_threads: int) -> float:
    """Returns the mean milliseconds of a matrix product as small as those of a decode step."""
    import torch

    from nanovllm.kernels.linear import linear, pack_weight

    torch.set_num_threads(num_threads)
    hidden = torch.ones(8, 256)
    weight = pack_weight(torch.ones(1024, 256))
    linear(hidden, weight)  # compiles oneDNN's code for this shape
    started = time.perf_counter()
    for _ in range(_PRODUCTS):
        linear(hidden, weight)
    return (time.perf_counter() - started) * 1e3 / _PRODUCTS
