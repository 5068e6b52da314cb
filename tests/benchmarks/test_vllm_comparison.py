"""`--compare vllm`, with a package that stands in for vLLM: it takes the arguments and calls that vLLM takes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from nanovllm.benchmarks import vllm_comparison
from nanovllm.benchmarks.arrivals import Lengths, OnlineTraffic
from nanovllm.benchmarks.online import Bounds
from nanovllm.benchmarks.online_run import Measured, _run_theirs
from nanovllm.benchmarks.online_settings import OnlinePlan
from nanovllm.benchmarks.settings import WorkloadError
from nanovllm.benchmarks.vllm_comparison import check_installed
from tests.processes import ROOT, WATCHDOG, run_python, start_python, until

ENGINE = """
import asyncio, os, subprocess, sys, time
from types import SimpleNamespace as Value

class AsyncLLM:
    @classmethod
    def from_engine_args(cls, args):
        print("vLLM writes to standard output", args.values)
        if os.environ.get("STAND_IN") == "fails":
            raise RuntimeError("no kernel")
        if os.environ.get("STAND_IN") == "hangs":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            print("child", child.pid, file=sys.stderr, flush=True)
            while True:
                try:
                    time.sleep(1000)
                except KeyboardInterrupt:
                    print("ignored", file=sys.stderr, flush=True)
        return cls()

    async def generate(self, prompt, params, request_id):
        assert params.ignore_eos and params.output_kind == "DELTA" and params.detokenize and prompt["prompt_token_ids"]
        for _ in range(params.max_tokens):
            await asyncio.sleep(0)
            yield Value(outputs=[Value(token_ids=[1])])

    def shutdown(self):
        print("shut down")
"""
FILES = {
    "vllm/__init__.py": "from types import SimpleNamespace as SamplingParams",
    "vllm/sampling_params.py": "class RequestOutputKind:\n    DELTA = 'DELTA'",
    "vllm/engine/arg_utils.py": "class AsyncEngineArgs:\n    def __init__(self, **given):\n        self.values = given",
    "vllm/v1/engine/async_llm.py": ENGINE,
}
ARGUMENTS = (
    *("bench.py", "--json", "--workload", "online", "--compare", "vllm", "--device", "cpu", "--model", "tiny"),
    *("--rates", "50,40", "--num-requests", "3", "--seeds", "2", "--input-len", "8:0:8", "--output-len", "4:0:4"),
    *("--warm-up", "1", "--max-model-len", "64", "--kvcache-block-size", "16"),
)

PLAIN = {"skip_tokenizer_init": False}
PLAN = OnlinePlan(
    rates=(50.0,),
    seeds=(0,),
    traffic=OnlineTraffic(Lengths(8, 0, 8), Lengths(4, 0, 4), vocab_size=512, num_requests=3),
    warm_up=1,
    temperature=0.6,
    bounds=Bounds(ttft_ms=500, itl_ms=50),
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return f"{ROOT}{os.pathsep}{tmp_path}"


def test_both_engines_get_the_same_requests(path: str, tmp_path: Path) -> None:
    saved = tmp_path / "rows.jsonl"
    done = run_python(*ARGUMENTS, "--save", str(saved), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    entries = [(result["engine"], result["rate"]) for result in report["results"]]
    assert entries == [("nanovllm", 50), ("nanovllm", 40), ("vLLM", 50), ("vLLM", 40)]
    assert all((result["num_requests"], result["num_failed"]) == (6, 0) for result in report["results"])
    assert report["results"][0]["ratios_to_vllm"]["output_tokens_per_second"] > 0
    assert "shut down" in done.stderr
    for name, value in {"max_model_len": 64, "max_num_seqs": 512, "seed": 0, "skip_tokenizer_init": False}.items():
        assert f"'{name}': {value!r}" in done.stderr
    assert "kvcache_block_size" not in done.stderr
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    due = {"nanovllm": [], "vLLM": []}
    for row in rows:
        due[row["engine"]].append((row["rate"], row["seed"], row["at"], row["prompt_len"]))
    assert len(due["vLLM"]) == 12
    assert sorted(due["vLLM"]) == sorted(due["nanovllm"])


def test_a_failure_of_vllm_is_in_the_report(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And raises nothing: our figures, which are there already, are printed."""
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("STAND_IN", "fails")
    said: list[str] = []
    report: dict[str, object] = {}
    _run_theirs("tiny", PLAIN, PLAN, Measured(None), report, said.append)
    assert report["vllm_error"] == "vLLM's process ended with status 1; its output says why."
    assert said == [f"\n{report['vllm_error']}"]


def test_an_interrupt_ends_vllm_and_its_processes(path: str) -> None:
    """Also when vLLM ignores the interrupt."""
    script = (
        "import json, nanovllm.benchmarks.vllm_comparison as module; module._GRACE = 0.1\n"
        f"plan = module.OnlinePlan.from_dict(json.loads({json.dumps(PLAN.to_dict())!r}))\n"
        f"module.run_vllm('tiny', {PLAIN}, plan, print)"
    )
    process = start_python("-c", script, PYTHONPATH=path, STAND_IN="hangs")
    assert process.stderr is not None
    child = next(int(line.split()[1]) for line in process.stderr if line.startswith("child "))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WATCHDOG)
    assert "KeyboardInterrupt" in stderr
    assert until(lambda: not is_running(child))


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_without_vllm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_comparison.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkloadError, match="pip install vllm.*--url"):
        check_installed()
