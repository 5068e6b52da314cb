"""Structured outputs, below the engine: what is read at the door, compiled in a thread, and masked token by token."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm import InvalidArgumentError, SamplingParams, StructuredOutputsParams
from nanovllm.engine.sequence import Sequence
from nanovllm.models.checkpoint import resolve_model_folder
from nanovllm.requests.grammar_compiler import GrammarCompiler, GrammarMatcher
from tests.engine.scheduler_driver import Driver
from tests.engine.simulated_executor import make_config
from tests.requests.grammar_gate import gate

__all__ = ["gate"]  # a fixture

EOS = (509, 507)
VOCAB_SIZE = 520  # eight more than the tokenizer has: a padded head


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_model_folder("tiny"))


@pytest.fixture
def grammars(tokenizer: PreTrainedTokenizerBase) -> Iterator[GrammarCompiler]:
    pytest.importorskip("xgrammar", reason="the extra nanovllm[structured] is not installed")
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


def finish(grammars: GrammarCompiler, waiting: Sequence) -> None:
    for _ in range(200):
        if not waiting.waits_for_grammar:
            return
        grammars.collect(idle=True)
    raise AssertionError("never compiled")


def matcher(grammars: GrammarCompiler, **asked: Any) -> GrammarMatcher:
    waiting = sequence(**asked)
    start(grammars, waiting)
    finish(grammars, waiting)
    assert waiting.grammar is not None, waiting.error
    return waiting.grammar


def allowed(mask: np.ndarray) -> set[int]:
    return {token for token in range(32 * len(mask)) if mask[token // 32] >> (token % 32) & 1}


def takes(matcher: GrammarMatcher, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
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
    finish(grammars, waiting)
    assert waiting.grammar is None
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


def test_it_is_read_and_compiled_once_for_all_that_ask_the_same(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    calls: list[str] = []
    read = xgrammar.Grammar.from_ebnf
    monkeypatch.setattr(xgrammar.Grammar, "from_ebnf", lambda text: calls.append(text) or read(text))
    for _ in range(3):
        matcher(grammars, regex="[0-9]+")
    assert calls == ["root ::= ([0-9])+"]


def test_it_compiles_in_a_thread_and_the_caller_goes_on(grammars: GrammarCompiler, gate: threading.Event) -> None:
    waiting = sequence(regex="a")
    start(grammars, waiting)
    assert grammars.collect(idle=False) == grammars.collect(idle=True) == []
    assert waiting.waits_for_grammar
    gate.set()
    finish(grammars, waiting)
    assert waiting.grammar is not None


def test_what_fails_in_the_thread_ends_that_sequence_alone(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    compile_grammar = xgrammar.GrammarCompiler.compile_grammar

    def fragile(self: Any, grammar: Any) -> Any:
        if '"bad"' in str(grammar):
            raise RuntimeError("[10:11:12] /src/x.cc:7: Check failed: (a) is false: out of luck")
        return compile_grammar(self, grammar)

    monkeypatch.setattr(xgrammar.GrammarCompiler, "compile_grammar", fragile)
    good, bad = sequence(choice=["good"]), sequence(choice=["bad"])
    start(grammars, bad)
    start(grammars, good)
    failed: list[Sequence] = []
    for _ in range(200):
        failed += grammars.collect(idle=True)
    assert failed == [bad]
    assert str(bad.error).endswith("what xgrammar can follow: out of luck.")
    assert good.grammar is not None


def test_without_xgrammar_the_error_says_what_to_install(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("xgrammar"):
            raise ImportError("No module named 'xgrammar'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'nanovllm\[structured\]'"):
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
