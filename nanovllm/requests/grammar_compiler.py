"""GrammarCompiler: compiles the grammars of structured outputs against the vocabulary, while other requests run.

A grammar is read when its request is prepared (`grammar_reader`). It is compiled in a thread, which takes up to
seconds, while the request waits. Compiled grammars are kept for later requests with the same grammar. xgrammar is an
optional dependency, imported by the first request that needs it; only the files grammar_*.py use it.
"""

from __future__ import annotations

import functools
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from nanovllm.config import ResolvedConfig
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidArgumentError
from nanovllm.requests.grammar_matcher import GrammarMatcher, grammar_error
from nanovllm.requests.grammar_reader import Grammar, read_grammar
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NUM_THREADS = 4
_CACHE_BYTES = 2**28
_IDLE_SECONDS = 0.05  # how long `collect` waits for a grammar when there is nothing else to do


class GrammarCompiler:
    """Compiles the grammars of one engine's requests."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, resolved: ResolvedConfig) -> None:
        self._tokenizer = tokenizer
        self._resolved = resolved
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "nanovllm-grammar")
        self._compiler: Future[Any] | None = None
        self._compiling: dict[Future[GrammarMatcher], Sequence] = {}
        self._read = functools.lru_cache(maxsize=256)(read_grammar)

    def read(self, params: StructuredOutputsParams) -> Grammar:
        """Reads a grammar. Any thread may call it.

        Raises InvalidArgumentError for a text that xgrammar cannot read, and when xgrammar or a tokenizer is missing.
        """
        if self._tokenizer is None or not self._resolved.eos_token_ids:
            allowed = "None for an engine without a tokenizer, or a model without an end-of-sequence token"
            raise InvalidArgumentError("structured_outputs", params, allowed)
        return self._read(params)

    def start(self, sequence: Sequence, grammar: Grammar) -> None:
        """Begins to compile a grammar. `sequence` waits until `collect` gives it the result."""
        params = sequence.params.structured_outputs
        assert isinstance(params, StructuredOutputsParams), "only a sequence that asks for structured outputs compiles"
        if self._compiler is None:  # submitted before the first grammar, which waits for it, so that it gets a thread
            self._compiler = self._threads.submit(_make_compiler, self._tokenizer, self._resolved)
        sequence.waits_for_grammar = True
        self._compiling[self._threads.submit(self._compile, self._compiler, grammar, params)] = sequence

    def collect(self, idle: bool) -> list[Sequence]:
        """Gives compiled grammars to their sequences. Returns those whose grammar failed, with the reason in `error`.

        idle: the caller has nothing else to do, so wait a little if no grammar is ready.
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
        """Cancels the grammars that are not being compiled yet, without waiting for the others."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, compiler: Future[Any], grammar: Grammar, params: StructuredOutputsParams) -> GrammarMatcher:
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
    special = set(tokenizer.all_special_ids)  # they add nothing to the text, so no grammar may use them
    texts = [b"" if token_id in special else text for token_id, text in enumerate(info.decoded_vocab)]
    info = xgrammar.TokenizerInfo(texts, xgrammar.VocabType.RAW, add_prefix_space=info.add_prefix_space, **sizes)
    return xgrammar.GrammarCompiler(info, max_threads=_NUM_THREADS, cache_limit_bytes=_CACHE_BYTES)
