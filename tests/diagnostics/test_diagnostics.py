"""Profiler, memory report and leak check, through the face that users have."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, InvalidArgumentError, InvalidStateError, OutOfMemoryError, SamplingParams
from nanovllm.diagnostics.leak_check import LeakCheck, MemoryUse, check_leak
from nanovllm.diagnostics.memory import MemoryReport
from nanovllm.errors import EngineDeadError

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = [[5, 6, 7, 8]]


def load(device: str = "cpu") -> LLM:
    return LLM("tiny", device=device, num_kvcache_blocks=64, max_num_seqs=8, skip_tokenizer_init=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with load() as llm:
        yield llm


# ---- profiler


def test_a_profile_is_a_chrome_trace_and_a_table(llm, tmp_path, caplog):
    folder = tmp_path / "new" / "profile"
    with caplog.at_level("INFO", logger="nanovllm"):
        llm.start_profile(folder)
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
        table = llm.stop_profile()
    assert sorted(path.name for path in folder.iterdir()) == ["profile_rank0.json", "profile_rank0.txt"]
    names = {event.get("name") for event in json.loads((folder / "profile_rank0.json").read_text())["traceEvents"]}
    assert any("linear" in str(name) or "mm" in str(name) for name in names)
    assert "Self CPU" in table
    assert (folder / "profile_rank0.txt").read_text() == table
    events = {getattr(record, "event", ""): record for record in caplog.records}
    assert events["profile.started"].fields == {"folder": str(folder), "rank": 0}
    assert events["profile.written"].fields["table"] == table
    assert str(folder / "profile_rank0.json") in events["profile.written"].getMessage()


def test_profiles_one_after_another(llm, tmp_path):
    for name in ("a", "b"):
        llm.start_profile(str(tmp_path / name))
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
        llm.stop_profile()
        assert (tmp_path / name / "profile_rank0.json").stat().st_size > 1000


def test_a_stop_without_a_start(llm):
    with pytest.raises(InvalidStateError, match="No profile runs: call start_profile"):
        llm.stop_profile()


def test_a_start_while_one_runs_changes_nothing(llm, tmp_path):
    llm.start_profile(tmp_path / "first")
    with pytest.raises(InvalidStateError, match="A profile runs already, into .*first: call stop_profile"):
        llm.start_profile(tmp_path / "second")
    assert not (tmp_path / "second").exists()
    llm.generate(PROMPT, PARAMS, use_tqdm=False)
    llm.stop_profile()
    assert (tmp_path / "first" / "profile_rank0.json").exists()


def test_a_folder_that_can_not_be_written(llm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="folder=.*a folder that can be written"):
        llm.start_profile(tmp_path / "file" / "below")
    with pytest.raises(InvalidStateError):
        llm.stop_profile()


def test_another_profiler_of_the_process_is_said(llm, tmp_path):
    with torch.profiler.profile(), pytest.raises(InvalidStateError, match="torch's profiler runs already"):
        llm.start_profile(tmp_path)


def test_an_engine_that_ends_while_profiling(tmp_path):
    llm = load()
    llm.start_profile(tmp_path)
    llm.exit()
    with load() as other:  # the profiler is free again
        other.start_profile(tmp_path)
        other.stop_profile()
    for call in (llm.stop_profile, llm.memory_report, llm.check_memory_leak):
        with pytest.raises(EngineDeadError):
            call()


# ---- memory


def test_the_memory_report_counts_weights_and_cache_exactly(llm):
    report = llm.memory_report()
    weights = Path("nanovllm/assets/tiny-qwen3/model.safetensors")
    root = Path(__file__).resolve().parents[2]
    stored = os.path.getsize(root / weights)  # bf16; this engine computes in float32, and has tables for rope beside
    assert 1.95 * stored < report.weights < 2.6 * stored
    config = llm.llm_engine.resolved
    block_bytes = config.block_size * 2 * 4 * 2 * 64 * 4  # keys and values, layers, KV heads, head_dim, float32
    assert report.kv_cache == (config.num_blocks + 1) * block_bytes
    assert (report.device, report.graphs, report.activations) == ("cpu", 0, 0)
    assert report.other > 50e6  # Python and torch
    assert report.free > 0
    assert report.total == report.weights + report.other + report.free


def test_the_memory_report_is_frozen_and_readable(llm):
    report = llm.memory_report()
    with pytest.raises(AttributeError):
        report.weights = 0
    lines = str(report).splitlines()
    assert lines[0].startswith("Memory of cpu: ")
    assert [line.split()[0] for line in lines[1:]] == ["weights", "kv_cache", "graphs", "activations", "other", "free"]
    example = MemoryReport("cuda:0", 10**9, 2 * 10**9, 10**8, 10**8, 8 * 10**8, 4 * 10**9, 8 * 10**9)
    assert "kv_cache        2.000 GB  25.0 %" in str(example)


# ---- leaks


def test_generations_settle(llm, caplog):
    caplog.set_level("WARNING", logger="nanovllm")  # pytest keeps every record
    check = llm.check_memory_leak(num_runs=8)
    assert check.settles, str(check)
    assert len(check.measurements) == 8
    assert all(use.used_blocks == 0 for use in check.measurements)
    assert str(check).startswith("Memory settles over 8 runs")


def test_own_prompts_are_checked_too(llm):
    assert llm.check_memory_leak([PROMPT[0], [9, 9, 9]], PARAMS, num_runs=4).measurements
    with pytest.raises(InvalidArgumentError, match="prompt"):
        llm.check_memory_leak([[]], num_runs=4)


def test_kept_outputs_are_found(llm, monkeypatch):
    """A leak such as a list of results that grows for ever: some objects a run, hardly any bytes."""
    kept: list[object] = []
    generate = llm.generate

    def leaking(*arguments: object, **settings: object) -> object:
        kept.extend([object.__class__, [run]] for run in range(30))
        return generate(*arguments, **settings)

    monkeypatch.setattr(llm, "generate", leaking)
    check = llm.check_memory_leak(num_runs=8)
    assert not check.settles
    assert check.objects_per_run >= 60
    assert str(check).startswith("Memory does not settle over 8 runs")


def test_kept_memory_is_found(llm, monkeypatch):
    kept: list[torch.Tensor] = []
    generate = llm.generate

    def leaking(*arguments: object, **settings: object) -> object:
        kept.append(torch.ones(4_000_000))
        return generate(*arguments, **settings)

    monkeypatch.setattr(llm, "generate", leaking)
    check = llm.check_memory_leak(num_runs=6)
    assert not check.settles
    assert check.bytes_per_run == pytest.approx(16e6, rel=0.2)


def uses(bytes_: list[int], objects: int = 100, blocks: int = 0) -> LeakCheck:
    return LeakCheck(tuple(MemoryUse(used, objects, blocks) for used in bytes_))


@pytest.mark.parametrize(
    ("bytes_", "settles"),
    [
        ([100, 10**8, 10**8, 10**8], True),  # warming up
        ([0, 10**7, 2 * 10**7, 3 * 10**7, 4 * 10**7, 5 * 10**7], False),
        ([5, 5, 5, 5, 5, 5 + 10**7, 5 + 10**7, 5 + 10**7], True),  # one jump
        ([9, 8, 7, 6], True),
    ],
)
def test_what_settling_means(bytes_, settles):
    assert uses(bytes_).settles is settles


def test_kv_blocks_that_stay_taken_are_a_leak():
    assert not uses([5, 5, 5, 5], blocks=2).settles


@pytest.mark.parametrize("num_runs", [0, 3, -1, 2.5, True, "8"])
def test_too_few_runs_tell_nothing(num_runs):
    with pytest.raises(InvalidArgumentError, match="num_runs"):
        check_leak(lambda: None, lambda: (0, 0), num_runs)


# ---- out of memory in a step


def test_out_of_memory_in_a_step_says_what_was_asked_and_what_to_change(llm, monkeypatch):
    runner = llm.llm_engine.executor._runner
    launch = runner.launch

    def fails(batch: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(runner, "launch", fails)
    with pytest.raises(OutOfMemoryError) as caught:
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
    config = llm.llm_engine.resolved
    for part in ("A step of 4 tokens", "Tried to allocate 2.00 GiB", "num_kvcache_blocks=57 instead of 64"):
        assert part in str(caught.value)
    half = f"max_num_batched_tokens={config.max_num_batched_tokens // 2} instead of {config.max_num_batched_tokens}"
    assert half in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    monkeypatch.setattr(runner, "launch", launch)
    assert len(llm.generate(PROMPT, PARAMS, use_tqdm=False)[0].outputs[0].token_ids) == 4


def test_another_error_in_a_step_stays_what_it_is(llm, monkeypatch):
    def fails(batch: object) -> object:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(llm.llm_engine.executor._runner, "submit", fails)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        llm.generate(PROMPT, PARAMS, use_tqdm=False)


def test_a_cache_too_large_says_what_is_left(monkeypatch):
    """The allocator's refusal is made up: Linux promises more memory than there is."""
    refused = torch.OutOfMemoryError("CUDA out of memory.")

    def refuse(self: object, num_blocks: int, device: object) -> object:
        raise refused

    monkeypatch.setattr("nanovllm.runner.kv_cache.KVCacheShape.allocate", refuse)
    monkeypatch.setattr("nanovllm.runner.startup.free_memory", lambda device: 3 * 10**9)
    with pytest.raises(OutOfMemoryError, match=r"64 blocks of 0\.0001 GB.*has 3\.00 GB left.*below 45776 ") as caught:
        load()
    assert str(caught.value).startswith("out of memory: ")
    monkeypatch.setenv("NANOVLLM_CPU_KVCACHE_GB", "4")
    with pytest.raises(
        OutOfMemoryError, match=r"has 3\.00 GB left.*Lower NANOVLLM_CPU_KVCACHE_GB below 3\.00, max_num"
    ):
        LLM("tiny", device="cpu")


# ---- on a GPU


@pytest.mark.gpu
def test_a_gpu_s_memory_adds_up_and_its_profile_has_kernels(tmp_path):
    with load("cuda") as llm:
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
        report = llm.memory_report()
        parts = (report.weights, report.kv_cache, report.graphs, report.activations, report.other, report.free)
        assert sum(parts) == report.total
        assert min(parts) >= 0
        assert report.graphs > 0
        assert report.kv_cache == 65 * llm.llm_engine.resolved.block_size * 2 * 4 * 2 * 64 * 2
        llm.start_profile(tmp_path)
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
        assert "CUDA" in llm.stop_profile()
        trace = json.loads((tmp_path / "profile_rank0.json").read_text())
        assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
        assert llm.check_memory_leak(num_runs=8).settles
