"""How torch's threads share the cores of a CPU with other work.

OpenMP threads spin while they wait for one another, by default for milliseconds. Beside other work on the cores, a
spinning thread keeps the one that it waits for from running, and each of the many small operators of a step takes
milliseconds. The engine therefore lets GNU OpenMP spin briefly, which it reads only once, when torch is imported, and
uses one thread where a measurement shows that more are slower. What the user has set stays.
"""

from __future__ import annotations

import importlib
import sys
import time

from nanovllm.logs import events
from nanovllm.utils import env
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_ROUNDS, _PRODUCTS = 4, 8
_SLOWER = 3.0  # all threads must take this many times as long as one before one is used


def load_torch(device: str) -> bool:
    """Imports torch for an engine on `device`. Returns whether it was not imported before."""
    if "torch" in sys.modules:
        return False
    if device.startswith("cuda") or env.omp_wait_policy() or env.gomp_spincount():
        importlib.import_module("torch")
    else:
        with env.openmp_spins_briefly():
            importlib.import_module("torch")
    return True


def uses_cpu(device: str) -> bool:
    """Whether an engine with the argument `device` computes on a CPU."""
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def choose_cpu_threads(is_fresh: bool, num_ranks: int = 1) -> None:
    """Sets torch's number of threads in this process, if it is the engine's choice, and logs the reason.

    is_fresh: what `load_torch` returned; code that imported torch before may have set the number. num_ranks: each
    further rank gets its share of the number.
    """
    import torch

    num_threads = torch.get_num_threads()
    if env.omp_num_threads() or env.mkl_num_threads() or (not is_fresh and num_threads != env.num_usable_cores()):
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
    """Returns `num_threads`, or 1 where that is much faster, and what was measured."""
    times = {1: 0.0, num_threads: 0.0}
    for _ in range(_ROUNDS):  # in turns, so that other work slows both
        for count in times:
            times[count] += _product_ms(count) / _ROUNDS
    measured = f"a small product takes {times[num_threads]:.2f} ms with {num_threads} threads, {times[1]:.2f} ms with 1"
    if times[num_threads] > _SLOWER * times[1]:
        return 1, f"{measured}: other work uses the cores; OMP_NUM_THREADS sets another number"
    return num_threads, measured


def _product_ms(num_threads: int) -> float:
    """Returns the mean time of a product as small as those of a decode step."""
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
