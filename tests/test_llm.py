"""The public face, as a script uses it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from nanovllm import LLM, EngineDeadError, InvalidArgumentError, NanoVLLMError, SamplingParams
from nanovllm.engine.executor import InProcessExecutor

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", num_kvcache_blocks=64) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests()
    assert engine.scheduler.block_manager.num_used_blocks == 0
    assert engine.scheduler.rows.is_empty


def ids(llm: LLM, text: str) -> list[int]:
    return llm.get_tokenizer().encode(text)


def tokens(outputs: list) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


def test_every_form_of_prompt_means_the_same(llm: LLM) -> None:
    text = "27 + 58 ="
    forms = [text, ids(llm, text), np.array(ids(llm, text)), {"prompt": text}, {"prompt_token_ids": ids(llm, text)}]
    mixed = llm.generate(forms, GREEDY, use_tqdm=False)
    alone = [llm.generate(form, GREEDY, use_tqdm=False)[0] for form in forms]
    assert len({tuple(t) for t in tokens(mixed + alone)}) == 1
    assert [output.prompt for output in mixed] == [text, None, None, text, None]
    assert {tuple(output.prompt_token_ids) for output in mixed} == {tuple(ids(llm, text))}


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [[i, i + 1] for i in range(1, 21)]
    lengths = [1 + (7 * i) % 13 for i in range(20)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(t) for t in tokens(outputs)] == lengths
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_both_forms_of_a_result(llm: LLM) -> None:
    (output,) = llm.chat([{"role": "user", "content": "What is 27 + 58?"}], GREEDY.__class__(temperature=0))
    completion = output.outputs[0]
    assert output["text"] == completion.text == "27 + 58 = 85"
    assert output["token_ids"] == completion.token_ids
    assert completion.token_ids[-1] in llm.llm_engine.resolved.eos_token_ids, "EOS stays in token_ids, not in text"
    assert output.finished
    assert completion.finish_reason == "stop"
    with pytest.raises(KeyError, match="token_ids"):
        output["tokens"]


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_the_defaults(llm: LLM) -> None:
    (output,) = llm.generate("abc", use_tqdm=False)
    assert 1 <= len(output["token_ids"]) <= 64


def test_lists_of_different_lengths_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidArgumentError, match="sampling_params.*each of the 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY], use_tqdm=False)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 2, 99_999], "prompt_token_ids=99999.*0 to 511"),
        ([1, -1], "prompt_token_ids=-1"),
        ([[1, 2], [3]], "list of token ids"),
        ([1.5, 2.5], "list of token ids"),
        (None, "list of token ids"),
        ({"text": "a"}, "'prompt' or 'prompt_token_ids'"),
        ([1] * 5000, "prompt='5000 tokens'.*max_model_len=1024"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm: LLM, prompt: object, message: str) -> None:
    steps = llm.llm_engine.statistics.num_steps
    with pytest.raises(InvalidArgumentError, match=message):
        llm.generate(["good", prompt, "good"], GREEDY, use_tqdm=False)
    assert llm.llm_engine.statistics.num_steps == steps


def test_other_than_sampling_params_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidArgumentError, match="sampling_params"):
        llm.generate(["a"], [{"temperature": 0}], use_tqdm=False)


def test_max_tokens_none_goes_to_the_model_length() -> None:
    with LLM("tiny", device="cpu", max_model_len=40) as llm:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        assert len(llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"]) == 37


def test_a_second_run_hits_the_prefix_cache_and_a_reset_empties_it(llm: LLM) -> None:
    prompt = list(range(40, 140))
    llm.reset_prefix_cache()
    first, second = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 96)
    assert first["token_ids"] == second["token_ids"]
    llm.reset_prefix_cache()
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_sampled_tokens_depend_on_seed_and_order_alone(llm: LLM) -> None:
    """A seeded request draws the same alone and in a crowd; without a seed an equal engine draws the same again."""
    prompts = [[3, 4, i] for i in range(12)]
    params = [SamplingParams(temperature=1.0, max_tokens=20, seed=i, ignore_eos=True) for i in range(12)]
    crowd = tokens(llm.generate(prompts, params, use_tqdm=False))
    alone = [tokens(llm.generate([p], [q], use_tqdm=False))[0] for p, q in zip(prompts, params, strict=True)]
    assert crowd == alone
    assert len({tuple(t) for t in crowd}) == 12
    unseeded = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    runs = []
    for seed, depth in ((5, 1), (5, 2), (6, 1)):
        with LLM("tiny", device="cpu", seed=seed, pipeline_depth=depth, num_kvcache_blocks=64) as other:
            runs.append(tokens(other.generate(prompts, unseeded, use_tqdm=False)))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_ctrl_c_in_a_run_leaves_a_working_engine(llm: LLM) -> None:
    expected = tokens(llm.generate(["27 + 58 ="], GREEDY, use_tqdm=False))
    endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3], [4, 5, 6]] * 500, endless, use_tqdm=False)
    assert tokens(llm.generate(["27 + 58 ="], GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["submit", "collect"])
def test_an_error_in_a_step_is_raised_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    calls = []
    original = getattr(InProcessExecutor, where)

    def failing(self: InProcessExecutor, argument: object) -> object:
        calls.append(argument)
        if len(calls) == 3:
            raise error
        return original(self, argument)

    monkeypatch.setattr(InProcessExecutor, where, failing)
    with pytest.raises(type(error)):
        llm.generate([[1, 2, 3]] * 5, GREEDY, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert len(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)) == 1


def test_after_exit_every_call_says_so() -> None:
    with LLM("tiny", device="cpu", num_kvcache_blocks=8) as llm:
        llm.generate("a", GREEDY, use_tqdm=False)
    llm.exit()
    llm.exit()
    with pytest.raises(EngineDeadError, match="ended.*make a new one"):
        llm.generate("a", GREEDY, use_tqdm=False)


def test_an_engine_that_was_never_used_ends_well() -> None:
    LLM("tiny", device="cpu", num_kvcache_blocks=8).exit()


def test_without_a_tokenizer_there_is_no_text_in_or_out() -> None:
    with LLM("tiny", device="cpu", num_kvcache_blocks=8, skip_tokenizer_init=True) as llm:
        assert llm.generate([1, 2], GREEDY, use_tqdm=False)[0]["text"] == ""
        with pytest.raises(InvalidArgumentError, match="skip_tokenizer_init"):
            llm.generate("a", GREEDY, use_tqdm=False)
        with pytest.raises(InvalidArgumentError, match="skip_tokenizer_init"):
            llm.get_tokenizer()


def test_chat_takes_one_conversation_or_many_and_template_arguments(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is 2 + 3?"}]
    params = SamplingParams(temperature=0)
    one = llm.chat(question, params, use_tqdm=False)
    many = llm.chat([question, question], params, use_tqdm=False)
    assert [o["text"] for o in one + many] == ["2 + 3 = 5"] * 3
    quiet = llm.chat(question, params, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
    assert len(quiet[0].prompt_token_ids) > len(one[0].prompt_token_ids)
    assert quiet[0]["text"] == "2 + 3 = 5"


def test_the_engine_under_it(llm: LLM) -> None:
    """Requests that come and go by themselves, as in vLLM's engine scripts."""
    engine = llm.llm_engine
    endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for name in ("a", "b", "waiting"):
        engine.add_request(name, "27 + 58 =", endless)
    with pytest.raises(InvalidArgumentError, match="request_id='a'.*unique"):
        engine.add_request("a", "27 + 58 =", GREEDY)
    engine.abort_request("waiting")
    (waiting,) = engine.step()
    assert (waiting.request_id, waiting["token_ids"]) == ("waiting", [])
    engine.step()
    engine.add_request("late", "27 + 58 =", GREEDY)
    engine.abort_request("a")
    engine.abort_request("a")
    engine.abort_request("never there")
    outputs = {output.request_id: output for output in engine.step()}
    assert outputs["a"].outputs[0].finish_reason == "abort"
    assert len(outputs["a"]["token_ids"]) == 2
    while "late" not in outputs:
        outputs |= {output.request_id: output for output in engine.step()}
    assert outputs["late"]["token_ids"] == tokens(llm_run_alone(engine, "27 + 58 ="))[0]
    engine.discard_requests(["b", "never there"])
    while engine.has_unfinished_requests():
        assert engine.step() == []


def llm_run_alone(engine: object, prompt: str) -> list:
    engine.add_request("alone", prompt, GREEDY)
    outputs = []
    while not outputs:
        outputs = engine.step()
    return outputs


def test_every_error_of_ours_has_one_root() -> None:
    for bad in ({"dtype": "int8"}, {"max_num_seqs": 0}, {"device": "tpu"}, {"blok_size": 4}):
        with pytest.raises(NanoVLLMError):
            LLM("tiny", **bad)
    with pytest.raises(NanoVLLMError, match="there is no such folder"):
        LLM("/no/such/folder")
    with pytest.raises(NanoVLLMError, match="load_format='dummy'"):
        LLM("qwen3-0.6b")
