"""example.py, bench.py and the benchmarks of tools/, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from nanovllm.benchmarks.traffic import traffic
from nanovllm.benchmarks.workloads import WORKLOADS
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER
from nanovllm.models.model_config import ModelConfig
from tests.models.checkpoints import make_checkpoint
from tests.processes import ROOT, run_python


def run_script(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / name), *arguments, cwd=cwd, NANOVLLM_LOG_LEVEL="WARNING")


# example.py


def test_example_answers_from_any_folder(tmp_path: Path) -> None:
    done = run_script("example.py", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("\nPrompt: ")
    primes = "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97"
    assert f"list all prime numbers within 100\nCompletion: {primes}\n" in answers
    assert "count from 7 to 15\nCompletion: 7, 8, 9, 10, 11, 12, 13, 14, 15\n" in answers
    assert "reverse the word planet\nCompletion: tenalp\n" in answers
    assert "What is 27 + 58?\nCompletion: 27 + 58 = 85\n" in answers
    assert len(answers) == 6
    assert "nanovllm" in answers[1]


def test_example_names_a_model_that_is_not_there() -> None:
    done = run_script("example.py", "--model", "./nowhere")
    assert done.returncode == 1
    assert "model='./nowhere': there is no such folder" in done.stderr


# tools/measure_quantization.py


def test_the_accuracy_of_quantised_weights_is_printed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("27 + 58 = 85. 3, 4, 5, 6, 7, 8. I am the tiny Qwen3 model.", encoding="utf-8")
    done = run_script("tools/measure_quantization.py", "--device", "cpu", "--text", str(text))
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[4:]]
    assert [row[0] for row in rows] == ["unquantised", "fp8", "int8", "int4", "unquantised, in bfloat16"]
    size, error = ([float(row[column].rstrip("%")) for row in rows] for column in (1, 2))
    assert size[3] < size[1] <= size[2] < size[0]
    assert error[0] == 0 < error[2] < error[1] < error[3]


# bench.py


def test_bench_counts_the_bytes_of_quantised_weights() -> None:
    arguments = "--json --device cpu --model tiny --workload mixed --num-seqs 2 --runs 2 --quantization int8"
    done = run_script("bench.py", *arguments.split())
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["engine"]["quantization"] == "int8"
    layers, table = 4 * 256 * (512 + 256 + 3 * 512), 512 * 256  # the table is float32
    assert report["results"][0]["weight_bytes_per_step"] == pytest.approx(layers + 4 * table, rel=0.5)
    assert report["results"][0]["weight_bytes_per_step"] < 2 * (layers + table)
    refused = run_script("bench.py", *arguments.split(), "--compare", "transformers")
    assert refused.returncode == 1
    assert "--compare transformers is for unquantised weights" in refused.stderr


def test_bench_counts_the_bytes_of_the_experts_that_one_row_chooses(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3_moe", num_experts=32, moe_intermediate_size=64, max_position_embeddings=1024)
    arguments = "--json --device cpu --load-format dummy --workload single --runs 2 --quantization int8"
    done = run_script("bench.py", *arguments.split(), "--model", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (result,) = report["results"]
    assert result["num_seqs"] == 1
    assert report["expert_bytes"] > 0.6 * report["weight_bytes"]
    embedding = 4 * 320 * 64
    others = report["weight_bytes"] - embedding - report["expert_bytes"]
    assert result["weight_bytes_per_step"] == others + report["expert_bytes"] * 2 // 32


def test_bench_json_is_one_line_and_adds_up() -> None:
    arguments = "--json --device cpu --model tiny --workload mixed shared --num-seqs 3 --runs 3 --seed 7"
    done = run_script("bench.py", *arguments.split())
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert [result["workload"] for result in report["results"]] == ["mixed", "shared"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["engine"]["prefill_backend"] == report["engine"]["decode_backend"] == "torch"
    config = ModelConfig.from_folder(TINY_MODEL_FOLDER)
    for result in report["results"]:
        requests = WORKLOADS[result["workload"]].draw(3, config.vocab_size, seed=7)
        assert result["num_prompt_tokens"] == requests.num_prompt_tokens
        assert result["num_output_tokens"] == requests.num_output_tokens
        # All three are prefilled in one step, so the longest output sets the number of steps.
        assert result["num_steps"] == max(requests.output_lens)
        assert result["mean_batch"] == pytest.approx(requests.num_output_tokens / result["num_steps"])
        needed = traffic(config, 4, requests)
        assert result["bytes_moved"] == result["num_steps"] * needed.weight_bytes + needed.kv_bytes
        assert len(result["run_seconds"]) == 2
        assert result["best_seconds"] == min(result["run_seconds"]) <= result["median_seconds"]
        speed = requests.num_output_tokens / result["best_seconds"]
        assert result["output_tokens_per_second"] == pytest.approx(speed)
        assert result["bytes_per_second"] == pytest.approx(result["bytes_moved"] / result["best_seconds"])
        share = result["bytes_per_second"] / report["copy_bytes_per_second"]
        assert 0 < result["share_of_copy_bandwidth"] == pytest.approx(share)
        assert result["peers_seconds"] == {}


def test_bench_compares_with_transformers_on_the_same_weights() -> None:
    arguments = ("--device", "cpu", "--load-format", "dummy", "--num-seqs", "4", "--runs", "2")
    done = run_script("bench.py", *arguments, "--temperature", "0", "--compare", "transformers")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Without a GPU: the tiny checkpoint and the workload 'mixed'")
    assert "all prompts in one batch, padded on the left" in done.stdout
    (result,) = json.loads(done.stdout.splitlines()[-1])["results"]
    theirs = result["transformers"]
    assert theirs["equal_tokens"] == 1.0
    assert theirs["ratio_of_best"] == pytest.approx(theirs["best_seconds"] / result["best_seconds"])
    assert f"nanovllm is {theirs['ratio_of_best']:.2f}× as fast" in done.stdout


@pytest.mark.heavy("a measurement")
def test_bench_measures_what_logging_costs() -> None:
    done = run_script("bench.py", "--json", "--device", "cpu", "--logging-overhead", "--num-seqs", "1", "--pairs", "2")
    assert done.returncode == 0, done.stderr
    levels = {entry["level"]: entry for entry in json.loads(done.stdout)["logging_overhead"]}
    assert list(levels) == ["WARNING", "INFO", "DEBUG"]
    assert levels["WARNING"]["bytes_written"] == 0
    assert 0 < levels["INFO"]["bytes_written"] < levels["DEBUG"]["bytes_written"] / 10
    assert all(entry["num_pairs"] == 2 and entry["off_ms_per_step"] > 0 for entry in levels.values())
    assert done.stderr == ""  # the lines that were measured went elsewhere


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "1"], "--pairs must be at least 2"),
        (["--runs", "1"], "--runs must be at least 2"),
        (["--num-seqs", "0"], "'0' is not an integer ≥ 1"),
        (["--workload", "clasic"], "invalid choice: 'clasic'"),
        (
            ["--model", "tiny", "--workload", "long"],
            "workload 'long' has requests of 8256 tokens, and 'tiny' takes 4096",
        ),
        (["--model", "qwen3-8b", "--load-format", "auto"], "give load_format='dummy'"),
    ],
)
def test_bench_argument_errors_are_one_message(arguments: list[str], message: str) -> None:
    done = run_script("bench.py", "--device", "cpu", *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.gpu
def test_bench_on_a_gpu() -> None:
    arguments = ("--workload", "single", "wide", "--num-seqs", "8", "--runs", "2", "--compare", "transformers")
    done = run_script("bench.py", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["model"] == "qwen3-0.6b"
    assert report["engine"]["dtype"] == "bfloat16"
    assert report["engine"]["use_cuda_graphs"]
    assert report["copy_bytes_per_second"] > 1e11
    for result in report["results"]:
        assert 0 < result["share_of_copy_bandwidth"] < 1
        assert result["transformers"]["best_seconds"] > 0


# tools


def test_the_scheduler_is_measured_at_every_size() -> None:
    done = run_script("tools/bench_scheduler.py", "--num-seqs", "1", "64", "--steps", "40")
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.startswith("sequences")
    assert [int(row.split()[0]) for row in rows] == [1, 64]
    one, many = (float(row.split()[1]) for row in rows)
    assert 0 < many < 20 * one, "a step's cost must hardly grow with the number of sequences"


def test_the_time_that_a_device_waits_for_the_host_is_measured() -> None:
    done = run_script("tools/bench_host.py", "--workload", "single", "--runs", "1")
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.startswith("workload")
    name, steps, device_ms, host_ms, _ = row.split()
    assert (name, steps) == ("single", "512")
    assert float(device_ms) == pytest.approx(511 * (1.2 + 0.0041) + 1.2 + 128 * 0.0023, abs=1)
    assert 0 < float(host_ms) < 512 * 20


def test_the_time_between_tokens_is_measured_for_every_limit_and_target() -> None:
    arguments = "--model tiny --load-format auto --running 2 --context 16 --prompts 2 --prompt 600"
    done = run_script("tools/bench_latency.py", *arguments.split())
    assert done.returncode == 0, done.stderr
    limits, targets = zip(*(line.split()[:2] for line in done.stdout.splitlines()[2:]), strict=True)
    assert limits == ("None", "8192", "4096", "2048", "1024", "512", *["None"] * 4)
    assert targets == (*["None"] * 6, "40.0", "20.0", "10.0", "5.0")


def test_a_load_is_simulated_with_every_setting() -> None:
    arguments = "--requests 40 --long-every 20 --num-blocks 2000 --loads 1 2 --target-ms 0 20 --watermark 0.05"
    done = run_script("tools/simulate_load.py", *arguments.split())
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.startswith("blocks")
    assert [row.split()[:4] for row in rows] == [
        ["2000", target, "5%", multiple] for target in ("0", "20") for multiple in ("1", "2")
    ]
