"""LLM: every form of input, results in order, and the same tokens whatever runs beside."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import (
    LLM,
    InvalidArgumentError,
    ModelLoadError,
    SamplingParams,
    UnknownArgumentError,
)
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import GREEDY, assert_empty, generate, load, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3: no tokenizer, and its tokens wander."""
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_seqs=8) as llm:
        yield llm


# ---- prompts and parameters


def test_every_form_of_prompt_and_lists_that_mix_them(tiny: LLM) -> None:
    text = "introduce yourself"
    ids = tiny.get_tokenizer().encode(text)
    forms: list[Any] = [text, ids, tuple(ids), np.array(ids), {"prompt": text}, {"prompt_token_ids": ids}]
    expected = generate(tiny, [text])[0]
    assert expected.prompt_token_ids == ids
    for output, form in zip(generate(tiny, forms), forms, strict=True):
        assert output.outputs == expected.outputs
        assert output.prompt_token_ids == ids
        assert output.prompt == (
            text if isinstance(form, str) or (isinstance(form, dict) and "prompt" in form) else None
        )
    for form in forms:  # alone, each is one prompt
        (output,) = generate(tiny, form)
        assert output.outputs == expected.outputs


def test_nano_vllm_s_form_of_output(tiny: LLM) -> None:
    (output,) = generate(tiny, "introduce yourself")
    assert output["text"] == output.outputs[0].text != ""
    assert output["token_ids"] == output.outputs[0].token_ids
    with pytest.raises(KeyError, match="'text' and 'token_ids', not 'tokens'"):
        output["tokens"]


def test_results_come_in_the_order_of_the_prompts(folder: Path) -> None:
    with load(folder, max_num_seqs=3) as llm:
        prompts = [[10 + i] * (1 + 5 * (i % 3)) for i in range(10)]
        params = [SamplingParams(temperature=0, max_tokens=30 - 3 * i, ignore_eos=True) for i in range(10)]
        outputs = generate(llm, prompts, params)
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert [len(tokens) for tokens in token_ids(outputs)] == [30 - 3 * i for i in range(10)]
        assert token_ids(outputs) == [token_ids(generate(llm, p, q))[0] for p, q in zip(prompts, params, strict=True)]


def test_parameters_for_all_for_each_or_none(folder: Path) -> None:
    with load(folder) as llm:
        assert [len(t) for t in token_ids(generate(llm, [[1], [2]], GREEDY))] == [6, 6]
        each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 5)]
        assert [len(t) for t in token_ids(generate(llm, [[1], [2]], each))] == [2, 5]
        assert [len(t) for t in token_ids(generate(llm, [[1], [2]], tuple(each)))] == [2, 5]
        (output,) = generate(llm, [[1]], None)
        assert len(output["token_ids"]) == SamplingParams().max_tokens or output.outputs[0].finish_reason == "stop"
        assert generate(llm, []) == []
        for wrong in (each, [], [GREEDY] * 4):
            with pytest.raises(InvalidArgumentError, match=f"a list of {len(wrong)}.*each of the 3 prompts"):
                generate(llm, [[1], [2], [3]], wrong)
        good, bad = generate(llm, [[1], [2]], [GREEDY, {"temperature": 0}])
        assert (len(good["token_ids"]), good.error) == (6, None)
        assert "a SamplingParams" in str(bad.error)
        assert_empty(llm)


def test_unknown_arguments_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UnknownArgumentError, match="LLM has no argument 'max_modle_len'. Did you mean 'max_model_len'"):
        LLM("no such model", max_modle_len=64)


def test_vllm_s_spellings_reach_the_engine(folder: Path) -> None:
    with LLM(str(folder), device="cpu", skip_tokenizer_init=True, block_size=8, num_gpu_blocks_override=11) as llm:
        assert (llm.llm_engine.resolved.block_size, llm.llm_engine.resolved.num_blocks) == (8, 11)


@pytest.mark.parametrize(("prompts", "params"), [(7, GREEDY), (None, GREEDY), ([[1]], 7), ([[1]], GREEDY.temperature)])
def test_what_is_no_list_is_refused(tiny: LLM, prompts: Any, params: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        generate(tiny, prompts, params)
    assert_empty(tiny)


# ---- chat and text


def test_chat_is_generate_on_the_template(tiny: LLM) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("introduce yourself", "12 + 30 =")]
    template = tiny.get_tokenizer().apply_chat_template
    prompts = [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    expected = generate(tiny, prompts)
    outputs = tiny.chat(chats, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [output.outputs for output in outputs] == [output.outputs for output in expected]
    (single,) = tiny.chat(chats[1], GREEDY, use_tqdm=False)
    assert single.outputs == expected[1].outputs
    (quiet,) = tiny.chat(chats[1], GREEDY, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
    assert quiet.prompt == template(chats[1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert quiet.prompt != single.prompt


def test_the_end_of_sequence_is_in_the_tokens_and_not_in_the_text(tiny: LLM) -> None:
    chat = [{"role": "user", "content": "introduce yourself"}]
    (output,) = tiny.chat(chat, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] in tiny.llm_engine.resolved.eos_token_ids
    assert completion.text == tiny.get_tokenizer().decode(completion.token_ids[:-1])


def test_an_ordinary_token_that_ends_a_sequence_is_not_in_the_text_either() -> None:
    prompt = [{"role": "user", "content": "count from 3 to 9"}]
    params = SamplingParams(temperature=0)
    with LLM("tiny", device="cpu") as llm:
        (output,) = llm.chat(prompt, params, use_tqdm=False)
        assert output["text"] == "3, 4, 5, 6, 7, 8, 9"
        (stop,) = llm.get_tokenizer().encode("6")
    with LLM("tiny", device="cpu", hf_overrides={"eos_token_id": stop}) as llm:
        (output,) = llm.chat(prompt, params, use_tqdm=False)
        assert output["text"].strip() == "3, 4, 5,"
        assert output["token_ids"][-1] == stop
        assert output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("messages", ["hello", ["hello"], [["hello"]], [{"role": "user"}, "x"]])
def test_a_chat_that_is_none_is_refused(tiny: LLM, messages: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="messages="):
        tiny.chat(messages, GREEDY, use_tqdm=False)


def test_a_folder_without_a_tokenizer_says_what_to_do(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="gives no tokenizer.*skip_tokenizer_init=True"):
        LLM(str(folder), device="cpu", num_kvcache_blocks=8)
    with LLM(str(folder), tokenizer="tiny", device="cpu", num_kvcache_blocks=8) as llm:
        assert llm.get_tokenizer().encode("a")
        with pytest.raises(InvalidArgumentError, match="0 to 319.*the tokenizer is not this model's"):
            generate(llm, [400])


def test_a_text_that_can_not_be_encoded_is_refused(tiny: LLM) -> None:
    with pytest.raises(InvalidArgumentError, match="a text without half of a surrogate pair"):
        generate(tiny, "\ud800")
    assert_empty(tiny)


def test_without_a_tokenizer(folder: Path) -> None:
    with load(folder) as llm:
        (output,) = generate(llm, [1, 2, 3])
        assert output["text"] == ""
        with pytest.raises(InvalidArgumentError, match="since there is no tokenizer"):
            generate(llm, "text")
        with pytest.raises(InvalidArgumentError, match="skip_tokenizer_init=True"):
            llm.get_tokenizer()
        assert_empty(llm)


# ---- ends


def test_all_end_of_sequence_tokens_of_both_files_count(folder: Path, tmp_path: Path) -> None:
    with load(folder) as llm:
        whole = token_ids(generate(llm, [[5, 6]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))[0]
    for source, (in_config, in_generation) in enumerate(
        [([whole[9]], [319]), (319, [318, whole[9]]), ([319], whole[9])]
    ):
        copy = tmp_path / str(source)
        shutil.copytree(folder, copy)
        for name, value in [("config.json", in_config), ("generation_config.json", in_generation)]:
            content = json.loads((copy / name).read_text())
            (copy / name).write_text(json.dumps({**content, "eos_token_id": value}))
        with load(copy, pipeline_depth=2) as llm:
            (output,) = generate(llm, [[5, 6]], SamplingParams(temperature=0, max_tokens=40))
            assert_empty(llm)  # the step in flight that computed a token too many was collected
            assert output["token_ids"] == whole[: whole.index(whole[9]) + 1]
            assert output.outputs[0].finish_reason == "stop"


def test_without_max_tokens_it_goes_on_to_the_model_s_length(folder: Path) -> None:
    with load(folder, max_model_len=50) as llm:
        outputs = generate(llm, [[5], [6] * 49], SamplingParams(max_tokens=None, ignore_eos=True))
        assert [len(tokens) for tokens in token_ids(outputs)] == [49, 1]
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


# ---- the same tokens whatever runs beside


def test_a_temperature_draws_the_same_under_any_schedule(folder: Path) -> None:
    """Seeded and unseeded requests, alone and together, all at once and squeezed."""
    prompts = [[7 + i] * (1 + 7 * i % 23) for i in range(12)]
    params = [
        SamplingParams(temperature=0.5 + i / 10, max_tokens=20, ignore_eos=True, seed=100 + i if i % 2 else None)
        for i in range(12)
    ]
    with load(folder, max_num_seqs=16) as llm:
        expected = token_ids(generate(llm, prompts, params))
    squeezed = {"max_num_seqs": 5, "max_num_batched_tokens": 9, "kvcache_block_size": 4, "num_kvcache_blocks": 18}
    for depth in (1, 2):
        with load(folder, **squeezed, pipeline_depth=depth) as llm:
            assert token_ids(generate(llm, prompts, params)) == expected
            assert llm.llm_engine.statistics.num_preemptions > 0
    with load(folder, max_num_seqs=1) as llm:  # one after another, each call a batch of its own
        assert [token_ids(generate(llm, p, q))[0] for p, q in zip(prompts, params, strict=True)] == expected
    with load(folder) as llm:  # a seed does not care for the order, nor for the engine's own seed
        backwards = token_ids(generate(llm, prompts[::-1], params[::-1]))[::-1]
        assert backwards[1::2] == expected[1::2]
        assert backwards[0::2] != expected[0::2]
    with load(folder, seed=1) as llm:
        reseeded = token_ids(generate(llm, prompts, params))
        assert reseeded[1::2] == expected[1::2]
        assert all(ours != theirs for ours, theirs in zip(reseeded[0::2], expected[0::2], strict=True))


def test_a_prefix_is_found_again_and_forgotten_when_asked(folder: Path) -> None:
    with load(folder, kvcache_block_size=4) as llm:
        prompt = list(range(30))
        first, second = (generate(llm, prompt)[0] for _ in range(2))
        llm.reset_prefix_cache()
        third = generate(llm, prompt)[0]
        assert [output.num_cached_tokens for output in (first, second, third)] == [0, 28, 0]
        assert first.outputs == second.outputs == third.outputs


# ---- statistics


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("use_tqdm", [False, True])
def test_the_last_line_is_right_with_and_without_a_progress_bar(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], use_tqdm: bool, depth: int
) -> None:
    caplog.set_level(logging.INFO, logger="nanovllm.engine.llm_engine")
    with load(folder, pipeline_depth=depth) as llm:
        for _ in range(2):  # totals are of one generation, not of the engine
            llm.reset_prefix_cache()
            caplog.clear()
            outputs = llm.generate([[5, 6, 7], [8]], [GREEDY, SamplingParams(max_tokens=3)], use_tqdm=use_tqdm)
            records = [record for record in caplog.records if record.name == "nanovllm.engine.llm_engine"]
            assert [record.getMessage() for record in records[:3]] == [
                "-" * 80,
                "Starting generation for 2 prompts",
                "Total prompt tokens: 4",
            ]
            assert [record.event for record in records[3:5]] == ["request.finished"] * 2
            assert [record.event for record in records[5:]] == ["generation.complete", "generation.memory"]
            fields = records[5].fields
            assert fields["num_steps"] == 6
            assert fields["total_output_tokens"] == sum(map(len, token_ids(outputs)))
            assert fields["prefill_time"] > 0
            assert fields["decode_time"] > 0
            assert records[5].getMessage() == (
                f"Generation complete: 6 steps, total_output_tokens={fields['total_output_tokens']}, "
                f"prefill_time={fields['prefill_time']:.2f}s, decode_time={fields['decode_time']:.2f}s"
            )
    assert ("Generating: 100%" in capsys.readouterr().err) == use_tqdm
