"""The settings of a benchmark from the command line, and the plan that follows from them. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.benchmarks.workloads import WORKLOADS, Requests
from nanovllm.errors import NanoVLLMError
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.checkpoint import resolve_model_folder
from nanovllm.models.model_config import ModelConfig
from nanovllm.runner.cpu_threads import load_torch

ALL_WORKLOADS = "all"
MIN_MODEL_LEN = 4096  # as in nano-vllm's benchmark, if the workload needs less

Say = Callable[[str], None]  # prints a line for people, or discards it


class WorkloadError(NanoVLLMError):
    """A workload that this model cannot run."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """The settings of one benchmark. None, or no workload, leaves the choice to `make_plan`."""

    model: str | None
    workloads: tuple[str, ...]  # names in WORKLOADS, or "all"
    load_format: str | None
    num_seqs: int | None  # of each workload, instead of its own
    runs: int  # of each workload, the warm-up included
    temperature: float
    seed: int
    device: str
    max_model_len: int | None
    tensor_parallel_size: int
    compare_with_transformers: bool
    measure_logging_overhead: bool
    pairs: int  # of measurements at each level, for the overhead of logging
    engine_options: Mapping[str, Any]  # further arguments of LLM


@dataclass(frozen=True)
class Plan:
    """The work of a benchmark, with every choice made."""

    model: str
    model_config: ModelConfig
    load_format: str
    workloads: Mapping[str, Requests]
    max_model_len: int


def make_plan(settings: BenchmarkSettings, say: Say) -> Plan:
    """Chooses what `settings` leave open. Raises WorkloadError for a workload that the model cannot run."""
    on_gpu = has_gpu(settings.device)
    if not on_gpu and settings.model is None and not settings.workloads:
        say(
            "Without a GPU: the tiny checkpoint and the workload 'mixed', which end within a minute. "
            "--model and --workload choose others."
        )
    model = settings.model or ("qwen3-0.6b" if on_gpu else "tiny")
    config = model_config(model)
    asked = settings.workloads or (("classic",) if on_gpu else ("mixed",))
    names = choose_workloads(asked, model, settings.max_model_len or config.max_context_len, say)
    longest = max([MIN_MODEL_LEN, *(WORKLOADS[name].longest for name in names)])
    return Plan(
        model=model,
        model_config=config,
        load_format=settings.load_format or ("dummy" if model in BUILTIN_SHAPES else "auto"),
        workloads={
            name: WORKLOADS[name].draw(settings.num_seqs or WORKLOADS[name].num_seqs, config.vocab_size, settings.seed)
            for name in names
        },
        max_model_len=settings.max_model_len or min(longest, config.max_context_len),
    )


def has_gpu(device: str) -> bool:
    """Returns whether an engine on `device` runs on a GPU."""
    load_torch(device)  # before all else that imports torch: OpenMP reads once how long its threads spin
    import torch

    return device != "cpu" and torch.cuda.is_available()


def model_config(model: str) -> ModelConfig:
    """Returns the configuration of a shape, or of a checkpoint by its folder or id."""
    return BUILTIN_SHAPES[model] if model in BUILTIN_SHAPES else ModelConfig.from_folder(resolve_model_folder(model))


def choose_workloads(asked: Sequence[str], model: str, limit: int, say: Say) -> list[str]:
    """Returns the workloads to run. "all" leaves out those whose requests are longer than `limit` tokens."""
    is_all = ALL_WORKLOADS in asked
    names = list(WORKLOADS) if is_all else list(dict.fromkeys(asked))
    for name in [name for name in names if WORKLOADS[name].longest > limit]:
        text = f"workload {name!r} has requests of {WORKLOADS[name].longest} tokens, and {model!r} takes {limit}"
        if not is_all:
            raise WorkloadError(f"{text}: leave it out, or raise --max-model-len if the model allows it.")
        say(f"Left out: {text}.")
        names.remove(name)
    return names
