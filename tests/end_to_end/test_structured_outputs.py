"""Structured outputs, end to end: what ends by itself fits, under any schedule, and who does not ask is not touched."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, AsyncLLM, InvalidArgumentError, RequestOutput, SamplingParams, StructuredOutputsParams
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.properties import examples
from tests.requests.grammar_gate import gate
from tests.small_llm import assert_empty, generate, load

__all__ = ["gate"]  # a fixture

pytest.importorskip("xgrammar", reason="xgrammar is not installed")

PROMPT = "introduce yourself"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}
LIST = 'root ::= "[" item ("," item){0,3} "]"\nitem ::= [0-9]{1,2} | root2\nroot2 ::= "(" [a-z]{1,3} ")"'


def fits_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "tags"]
        and isinstance(person["name"], str)
        and len(person["name"]) <= 8
        and type(person["age"]) is int
        and 0 <= person["age"] <= 120
        and len(person["tags"]) <= 3
        and all(tag in ("a", "b", None) for tag in person["tags"])
    )


def matches(pattern: str) -> Any:
    return lambda text: re.fullmatch(pattern, text) is not None


# Each ends within some 60 tokens, whatever is drawn.
ASKED: dict[str, tuple[dict[str, Any], Any]] = {
    "json": ({"json": PERSON, "disable_any_whitespace": True}, fits_person),
    "regex": ({"regex": r"(é|[a-f]{2}){1,4}-\d{1,5}"}, matches(r"(é|[a-f]{2}){1,4}-\d{1,5}")),
    "choice": (
        {"choice": ["yes", "no", "I can't say", '"😀"']},
        lambda text: text in ("yes", "no", "I can't say", '"😀"'),
    ),
    "grammar": ({"grammar": LIST}, matches(r"\[(\d{1,2}|\([a-z]{1,3}\))(,(\d{1,2}|\([a-z]{1,3}\))){0,3}\]")),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["depth 1", "depth 2"])
def tiny(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_seqs=16, pipeline_depth=request.param) as llm:
        yield llm
        assert_empty(llm)


def params(asked: dict[str, Any] | None = None, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 120, "structured_outputs": asked, **changes})


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output["text"] for output in outputs]


@pytest.mark.parametrize("temperature", [0, 1, 2])
@pytest.mark.parametrize("kind", ASKED)
def test_every_output_fits(tiny: LLM, kind: str, temperature: float) -> None:
    asked, fits = ASKED[kind]
    outputs = generate(tiny, [PROMPT] * 40, [params(asked, temperature=temperature, seed=i) for i in range(40)])
    for output in outputs:
        (completion,) = output.outputs
        assert fits(completion.text), completion
        assert (completion.finish_reason, completion.stop_reason, output.error) == ("stop", None, None)
        assert completion.token_ids[-1] in tiny.llm_engine.resolved.eos_token_ids
    assert len(set(texts(outputs))) > (1 if temperature else 0)


def test_a_json_object_is_one_where_it_ends(tiny: LLM) -> None:
    asked = {"json_object": True, "disable_any_whitespace": True}
    outputs = generate(tiny, [PROMPT] * 40, [params(asked, seed=i) for i in range(40)])
    ended = [output for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert len(ended) >= 2
    assert all(isinstance(json.loads(output["text"]), dict) for output in ended)
    assert all(output["text"].startswith("{") for output in outputs), "what max_tokens cut is the beginning of one"


def test_a_mask_leaves_the_draw_among_what_it_allows_alone(tiny: LLM) -> None:
    """Greedy: the likeliest of the tokens that fit. The scores are those of the model, before the mask."""
    (output,) = generate(tiny, PROMPT, params({"regex": "[a-z]{6}"}, temperature=0, logprobs=-1))
    (completion,) = output.outputs
    assert completion.logprobs is not None
    decoded = {token: tiny.get_tokenizer().decode([token]) for token in completion.logprobs[0]}
    left = 6
    for token, scores in zip(completion.token_ids[:-1], completion.logprobs, strict=False):
        fitting = {t: s.logprob for t, s in scores.items() if re.fullmatch(f"[a-z]{{1,{left}}}", decoded[t])}
        assert token == max(fitting, key=lambda t: fitting[t])
        left -= len(decoded[token])
    assert left == 0


def test_who_does_not_ask_is_not_touched(tiny: LLM) -> None:
    free = [params(seed=i, max_tokens=30, top_k=5 * (i % 2)) for i in range(6)]
    alone = generate(tiny, [PROMPT] * 6, free)
    structured = [params(asked, seed=i) for i, (asked, _) in enumerate(ASKED.values())]
    both = generate(tiny, [PROMPT] * 10, free[:3] + structured + free[3:])
    assert [output.outputs for output in both[:3] + both[7:]] == [output.outputs for output in alone]
    assert [output.outputs for output in both[3:7]] == [
        o.outputs for p in structured for o in generate(tiny, PROMPT, p)
    ]


def test_a_row_forgets_its_mask(tiny: LLM) -> None:
    free = generate(tiny, PROMPT, params(temperature=0, max_tokens=20))
    generate(tiny, [PROMPT] * 16, params({"choice": ["yes"]}))
    after = generate(tiny, [PROMPT] * 16, params(temperature=0, max_tokens=20))
    assert {output["text"] for output in after} == {free[0]["text"]}


def test_max_tokens_cuts_and_stop_rules_end(tiny: LLM) -> None:
    (cut,) = generate(tiny, PROMPT, params({"regex": "[a-z]{60,80}"}, seed=1, max_tokens=5))
    assert (len(cut["token_ids"]), cut.outputs[0].finish_reason, cut.error) == (5, "length", None)
    (stopped,) = generate(tiny, PROMPT, params({"choice": ["one two three"]}, stop=" two"))
    assert (stopped["text"], stopped.outputs[0].stop_reason) == ("one", " two")
    token = tiny.get_tokenizer().encode("!")[0]
    (ended,) = generate(tiny, PROMPT, params({"choice": ["ab!cd"]}, stop_token_ids=[token]))
    assert (ended["text"], ended.outputs[0].stop_reason) == ("ab", token)


def test_truncation_counts_what_the_mask_leaves(tiny: LLM) -> None:
    """top_k=1 draws the likeliest that fits, even where no token that fits is among the model's first."""
    asked = {"regex": "[xyz]{5}"}
    greedy = generate(tiny, PROMPT, params(asked, temperature=0))[0]["text"]
    drawn = generate(tiny, [PROMPT] * 8, [params(asked, temperature=2, top_k=1, seed=i) for i in range(8)])
    assert set(texts(drawn)) == {greedy}
    drawn = generate(tiny, [PROMPT] * 8, [params(asked, temperature=1, top_p=0.5, min_p=0.1, seed=i) for i in range(8)])
    assert all(re.fullmatch("[xyz]{5}", text) for text in texts(drawn))


def test_a_mask_goes_before_bans_and_beside_penalties(tiny: LLM) -> None:
    asked = {"regex": "(yes|no){1,3}"}
    for changes in (
        {"min_tokens": 50},
        {"bad_words": ["yes", "no", "y", "n"], "logit_bias": dict.fromkeys(range(300), -100.0)},
        {"repetition_penalty": 1.5, "frequency_penalty": 2.0, "presence_penalty": -2.0},
    ):
        for output in generate(tiny, [PROMPT] * 6, [params(asked, seed=i, **changes) for i in range(6)]):
            assert re.fullmatch(asked["regex"], output["text"]), changes
            assert output.outputs[0].finish_reason == "stop"
    ids = set(tiny.get_tokenizer().encode("no"))
    no = params(asked, logit_bias=dict.fromkeys(ids, 100.0), temperature=0)
    assert generate(tiny, PROMPT, no)[0]["text"].startswith("no")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "tight",
    [
        {"num_kvcache_blocks": 9, "max_model_len": 128},  # preempts
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},  # chunks, and rows that many use
        {"max_num_seqs": 3, "enable_prefix_caching": False},
    ],
    ids=["preempted", "chunked", "few rows"],
)
def test_the_same_tokens_under_any_schedule(tight: dict[str, Any], depth: int) -> None:
    prompts = [f"{PROMPT} {i % 3} and again" for i in range(12)]
    kinds = [*(asked for asked, _ in ASKED.values()), None, {"regex": "([a-z]{3,5} ){20}"}]
    many = [params(kinds[i % 6], seed=i, max_tokens=60, logprobs=0 if i % 4 == 0 else None) for i in range(12)]
    with LLM("tiny", device="cpu", dtype="float32", max_num_seqs=16, pipeline_depth=1) as llm:
        alone = [generate(llm, prompt, param)[0] for prompt, param in zip(prompts, many, strict=True)]
    arguments = {"max_num_seqs": 8, "kvcache_block_size": 16, **tight, "pipeline_depth": depth}
    with LLM("tiny", device="cpu", dtype="float32", **arguments) as llm:
        outputs = generate(llm, prompts, many)
        assert (llm.llm_engine.statistics.num_preemptions > 0) == ("num_kvcache_blocks" in tight)
        assert_empty(llm)
    for output, expected in zip(outputs, alone, strict=True):
        assert output["token_ids"] == expected["token_ids"]
        assert output["text"] == expected["text"]
        assert (output.outputs[0].logprobs is None) == (expected.outputs[0].logprobs is None)


def test_two_ranks(tmp_path: Path) -> None:
    with LLM("tiny", device="cpu", dtype="float32", max_num_seqs=8) as llm:
        many = [*(params(asked, seed=i) for i, (asked, _) in enumerate(ASKED.values())), params(seed=9)]
        one = generate(llm, [PROMPT] * 5, many)
    with LLM("tiny", device="cpu", dtype="float32", max_num_seqs=8, tensor_parallel_size=2) as llm:
        two = generate(llm, [PROMPT] * 5, many)
    assert [output["token_ids"] for output in two] == [output["token_ids"] for output in one]


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2])
def test_on_a_gpu_with_and_without_graphs(depth: int) -> None:
    kinds = list(ASKED.values())
    many = [params(kinds[i % 4][0] if i % 5 else None, seed=i, temperature=i % 3, max_tokens=60) for i in range(40)]
    outputs = []
    for eager in (False, True):
        arguments: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 24, "pipeline_depth": depth}
        with LLM("tiny", device="cuda", enforce_eager=eager, max_model_len=256, **arguments) as llm:
            outputs.append(generate(llm, [PROMPT] * 40, many))
            assert_empty(llm)
    for i, (replayed, eager_one) in enumerate(zip(*outputs, strict=True)):
        assert replayed["token_ids"] == eager_one["token_ids"], many[i]
        if i % 5 and replayed.outputs[0].finish_reason == "stop":
            assert kinds[i % 4][1](replayed["text"]), replayed["text"]
    assert sum(output.outputs[0].finish_reason == "stop" for output in outputs[0]) > 30


# ---- requests that cannot go on, or not yet


def test_what_xgrammar_can_not_read_raises_before_anything_runs(tiny: LLM) -> None:
    steps = tiny.llm_engine.statistics.num_steps
    with pytest.raises(InvalidArgumentError, match=r"structured_outputs.regex='a\(b' is not allowed.*unterminated"):
        generate(tiny, PROMPT, params({"regex": "a(b"}))
    assert tiny.llm_engine.statistics.num_steps == steps
    assert_empty(tiny)


@pytest.mark.parametrize("grammar", ['root ::= root "a"', 'root ::= "hel" x\nx ::= x "c"'])
def test_a_grammar_that_leads_nowhere_ends_its_request_alone(tiny: LLM, grammar: str) -> None:
    good = params({"choice": ["yes", "no"]}, seed=3)
    free = params(max_tokens=5, ignore_eos=True)
    first, bad, last = generate(tiny, [PROMPT] * 3, [good, params({"grammar": grammar}), free])
    assert first["text"] in ("yes", "no")
    assert len(last["token_ids"]) == 5
    assert bad.outputs[0].finish_reason == "abort"
    assert isinstance(bad.error, InvalidArgumentError)
    assert bad.error.field == "structured_outputs.grammar"
    assert first.error is last.error is None
    assert_empty(tiny)


def test_an_output_that_its_stop_rule_ends_at_a_dead_end_is_whole(tiny: LLM) -> None:
    dead_end = {"grammar": 'root ::= "ab" x\nx ::= x "c"'}
    (output,) = generate(tiny, "hello", SamplingParams(temperature=0, structured_outputs=dead_end, stop="b"))
    assert output.error is None
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("a", "stop", "b")


@pytest.mark.parametrize("in_process", [False, True])
def test_who_streams_gets_the_reason_too(in_process: bool) -> None:
    async def ask(engine: AsyncLLM, asked: dict[str, Any] | None) -> str:
        text = ""
        async for output in engine.generate(PROMPT, params(asked, max_tokens=20), delta=True):
            text += output["text"]
        return text

    async def main() -> list[Any]:
        asked = [{"choice": ["aye"]}, {"regex": "a(b"}, {"grammar": 'root ::= "hel" x\nx ::= x "c"'}, None]
        settings: dict[str, Any] = {"max_num_seqs": 8, "pipeline_depth": 2, "engine_process": in_process}
        async with AsyncLLM("tiny", device="cpu", **settings) as engine:
            return await asyncio.gather(*(ask(engine, each) for each in asked), return_exceptions=True)

    aye, unread, nowhere, free = asyncio.run(main())
    assert (aye, bool(free)) == ("aye", True)
    assert "unterminated" in str(unread)
    assert "no token may follow" in str(nowhere)
    assert isinstance(unread, InvalidArgumentError)
    assert isinstance(nowhere, InvalidArgumentError)


def test_streamed_text_is_the_text(tiny: LLM) -> None:
    many = [params(asked, seed=i) for i, (asked, _) in enumerate(ASKED.values())]
    shown = dict.fromkeys(range(4), "")
    ids: dict[str, int] = {}
    for output in tiny.stream([PROMPT] * 4, many):
        shown[ids.setdefault(output.request_id, len(ids))] += output["text"]
    assert sorted(shown.values()) == sorted(texts(generate(tiny, [PROMPT] * 4, many)))


def test_others_run_while_one_compiles_and_it_runs_then(tiny: LLM, gate: threading.Event) -> None:
    engine = tiny.llm_engine
    engine.add_request("structured", PROMPT, params({"choice": ["aye"]}))
    for name in ("a", "b"):
        engine.add_request(name, PROMPT, params(max_tokens=4))
    ended: list[RequestOutput] = []
    for _ in range(30):
        ended += engine.step()
    assert {output.request_id for output in ended} == {"a", "b"}
    assert engine.has_unfinished_requests()
    gate.set()
    while engine.has_unfinished_requests():
        ended += engine.step()
    assert ended[-1]["text"] == "aye"
    assert_empty(tiny)


def test_others_run_while_a_mask_is_late_and_the_tokens_are_the_same(tiny: LLM) -> None:
    engine, asked = tiny.llm_engine, params({"regex": "[a-f]{30}"}, seed=4, max_tokens=40)
    (expected,) = generate(tiny, PROMPT, asked)
    engine.add_request("structured", PROMPT, asked)
    while engine.sequences("structured")[0].first_token is None:
        engine.step()
    process = engine._grammars._process._child
    assert process is not None
    os.kill(process._process.pid, signal.SIGSTOP)
    engine.add_request("other", PROMPT, params(max_tokens=20))
    ended: list[RequestOutput] = []
    while not ended:
        ended += engine.step()
    os.kill(process._process.pid, signal.SIGCONT)
    assert ended[0].request_id == "other"
    while engine.has_unfinished_requests():
        ended += engine.step()
    assert ended[1]["token_ids"] == expected["token_ids"]
    assert_empty(tiny)


def test_a_costly_grammar_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_GRAMMAR_SECONDS", "1")
    with LLM("tiny", device="cpu", max_num_seqs=4) as llm:
        free = params(max_tokens=5, ignore_eos=True)
        many = [params({"regex": "(.*)*" * 120}, seed=1), params({"choice": ["aye"]}), free]
        costly, aye, other = generate(llm, [PROMPT] * 3, many)
        assert "within 1 s (NANOVLLM_GRAMMAR_SECONDS)" in str(costly.error)
        assert (aye["text"], len(other["token_ids"])) == ("aye", 5)
        assert_empty(llm)


def test_one_that_compiles_can_be_aborted_or_discarded_and_its_id_used_again(tiny: LLM, gate: threading.Event) -> None:
    engine = tiny.llm_engine
    for name in ("aborted", "discarded"):
        engine.add_request(name, PROMPT, params({"choice": [name]}))
    engine.abort_request("aborted")
    engine.discard_requests(["discarded"])
    (output,) = engine.step()
    assert (output.request_id, output.outputs[0].finish_reason, output.error) == ("aborted", "abort", None)
    assert_empty(tiny)
    engine.add_request("aborted", PROMPT, params({"choice": ["again"]}))
    gate.set()
    outputs: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert texts(outputs) == ["again"]
    assert_empty(tiny)


def test_waiting_for_a_grammar_alone_does_not_spin(tiny: LLM, gate: threading.Event) -> None:
    tiny.llm_engine.add_request("structured", PROMPT, params({"choice": ["slowly"]}))
    threading.Timer(0.3, gate.set).start()
    num_calls = 0
    while tiny.llm_engine.has_unfinished_requests():
        tiny.llm_engine.step()
        num_calls += 1
    assert num_calls < 60


def test_an_engine_can_exit_while_it_compiles(gate: threading.Event) -> None:
    with LLM("tiny", device="cpu", max_num_seqs=2) as llm:
        llm.llm_engine.add_request("structured", PROMPT, params({"choice": ["never"]}))
        llm.llm_engine.step()


def test_an_engine_without_a_tokenizer_refuses_by_name(tmp_path: Path) -> None:
    with load(make_qwen3_checkpoint(tmp_path)) as llm, pytest.raises(InvalidArgumentError, match="a tokenizer"):
        generate(llm, [[1, 2]], params({"regex": "a"}))


# ---- small schemas, drawn

SCALARS = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "string", "maxLength": 3},
        {"enum": ["x", 2, None, 'q"']},
        {"const": {"k": [1]}},
    ]
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}, inner),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(
            lambda fields: {"type": "object", "properties": fields, "required": sorted(fields)[:1]},
            st.dictionaries(st.sampled_from(["a", "b c", "é"]), inner, min_size=1, max_size=2),
        ),
    ),
    max_leaves=3,
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return any(
            value == option and type(value) is type(option) for option in schema.get("enum", [schema.get("const")])
        )
    kind = schema["type"]
    if kind == "object":
        fields = schema["properties"]
        known = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(fields)
        return known and all(fits(item, fields[name]) for name, item in value.items())
    if kind == "array":
        return isinstance(value, list) and 1 <= len(value) <= 2 and all(fits(item, schema["items"]) for item in value)
    if kind == "integer":
        return type(value) is int and -3 <= value <= 12
    if kind == "string":
        return isinstance(value, str) and len(value) <= 3
    return value is None if kind == "null" else isinstance(value, bool)


@settings(
    max_examples=examples(40),
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_drawn_schemas(tiny: LLM, schema: dict[str, Any], seed: int) -> None:
    asked = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    drawn = SamplingParams(structured_outputs=asked, temperature=1.5, max_tokens=150, seed=seed)
    for output in generate(tiny, [PROMPT, "count from 3 to 9"], drawn):
        assert output.outputs[0].finish_reason == "stop", output
        assert fits(json.loads(output["text"]), schema), output["text"]
