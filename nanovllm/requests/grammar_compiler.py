"""Structured outputs: which tokens may come next, so that an output fits its schema, regex, choice or grammar.

The only file that knows xgrammar, an extra that is imported when a request first asks. A text is read when its
request is added (a millisecond) and compiled against the vocabulary in a thread (up to seconds) while the request
waits. What was compiled is kept for requests that ask for the same.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from nanovllm.config import ResolvedConfig
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidArgumentError
from nanovllm.requests.grammar_matcher import GrammarMatcher, grammar_error
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NUM_THREADS = 4
_CACHE_BYTES = 2**28
_IDLE_SECONDS = 0.05  # to wait for a grammar when there is nothing else to do

# Of JSON Schema, what xgrammar reads and does not enforce.
_NOT_ENFORCED = {"not", "if", "uniqueItems", "contains", "dependentRequired", "dependentSchemas", "dependencies"}
_NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}  # keys below these are names
_VALUES = {"enum", "const", "default", "examples"}  # what is below these is no schema


class GrammarCompiler:
    """Compiles what the requests of one engine ask for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, resolved: ResolvedConfig) -> None:
        self._tokenizer = tokenizer
        self._resolved = resolved
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "nanovllm-grammar")
        self._compiler: Future[Any] | None = None
        self._compiling: dict[Future[GrammarMatcher], Sequence] = {}
        self._read = functools.lru_cache(maxsize=256)(_read)

    def start(self, sequence: Sequence) -> None:
        """Begins to compile what `sequence` asks for, if it does; it waits until `collect` gives it one.

        Raises InvalidArgumentError for a text that xgrammar cannot read, and where xgrammar or a tokenizer is missing.
        """
        params = sequence.params.structured_outputs
        if not isinstance(params, StructuredOutputsParams):
            return
        if self._tokenizer is None or not self._resolved.eos_token_ids:
            allowed = "None for an engine without a tokenizer, or a model without an end-of-sequence token"
            raise InvalidArgumentError("structured_outputs", params, allowed)
        grammar = self._read(params)
        if self._compiler is None:  # before the first that needs it, so that it has its thread first
            self._compiler = self._threads.submit(_make_compiler, self._tokenizer, self._resolved)
        sequence.waits_for_grammar = True
        self._compiling[self._threads.submit(self._compile, self._compiler, grammar, params)] = sequence

    def collect(self, idle: bool) -> list[Sequence]:
        """Gives what is compiled to its sequences, and returns those that failed: their `error` says why.

        idle: the caller has nothing else to do, and waits a little.
        """
        if idle and self._compiling:
            wait(self._compiling, _IDLE_SECONDS, FIRST_COMPLETED)
        failed = []
        for future in [future for future in self._compiling if future.done()]:
            sequence = self._compiling.pop(future)
            sequence.waits_for_grammar = False
            try:
                sequence.grammar = future.result()
            except InvalidArgumentError as error:
                sequence.error = error
                failed.append(sequence)
        return failed

    def shutdown(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, compiler: Future[Any], grammar: Any, params: StructuredOutputsParams) -> GrammarMatcher:
        import xgrammar

        try:
            matcher = xgrammar.GrammarMatcher(compiler.result().compile_grammar(grammar))
            return GrammarMatcher(matcher, params, self._resolved.vocab_size)
        except Exception as error:  # xgrammar raises many kinds
            raise grammar_error(params, error) from None


def _make_compiler(tokenizer: PreTrainedTokenizerBase, resolved: ResolvedConfig) -> Any:
    import xgrammar

    sizes: dict[str, Any] = {"vocab_size": resolved.vocab_size, "stop_token_ids": list(resolved.eos_token_ids)}
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, **sizes)
    special = set(tokenizer.all_special_ids)  # nothing of them is in the text, so they fit nowhere
    texts = [b"" if token_id in special else text for token_id, text in enumerate(info.decoded_vocab)]
    info = xgrammar.TokenizerInfo(texts, xgrammar.VocabType.RAW, add_prefix_space=info.add_prefix_space, **sizes)
    return xgrammar.GrammarCompiler(info, max_threads=_NUM_THREADS, cache_limit_bytes=_CACHE_BYTES)


def _read(params: StructuredOutputsParams) -> Any:
    """An xgrammar.Grammar. Raises InvalidArgumentError."""
    try:
        from xgrammar import Grammar
    except ImportError as error:
        hint = f"pip install 'nanovllm[structured]' ({error})"
        raise InvalidArgumentError("structured_outputs", params, "None, since xgrammar is missing", hint) from None
    try:
        if params.kind in ("json", "json_object"):
            schema = str(params.json) if params.json else '{"type": "object"}'
            schema = json.dumps(_enforceable(json.loads(schema)))
            return Grammar.from_json_schema(schema, any_whitespace=not params.disable_any_whitespace)
        if params.regex is not None:
            return Grammar.from_regex(params.regex)
        if params.choice is not None:
            texts = [json.dumps(text, ensure_ascii=False) for text in params.choice]
            return Grammar.from_ebnf(f"root ::= {' | '.join(texts)}")
        text = str(params.grammar)
        return Grammar.from_ebnf(text) if "::=" in text else Grammar.from_lark(text)
    except Exception as error:  # xgrammar raises many kinds
        raise grammar_error(params, error) from None


def _enforceable(schema: Any, names: bool = False) -> Any:
    """A schema that xgrammar enforces as it stands. Raises ValueError for keywords that it would pass over.

    names: `schema` has schemas under names, not keywords.
    """
    if isinstance(schema, list):
        return [_enforceable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if names:
        return {name: _enforceable(item) for name, item in schema.items()}
    passed_over = [keyword for keyword in schema if keyword in _NOT_ENFORCED and schema[keyword] is not False]
    if passed_over or len(schema.get("allOf", ())) > 1:
        raise ValueError(f"{(passed_over or ['allOf'])[0]!r} cannot be enforced")
    bounds = schema.get("minLength", 0), schema.get("maxLength", "")
    schema = {
        keyword: value if keyword in _VALUES else _enforceable(value, keyword in _NAMED_SCHEMAS)
        for keyword, value in schema.items()
        if keyword not in ("minLength", "maxLength")
    }
    if bounds != (0, ""):  # xgrammar's own strings of a bounded length hold raw control characters
        if "pattern" in schema:
            raise ValueError("'pattern' with 'minLength' or 'maxLength' cannot be enforced")
        schema["pattern"] = f"^[\\s\\S]{{{bounds[0]},{bounds[1]}}}$"
    return schema
