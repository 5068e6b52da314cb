"""`nanovllm bench --workload online`: its options, a run on the tiny checkpoint, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from nanovllm.benchmarks.arrivals import Lengths
from nanovllm.benchmarks.online_settings import OnlinePlan, OnlineSettings, make_online_plan
from nanovllm.cli.bench import online_settings_of, parse_arguments
from nanovllm.cli.main import main
from tests.processes import WATCHDOG, run_python, start_python, until

SMALL = "--workload online --device cpu --input-len 8:0 --output-len 4:0 --warm-up 2 --num-requests 3"


def settings_from(arguments: str) -> OnlineSettings:
    return online_settings_of(parse_arguments(f"--workload online {arguments}".split(), "bench.py"))


def test_defaults_by_device() -> None:
    on_gpu = make_online_plan(settings_from(""), on_gpu=True, vocab_size=150_000)
    assert (on_gpu.rates, on_gpu.seeds, on_gpu.traffic.duration) == ((10, 60, 120), (0, 1, 2), 20)
    assert on_gpu.traffic.vocab_size == 10_000
    on_cpu = make_online_plan(settings_from("--seed 5"), on_gpu=False, vocab_size=512)
    assert (on_cpu.rates, on_cpu.seeds, on_cpu.traffic.vocab_size) == ((2, 8), (5, 6), 512)
    assert OnlinePlan.from_dict(json.loads(json.dumps(on_cpu.to_dict()))) == on_cpu


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100", Lengths(100, 1, 800)),
        ("100:0", Lengths(100, 0, 800)),
        ("100:0.5:300", Lengths(100, 0.5, 300)),
    ],
)
def test_lengths(text: str, expected: Lengths) -> None:
    assert settings_from(f"--output-len {text}").output_len == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workload online classic", "--workload online goes with no other workload"),
        ("--workload online --compare transformers", "does not go with --workload online"),
        ("--compare vllm", "--compare vllm needs --workload online"),
        ("--workload online --num-seqs 3", "see --num-requests"),
        ("--url http://localhost:8000", "--rates, --url and --save need --workload online"),
        ("--workload online --url http://localhost:8000 --model tiny", "see --served-model-name"),
        ("--workload online --duration 3 --num-requests 3", "not allowed with argument"),
        ("--workload online --rates 1,x", "'x' is not a number > 0"),
        ("--workload online --rates 0", "'0' is not a number > 0"),
        ("--workload online --burstiness nan", "'nan' is not a number > 0"),
        ("--workload online --input-len 1:2:3:4", "'1:2:3:4' is not MEAN[:SIGMA[:MAX]]"),
        ("--workload online --input-len 10:1:0", "'0' is not an integer ≥ 1"),
    ],
)
def test_a_mistake_is_one_message(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model tiny --device cpu --input-len 5000:0:5000", "'tiny' takes 4096: lower MAX of --input-len"),
        ("--device cpu --save /nowhere/rows.jsonl", "--save /nowhere/rows.jsonl cannot be written"),
        ("--url http://127.0.0.1:1 --served-model-name x", "completed no request of the warm-up"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--workload", "online", *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nanovllm bench: ")
    assert message in error


def test_a_server_is_measured_without_torch() -> None:
    script = (
        "import sys; from nanovllm.cli.main import main\n"
        "assert main('bench --workload online --url http://127.0.0.1:1'.split()) == 1\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def test_the_tiny_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "rows.jsonl"
    done = run_python("bench.py", *SMALL.split(), "--rates", "20,40", "--seeds", "2", "--save", str(saved))
    assert done.returncode == 0, done.stderr
    assert "warm-up with twice 2 requests at once took" in done.stdout
    assert "nanovllm, 40 requests/s: 6 requests, 0 failed; 8 tokens in and 4 out on average" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["interrupted"]
    assert [result["rate"] for result in report["results"]] == [20, 40]
    for result in report["results"]:
        assert [run["seed"] for run in result["runs"]] == [0, 1]
        assert 0 < result["ttft_p50_ms"] <= result["ttft_p99_ms"] <= result["latency_p99_ms"]
        assert 0 < result["itl_p50_ms"] <= result["longest_gap_max_ms"]
        assert result["output_tokens_per_second"] > 0
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(rows) == 12
    assert {row["num_output_tokens"] for row in rows} == {4}


def test_ctrl_c_prints_what_there_is_and_leaves_nothing() -> None:
    """The second rate waits for its first request when the interrupt comes."""
    process = start_python("bench.py", *SMALL.split(), "--rates", "50,0.0001", "--seeds", "1")
    assert process.stdout is not None
    assert any("50 requests/s, seed 0: 3 requests in" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    report = json.loads(stdout.splitlines()[-1])
    assert report["interrupted"]
    assert [(result["rate"], result["num_requests"]) for result in report["results"]] == [(50, 3)]
    assert "nanovllm, 50 requests/s: 3 requests" in stdout
    assert until(lambda: not group_exists(process.pid))


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
