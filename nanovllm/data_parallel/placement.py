"""place_replicas: which GPUs, or how many cores, each replica gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from nanovllm.async_engine.selection import has_gpu
from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidArgumentError
from nanovllm.utils import env


@dataclass(frozen=True)
class Placement:
    """The settings of a replica's engine, and the environment variables of its process that differ from ours."""

    config: EngineConfig
    variables: Mapping[str, str]


def place_replicas(config: EngineConfig, num_replicas: int) -> list[Placement]:
    """Returns the placement of each replica.

    On GPUs each replica sees the next `tensor_parallel_size` of the visible ones. On a CPU each one uses an equal share
    of the cores, unless OMP_NUM_THREADS or MKL_NUM_THREADS is set. Each one writes its traces to files of its own.
    Raises InvalidArgumentError for an engine in a thread, and if there are too few visible GPUs.
    """
    if config.engine_process is False:
        raise InvalidArgumentError("engine_process", False, "True or None with several replicas: each is a process")
    placements = _on_devices(config, num_replicas)
    return [replace(each, variables={**each.variables, **_traces(index)}) for index, each in enumerate(placements)]


def _traces(index: int) -> dict[str, str]:
    files = {each.name: each() for each in (env.trace_file, env.trace_function)}
    return {name: f"{path}.replica{index}" for name, path in files.items() if path is not None}


def _on_devices(config: EngineConfig, num_replicas: int) -> list[Placement]:
    visible = env.visible_gpus()
    if config.device.startswith("cuda") or (config.device == "auto" and visible != [] and has_gpu()):
        return _on_gpus(config, num_replicas, visible)
    variables = {}
    if not (env.omp_num_threads() or env.mkl_num_threads()):
        variables[env.omp_num_threads.name] = str(max(1, env.num_usable_cores() // num_replicas))
    return [Placement(_on_device(config, config.device), variables)] * num_replicas


def _on_gpus(config: EngineConfig, num_replicas: int, visible: list[str] | None) -> list[Placement]:
    first, size = int(config.device.partition(":")[2] or 0), config.tensor_parallel_size
    needed = first + num_replicas * size
    if visible is not None and needed > len(visible):
        raise InvalidArgumentError(
            "data_parallel_size",
            num_replicas,
            f"at most {max(0, len(visible) - first) // size}: CUDA_VISIBLE_DEVICES has {len(visible)} GPUs",
            f"Each replica needs {size}, from device {first} on.",
        )
    gpus = [str(index) for index in range(needed)] if visible is None else visible
    groups = [gpus[first + index * size :][:size] for index in range(num_replicas)]
    # "cuda", not "auto": a GPU that does not exist is an error, not a replica on the CPU.
    return [Placement(_on_device(config, "cuda"), {env.cuda_visible_devices.name: ",".join(group)}) for group in groups]


def _on_device(config: EngineConfig, device: str) -> EngineConfig:
    return EngineConfig(**{**asdict(config), "device": device, "engine_process": True})
