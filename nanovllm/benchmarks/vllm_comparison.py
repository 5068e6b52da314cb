"""The same requests in vLLM's AsyncLLM, in a process of its own (`--compare vllm`).

The process runs `main`: it draws the same traffic, measures it with the same code, and writes a line of JSON for each
run into a file that the caller reads. Its output, vLLM's log included, goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm.benchmarks.arrivals import OnlineRequest
from nanovllm.benchmarks.online_measurement import Finished, measure
from nanovllm.benchmarks.online_settings import VLLM, OnlinePlan
from nanovllm.benchmarks.online_summary import RunSummary
from nanovllm.benchmarks.settings import WorkloadError
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.checkpoint import resolve_model_folder

# Arguments of our engine that vLLM has under the same name with the same meaning. Others stay at vLLM's defaults.
SHARED_ARGUMENTS = (
    "dtype",
    "enable_prefix_caching",
    "enforce_eager",
    "kv_cache_dtype",
    "load_format",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "quantization",
    "seed",
    "skip_tokenizer_init",
    "tensor_parallel_size",
)
_START = "import sys; sys.path.insert(0, sys.argv[1]); from {module} import main; main(*sys.argv[2:])"
_GRACE = 20.0  # seconds for the process to end after an interrupt


def check_installed() -> None:
    """Raises WorkloadError if there is no vLLM in this environment."""
    if importlib.util.find_spec("vllm") is None:
        raise WorkloadError(
            "--compare vllm needs vLLM in this environment: pip install vllm. Or start `vllm serve` in an environment "
            "of its own and measure it with --url."
        )


def run_vllm(model: str, arguments: Mapping[str, Any], plan: OnlinePlan, finished: Finished) -> None:
    """Runs the plan in vLLM and gives each run to `finished`, also after an interrupt.

    Raises WorkloadError if vLLM does not get through all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        shared = {name: value for name, value in arguments.items() if name in SHARED_ARGUMENTS}
        shared["model"] = _model_folder(model, Path(folder))
        job, results = Path(folder, "job.json"), Path(folder, "results.jsonl")
        job.write_text(json.dumps({"arguments": shared, "plan": plan.to_dict()}), encoding="utf-8")
        results.touch()
        package_root = str(Path(__file__).resolve().parents[2])
        command = [sys.executable, "-c", _START.format(module=__name__), package_root, str(job), str(results)]
        try:
            status = _run_process(command)
        finally:
            for line in results.read_text(encoding="utf-8").splitlines():
                measured = json.loads(line)
                finished(RunSummary(**measured["summary"]), measured["rows"])
    if status:
        raise WorkloadError(f"vLLM's process ended with status {status}; its output says why.")


def _model_folder(model: str, folder: Path) -> str:
    """Returns a folder that vLLM loads `model` from. Of a built-in shape it holds the configuration alone."""
    if model not in BUILTIN_SHAPES:
        return str(resolve_model_folder(model))
    from nanovllm.benchmarks.transformers_comparison import transformers_config

    transformers_config(model).save_pretrained(folder)
    return str(folder)


def _run_process(command: list[str]) -> int:
    """Runs a command in a session of its own and returns its status. Nothing of the session is left afterwards."""
    process = subprocess.Popen(command, stdout=2, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # vLLM's own processes too
        process.wait()


def main(job: str, results: str) -> None:
    """Runs in vLLM's process: reads the file `job` and appends to the file `results`."""
    work = json.loads(Path(job).read_text(encoding="utf-8"))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_measure_vllm(work["arguments"], OnlinePlan.from_dict(work["plan"]), Path(results)))


async def _measure_vllm(arguments: dict[str, Any], plan: OnlinePlan, results: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    def finished(run: RunSummary, rows: list[dict[str, Any]]) -> None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"summary": asdict(run), "rows": rows}) + "\n")

    def say(text: str) -> None:
        print(text, flush=True)

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        detokenize = not arguments["skip_tokenizer_init"]
        await measure(VllmEngine(engine, plan.temperature, detokenize=detokenize), VLLM, plan, finished, say)
    finally:
        engine.shutdown()


class VllmEngine:
    """vLLM's AsyncLLM with delta outputs, as a `StreamingEngine`."""

    def __init__(self, engine: Any, temperature: float, *, detokenize: bool) -> None:
        self._engine, self._temperature, self._detokenize = engine, temperature, detokenize
        self._ids = itertools.count()

    async def stream(self, request: OnlineRequest) -> AsyncIterator[int | None]:
        """Yields the number of tokens so far."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=self._temperature,
            max_tokens=request.output_len,
            ignore_eos=True,
            detokenize=self._detokenize,
            output_kind=RequestOutputKind.DELTA,
        )
        num_tokens = 0
        async for output in self._engine.generate({"prompt_token_ids": request.prompt}, params, f"{next(self._ids)}"):
            num_tokens += len(output.outputs[0].token_ids)
            yield num_tokens
