"""Structured outputs, below the engine: read at the door, compiled and followed in a process, masked token by token."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm import InvalidArgumentError, SamplingParams, StructuredOutputsParams
from nanovllm.engine.sequence import Sequence
from nanovllm.models.checkpoint import resolve_model_folder
from nanovllm.requests import grammar_compiler
from nanovllm.requests.grammar_compiler import GrammarCompiler
from tests.distributed.rank_processes import is_alive
from tests.engine.scheduler_driver import Driver
from tests.engine.simulated_executor import make_config
from tests.processes import until
from tests.requests.grammar_gate import gate

__all__ = ["gate"]  # a fixture

EOS = (509, 507)
TEXT = {"type": "any_text"}
TAGS = [
    {"type": "tag", "begin": f"<{name}>", "content": content, "end": f"</{name}>"}
    for name, content in (
        ("a", {"type": "json_schema", "json_schema": {"type": "integer"}, "style": "json", "excludes": []}),
        ("b", {"type": "grammar", "grammar": 'root ::= "a" root | "b"'}),
        ("c", {"type": "regex", "pattern": r"\d{2}"}),
    )
]
VOCAB_SIZE = 520  # eight more than the tokenizer has: a padded head


def tag(begin: str, schema: Any) -> dict[str, Any]:
    return {"begin": begin, "schema": schema, "end": begin.replace("<", "</")}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_model_folder("tiny"))


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerBase) -> Iterator[GrammarCompiler]:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    grammars = GrammarCompiler(tokenizer, make_config(vocab_size=VOCAB_SIZE, eos_token_ids=EOS))
    yield grammars
    grammars.shutdown()


@pytest.fixture(scope="module")
def hasty(tokenizer: PreTrainedTokenizerBase) -> Iterator[GrammarCompiler]:
    """Grammars may take a second."""
    pytest.importorskip("xgrammar", reason="the extra nanovllm[structured] is not installed")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NANOVLLM_GRAMMAR_SECONDS", "1")
        environment.setenv("NANOVLLM_GRAMMAR_LENGTH", "20000")
        grammars = GrammarCompiler(tokenizer, make_config(vocab_size=VOCAB_SIZE, eos_token_ids=EOS))
    yield grammars
    grammars.shutdown()


def sequence(**asked: Any) -> Sequence:
    params = SamplingParams(structured_outputs=asked)
    return Sequence.from_prompt(0, "r", [1], params, max_model_len=64, seed=0)


def start(grammars: GrammarCompiler, waiting: Sequence) -> None:
    wanted = waiting.params.structured_outputs
    assert isinstance(wanted, StructuredOutputsParams)
    grammars.start(waiting, grammars.read(wanted))


def finish(grammars: GrammarCompiler, *waiting: Sequence) -> list[Sequence]:
    """Returns those whose grammar failed."""
    failed, end = [], time.monotonic() + 120
    while any(each.waits_for_grammar for each in waiting):
        assert time.monotonic() < end, "no answer"
        grammars.wait()
        failed += grammars.collect()
    return failed


class Follower:
    """A sequence whose every token is followed before the next one."""

    def __init__(self, grammars: GrammarCompiler, **asked: Any) -> None:
        self.sequence = sequence(**asked)
        self._grammars = grammars
        start(grammars, self.sequence)
        finish(grammars, self.sequence)
        assert self.sequence.error is None

    @property
    def mask(self) -> np.ndarray:
        assert self.sequence.grammar is not None
        return self.sequence.grammar.mask

    def accept(self, token: int) -> InvalidArgumentError | None:
        assert self.sequence.grammar is not None
        self.sequence.grammar.accept(token)
        assert self.sequence.waits_for_grammar
        finish(self._grammars, self.sequence)
        return self.sequence.error


def matcher(grammars: GrammarCompiler, **asked: Any) -> Follower:
    return Follower(grammars, **asked)


def allowed(mask: np.ndarray) -> set[int]:
    return {token for token in range(32 * len(mask)) if mask[token // 32] >> (token % 32) & 1}


def takes(matcher: Follower, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the whole text fits, and may end there."""
    for token in tokenizer.encode(text):
        if token not in allowed(matcher.mask):
            return False
        assert matcher.accept(token) is None
    return set(EOS) <= allowed(matcher.mask)


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ({"regex": r"\d{2}-[ab]"}, ["12-a", "99-b"], ["1-a", "12-", "12-c", "12-a "]),
        ({"choice": ["yes", "no"]}, ["yes", "no"], ["ye", "maybe", ""]),
        ({"choice": ['q"uote', "back\\slash", "é😀", "a\nb\t\x01\x7f", "a|b", ""]}, ['q"uote', "back\\slash"], ["a"]),
        (
            {"choice": ['q"uote', "back\\slash", "é😀", "a\nb\t\x01\x7f", "a|b", ""]},
            ["é😀", "a\nb\t\x01\x7f", ""],
            ["é"],
        ),
        ({"grammar": 'root ::= "a" root | "b"'}, ["b", "aaab"], ["a", "ba"]),
        ({"grammar": 'start: "a" start | "b"'}, ["b", "aaab"], ["a", "ba"]),
        ({"json_object": True}, ["{}", '{"a": [1, null]}', '{\n  "a" : "é"}'], ["[]", "1", '{"a"}', "{"]),
        ({"json_object": True, "disable_any_whitespace": True}, ['{"a": [1, null]}'], ['{"a" : 1}', '{ "a": 1}']),
        (
            {"json": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
            ['{"n": 3}', '{"n":-12}'],
            ["{}", '{"n": "3"}', '{"m": 1}', '{"n": 1, "m": 2}'],
        ),
        (
            {"json": {"type": "string", "minLength": 2, "maxLength": 3}},
            ['"ab"', '"é😀x"'],
            ['"a"', '"abcd"', '"a\x01"', '"a\tb"', '"a\n"', "ab"],
        ),
        ({"json": {"type": ["string", "null"], "maxLength": 1}}, ["null", '"a"'], ['"ab"']),
        ({"json": '{"enum": ["a", 1, null]}'}, ['"a"', "1", "null"], ["a", "2"]),
        (
            {"structural_tag": {"structures": [tag("<a>", {"type": "integer"})], "triggers": ["<"]}},
            ["", "no tag", "1 <a>17</a> 2 <a>-3</a>"],
            ["<b>", "<a>x</a>", "<a>17", "1 <a>1.5</a>"],
        ),
        (
            {"structural_tag": {"format": {"type": "triggered_tags", "triggers": ["<"], "tags": TAGS}}},
            ["x <a>17</a> <b>aab</b>", "<c>12</c>"],
            ["<a>true</a>", "<b>a</b>", "<c>1</c>", "<d>"],
        ),
        (
            {"structural_tag": {"format": {"type": "sequence", "elements": [TAGS[0], {**TEXT, "excludes": ["no"]}]}}},
            ["<a>1</a>", "<a>1</a> yes"],
            ["", " yes", "<a>1</a> no"],
        ),
    ],
)
def test_what_fits(
    grammars: GrammarCompiler,
    tokenizer: PreTrainedTokenizerBase,
    asked: dict[str, Any],
    good: list[str],
    bad: list[str],
) -> None:
    for text in good:
        assert takes(matcher(grammars, **asked), tokenizer, text), text
    for text in bad:
        assert not takes(matcher(grammars, **asked), tokenizer, text), text


def test_tokens_without_text_fit_nowhere(grammars: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    mask = matcher(grammars, regex="(.|\n)*").mask
    assert len(mask) == -(-VOCAB_SIZE // 32)
    special = set(tokenizer.all_special_ids)
    assert allowed(mask) & special == set(EOS), "of the special tokens, those that end the text alone"
    assert max(allowed(mask)) < len(tokenizer), "no token of the padding"
    assert set(tokenizer.encode("<think>")) <= allowed(mask), "an added token that is shown is text"


def test_matchers_of_one_grammar_do_not_share_their_place(grammars: GrammarCompiler) -> None:
    one, two = matcher(grammars, regex="ab"), matcher(grammars, regex="ab")
    before = two.mask.copy()
    assert one.accept(min(allowed(one.mask))) is None
    assert (two.mask == before).all()
    assert (one.mask != before).any()


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"regex": "a(b"}, "unterminated subpattern"),
        ({"regex": "(?=a)b"}, "Lookahead is not supported"),
        ({"regex": "\ud800"}, "surrogates not allowed"),
        ({"choice": ["\ud800"]}, "surrogates not allowed"),
        ({"grammar": "root ::= nobody"}, '"nobody" is not defined'),
        ({"grammar": "start: nobody"}, "nobody"),
        ({"grammar": 'rest ::= "a"'}, '"root" is not found'),
        ({"grammar": ""}, ""),
        ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "maximum limit"),
        ({"json": "3"}, "3 is not of type 'object', 'boolean'"),
        ({"json": {"type": "objekt"}}, "'objekt' is not valid"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "no value fits it"),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 3}}, "no value fits it"),
        ({"json": {"type": "string", "maxLength": "x"}}, "'x' is not of type 'integer' (at $.maxLength)"),
        ({"json": {"type": "string", "maxLength": -1}}, "-1 is less than the minimum of 0"),
        (
            {"json": {"type": "array", "items": {"not": {"type": "string"}}}},
            '\'not\': {"type": "string"} cannot be enforced',
        ),
        (
            {"json": {"properties": {"a": {"uniqueItems": True}}}},
            "'uniqueItems': true cannot be enforced: leave it out",
        ),
        ({"json": {"type": "string", "pattern": "a+", "maxLength": 3}}, "'pattern' with 'minLength' or"),
        ({"structural_tag": {}}, "a structural tag has a 'format', or 'structures' and 'triggers'"),
        ({"structural_tag": "[]"}, "a structural tag has a 'format', or 'structures' and 'triggers'"),
        ({"structural_tag": {"structures": [{"begin": "<a>"}]}}, "'begin', 'schema' and 'end'"),
        ({"structural_tag": {"structures": [tag("<a>", {})]}}, "triggers"),
        ({"structural_tag": {"format": None}}, "format"),
        ({"structural_tag": {"format": {"type": "xml"}}}, "the type of a format is one of tag, triggered_tags"),
        ({"structural_tag": {"format": {**TEXT, "exclude": ["a"]}}}, "type any_text has the fields excludes alone"),
        ({"structural_tag": {"format": {**tag("a", {}), "type": "tag", "content": 3}}}, ""),
        ({"structural_tag": {"format": {"type": "regex", "pattern": "(?=a)b"}}}, "Lookahead is not supported"),
        ({"structural_tag": {"format": {"type": "grammar", "grammar": 'root ::= (="a")'}}}, "Lookahead"),
        (
            {"structural_tag": {"structures": [tag("<a>", {"uniqueItems": True})], "triggers": ["<"]}},
            "'uniqueItems': true cannot be enforced",
        ),
        (
            {"structural_tag": {"format": {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}}},
            "type json_schema has the fields json_schema alone",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_at_the_door(grammars: GrammarCompiler, asked: dict[str, Any], why: str) -> None:
    waiting = sequence(**asked)
    with pytest.raises(InvalidArgumentError, match="what xgrammar can follow") as caught:
        start(grammars, waiting)
    assert caught.value.field == f"structured_outputs.{next(iter(asked))}"
    assert why in str(caught.value)
    assert ".cc:" not in str(caught.value), "where in xgrammar's source is nobody's business"
    assert not waiting.waits_for_grammar


def test_a_property_may_have_a_keywords_name(grammars: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    named = {"not": {"const": {"if": 1}}, "if": {"type": "integer"}}
    schema = {"type": "object", "properties": named, "required": ["not", "if"], "uniqueItems": False}
    assert takes(matcher(grammars, json=schema), tokenizer, '{"not": {"if":1}, "if": 2}')


def test_a_grammar_that_no_text_fits_fails_when_it_is_compiled(grammars: GrammarCompiler) -> None:
    waiting = sequence(grammar='root ::= root "a"')
    start(grammars, waiting)
    assert finish(grammars, waiting) == [waiting]
    assert "no text fits it" in str(waiting.error)


def test_a_dead_end_is_an_error_of_the_output_that_runs_into_it(
    grammars: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    dead = matcher(grammars, grammar='root ::= "ab" x\nx ::= x "c"')
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert dead.accept(a) is None
    error = dead.accept(b)
    assert isinstance(error, InvalidArgumentError)
    assert error.field == "structured_outputs.grammar"
    assert "no token may follow the first 2" in str(error)
    refused = matcher(grammars, regex="ab").accept(b)
    assert "no token may follow the first 1" in str(refused), "and so is a token that does not fit"


def test_it_is_read_once_for_all_that_ask_the_same(grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    start(grammars, sequence(regex="[0-9]+"))
    monkeypatch.setattr(grammars._process, "submit", None)
    asked = StructuredOutputsParams(regex="[0-9]+")
    assert grammars.read(asked) == asked


def test_the_caller_goes_on_while_it_is_compiled(grammars: GrammarCompiler, gate: threading.Event) -> None:
    waiting = sequence(regex="a")
    start(grammars, waiting)
    grammars.wait()
    assert grammars.collect() == []
    assert waiting.waits_for_grammar
    gate.set()
    assert finish(grammars, waiting) == []
    assert waiting.grammar is not None


COSTLY = {"regex": "(.*)*" * 120}


def test_a_costly_grammar_ends_its_sequence_and_the_others_go_on(
    hasty: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Only the end of its process stops it: the others are compiled again in a new one, and go on where they were."""
    ahead = Follower(hasty, regex="[a-z]{3}-end")
    for token in tokenizer.encode("xyz"):
        assert ahead.accept(token) is None
    before = ahead.mask.copy()
    costly, beside = sequence(**COSTLY), sequence(choice=["beside"])
    start(hasty, costly)
    start(hasty, beside)
    failed = finish(hasty, costly, beside)
    while not failed:  # it was compiled in time: then following it takes too long
        assert costly.grammar is not None
        costly.grammar.accept(tokenizer.encode("a")[0])
        failed = finish(hasty, costly)
    assert failed == [costly]
    assert "follow within 1 s (NANOVLLM_GRAMMAR_SECONDS)" in str(costly.error)
    assert beside.error is None
    for token in tokenizer.encode("-end"):
        assert token in allowed(ahead.mask)
        assert ahead.accept(token) is None
    assert set(EOS) == allowed(ahead.mask) != allowed(before)


@pytest.mark.heavy("each starts a process")
@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "(.*.*.*)*" * 50},
        {"regex": "(((((a{1,50}b?){1,50}c?){1,50}d?){1,50}e?){1,50}f?){1,50}(.*.*)*"},
        {"json": {"type": "object", "properties": {f"p{i}": {"enum": [0, i]} for i in range(600)}}},
        {"json": {"anyOf": [{"properties": {f"p{i}": {}}, "type": "object"} for i in range(400)]}},
        {"json": {"enum": ["a" * 40 + "!"], "pattern": "^(a+)+$"}},
        {"choice": ["b" * 19_000]},
    ],
    ids=["stars", "repetitions", "properties", "alternatives", "slow in Python", "long"],
)
def test_whatever_it_costs_it_ends(hasty: GrammarCompiler, asked: dict[str, Any]) -> None:
    waiting = sequence(**asked)
    with suppress(InvalidArgumentError):  # it takes too long to be read
        start(hasty, waiting)
    finish(hasty, waiting)
    assert "NANOVLLM_GRAMMAR_SECONDS" in str(waiting.error or "NANOVLLM_GRAMMAR_SECONDS")
    start(hasty, after := sequence(regex="a"))
    assert finish(hasty, after) == []


@pytest.mark.parametrize("asked", [{"regex": "a" * 20_001}, {"choice": ["a" * 101] * 200}, {"json": [0] * 20_000}])
def test_one_that_is_too_long_is_refused_before_it_is_read(hasty: GrammarCompiler, asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="at most 20000 characters .NANOVLLM_GRAMMAR_LENGTH., not "):
        start(hasty, sequence(**asked))


def process_of(grammars: GrammarCompiler) -> int:
    child = grammars._process._child
    assert child is not None
    return child._process.pid


def test_a_process_that_is_killed_is_replaced(grammars: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    goes_on = Follower(grammars, regex="ab")
    pid = process_of(grammars)
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: not is_alive(pid))
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    error = goes_on.accept(a)
    if error is None:  # it had ended before the token was sent; else the token is what ended it
        assert allowed(goes_on.mask) == {b}
    else:
        assert "its process ended (exit code -9)" in str(error)
    assert b in allowed(Follower(grammars, regex="b").mask)


def test_its_memory_is_limited(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xgrammar")
    monkeypatch.setenv("NANOVLLM_GRAMMAR_MEMORY_GB", "0.1")  # less than it has
    grammars = GrammarCompiler(tokenizer, make_config(vocab_size=VOCAB_SIZE, eos_token_ids=EOS))
    waiting = sequence(regex="a")
    with pytest.raises(InvalidArgumentError, match="structured_outputs.regex='a' is not allowed"):
        start(grammars, waiting)
    grammars.shutdown()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("exits", [True, False], ids=["exit", "last reference"])
def test_its_process_ends_with_the_engine(tokenizer: PreTrainedTokenizerBase, exits: bool) -> None:
    pytest.importorskip("xgrammar")
    grammars = GrammarCompiler(tokenizer, make_config(vocab_size=VOCAB_SIZE, eos_token_ids=EOS))
    grammars.read(StructuredOutputsParams(regex="a"))
    pid = process_of(grammars)
    if exits:
        grammars.shutdown()
    del grammars
    assert until(lambda: is_gone(pid))


def test_its_process_ends_when_the_engines_is_killed() -> None:
    script = (
        "import tests.requests.test_grammar_compiler as test\n"
        "tokenizer = test.AutoTokenizer.from_pretrained(test.resolve_model_folder('tiny'))\n"
        "config = test.make_config(vocab_size=test.VOCAB_SIZE, eos_token_ids=test.EOS)\n"
        "grammars = test.GrammarCompiler(tokenizer, config)\n"
        "grammars.read(test.StructuredOutputsParams(regex='a'))\n"
        "print(test.process_of(grammars), flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        engine.kill()
    assert until(lambda: is_gone(pid))


@pytest.mark.parametrize("name", ["xgrammar", "jsonschema"])
def test_without_a_library_the_error_says_what_to_install(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(grammar_compiler, "find_spec", lambda wanted: None if wanted == name else object())
    with pytest.raises(InvalidArgumentError, match=rf"since {name} is missing. pip install xgrammar jsonschema"):
        start(GrammarCompiler(tokenizer, make_config(eos_token_ids=EOS)), sequence(regex="a"))


def test_it_needs_a_tokenizer_and_an_end_of_sequence_token(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidArgumentError, match="without a tokenizer"):
        start(GrammarCompiler(None, make_config()), sequence(regex="a"))
    with pytest.raises(InvalidArgumentError, match="without an end-of-sequence token"):
        start(GrammarCompiler(tokenizer, make_config(eos_token_ids=())), sequence(regex="a"))


# ---- the scheduler's rule


class Matcher:
    """Takes every token, and keeps them."""

    def __init__(self) -> None:
        self.mask = np.full(2, -1, dtype=np.int32)
        self.tokens: list[int] = []

    def accept(self, token_id: int) -> None:
        self.tokens.append(token_id)


def with_grammar(driver: Driver, prompt_len: int, max_tokens: int = 40) -> tuple[Sequence, Matcher]:
    one, matcher = driver.add(prompt_len, max_tokens), Matcher()
    one.grammar = matcher  # type: ignore[assignment]
    return one, matcher


def test_a_guided_row_waits_for_its_last_token_and_the_others_do_not() -> None:
    driver = Driver(max_num_seqs=2)
    one, matcher = with_grammar(driver, 3)
    driver.add(3)
    driver.step()
    free = 1 - int(one.row or 0)
    assert set(driver.launch().decode_rows) == {0, 1}  # type: ignore[union-attr]
    assert driver.launch().decode_rows.tolist() == [free]  # type: ignore[union-attr]
    driver.collect()
    assert set(driver.launch().decode_rows) == {0, 1}, "what it waited for is read"  # type: ignore[union-attr]
    driver.collect()
    driver.collect()
    assert matcher.tokens == [1, 1, 1]


def test_guided_rows_alone_leave_nothing_to_launch_until_they_are_read() -> None:
    driver = Driver()
    with_grammar(driver, 3)
    assert driver.launch() is not None
    assert driver.launch() is None
    driver.collect()
    assert driver.launch() is not None


def test_a_preempted_matcher_has_followed_what_was_in_flight_and_nothing_twice() -> None:
    driver = Driver(num_blocks=3, block_size=4, max_num_seqs=3, max_model_len=12)
    driver.add(4)
    driver.add(4)
    youngest, matcher = with_grammar(driver, 4)
    for token in range(10, 30):
        if driver.launch() is None or len(driver.in_flight) == 2:
            driver.collect(token)
        if youngest.preempted_at and youngest.row is None:
            break
    assert youngest.output_token_ids.tolist() == matcher.tokens
    assert len(matcher.tokens) >= 1
    while driver.scheduler.has_unfinished:
        if driver.launch() is None or len(driver.in_flight) == 2:
            driver.collect(11)
    assert youngest.output_token_ids.tolist() == matcher.tokens


def test_a_sequence_that_compiles_is_passed_by_and_then_goes_first() -> None:
    driver = Driver(max_num_seqs=1)
    first, second = driver.add(3, max_tokens=1), driver.add(3, max_tokens=1)
    third = driver.add(3, max_tokens=1)
    first.waits_for_grammar = True
    driver.launch()
    assert (first.row, second.row) == (None, 0)
    first.waits_for_grammar = False
    assert driver.collect() == [second]
    driver.launch()
    assert first.row == 0
    assert third.row is None


def test_nothing_runs_while_all_compile_and_an_aborted_one_is_gone() -> None:
    driver = Driver()
    only = driver.add(3)
    only.waits_for_grammar = True
    assert driver.launch() is None
    driver.scheduler.abort(only)
    assert not driver.scheduler.has_unfinished
    assert only.finish_reason == "abort"
