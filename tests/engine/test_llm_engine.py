"""The loop: what it lets in, how requests end, and that no failure leaves anything behind."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanovllm import (
    EngineDeadError,
    InvalidArgumentError,
    LLMEngine,
    RequestOutput,
    RequestTooLargeError,
    SamplingParams,
)
from nanovllm.config import EngineConfig
from nanovllm.engine.batch import StepResult
from nanovllm.engine_factory import default_observers
from tests.engine.breakable_executor import BreakableExecutor
from tests.engine.simulated_executor import VOCAB_SIZE, Handle, expected_output
from tests.engine.test_schedules import check_integrity


def make_engine(
    seed: int = 0, clock: Callable[[], float] = time.monotonic, **config: object
) -> tuple[LLMEngine, BreakableExecutor]:
    executor = BreakableExecutor(**config)
    engine_config = EngineConfig("simulated", skip_tokenizer_init=True, seed=seed)
    engine = LLMEngine(engine_config, lambda config, stopwatch: executor, default_observers(engine_config), clock)
    return engine, executor


def run(engine: LLMEngine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    for _ in range(1000):
        if not engine.has_unfinished_requests():
            return outputs
        outputs.update((output.request_id, output) for output in engine.step())
        check_integrity(engine)
    raise AssertionError("the engine makes no progress")


def tokens(output: RequestOutput) -> list[int]:
    assert output.outputs[0].token_ids == output["token_ids"]
    return output.outputs[0].token_ids


def greedy(max_tokens: int | None = 5, ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)


def is_empty(engine: LLMEngine) -> bool:
    scheduler = engine.scheduler
    free = scheduler.block_manager.num_free_blocks == engine.resolved.num_blocks
    return free and scheduler.rows.is_empty and not scheduler.waiting and not engine.has_unfinished_requests()


# ---- what is let in


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 1, 4],
        (3, 1, 4),
        np.array([3, 1, 4]),
        np.array([3, 1, 4], dtype=np.uint8),
        {"prompt_token_ids": [3, 1, 4]},
        {"prompt_token_ids": [3, 1, 4], "prompt": "ignored for the tokens, kept as the text"},
    ],
)
def test_every_form_of_token_ids(prompt: Any) -> None:
    engine, _ = make_engine()
    assert engine.add_request("a", prompt, greedy()) == "a"
    output = run(engine)["a"]
    assert tokens(output) == expected_output([3, 1, 4], 5, 64, ignore_eos=True)
    assert output.prompt_token_ids == [3, 1, 4]
    assert all(type(token) is int for token in output.prompt_token_ids + tokens(output))
    assert output.prompt == (prompt.get("prompt") if isinstance(prompt, dict) else None)
    assert output.finished
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "at least one token long"),
        (np.array([], dtype=np.int32), "at least one token long"),
        ({"prompt_token_ids": []}, "at least one token long"),
        ("text", "since there is no tokenizer"),
        ([1, -1], "prompt_token_ids=-1"),
        ([1, VOCAB_SIZE], f"prompt_token_ids={VOCAB_SIZE}"),
        ([1, 2**40], "prompt_token_ids=1099511627776"),
        ([1, 2**70], f"from 0 to {VOCAB_SIZE - 1}"),
        ([1.0, 2.0], f"from 0 to {VOCAB_SIZE - 1}"),
        ([True, False], f"from 0 to {VOCAB_SIZE - 1}"),
        ([[1, 2], [3, 4]], f"from 0 to {VOCAB_SIZE - 1}"),
        ([[1], [2, 3]], f"from 0 to {VOCAB_SIZE - 1}"),
        ([1, "2"], f"from 0 to {VOCAB_SIZE - 1}"),
        (None, f"from 0 to {VOCAB_SIZE - 1}"),
        (7, f"from 0 to {VOCAB_SIZE - 1}"),
        ({"text": "x"}, "a dictionary with 'prompt' (a text) or 'prompt_token_ids'"),
        ({"prompt_token_ids": None}, "a dictionary with 'prompt' (a text) or 'prompt_token_ids'"),
        ({"prompt_token_ids": "ab"}, f"from 0 to {VOCAB_SIZE - 1}"),
        ({"prompt": [1, 2]}, "a dictionary with 'prompt' (a text)"),
        ({"prompt_token_ids": [1], "promt": "x"}, "no other key"),
    ],
)
def test_a_bad_prompt_is_refused_and_leaves_nothing(prompt: Any, words: str) -> None:
    engine, _ = make_engine()
    with pytest.raises(InvalidArgumentError, match="prompt") as caught:
        engine.add_request("a", prompt)
    assert words in str(caught.value)
    assert is_empty(engine)
    engine.add_request("a", [1], greedy())  # the id is still free
    assert tokens(run(engine)["a"]) == expected_output([1], 5, 64, ignore_eos=True)


def test_what_can_never_fit_is_refused_with_the_numbers_and_the_others_go_on() -> None:
    engine, _ = make_engine(max_model_len=40, num_blocks=10, block_size=4)
    engine.add_request("before", [1, 2], greedy())
    engine.step()
    with pytest.raises(RequestTooLargeError) as caught:
        engine.add_request("huge", [1] * 40)
    for part in (
        "40 tokens",
        "at most 39 tokens",
        "max_model_len=40",
        "10 blocks of 4 tokens",
        "max_model_len to 41",
        "num_kvcache_blocks to 11",
    ):
        assert part in str(caught.value)
    engine.add_request("largest", [1] * 39, greedy(max_tokens=100))
    outputs = run(engine)
    assert tokens(outputs["before"]) == expected_output([1, 2], 5, 40, ignore_eos=True)
    assert len(tokens(outputs["largest"])) == 1
    assert outputs.keys() == {"before", "largest"}


def test_request_ids_are_unique_among_the_unfinished() -> None:
    engine, _ = make_engine()
    engine.add_request("a", [1], greedy())
    with pytest.raises(InvalidArgumentError, match="request_id='a'"):
        engine.add_request("a", [2])
    assert tokens(run(engine)["a"]) == expected_output([1], 5, 64, ignore_eos=True)
    engine.add_request("a", [2], greedy())
    assert tokens(run(engine)["a"]) == expected_output([2], 5, 64, ignore_eos=True)


def test_parameters_must_be_sampling_params() -> None:
    engine, _ = make_engine()
    wrong: Any = {"temperature": 0}
    with pytest.raises(InvalidArgumentError, match="a SamplingParams"):
        engine.add_request("a", [1], wrong)
    assert is_empty(engine)
    engine.add_request("a", [1])  # none: the defaults
    assert len(tokens(run(engine)["a"])) <= 64


def test_without_max_tokens_a_request_goes_to_the_model_s_length() -> None:
    engine, _ = make_engine(max_model_len=30)
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=None))
    output = run(engine)["a"]
    assert (len(tokens(output)), output.outputs[0].finish_reason) == (27, "length")


def test_every_end_of_sequence_token_ends_a_sequence() -> None:
    whole = expected_output([1], 30, 64, ignore_eos=True)
    for stop in {whole[3], whole[10]}:
        engine, _ = make_engine(eos_token_ids=(0, stop) if stop else (0,))
        engine.add_request("a", [1], greedy(30, ignore_eos=False))
        output = run(engine)["a"]
        end = next(i for i, token in enumerate(whole) if token in (0, stop))
        assert tokens(output) == whole[: end + 1]  # it stays in the tokens
        assert output.outputs[0].finish_reason == "stop"


def test_seeds_come_from_the_engine_s_and_the_arrival() -> None:
    def seeds(engine_seed: int) -> list[int]:
        engine, _ = make_engine(seed=engine_seed)
        for index in range(3):
            engine.add_request(str(index), [1])
        engine.add_request("own", [1], SamplingParams(seed=5))
        return [engine.sequences(request_id)[0].seed for request_id in ("0", "1", "2", "own")]

    assert seeds(0) == seeds(0)
    assert len({*seeds(0)[:3], *seeds(1)[:3]}) == 6
    assert seeds(0)[3] == seeds(1)[3] == 5
    assert all(0 <= seed < 2**63 for seed in seeds(0))


def test_a_refused_request_does_not_shift_the_seeds_of_the_others() -> None:
    engine, _ = make_engine()
    with pytest.raises(InvalidArgumentError):
        engine.add_request("bad", [])
    engine.add_request("a", [1])
    other, _ = make_engine()
    other.add_request("a", [1])
    assert engine.sequences("a")[0].seed == other.sequences("a")[0].seed


# ---- aborts


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_abort_in_any_state_returns_what_there_is(num_steps: int, depth: int) -> None:
    """After 0, 1, 2 and 4 steps the request waits, is in its prefill, ends it, and decodes."""
    engine, _ = make_engine(pipeline_depth=depth, max_num_batched_tokens=8)
    prompt = [1, 2, 3] * 4
    engine.add_request("a", prompt, greedy(20))
    engine.add_request("b", [4], greedy(20))
    for _ in range(num_steps):
        engine.step()
    engine.abort_request("a")
    engine.abort_request("a")
    assert engine.has_unfinished_requests()
    (output,) = engine.step()
    assert (output.request_id, output.outputs[0].finish_reason) == ("a", "abort")
    assert tokens(output) == expected_output(prompt, 20, 64, ignore_eos=True)[: max(0, num_steps - 1)]
    engine.abort_request("a")  # finished
    engine.abort_request("never seen")
    assert tokens(run(engine)["b"]) == expected_output([4], 20, 64, ignore_eos=True)
    assert is_empty(engine)


def test_discarded_requests_give_no_output_aborted_or_not() -> None:
    engine, _ = make_engine()
    for request_id in "abc":
        engine.add_request(request_id, [1], greedy())
    engine.step()
    engine.abort_request("a")
    engine.discard_requests(["a", "b", "unknown"])
    assert run(engine).keys() == {"c"}
    assert is_empty(engine)


# ---- failures


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("where", ["submit", "collect"])
@pytest.mark.parametrize("error", [RuntimeError("the device failed"), KeyboardInterrupt()])
def test_a_step_that_fails_raises_aborts_what_ran_and_the_engine_goes_on(
    error: BaseException, where: str, depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="nanovllm")
    engine, executor = make_engine(pipeline_depth=depth)
    for request_id in "abcdef":  # four run, two wait
        engine.add_request(request_id, [1, 2, 3, 4, 5], greedy())
    engine.abort_request("b")
    engine.step()
    engine.step()
    engine.abort_request("a")
    executor.failures[where] = error
    with pytest.raises(type(error)) as caught:
        engine.step()
    assert caught.value is error
    assert is_empty(engine)
    level, what = ("ERROR", "failed") if isinstance(error, Exception) else ("INFO", "was interrupted")
    (record,) = [record for record in caplog.records if record.event in ("engine.error", "engine.interrupted")]
    assert record.levelname == level
    assert record.getMessage() == f"A step {what} ({error!r}); its requests are aborted, and the engine goes on"
    assert engine.step() == []
    engine.add_request("a", [1, 2, 3, 4, 5], greedy())
    outputs = run(engine)
    assert tokens(outputs["a"]) == expected_output([1, 2, 3, 4, 5], 5, 64, ignore_eos=True)
    assert outputs["a"].num_cached_tokens == 0, "what a failed step should have written cannot be trusted"
    assert is_empty(engine)


def test_a_failure_at_a_numbered_step() -> None:
    engine, executor = make_engine()
    executor.fail_at_step = 3
    engine.add_request("a", [1], greedy())
    engine.step()
    engine.step()
    with pytest.raises(RuntimeError, match="the device failed"):
        engine.step()
    executor.fail_at_step = None
    assert is_empty(engine)


def test_a_device_that_is_out_of_order_ends_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    engine, executor = make_engine()
    engine.add_request("a", [1])
    executor.failures = {"collect": RuntimeError("first"), "synchronize": RuntimeError("illegal access")}
    with pytest.raises(RuntimeError, match="first"):
        engine.step()
    assert "the engine cannot go on" in caplog.messages[-1]
    for use in (lambda: engine.step(), lambda: engine.add_request("b", [1])):
        with pytest.raises(EngineDeadError, match="first") as caught:
            use()
        assert isinstance(caught.value.__cause__, RuntimeError)
    engine.exit()
    assert executor.is_shut_down


def test_a_second_ctrl_c_while_the_first_waits_for_the_device() -> None:
    engine, executor = make_engine(pipeline_depth=2)
    for request_id in "abcdef":
        engine.add_request(request_id, [1, 2, 3, 4, 5], greedy())
    engine.step()
    executor.failures = {"collect": KeyboardInterrupt(), "synchronize": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert is_empty(engine)
    engine.add_request("a", [1, 2, 3], greedy())
    assert tokens(run(engine)["a"]) == expected_output([1, 2, 3], 5, 64, ignore_eos=True)
    assert is_empty(engine)


# ---- the end


def test_exit_twice_and_use_after() -> None:
    engine, executor = make_engine()
    engine.add_request("a", [1])
    engine.exit()
    engine.exit()
    assert executor.is_shut_down
    assert not engine.has_unfinished_requests()
    for use in (lambda: engine.step(), lambda: engine.add_request("b", [1])):
        with pytest.raises(EngineDeadError, match=r"exit\(\) was called.*make a new one"):
            use()


def test_as_a_context_manager_it_shuts_down_whatever_happens() -> None:
    engine, executor = make_engine()
    with pytest.raises(ZeroDivisionError), engine:
        raise ZeroDivisionError
    assert executor.is_shut_down


def test_forgotten_it_shuts_down_too() -> None:
    engine, executor = make_engine()
    del engine
    gc.collect()
    assert executor.is_shut_down


# ---- steps and statistics


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_as_many_steps_are_in_flight_as_asked_for(depth: int) -> None:
    engine, executor = make_engine(pipeline_depth=depth)
    engine.add_request("a", [1], greedy(10))
    run(engine)
    assert executor.most_in_flight == depth
    assert executor.num_in_flight == 0


def test_statistics() -> None:
    engine, _ = make_engine(max_num_batched_tokens=8, max_num_seqs=4)
    engine.add_request("a", [1] * 12, greedy(3))
    engine.add_request("b", [2], greedy(2))
    assert engine.num_waiting_tokens == 13
    run(engine)
    statistics = engine.statistics
    # Chunks of 8, then 4 + 1; two decode steps.
    assert statistics.num_steps == 4
    assert statistics.num_prompt_tokens == 13
    assert statistics.num_output_tokens == 5
    assert statistics.prefill_seconds > 0
    assert statistics.decode_seconds > 0
    before = statistics.since(type(statistics)())
    engine.add_request("c", [3], greedy(1))
    run(engine)
    done = engine.statistics.since(before)
    assert (done.num_steps, done.num_prompt_tokens, done.num_output_tokens, done.decode_seconds) == (1, 1, 1, 0)


def test_idle_time_belongs_to_no_step() -> None:
    now = [100.0]
    engine, executor = make_engine(clock=lambda: now[0])
    original = executor.collect

    def collect(handle: Handle) -> StepResult:
        now[0] += 0.5
        return original(handle)

    executor.collect = collect  # type: ignore[method-assign]  # a step takes half a second
    for request_id in "ab":
        engine.add_request(request_id, [1, 2], greedy(3))
        run(engine)
        now[0] += 1000
    assert engine.statistics.prefill_seconds == 1.0
    assert engine.statistics.decode_seconds == 2.0


def test_a_reset_prefix_cache_gives_no_hits() -> None:
    engine, _ = make_engine()
    hits = []
    for index in range(3):
        engine.add_request(str(index), list(range(10)), greedy(1))
        hits.append(run(engine)[str(index)].num_cached_tokens)
        if index == 1:
            engine.reset_prefix_cache()
    assert hits == [0, 8, 0]


def test_start_up_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nanovllm.engine.llm_engine")
    engine, _ = make_engine()
    assert not engine.is_dead  # it is still referenced: its end is logged too
    assert engine.engine_id >= 0
    versions, *messages = caplog.messages
    assert versions.startswith("Versions: nanovllm=")
    assert messages[:3] == ["=" * 80, "Initializing LLMEngine", "Model: simulated"]
    assert messages[3].startswith("Configuration: tensor_parallel_size=1, max_model_len=None, ")
    assert messages[4] == "=" * 80
    assert messages[5].startswith("Resolved: model=simulated, device=cpu, dtype=float32, ")
    assert caplog.records[4].fields["max_num_seqs"] == 512
    assert messages[6].startswith("Start-up: ")
    assert list(caplog.records[7].fields["seconds"]) == ["tokenizer"]  # a given executor has its own past
    assert len(messages) == 7
