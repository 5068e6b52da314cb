"""Runs the workload "online" on this engine or a server, and on vLLM beside it, and makes the report.

Ctrl-C ends the measurement; the report then has what was measured so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import IO, Any

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.benchmarks.arrivals import OnlineRequest, OnlineTraffic
from nanovllm.benchmarks.online import Bounds
from nanovllm.benchmarks.online_measurement import measure
from nanovllm.benchmarks.online_settings import (
    DEFAULT_VOCAB_SIZE,
    ONLINE,
    OURS,
    VLLM,
    OnlinePlan,
    OnlineSettings,
    Server,
    make_online_plan,
)
from nanovllm.benchmarks.online_summary import (
    RunSummary,
    described,
    described_ratios,
    ratios_of,
    result_of,
)
from nanovllm.benchmarks.settings import (
    MIN_MODEL_LEN,
    BenchmarkSettings,
    Say,
    WorkloadError,
    has_gpu,
    model_config,
)
from nanovllm.benchmarks.vllm_comparison import check_installed, run_vllm
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.model_config import ModelConfig


class Measured:
    """The runs so far, and the file that gets a line for each request."""

    def __init__(self, rows: IO[str] | None) -> None:
        self.runs: list[RunSummary] = []
        self._rows = rows

    def add(self, run: RunSummary, rows: list[dict[str, Any]]) -> None:
        """Keeps the figures of a run and writes its rows."""
        self.runs.append(run)
        if self._rows is not None:
            self._rows.writelines(json.dumps(row) + "\n" for row in rows)
            self._rows.flush()

    def results(self, engine: str) -> list[dict[str, Any]]:
        """Returns an entry of the report for each rate at which `engine` ran."""
        runs = [run for run in self.runs if run.engine == engine]
        return [result_of(list(group)) for _, group in itertools.groupby(runs, key=lambda run: run.rate)]

    @contextlib.contextmanager
    def showing(self, engine: str, bounds: Bounds, say: Say) -> Iterator[None]:
        """Prints the tables of `engine` at the end of the block, also of what an interrupt leaves."""
        try:
            yield
        finally:
            for result in self.results(engine):
                say(described(result, bounds))


def run_online(settings: OnlineSettings, say: Say) -> dict[str, Any]:
    """Returns the JSON report."""
    with contextlib.ExitStack() as stack:
        rows = None
        if settings.save is not None:
            try:
                rows = stack.enter_context(settings.save.open("w", encoding="utf-8"))
            except OSError as error:
                raise WorkloadError(f"--save {settings.save} cannot be written: {error}") from error
        measured = Measured(rows)
        if settings.server is None:
            return _run_engines(settings, measured, say)
        return _run_server(settings, settings.server, measured, say)


def _run_server(settings: OnlineSettings, server: Server, measured: Measured, say: Say) -> dict[str, Any]:
    from nanovllm.benchmarks.openai_client import open_server

    plan = make_online_plan(settings, on_gpu=False, vocab_size=DEFAULT_VOCAB_SIZE)

    async def run() -> None:
        async with open_server(server, plan.temperature) as engine:
            report["model"] = engine.model
            await measure(engine, server.url, plan, measured.add, say)

    report: dict[str, Any] = {**_header(plan), "url": server.url, "interrupted": False}
    say(introduced(server.url, plan))
    try:
        with measured.showing(server.url, plan.bounds, say):
            asyncio.run(run())
    except KeyboardInterrupt:
        report["interrupted"] = True
    return report | {"results": measured.results(server.url)}


def _run_engines(settings: OnlineSettings, measured: Measured, say: Say) -> dict[str, Any]:
    if settings.compare_with_vllm:
        check_installed()
    on_gpu = has_gpu(settings.engine.device)
    model = settings.engine.model or ("qwen3-0.6b" if on_gpu else "tiny")
    config = model_config(model)
    plan = make_online_plan(settings, on_gpu=on_gpu, vocab_size=config.vocab_size)
    arguments = engine_arguments(settings.engine, model, config, plan.traffic)
    report = {
        **_header(plan),
        **_machine(settings.engine.device, on_gpu=on_gpu),
        "model": model,
        "arguments": arguments,
        "interrupted": False,
    }
    shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
    say(introduced(f"{model} on {report['device_name']}; {shown}", plan))
    try:
        with measured.showing(OURS, plan.bounds, say):
            _run_ours(model, {"device": settings.engine.device, **arguments}, plan, measured, say)
        if settings.compare_with_vllm:  # our engine has released its memory
            _run_theirs(model, arguments, plan, measured, report, say)
    except KeyboardInterrupt:
        report["interrupted"] = True
    ours, theirs = measured.results(OURS), measured.results(VLLM)
    for our, their in zip(ours, theirs, strict=False):
        our["ratios_to_vllm"] = ratios_of(our, their)
        say(described_ratios(our["ratios_to_vllm"], our["rate"], f"{OURS} / vLLM"))
    return report | {"results": ours + theirs}


def engine_arguments(
    settings: BenchmarkSettings, model: str, config: ModelConfig, traffic: OnlineTraffic
) -> dict[str, Any]:
    """Returns the arguments of an engine. Raises WorkloadError for requests that are longer than the model takes."""
    longest = traffic.input_len.most + traffic.output_len.most
    limit = settings.max_model_len or min(max(longest, MIN_MODEL_LEN), config.max_context_len)
    if longest > limit:
        raise WorkloadError(
            f"Requests have up to {longest} tokens, and {model!r} takes {limit}: lower MAX of --input-len or "
            "--output-len, or raise --max-model-len if the model allows it."
        )
    is_shape = model in BUILTIN_SHAPES
    return {
        "load_format": settings.load_format or ("dummy" if is_shape else "auto"),
        "max_model_len": limit,
        "seed": settings.seed,
        "skip_tokenizer_init": is_shape,  # it has none; with a tokenizer, text is decoded as for a user
        "tensor_parallel_size": settings.tensor_parallel_size,
        **settings.engine_options,
    }


def introduced(target: str, plan: OnlinePlan) -> str:
    """Returns what is measured, as text."""
    traffic = plan.traffic
    amount = f"{traffic.num_requests} requests" if traffic.duration is None else f"{traffic.duration:g} s"
    return (
        f"{target}\n{amount} a run, seeds {', '.join(map(str, plan.seeds))}, at "
        f"{', '.join(f'{rate:g}' for rate in plan.rates)} requests/s; prompts of {traffic.input_len} and outputs of "
        f"{traffic.output_len} tokens; temperature {plan.temperature}"
    )


def _header(plan: OnlinePlan) -> dict[str, Any]:
    return {"benchmark": "nanovllm", "workload": ONLINE, "plan": plan.to_dict()}


def _machine(device: str, *, on_gpu: bool) -> dict[str, Any]:
    import torch

    from nanovllm.benchmarks.machine import device_name, load_average, versions

    name = ("cuda" if on_gpu else "cpu") if device == "auto" else device
    return {"versions": versions(), "device_name": device_name(torch.device(name)), "load_average": load_average()}


def _run_ours(model: str, arguments: dict[str, Any], plan: OnlinePlan, measured: Measured, say: Say) -> None:
    started = time.perf_counter()
    with AsyncLLM(model, **arguments) as llm:
        say(f"{OURS}: started in {time.perf_counter() - started:.1f} s")
        asyncio.run(measure(AsyncLLMEngine(llm, plan.temperature), OURS, plan, measured.add, say))


def _run_theirs(
    model: str, arguments: dict[str, Any], plan: OnlinePlan, measured: Measured, report: dict[str, Any], say: Say
) -> None:
    """Runs vLLM. Its failure goes into the report, whose other figures stay."""
    try:
        with measured.showing(VLLM, plan.bounds, say):
            run_vllm(model, arguments, plan, measured.add)
    except WorkloadError as error:
        report["vllm_error"] = str(error)
        say(f"\n{error}")


class AsyncLLMEngine:
    """An AsyncLLM with delta outputs, as a `StreamingEngine`."""

    def __init__(self, llm: AsyncLLM, temperature: float) -> None:
        self._llm, self._temperature = llm, temperature

    async def stream(self, request: OnlineRequest) -> AsyncIterator[int | None]:
        """Yields the number of tokens so far."""
        params = SamplingParams(temperature=self._temperature, max_tokens=request.output_len, ignore_eos=True)
        num_tokens = 0
        async for output in self._llm.generate(request.prompt, params, delta=True):
            num_tokens += len(output.outputs[0].token_ids)
            yield num_tokens
