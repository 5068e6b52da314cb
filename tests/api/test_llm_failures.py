"""LLM: whatever ends a call early leaves nothing behind."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, EngineDeadError, InvalidArgumentError, RequestOutput, RequestTooLargeError, SamplingParams
from nanovllm.engine.turns import Call
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import GREEDY, assert_empty, generate, load, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize(
    ("bad", "error"),
    [([], InvalidArgumentError), ([320], InvalidArgumentError), ([1] * 5000, RequestTooLargeError)],
)
def test_a_call_of_which_nothing_is_allowed_raises_before_anything_runs(
    folder: Path, bad: list[int], error: type[Exception]
) -> None:
    with load(folder) as llm:
        for prompts in ([bad], [bad, bad]):
            with pytest.raises(error):
                generate(llm, prompts)
            with pytest.raises(error):
                next(llm.stream(prompts, GREEDY))
        assert llm.llm_engine.statistics.num_steps == 0
        assert_empty(llm)


def test_a_bad_request_in_a_batch_fails_alone_and_by_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong: Any = {"temperature": 0}
    bad: list[tuple[Any, Any, str]] = [
        ([], GREEDY, "prompt=[] is not allowed: it must be at least one token long."),
        ([320], GREEDY, "prompt_token_ids=320 is not allowed: it must be a text or a list of token ids from 0 to 319."),
        ([1] * 5000, GREEDY, "prompt='5000 tokens' is not allowed: it must be at most"),
        ({"promt": [1]}, GREEDY, "prompt={'promt': [1]} is not allowed: it must be a dictionary with 'prompt'"),
        (None, GREEDY, "prompt=None is not allowed"),
        ([1], wrong, "sampling_params={'temperature': 0} is not allowed: it must be a SamplingParams."),
        ([1], SamplingParams(stop_token_ids=[320]), "stop_token_ids=320 is not allowed: it must be token ids from 0"),
    ]
    good: list[Any] = [[10 + index] * 9 for index in range(len(bad) + 1)]
    with load(folder) as llm:
        expected = generate(llm, good)
        prompts, params = [good[0]], [GREEDY]
        for (prompt, param, _), fine in zip(bad, good[1:], strict=True):  # good and bad in turn
            prompts += [prompt, fine]
            params += [param, GREEDY]
        caplog.clear()
        outputs = generate(llm, prompts, params)
        assert_empty(llm)
    assert token_ids(outputs[::2]) == token_ids(expected)
    assert all(output.error is None for output in outputs[::2])
    lines = [record for record in caplog.records if record.event == "request.failed"]
    for output, (_, _, message), line in zip(outputs[1::2], bad, lines, strict=True):
        assert isinstance(output.error, InvalidArgumentError)
        assert str(output.error).startswith(message)
        assert (output.finished, output["text"], output["token_ids"], output.metrics) == (True, "", [], None)
        assert output.outputs[0].finish_reason == "abort"
        assert line.levelname == "WARNING"
        assert f"Request {output.request_id} " in line.getMessage()
        assert output.error.allowed in line.getMessage()
        assert "promt" not in line.getMessage(), "a user's words"


def test_a_bad_conversation_fails_alone() -> None:
    chat = [{"role": "user", "content": "count from 3 to 9"}]
    with LLM("tiny", device="cpu") as llm:
        (expected,) = llm.chat(chat, GREEDY, use_tqdm=False)
        bad: Any = ["not a message"]
        outputs = llm.chat([chat, bad, chat], GREEDY, use_tqdm=False)
        assert outputs[0].outputs == outputs[2].outputs == expected.outputs
        assert "messages=['not a message'] is not allowed" in str(outputs[1].error)
        template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}hello"
        llm.get_tokenizer().chat_template = template
        fine, refused = llm.chat([chat, [{"role": "robot"}]], GREEDY, use_tqdm=False)
        assert (fine.prompt, fine.error) == ("hello", None)
        assert "must be what the chat template takes (TemplateError: users only)" in str(refused.error)
        with pytest.raises(InvalidArgumentError, match="messages="):
            llm.chat(bad, GREEDY, use_tqdm=False)
        assert_empty(llm)


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("raise_exception('users only')", "TemplateError: users only"),
        ("raise_exception(text)", "TemplateError: …"),
        ("raise_exception('users only, not ' ~ text)", "TemplateError: users only, not …"),
        ("raise_exception('I ' ~ text ~ ' users only')", "TemplateError: I …"),
        ("messages[text].role", "UndefinedError: …"),
        ("{}[text].role", "UndefinedError: …"),
        ("messages[0].extra.role", "UndefinedError: 'dict object' has no attribute 'extra'"),
        ("other.role", "UndefinedError: 'other' is undefined"),
        ("text.index('users')", "ValueError: …"),
        ("text + 1", 'TypeError: can only concatenate str (not "int") to str'),
    ],
)
def test_what_a_template_says_quotes_no_prompt(caplog: pytest.LogCaptureFixture, expression: str, why: str) -> None:
    """Neither the error nor the log: they have the template's own words."""
    secret: Any = [{"role": "user", "content": "it's my secret"}]
    with LLM("tiny", device="cpu") as llm:
        template = "{% set text = messages[0].content %}{% if 'secret' in text %}{{ ? }}{% endif %}hello"
        llm.get_tokenizer().chat_template = template.replace("?", expression)
        fine, refused = llm.chat([[{"role": "user", "content": "a"}], secret], GREEDY, use_tqdm=False)
    assert (fine.prompt, fine.error) == ("hello", None)
    assert isinstance(refused.error, InvalidArgumentError)
    assert refused.error.allowed == f"what the chat template takes ({why})"
    (line,) = [record for record in caplog.records if record.event == "request.failed"]
    assert refused.error.allowed in line.getMessage()
    assert "secret" not in line.getMessage()


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
            name = "next_outputs" if where == "between steps" else where
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
    """A real signal, a little later each time: while requests are added, in a step, between steps, at the end.

    Where the machine is faster than it was a moment ago, a signal comes too late: then it is tried again.
    """
    prompts = [[10 + i] * 9 for i in range(40)]
    num_interrupted = 0
    with load(folder, pipeline_depth=depth) as llm:
        expected = token_ids(generate(llm, prompts))
        started = time.perf_counter()
        generate(llm, prompts)
        elapsed = time.perf_counter() - started
        for moment in itertools.islice(itertools.cycle(range(16)), 160):
            if moment == 0 and num_interrupted > 3:
                break
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ended_within_a_generation_is_not_lost_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    with load(folder) as llm:
        engine = llm.llm_engine
        engine.add_request("mine", [5], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        original = engine.next_outputs

        def next_outputs(call: Call) -> list[RequestOutput]:
            if not engine.sequences("mine"):
                raise error
            return original(call)

        with monkeypatch.context() as patched:
            patched.setattr(engine, "next_outputs", next_outputs)
            with pytest.raises(error):
                generate(llm, [[7]], SamplingParams(max_tokens=30, ignore_eos=True))
        assert [output.request_id for output in engine.step()] == ["mine"]
        while engine.is_draining:
            engine.step()
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
