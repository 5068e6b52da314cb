"""Runs workloads through `LLM.generate` and measures them.

A run's time is the wall time of `LLM.generate`, from token ids to token ids, with end-of-sequence ignored. The first
run of a workload is the warm-up; the prefix cache is emptied before each run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.benchmarks.logging_overhead import BLOCK_STEPS, MAX_SECONDS, DecodeSteps, WaitClock, measure_overheads
from nanovllm.benchmarks.machine import copy_bytes_per_second, device_name, load_average, versions
from nanovllm.benchmarks.report import Run, describe, introduce, result_of
from nanovllm.benchmarks.settings import BenchmarkSettings, Plan, Say, WorkloadError, has_gpu
from nanovllm.benchmarks.workloads import Requests
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine_factory import default_observers, make_executor
from nanovllm.utils import env


def run_benchmark(settings: BenchmarkSettings, plan: Plan, say: Say, started: float) -> dict[str, Any]:
    """Starts an engine and runs the plan. Returns the JSON report. `started` is when the command began."""
    is_quantized = settings.engine_options.get("quantization") or plan.model_config.quantization_config
    if settings.compare_with_transformers and is_quantized:
        raise WorkloadError("--compare transformers is for unquantised weights: it runs the model in one dtype.")
    load = load_average()  # before this process adds its own
    arguments = _llm_arguments(settings, plan)
    start_time = time.perf_counter()
    if settings.measure_logging_overhead:
        if not has_gpu(settings.device):
            torch.set_num_threads(1)  # the CPU time of the engine's thread is then that of the whole step
        config, clock = EngineConfig(plan.model, **arguments), WaitClock()
        with LLMEngine(config, make_executor, [*default_observers(config), clock]) as engine:
            report = _started_report(settings, plan, engine, load, start_time, started)
            introduce(report, say)
            return report | {"logging_overhead": logging_overhead(engine, clock, settings, say)}
    last_runs: dict[str, Run] = {}
    with LLM(plan.model, **arguments) as llm:
        report = _started_report(settings, plan, llm.llm_engine, load, start_time, started)
        introduce(report, say)
        for name, requests in plan.workloads.items():
            runs = run_workload(llm, name, requests, settings, say)
            report["results"].append(result_of(name, requests, runs, plan.model_config, report))
            describe(report["results"][-1], say)
            last_runs[name] = runs[-1]
    if settings.compare_with_transformers:  # the engine has released its memory
        _compare(report, plan, last_runs, settings, say)
    return report


def _started_report(
    settings: BenchmarkSettings, plan: Plan, engine: LLMEngine, load: float | None, start_time: float, started: float
) -> dict[str, Any]:
    """Generates a token and returns the report without results. start_time: when the engine began to start."""
    start_seconds = time.perf_counter() - start_time
    engine.add_request("first output", [0] * 16, SamplingParams(max_tokens=1, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    memory = engine.diagnostics.memory_report()
    ranks = (memory, *memory.others)
    return {
        **_header(settings, plan),
        "engine": asdict(engine.resolved),
        "weight_bytes": sum(rank.weights for rank in ranks),
        "expert_bytes": sum(rank.experts for rank in ranks),
        "load_average": load,
        "start_seconds": start_seconds,
        "first_output_seconds": time.perf_counter() - started,
        **_device_entries(torch.device(engine.resolved.device), settings.tensor_parallel_size),
        "results": [],
    }


def _llm_arguments(settings: BenchmarkSettings, plan: Plan) -> dict[str, Any]:
    return {
        "device": settings.device,
        "load_format": plan.load_format,
        "max_model_len": plan.max_model_len,
        "seed": settings.seed,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        **settings.engine_options,
    }


def _header(settings: BenchmarkSettings, plan: Plan) -> dict[str, Any]:
    """Returns the entries of the report that are known before the engine starts."""
    return {
        "benchmark": "nanovllm",
        "model": plan.model,
        "load_format": plan.load_format,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "log_level": env.log_level(),
        "versions": versions(),
    }


def _device_entries(device: torch.device, tensor_parallel_size: int) -> dict[str, Any]:
    """Returns the device's name and the copy bandwidth of all devices together."""
    num_devices = tensor_parallel_size if device.type == "cuda" else 1
    return {
        "device_name": device_name(device),
        "copy_bytes_per_second": copy_bytes_per_second(device) * num_devices,
    }


def run_once(llm: LLM, requests: Requests, temperature: float) -> Run:
    """Generates for all requests once, from an empty prefix cache."""
    params = [
        SamplingParams(temperature=temperature, max_tokens=count, ignore_eos=True) for count in requests.output_lens
    ]
    llm.reset_prefix_cache()
    engine = llm.llm_engine
    before = engine.statistics.copy()
    started = time.perf_counter()
    outputs = llm.generate(requests.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    done = engine.statistics.since(before)
    return Run(
        seconds=seconds,
        decode_seconds=done.decode_seconds,
        num_steps=done.num_steps,
        mean_batch=done.num_output_tokens / done.num_steps,
        num_preemptions=done.num_preemptions,
        num_draft_tokens=done.num_draft_tokens,
        num_accepted_tokens=done.num_accepted_tokens,
        token_ids=[output.outputs[0].token_ids for output in outputs],
    )


def run_workload(llm: LLM, name: str, requests: Requests, settings: BenchmarkSettings, say: Say) -> list[Run]:
    """Returns all runs of a workload, the warm-up first. Raises WorkloadError when tokens are missing."""
    say(
        f"\n{name}: {len(requests.prompts)} requests, {requests.num_prompt_tokens:,} tokens in, "
        f"{requests.num_output_tokens:,} out"
    )
    runs = []
    for index in range(settings.runs):
        runs.append(run_once(llm, requests, settings.temperature))
        counted = sum(map(len, runs[-1].token_ids))
        if counted != requests.num_output_tokens:
            raise WorkloadError(f"{name}: {counted} tokens came back, {requests.num_output_tokens} were asked for.")
        say(f"  {f'run {index}' if index else 'warm-up'}: {runs[-1].seconds:.3f} s")
    return runs


def logging_overhead(
    engine: LLMEngine, clock: WaitClock, settings: BenchmarkSettings, say: Say
) -> list[dict[str, Any]]:
    """Measures each log level against logging off. Returns the report's `logging_overhead`."""
    num_seqs = settings.num_seqs or (8 if engine.resolved.device == "cpu" else 256)
    say(
        f"\nlogging: {num_seqs} requests decode; up to {settings.pairs} pairs of {2 * BLOCK_STEPS} steps a level with "
        f"and without logging, for at most {MAX_SECONDS:.0f} s; medians with 95 % confidence intervals"
    )
    steps = DecodeSteps(engine, clock, num_seqs)
    overheads = measure_overheads(steps, settings.pairs)
    steps.stop()
    for overhead in overheads:
        say(f"  {overhead.described()}")
    return [overhead.entry() for overhead in overheads]


def _compare(
    report: dict[str, Any], plan: Plan, last_runs: Mapping[str, Run], settings: BenchmarkSettings, say: Say
) -> None:
    """Runs the workloads in transformers too and adds `transformers` to each result."""
    from nanovllm.benchmarks.transformers_comparison import EXPLANATION, TransformersModel, compare_workload

    say(EXPLANATION)
    model = TransformersModel(
        report["engine"]["model"],
        device=torch.device(report["engine"]["device"]),
        dtype=getattr(torch, report["engine"]["dtype"]),
        dummy_seed=settings.seed if plan.load_format == "dummy" else None,
    )
    for result in report["results"]:
        name = result["workload"]
        runs = [model.generate(plan.workloads[name], settings.temperature) for _ in range(settings.runs)]
        engine_tokens = last_runs[name].token_ids if settings.temperature == 0 else None
        result["transformers"] = compare_workload(result, runs, engine_tokens, say)
