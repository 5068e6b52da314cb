"""What went wrong for users of engines like this one: each of it, and the tests that keep it from coming back.

`ROWS` lists them; those of several ranks come with tensor parallelism. What no other file tests is tested below.
"""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, InvalidArgumentError, OutOfMemoryError, RequestTooLargeError, SamplingParams
from nanovllm.benchmarks.machine import versions
from nanovllm.engine import block_manager
from nanovllm.runner.kv_cache import GB, GPUMemory, KVCacheShape
from tests.engine.scheduler_driver import Driver
from tests.engine.simulated_executor import VOCAB_SIZE, expected_output
from tests.engine.test_schedules import Request, make_engine, run

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests/end_to_end/test_pitfalls.py"
GRAPHS, SCHEDULES = "tests/runner/test_cuda_graph.py", "tests/engine/test_schedules.py"
REAL, ENGINE, LLM_TESTS = (
    "tests/end_to_end/test_real_schedules.py",
    "tests/engine/test_llm_engine.py",
    "tests/api/test_llm.py",
)
FAILURES, LOGGER = "tests/api/test_llm_failures.py", "tests/logs/test_logger.py"

ROWS = {
    "a full cache in decode kills the engine": [
        f"{SCHEDULES}::test_small_cache_preempts_and_still_answers",
        f"{REAL}::test_a_cache_too_small_for_all_preempts_and_gives_the_same",
    ],
    "a prompt larger than the whole cache is a bare assertion": [
        f"{HERE}::test_a_prompt_larger_than_the_cache_is_refused_and_the_others_go_on",
        f"{ENGINE}::test_what_can_never_fit_is_refused_with_the_numbers_and_the_others_go_on",
    ],
    "max_tokens <= 0 never ends": [
        "tests/api/test_sampling_params.py::test_refused_with_field_value_and_what_is_allowed"
    ],
    "an empty prompt is an IndexError": [
        f"{HERE}::test_an_empty_prompt_is_refused",
        f"{ENGINE}::test_a_bad_prompt_is_refused_and_leaves_nothing",
    ],
    "over-long prompts pass": [f"{FAILURES}::test_a_call_of_which_nothing_is_allowed_raises_before_anything_runs"],
    "greedy sampling forbidden": [
        f"{HERE}::test_temperature_zero_is_greedy",
        "tests/end_to_end/test_oracle.py::test_tiny_checkpoint",
    ],
    "block table wider than the captured graph": [f"{GRAPHS}::test_tables_are_fixed_in_width_and_cleared_on_reuse"],
    "stale rows between replays": [
        f"{GRAPHS}::test_padding_leaves_the_rows_of_ended_sequences_alone",
        "tests/runner/test_device_rows.py::test_a_row_reused_in_one_batch_keeps_nothing_of_the_last",
    ],
    "first output of a batch wrong with graphs only": [
        f"{GRAPHS}::test_the_first_outputs_of_a_fresh_engine_are_right",
        f"{REAL}::test_graphs_give_the_tokens_of_eager_under_any_schedule",
    ],
    "max_num_seqs off the capture grid leaves sizes without a graph": [
        f"{GRAPHS}::test_every_batch_size_has_a_graph_that_is_not_much_larger",
        f"{GRAPHS}::test_every_size_decodes_as_without_graphs",
    ],
    "hangs on exit": [f"{HERE}::test_a_process_that_never_calls_exit_ends", f"{FAILURES}::test_use_after_exit"],
    "two engines clash": [f"{HERE}::test_two_engines_live_side_by_side"],
    "full prefix hit makes an empty prefill": [
        f"{HERE}::test_a_full_prefix_hit_still_computes_the_last_token",
        "tests/engine/test_block_manager.py::test_a_full_prefix_hit_leaves_the_last_block_to_compute",
    ],
    "prefix hits on blocks not computed yet in the same batch": [
        f"{SCHEDULES}::test_prefix_hits_within_one_batch_in_order",
        f"{HERE}::test_equal_prompts_in_one_batch_give_equal_answers",
    ],
    "hash equality taken for prefix equality": [
        f"{HERE}::test_equal_hashes_are_not_taken_for_equal_prefixes",
        "tests/engine/test_block_manager.py::test_equal_tokens_under_another_parent_are_not_shared",
    ],
    "preemption with a prefix cache loses state": [
        f"{SCHEDULES}::test_answers_do_not_depend_on_the_schedule",
        f"{REAL}::test_the_same_tokens_under_any_schedule",
    ],
    "other processes' memory counted as our own": [
        f"{HERE}::test_other_processes_memory_is_not_counted_as_ours",
        "tests/runner/test_kv_cache.py::test_memory_of_other_processes_is_not_ours",
    ],
    "kwargs with a typo dropped in silence": [
        f"{LLM_TESTS}::test_unknown_arguments_are_refused_before_anything_is_loaded",
        "tests/api/test_sampling_params.py::test_a_typo_is_answered_with_the_nearest_name",
        "tests/api/test_config.py::test_a_typo_is_answered_with_the_nearest_name",
    ],
    "missing or left-over weights pass": [
        "tests/utils/test_loader.py::test_faults_are_named_before_anything_is_allocated",
        "tests/utils/test_loader.py::test_a_plan_that_does_not_fill_a_parameter_exactly_once_is_refused",
    ],
    "eos_token_id lists ignored": [
        f"{LLM_TESTS}::test_all_end_of_sequence_tokens_of_both_files_count",
        "tests/models/test_model_config.py::test_eos_is_the_union",
    ],
    "rope_theta moved into rope_parameters": ["tests/models/test_model_config.py::test_read_as_transformers_reads_it"],
    "slow on the newest torch and transformers": [
        f"{HERE}::test_the_speed_check_names_the_versions_in_use",
        f"{HERE}::test_decode_is_fast_on_the_versions_in_use",
    ],
    "flash-attn hard to install; no CPU": [
        "tests/attention/test_selection.py::test_a_cpu_takes_torch_and_the_log_says_why",
        "tests/attention/test_selection.py::test_a_package_that_is_missing_is_the_problem",
        "tests/kernels/test_triton_support.py::test_kernels_import_and_run_without_triton",
    ],
    "per-step tensor building in Python": [f"{HERE}::test_steady_decode_sends_rows_and_now_and_then_a_block"],
    "users patch the source to profile": [
        "tests/diagnostics/test_diagnostics.py::test_a_profile_is_a_chrome_trace_and_a_table"
    ],
    "timings that never synchronise": [f"{LOGGER}::test_on_a_gpu_elapsed_is_gpu_time_read_later_without_waiting"],
    "every line twice under basicConfig": [f"{LOGGER}::test_basic_config_decides_the_format_and_no_line_appears_twice"],
    "eager formatting with DEBUG off": [f"{LOGGER}::test_nothing_is_formatted_for_a_record_that_no_one_takes"],
    "totals that stay 0 without the progress bar": [
        f"{LLM_TESTS}::test_the_last_line_is_right_with_and_without_a_progress_bar"
    ],
    "no simple way to silence it": [f"{HERE}::test_a_process_that_never_calls_exit_ends"],
    "request text logged": [f"{HERE}::test_prompts_and_outputs_are_not_in_the_log"],
    "lines while idle": [f"{HERE}::test_an_idle_engine_says_nothing"],
}


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_that_the_table_names_exist(row: str) -> None:
    for test in ROWS[row]:
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


def test_every_test_here_is_in_the_table() -> None:
    named = {test.partition("::")[2] for tests in ROWS.values() for test in tests if test.startswith(HERE)}
    here = {name for name in globals() if name.startswith("test_")}
    assert here - named == {"test_the_tests_that_the_table_names_exist", "test_every_test_here_is_in_the_table"}


GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", num_kvcache_blocks=8, kvcache_block_size=16) as llm:
        yield llm


def test_a_prompt_larger_than_the_cache_is_refused_and_the_others_go_on(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("good", [1, 2, 3], GREEDY)
    with pytest.raises(
        RequestTooLargeError, match=r"500 tokens.*127.*max_model_len to 501.*num_kvcache_blocks to 32.*8 blocks of 16"
    ):
        engine.add_request("large", [1] * 500, GREEDY)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["good"]


@pytest.mark.parametrize("prompt", ["", [], {"prompt": ""}, {"prompt_token_ids": []}])
def test_an_empty_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt=.*at least one token"):
        llm.generate([prompt], GREEDY, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_temperature_zero_is_greedy(llm: LLM) -> None:
    seeded = [SamplingParams(temperature=0, max_tokens=8, seed=seed) for seed in range(3)]
    outputs = llm.generate(["27 + 58 ="] * 3, seeded, use_tqdm=False)
    assert len({tuple(output["token_ids"]) for output in outputs}) == 1


def test_a_process_that_never_calls_exit_ends() -> None:
    """And asked for silence, it says what its user prints, nothing else: no line, no progress bar."""
    script = (
        "from nanovllm import LLM, SamplingParams\n"
        "llm = LLM('tiny', device='cpu')\n"
        "chat = [{'role': 'user', 'content': 'What is 27 + 58?'}]\n"
        "print(llm.chat(chat, SamplingParams(temperature=0))[0]['text'])\n"
    )
    environment = {**os.environ, "NANOVLLM_LOG_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "27 + 58 = 85\n", "")


def test_two_engines_live_side_by_side(llm: LLM) -> None:
    prompts = ["27 + 58 =", "reverse the word planet"]
    expected = [output["text"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    with LLM("tiny", device="cpu", num_kvcache_blocks=16) as other:
        engines = [llm.llm_engine, other.llm_engine]
        for engine in engines:
            for index, prompt in enumerate(prompts):
                engine.add_request(str(index), prompt, GREEDY)
        texts: list[dict[str, str]] = [{}, {}]
        while any(engine.has_unfinished_requests() for engine in engines):
            for engine, found in zip(engines, texts, strict=True):
                found.update((output.request_id, output["text"]) for output in engine.step())
    assert texts == [dict(zip("01", expected, strict=True))] * 2
    assert [output["text"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected


def test_a_full_prefix_hit_still_computes_the_last_token() -> None:
    engine = make_engine()
    prompt = list(range(1, 9))  # exactly two blocks
    for _ in range(2):
        requests = [Request(prompt, SamplingParams(max_tokens=3, ignore_eos=True), 0)]
        run(engine, requests)
        assert requests[0].output == expected_output(prompt, 3, 64, ignore_eos=True)


def test_equal_prompts_in_one_batch_give_equal_answers(llm: LLM) -> None:
    llm.reset_prefix_cache()
    prompt = list(range(40, 73))
    outputs = llm.generate([prompt, prompt], GREEDY, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [0, 32]
    llm.reset_prefix_cache()
    (alone,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert outputs[0].outputs == outputs[1].outputs == alone.outputs


def test_equal_hashes_are_not_taken_for_equal_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst hash there is: the simulated memory fails on the first block shared in error."""
    monkeypatch.setattr(block_manager.xxhash, "xxh3_64_intdigest", lambda data, seed=0: 42)
    engine = make_engine(num_blocks=64)
    prompts = [[a, b, 3, 4, a, 6, 7, 8, 9] for a in (1, 2) for b in (1, 2)] * 3
    requests = [Request(p, SamplingParams(max_tokens=6, ignore_eos=True), i) for i, p in enumerate(prompts)]
    run(engine, requests)
    for request in requests:
        assert request.output == expected_output(request.prompt, 6, 64, ignore_eos=True)


def test_other_processes_memory_is_not_counted_as_ours() -> None:
    """A GPU of 80 GB on which another process holds 50: what is free decides, not the share of the total."""
    shape = KVCacheShape(28, 8, 128, 16, torch.bfloat16)
    shared = GPUMemory(80 * GB, 0.9, weights=GB, activations=2 * GB, free=28 * GB)
    assert shared.num_blocks(shape) == 26 * GB // 1_835_008 - 1
    full = GPUMemory(80 * GB, 0.9, weights=GB, activations=2 * GB, free=2 * GB)
    with pytest.raises(OutOfMemoryError, match=r"80\.00 GB.*=0\.9.*1\.00 GB.*2\.00 GB.*which hold 77\.00 GB"):
        full.num_blocks(shape)


def test_the_speed_check_names_the_versions_in_use() -> None:
    found = versions()
    for package in ("torch", "transformers", "numpy"):
        assert found[package] == metadata.version(package)


@pytest.mark.gpu
def test_decode_is_fast_on_the_versions_in_use() -> None:
    """A bound far below what any GPU of these years does, and far above what a fallback would: a peer fell to 132."""
    params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    prompts = [[seq] * 64 for seq in range(64)]
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 64}
    with LLM("qwen3-0.6b", device="cuda", enable_prefix_caching=False, num_kvcache_blocks=1024, **settings) as llm:
        llm.generate(prompts, params, use_tqdm=False)
        before = llm.llm_engine.statistics.decode_seconds
        llm.generate(prompts, params, use_tqdm=False)
        seconds = llm.llm_engine.statistics.decode_seconds - before
    assert 64 * 127 / seconds > 2000


def test_steady_decode_sends_rows_and_now_and_then_a_block() -> None:
    """Nothing is rebuilt from lists: a header, the rows, and three words for a block, however long the sequences."""
    driver = Driver(max_num_seqs=50, max_num_batched_tokens=4096, num_blocks=2000, block_size=4, max_model_len=128)
    for index in range(50):
        driver.add_tokens([index % VOCAB_SIZE] * (1 + index), max_tokens=60)
    driver.step()
    for _ in range(20):
        batch = driver.step()
        header = batch.sections["closed"].offset
        assert len(batch.buffer) == header + 50 + 3 * len(batch.blocks)
        assert len(batch.blocks) in (12, 13)  # a fourth of them is at the end of a block


def test_prompts_and_outputs_are_not_in_the_log(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        chat = [{"role": "user", "content": "What is 27 + 58?"}]
        (output,) = llm.chat(chat, SamplingParams(temperature=0), use_tqdm=False)
    assert len(caplog.records) > 50
    everything = caplog.text + "".join(repr(record.fields) for record in caplog.records)
    assert output["text"] == "27 + 58 = 85"
    for secret in ("27 + 58", str(output.prompt_token_ids)[1:-1], str(output["token_ids"])[1:-1]):
        assert secret not in everything


def test_an_idle_engine_says_nothing(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        for _ in range(3):
            assert llm.llm_engine.step() == []
    assert caplog.records == []
