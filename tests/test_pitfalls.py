"""What went wrong for users of engines like this one: each of it, and where it is tested.

`ELSEWHERE` names the tests of what other files cover; the rest is below. Several ranks come later.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator

import pytest

from nanovllm import (
    LLM,
    InvalidArgumentError,
    OutOfMemoryError,
    RequestTooLargeError,
    SamplingParams,
    UnknownArgumentError,
)
from nanovllm.engine import block_manager
from nanovllm.engine.cuda_graph import graph_sizes
from nanovllm.engine.kv_cache import GPUMemory, KVCacheShape
from tests.engine.simulated_executor import VOCAB_SIZE, expected_output
from tests.engine.test_schedules import Request, make_engine, run

SCHEDULES = "tests.engine.test_schedules"
ELSEWHERE = {
    "preemption with a prefix cache loses state": f"{SCHEDULES}:test_answers_do_not_depend_on_the_schedule",
    "a full cache in decode kills the engine": f"{SCHEDULES}:test_small_cache_preempts_and_still_answers",
    "prefix hits on blocks not computed": f"{SCHEDULES}:test_prefix_hits_within_one_batch_in_order",
    "stale rows between replays, outputs wrong with graphs only": (
        "tests.test_gpu:test_fp32_graphs_give_the_tokens_of_eager_at_every_size"
    ),
    "block table wider than the captured graph": (
        "tests.test_real_schedules:test_graphs_give_the_tokens_of_eager_under_any_schedule"
    ),
    "missing or left-over weights": "tests.utils.test_loader",
    "rope_theta in rope_parameters": "tests.test_oracle:test_random_shapes",
    "flash-attn hard to install": "tests.attention.test_selection",
    "lines twice under basicConfig, timings that never wait, eager formatting": "tests.utils.test_logger",
    "no simple way to be silent": "test_logging:test_silence",
}


@pytest.mark.parametrize("pitfall", ELSEWHERE)
def test_the_named_test_exists(pitfall: str) -> None:
    module, _, name = ELSEWHERE[pitfall].partition(":")
    tests = vars(importlib.import_module(module))
    assert name in tests if name else any(test.startswith("test_") for test in tests)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", num_kvcache_blocks=8, kvcache_block_size=16) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0, max_tokens=4)


def test_a_prompt_larger_than_the_cache_is_refused_and_the_others_go_on(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("good", [1, 2, 3], GREEDY)
    with pytest.raises(RequestTooLargeError, match=r"500 tokens.*127.*8 blocks of 16.*num_kvcache_blocks"):
        engine.add_request("large", [1] * 500, GREEDY)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["good"]


def test_a_length_that_the_cache_can_not_hold_is_lowered_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="nanovllm"):
        settings = {"max_model_len": 1000, "num_kvcache_blocks": 8, "kvcache_block_size": 16}
        with LLM("tiny", device="cpu", skip_tokenizer_init=True, **settings) as llm:
            assert llm.llm_engine.resolved.max_model_len == 128
    assert "max_model_len lowered from 1000 to 128" in caplog.text


@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, True])
def test_max_tokens_that_never_end_are_refused(max_tokens: object) -> None:
    with pytest.raises(InvalidArgumentError, match=f"max_tokens={max_tokens}.*integer ≥ 1"):
        SamplingParams(max_tokens=max_tokens)


@pytest.mark.parametrize("prompt", ["", [], {"prompt": ""}, {"prompt_token_ids": []}])
def test_an_empty_prompt_is_refused(llm: LLM, prompt: object) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt=.*at least one token"):
        llm.generate([prompt], GREEDY, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_temperature_zero_is_greedy(llm: LLM) -> None:
    seeded = [SamplingParams(temperature=0, max_tokens=8, seed=seed) for seed in range(3)]
    outputs = llm.generate(["27 + 58 ="] * 3, seeded, use_tqdm=False)
    assert len({tuple(output["token_ids"]) for output in outputs}) == 1


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 13, 100, 500, 512, 1000])
def test_every_batch_size_has_a_graph(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for size in range(1, max_num_seqs + 1):
        padded = min(captured for captured in sizes if captured >= size)
        assert padded - size < max(8, size / 4), "no more padding than an eighth or so"


def test_a_full_prefix_hit_still_computes_the_last_token() -> None:
    engine = make_engine()
    prompt = list(range(1, 9))  # exactly two blocks
    for _ in range(2):
        requests = [Request(prompt, SamplingParams(max_tokens=3, ignore_eos=True), 0)]
        run(engine, requests)
        assert requests[0].output == expected_output(prompt, 3, 64, ignore_eos=True)


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
    shape = KVCacheShape(28, 8, 128, 16, __import__("torch").bfloat16)
    gigabyte = 10**9
    shared = GPUMemory(80 * gigabyte, 0.9, weights=gigabyte, activations=2 * gigabyte, free=28 * gigabyte)
    assert shared.num_blocks(shape) == 26 * gigabyte // 1_835_008 - 1
    full = GPUMemory(80 * gigabyte, 0.9, weights=gigabyte, activations=2 * gigabyte, free=2 * gigabyte)
    with pytest.raises(OutOfMemoryError, match=r"80\.00 GB.*0\.9.*1\.00 GB.*2\.00 GB.*gpu_memory_utilization"):
        full.num_blocks(shape)


def test_a_typo_names_the_nearest_argument() -> None:
    with pytest.raises(UnknownArgumentError, match="max_modle_len.*'max_model_len'"):
        LLM("tiny", max_modle_len=100)
    with pytest.raises(TypeError, match="temprature.*'temperature'"):
        SamplingParams(temprature=0)


def test_each_of_several_eos_tokens_ends_a_sequence() -> None:
    for eos in ((7,), (3, 7), (11, 19, 23)):
        engine = make_engine(eos_token_ids=eos)
        requests = [Request([t], SamplingParams(max_tokens=40), 0) for t in range(12)]
        run(engine, requests)
        ended = [r for r in requests if r.finish_reason == "stop"]
        assert {r.output[-1] for r in ended} <= set(eos)
        assert all(not set(r.output[:-1]) & set(eos) for r in requests)
        assert ended


def test_steady_decode_sends_rows_and_now_and_then_a_block() -> None:
    """Nothing is rebuilt from lists: 100 sequences decode with 100 words and a header."""
    engine = make_engine(max_num_seqs=100, max_num_batched_tokens=400, num_blocks=2000)
    for i in range(100):
        engine.add_request(str(i), [i % VOCAB_SIZE, 1], SamplingParams(max_tokens=50, ignore_eos=True))
    engine.step()
    engine.step()
    sizes = []
    submit = engine.executor.submit
    engine.executor.submit = lambda batch: sizes.append(len(batch.buffer)) or submit(batch)
    engine.step()
    assert sizes == [9 + 100 + 0] or sizes == [9 + 100 + 300]


def test_prompts_and_outputs_are_not_in_the_log(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        text = llm.generate("reverse the word secretive", GREEDY, use_tqdm=False)[0]["text"]
    assert len(caplog.records) > 50
    assert "secretive" not in caplog.text
    assert not text or text not in caplog.text


def test_the_totals_are_right_without_the_progress_bar(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    for use_tqdm in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="nanovllm"):
            llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=6, ignore_eos=True), use_tqdm=use_tqdm)
        (record,) = [record for record in caplog.records if record.event == "generation.complete"]
        assert record.fields["num_steps"] == 6
        assert record.fields["total_output_tokens"] == 12
        assert record.fields["prefill_time"] > 0
        assert record.fields["decode_time"] > 0
