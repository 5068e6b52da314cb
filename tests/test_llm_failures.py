"""LLM: whatever ends a call early leaves nothing behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import EngineDeadError, InvalidArgumentError, RequestTooLargeError, SamplingParams
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import GREEDY, assert_empty, generate, load, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize(
    ("bad", "error"),
    [([], InvalidArgumentError), ([320], InvalidArgumentError), ([1] * 5000, RequestTooLargeError)],
)
def test_a_bad_request_raises_before_anything_runs(folder: Path, bad: list[int], error: type[Exception]) -> None:
    with load(folder) as llm:
        with pytest.raises(error):
            generate(llm, [[1], [2], bad, [3]])
        assert llm.llm_engine.statistics.num_steps == 0
        assert_empty(llm)
        assert len(generate(llm, [[1], [2], [3]])) == 3


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("where", ["submit", "collect", "between steps"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_interrupts_a_generation_leaves_the_engine_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], where: str, depth: int
) -> None:
    prompts = [[10 + i] * 9 for i in range(12)]
    with load(folder, pipeline_depth=depth) as llm:
        expected = token_ids(generate(llm, prompts))
        calls = 0

        def failing(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any) -> Any:
                nonlocal calls
                calls += 1
                result = original(*args)
                if calls == 4:
                    raise error
                return result

            return wrapper

        with monkeypatch.context() as patched:
            target: Any = llm.llm_engine if where == "between steps" else llm.llm_engine.executor
            name = "step" if where == "between steps" else where
            patched.setattr(target, name, failing(getattr(target, name)))
            with pytest.raises(error):
                generate(llm, prompts)
        assert calls == 4
        assert not llm.llm_engine.scheduler.waiting
        llm.reset_prefix_cache()  # so that the same work is done again
        assert token_ids(generate(llm, prompts)) == expected
        assert_empty(llm)


@pytest.mark.parametrize("depth", [1, 2])
def test_ctrl_c_at_any_moment(folder: Path, depth: int) -> None:
    """A real signal, a little later each time: while requests are added, in a step, between steps, at the end."""
    prompts = [[10 + i] * 9 for i in range(40)]
    num_interrupted = 0
    with load(folder, pipeline_depth=depth) as llm:
        expected = token_ids(generate(llm, prompts))
        started = time.perf_counter()
        generate(llm, prompts)
        elapsed = time.perf_counter() - started
        for moment in range(16):
            timer = threading.Timer(moment / 16 * elapsed, signal.raise_signal, [signal.SIGINT])
            try:
                timer.start()
                generate(llm, prompts)
                timer.cancel()
                timer.join()
            except KeyboardInterrupt:
                num_interrupted += 1
            timer.join()
        assert num_interrupted > 3
        llm.reset_prefix_cache()
        assert token_ids(generate(llm, prompts)) == expected
        assert_empty(llm)


def test_requests_of_the_engine_s_own_are_not_lost_in_a_generation(folder: Path) -> None:
    for depth in (1, 2):
        with load(folder, pipeline_depth=depth) as llm:
            expected = token_ids(generate(llm, [[5], [6], [7]], SamplingParams(temperature=0, max_tokens=20)))
            engine = llm.llm_engine
            short, long = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 20))
            engine.add_request("ends within", [5], short)
            engine.add_request("ends after", [6], long)
            assert token_ids(generate(llm, [[7]], GREEDY)) == [expected[2][:6]]
            outputs = {}
            for _ in range(30):
                outputs.update((output.request_id, output["token_ids"]) for output in engine.step())
            assert outputs == {"ends within": expected[0][:2], "ends after": expected[1]}
            assert_empty(llm)


def test_use_after_exit(folder: Path) -> None:
    llm = load(folder)
    generate(llm, [1])
    llm.exit()
    llm.exit()
    with pytest.raises(EngineDeadError, match="make a new one"):
        generate(llm, [1])
    with load(folder) as llm:
        pass
    with pytest.raises(EngineDeadError):
        generate(llm, [1])
