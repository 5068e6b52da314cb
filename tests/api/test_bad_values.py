"""Every field and argument, and what it says to a bad value: the field, the value, and what is allowed.

One table an interface; a field that is in none fails `test_every_field_is_in_a_table`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, AsyncLLM, InvalidArgumentError, LLMEngine, SamplingParams, StructuredOutputsParams
from nanovllm.config import EngineConfig
from nanovllm.requests.chat import ChatArguments, ChatOptions
from tests.small_llm import GREEDY, assert_empty, generate

Table = dict[str, tuple[str, list[Any]]]  # field → what is allowed, bad values

SWITCH = "True or False"
NO_SWITCH = [1, 0, None, "yes"]
COUNT = "an integer ≥ 1"
NO_COUNT = [0, -1, 1.5, "8", True]

SAMPLING_PARAMS: Table = {
    "temperature": ("a number from 0 (greedy) to 2", [-0.1, 2.1, math.nan, math.inf, "1", None, True, [1]]),
    "max_tokens": (
        "an integer ≥ 1, or None for as many as the model's length allows",
        [0, -1, 1.0, "64", True],
    ),
    "ignore_eos": (SWITCH, NO_SWITCH),
    "seed": ("an integer from 0 to 2**63 - 1, or None", [-1, 2**63, 0.5, "0", False]),
    "top_k": ("an integer ≥ 1, or 0 or -1 for all tokens", [-2, 1.0, "50", None, True]),
    "top_p": ("a number above 0, up to 1 (all tokens)", [0, -0.1, 1.01, math.nan, "1", None, True]),
    "min_p": ("a number from 0 (all tokens) to 1", [-0.1, 1.01, math.nan, "0", None, False]),
    "logprobs": ("0 to 20, -1 for all tokens, or None", [-2, 21, 1.0, "5", True]),
    "n": ("an integer from 1 to 16384, and 1 with temperature 0", [0, -1, 16385, 1.0, "2", None, True]),
    "prompt_logprobs": ("0 to 20, -1 for all tokens, or None", [-2, 21, 1.0, "5", True]),
    "presence_penalty": ("a number from -2 to 2 (0: none)", [-2.1, 2.1, math.nan, "0", None, True]),
    "frequency_penalty": ("a number from -2 to 2 (0: none)", [-2.1, 2.1, math.nan, "0", None, False]),
    "repetition_penalty": (
        "a number above 0 (1: none), no smaller than 1e-6 or larger than 1e6",
        [0, -1, math.nan, math.inf, "1", None, True],
    ),
    "logit_bias": (
        "a dictionary of token ids ≥ 0 and numbers from -100 to 100, or None",
        [[1], 5, {-1: 1}, {1.5: 1}, {1: 101}, {1: math.nan}, {1: "2"}, {"1": 1}],
    ),
    "min_tokens": ("an integer from 0 to max_tokens", [-1, 65, 1.0, "1", None, True]),
    "bad_words": ("a list of strings, none of them blank, or None", ["word", [""], [" "], [5], 5]),
    "allowed_token_ids": ("a list of at least one integer ≥ 0, or None for all", [[], [-1], [1.5], ["1"], 5, "5"]),
    "stop": (
        "a string, a list of strings, none of them empty, or None",
        ["", [""], ["a", 1], 3, b"a", {"a": 1}],
    ),
    "stop_token_ids": ("a list of integers ≥ 0, or None", [3, "3", [-1], [1.0], [True], ["a"]]),
    "include_stop_str_in_output": (SWITCH, NO_SWITCH),
    "detokenize": (SWITCH, NO_SWITCH),
    "skip_special_tokens": (SWITCH, NO_SWITCH),
    "speculate": (SWITCH, NO_SWITCH),
    "output_kind": ("a RequestOutputKind, or None", ["DELTA", 1, True]),
    "structured_outputs": (
        "a StructuredOutputsParams, a dictionary of its fields, or None",
        ["json", 3, [("regex", "a")], {1: 2}],
    ),
}
STRUCTURED_OUTPUTS: Table = {
    "json": ("a JSON schema, as a dictionary or as text", ["{", 3.5j, {1, 2}, {"type": object}]),
    "regex": ("a text, or None", [3, ["a"], b"a"]),
    "choice": ("a list of one or more texts, or None", ["yes", [], ["a", 1], {"a": 1}]),
    "grammar": ("a text, or None", [3, ["root"], b"root"]),
    "json_object": (f"{SWITCH}, or None", [1, "yes", {}]),
    "disable_any_whitespace": (f"{SWITCH}, or None", [1, "yes", []]),
    "structural_tag": ("a structural tag, as a dictionary or as text", ["{", 3.5j, {1, 2}, {"type": object}]),
}

SOURCE = "a folder, a Hugging Face id, or "
ENGINE_CONFIG: Table = {
    "model": (f"{SOURCE}'tiny'", [5, None, "", ["tiny"]]),
    "tokenizer": (f"{SOURCE}None", [5, "", ["a"], False]),
    "dtype": ("one of 'auto', 'bfloat16', 'float16', 'float32'", ["int8", None, 5, ["auto"]]),
    "max_model_len": (f"{COUNT}, or None", NO_COUNT),
    "max_num_seqs": (COUNT, [*NO_COUNT, None]),
    "max_num_batched_tokens": (COUNT, [*NO_COUNT, None]),
    "gpu_memory_utilization": (
        "a number above 0, at most 1",
        [0, -0.5, 1.01, math.nan, math.inf, "0.9", None, True],
    ),
    "kvcache_block_size": (f"{COUNT}, or None", NO_COUNT),
    "num_kvcache_blocks": (f"{COUNT}, or None", NO_COUNT),
    "enable_prefix_caching": (SWITCH, NO_SWITCH),
    "tensor_parallel_size": (COUNT, [*NO_COUNT, None]),
    "startup_timeout": ("a number of seconds > 0, at most 86400 (a day)", [0, -1, math.nan, math.inf, "9", True]),
    "step_timeout": ("a number of seconds > 0, at most 86400 (a day)", [0, -1, math.nan, math.inf, "9", True]),
    "enforce_eager": (SWITCH, NO_SWITCH),
    "fast_start": (f"{SWITCH}, or None", [1, 0, "yes"]),
    "engine_process": (f"{SWITCH}, or None", [1, 0, "yes"]),
    "device": ("'auto', 'cpu', 'cuda' or 'cuda:N'", ["tpu", "cuda0", "cuda:x", "cuda:-1", -1, None, ""]),
    "attention_backend": ("one of 'auto', 'flash_attn', 'triton', 'torch'", ["flashinfer", None, 1]),
    "kv_cache_dtype": ("one of 'auto', 'fp8', 'fp8_e4m3'", ["int4", None, 8]),
    "quantization": (
        "one of 'fp8', 'int8', 'int4', 'awq', 'gptq', 'compressed-tensors', or None",
        ["bitsandbytes", "gguf", 8, True],
    ),
    "load_format": ("one of 'auto', 'safetensors', 'dummy'", ["gguf", None, []]),
    "skip_tokenizer_init": (SWITCH, NO_SWITCH),
    "seed": ("an integer from 0 to 2**63 - 1", [-1, 2**63, "0", 1.0, True]),
    "trust_remote_code": (SWITCH, NO_SWITCH),
    "revision": ("a tag, a branch or a commit, or None", [5, "", ["main"]]),
    "hf_overrides": ("a dictionary of fields of config.json, or None", [5, "x", [1], {1: 2}]),
    "speculative_config": ("a dictionary with 'method', or None", [5, "ngram", ["ngram"], {}, {1: 2, "method": "x"}]),
    "pipeline_depth": (f"{COUNT}, or None", NO_COUNT),
    "max_prefill_tokens_beside_decode": (f"{COUNT}, or None", NO_COUNT),
    "inter_token_latency_target_ms": (
        "'auto', a number of milliseconds from 0 to 60000 (a minute), or None",
        [-1, math.nan, math.inf, 60_001, "20", True],
    ),
    "profiler_config": (
        "{'profiler': 'torch', 'torch_profiler_dir': a folder}, or None",
        ["./profile", {}, {"torch_profiler_dir": 5}, {"torch_profiler_dir": "a", "profiler": "cuda"}, {"other": 1}],
    ),
}

TEXT_OR_IDS = "a text or a list of token ids from 0 to 511"
MESSAGES = "a list of messages, each {'role': …, 'content': …}"
REQUEST_ID = "a text, unique among the unfinished requests"
CLIENT_REQUEST_ID = "a text of 1 to 128 printable characters"

DICTIONARY = "a dictionary with 'prompt' (a text) or 'prompt_token_ids' (a list), no other key"
ONE = "at least one token long"

Case = tuple[str, Any, str]  # argument, bad value, how the message begins


def refused(argument: str, allowed: str, *values: object, field: str | None = None) -> list[Case]:
    return [
        (argument, value, f"{field or argument}={value!r} is not allowed: it must be {allowed}") for value in values
    ]


def prompts(argument: str) -> list[Case]:
    """One prompt; the message speaks of what is wrong in it."""
    outside = f"is not allowed: it must be {TEXT_OR_IDS}. If it came from a text, the tokenizer is not this model's."
    return [
        *refused(argument, ONE, "", {"prompt": ""}, {"prompt_token_ids": []}, field="prompt"),
        *refused(argument, "a text without half of a surrogate pair", "\ud800", field="prompt"),
        *refused(argument, DICTIONARY, {}, {"a": 1}, {"prompt": 1}, {"prompt": None}, field="prompt"),
        (argument, [512], f"prompt_token_ids=512 {outside}"),
        (argument, {"prompt_token_ids": [-1]}, f"prompt_token_ids=-1 {outside}"),
        (argument, [1] * 5000, "prompt='5000 tokens' is not allowed: it must be at most 1023 tokens long, so that"),
        *refused("sampling_params", "a SamplingParams", 7, "x", {"n": 1}),
        (
            "sampling_params",
            SamplingParams(stop_token_ids=[512]),
            "stop_token_ids=512 is not allowed: it must be token ids from 0 to 511.",
        ),
    ]


STREAM = [
    *prompts("prompts"),
    *refused("prompts", "a text, token ids, a dictionary, or a list of these.", 7, None, b"ab", {1, 2}),
    *[
        ("prompts", [item], f"prompt={item!r} is not allowed: it must be {TEXT_OR_IDS}.")
        for item in (None, 1.5, [True], b"ab", [1, "2"], [[1]])
    ],
    ("sampling_params", [7], "sampling_params=7 is not allowed: it must be a SamplingParams."),
    ("sampling_params", [], "sampling_params='a list of 0' is not allowed: it must be one for all, or one for each of"),
    ("sampling_params", [GREEDY] * 2, "sampling_params='a list of 2' is not allowed: it must be one for all, or one"),
]
GENERATE = [*STREAM, *refused("use_tqdm", f"{SWITCH}.", *NO_SWITCH)]
CHAT = [
    *refused("messages", MESSAGES, 5, None, "hello"),
    ("messages", ["hello"], f"messages='hello' is not allowed: it must be {MESSAGES}."),
    ("messages", [["hello"]], f"messages=['hello'] is not allowed: it must be {MESSAGES}."),
    ("messages", [{}], "messages=[{}] is not allowed: it must be what the chat template takes (TemplateError: "),
    ("messages", [[]], "messages=[] is not allowed: it must be at least one message long."),
    *[case for case in GENERATE if case[0] in ("sampling_params", "use_tqdm")],
    *refused("chat_template_kwargs", "a dictionary of the template's variables, or None.", 5, "x", [1], {1: 2}),
    *refused("tools", "a list of {'type': 'function', 'function': {…}}, or None.", 5, "add", [1], {"a": 1}),
    *refused("chat_template", "a Jinja template, or None for the checkpoint's.", 5, "", ["{{ messages }}"]),
    *refused("chat_template", "a Jinja template (TemplateSyntaxError: ", "{% for %}"),
    *refused("add_generation_prompt", f"{SWITCH}.", *NO_SWITCH),
    *refused("continue_final_message", f"{SWITCH}.", *NO_SWITCH),
]
ASYNC = [
    *prompts("prompt"),
    *refused("prompt", f"{TEXT_OR_IDS}.", 7, None, b"ab", [1.5], [True], [True, 5], (5, np.True_)),
    *refused("request_id", f"{REQUEST_ID}.", 5, ["a"]),
    *refused("delta", "True, False, or None for what output_kind says.", 1, 0, "yes"),
    *refused("client_request_id", f"{CLIENT_REQUEST_ID}.", 5, "", "a\n", ["a"]),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_seqs=4, num_kvcache_blocks=64, kvcache_block_size=16) as llm:
        yield llm


def cases(table: Table) -> list[tuple[str, Any, str]]:
    return [(field, value, allowed) for field, (allowed, values) in table.items() for value in values]


def refusal(call: Callable[[], object]) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    return caught.value


def check_field(error: InvalidArgumentError, field: str, value: object, allowed: str) -> None:
    assert error.field == field
    assert str(error).startswith(f"{field}={value!r} is not allowed: it must be {allowed}.")


@pytest.mark.parametrize(("field", "value", "allowed"), cases(SAMPLING_PARAMS))
def test_sampling_params(field: str, value: object, allowed: str) -> None:
    kwargs: dict[str, Any] = {field: value}
    check_field(refusal(lambda: SamplingParams(**kwargs)), field, value, allowed)


@pytest.mark.parametrize(("field", "value", "allowed"), cases(STRUCTURED_OUTPUTS))
def test_structured_outputs(field: str, value: object, allowed: str) -> None:
    error = refusal(lambda: SamplingParams(structured_outputs={field: value}))
    check_field(error, f"structured_outputs.{field}", value, allowed)


@pytest.mark.parametrize(("field", "value", "allowed"), cases(ENGINE_CONFIG))
@pytest.mark.parametrize("make", [LLM, AsyncLLM])
def test_engine(make: Any, field: str, value: object, allowed: str) -> None:
    """Before anything is loaded: there is no such model."""
    arguments: dict[str, Any] = {"model": "/no/such/model", field: value}
    check_field(refusal(lambda: make(**arguments)), field, value, allowed)


@pytest.mark.parametrize(("name", "value", "message"), GENERATE)
def test_generate(llm: LLM, name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {"prompts": "a", "sampling_params": GREEDY, "use_tqdm": False, name: value}
    assert str(refusal(lambda: llm.generate(**arguments))).startswith(message)
    assert_empty(llm)


@pytest.mark.parametrize(("name", "value", "message"), STREAM)
def test_stream(llm: LLM, name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {"prompts": "a", "sampling_params": GREEDY, name: value}
    assert str(refusal(lambda: next(llm.stream(**arguments)))).startswith(message)
    assert_empty(llm)


@pytest.mark.parametrize(("name", "value", "message"), CHAT)
def test_chat(llm: LLM, name: str, value: Any, message: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    arguments: dict[str, Any] = {"messages": messages, "sampling_params": GREEDY, "use_tqdm": False, name: value}
    assert str(refusal(lambda: llm.chat(**arguments))).startswith(message)
    assert_empty(llm)


def test_the_engine_s_own_requests(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("taken", "a", GREEDY)
    for request_id in (5, None, ["a"], "taken"):
        error = refusal(lambda: engine.add_request(request_id, "a", GREEDY))  # noqa: B023
        check_field(error, "request_id", request_id, REQUEST_ID)
    engine.discard_requests(["taken"])
    assert_empty(llm)


def test_async_generate() -> None:
    async def ask(engine: AsyncLLM, arguments: dict[str, Any]) -> str:
        try:
            async for _ in engine.generate(**arguments):
                pass
        except InvalidArgumentError as error:
            return str(error)
        return "it was allowed"

    async def main() -> None:
        async with AsyncLLM("tiny", device="cpu", num_kvcache_blocks=64, kvcache_block_size=16) as engine:
            calls = [{"prompt": "a", "sampling_params": GREEDY, name: value} for name, value, _ in ASYNC]
            answers = await asyncio.gather(*(ask(engine, call) for call in calls))
            for answer, (name, value, message) in zip(answers, ASYNC, strict=True):
                assert answer.startswith(message), (name, value)
            assert (engine.metrics.num_running, engine.metrics.num_waiting) == (0, 0)

    asyncio.run(main())


def test_the_engine_answers_after_all_that(llm: LLM) -> None:
    assert len(generate(llm, "count from 3 to 9")[0]["token_ids"]) == GREEDY.max_tokens


def parameters(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def test_every_field_is_in_a_table() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} == SAMPLING_PARAMS.keys()
    assert {field.name for field in dataclasses.fields(StructuredOutputsParams)} == STRUCTURED_OUTPUTS.keys()
    assert {field.name for field in dataclasses.fields(EngineConfig)} == ENGINE_CONFIG.keys()
    assert parameters(LLM.generate) == {name for name, *_ in GENERATE}
    assert parameters(LLM.stream) == {name for name, *_ in STREAM}
    options = {field.name for field in dataclasses.fields(ChatOptions)}
    assert ChatArguments.__annotations__.keys() == options
    assert parameters(LLM.chat) - {"options"} | options == {name for name, *_ in CHAT}
    assert parameters(AsyncLLM.generate) == {name for name, *_ in ASYNC}
    assert parameters(LLMEngine.add_request) == {"request_id", "prompt", "params"}
