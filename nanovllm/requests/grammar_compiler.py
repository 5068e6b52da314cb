"""GrammarCompiler: the grammars of structured outputs, read, compiled and followed while other requests run.

The work is done in a process of its own (`grammar_process`), so no grammar holds up a step, however much time and
memory it takes. A request waits for its grammar in the queue, and a row that waits for its mask sits out steps.
xgrammar is an optional dependency, which the first request that needs it imports; only the files grammar_*.py use it.
"""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
import weakref
from concurrent.futures import Future
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.config import ResolvedConfig
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidArgumentError
from nanovllm.requests.grammar_matcher import GrammarMatcher, refused
from nanovllm.requests.grammar_process import GrammarJob, GrammarLimits, GrammarProcess
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.utils import env

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_IDLE_SECONDS = 0.05  # how long `wait` waits when nothing else can run
_PATIENCE_SECONDS = 2e-3  # how long a step waits for the masks after its last tokens


class GrammarCompiler:
    """Reads, compiles and follows the grammars of one engine's requests."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, resolved: ResolvedConfig) -> None:
        self._tokenizer = tokenizer
        self._resolved = resolved
        self._max_length = env.grammar_length()
        limits = GrammarLimits(seconds=env.grammar_seconds(), gigabytes=env.grammar_memory_gb())
        make_vocabulary = functools.partial(_vocabulary, tokenizer, resolved)
        self._process = GrammarProcess(limits, resolved.vocab_size, make_vocabulary)
        self._end = weakref.finalize(self, self._process.close)
        self._read = functools.lru_cache(maxsize=256)(functools.partial(_read, self._process, itertools.count(1)))
        self._numbers = itertools.count(2**32)  # of jobs that follow a grammar
        self._sequences: weakref.WeakValueDictionary[int, Sequence] = weakref.WeakValueDictionary()
        self._asked: dict[GrammarMatcher, float] = {}  # matchers without an answer, and when they asked
        self._answers: queue.SimpleQueue[tuple[GrammarMatcher, str | None, bytes]] = queue.SimpleQueue()
        self._news = threading.Event()  # set with each answer

    def read(self, params: StructuredOutputsParams) -> StructuredOutputsParams:
        """Reads a grammar, and returns it. Any thread may call it, and waits for the process of grammars.

        Raises InvalidArgumentError for one that cannot be read or enforced, that is too long or takes too much time,
        and when xgrammar or a tokenizer is missing.
        """
        if self._tokenizer is None or not self._resolved.eos_token_ids:
            allowed = "None for an engine without a tokenizer, or a model without an end-of-sequence token"
            raise InvalidArgumentError("structured_outputs", params, allowed)
        for name in ("xgrammar", "jsonschema"):
            if find_spec(name) is None:
                hint = "pip install xgrammar jsonschema"
                raise InvalidArgumentError("structured_outputs", params, f"None, since {name} is missing", hint)
        text = getattr(params, params.kind)
        size = sum(map(len, text)) if params.choice is not None else 0 if params.json_object else len(text)
        if size > self._max_length:
            raise refused(params, f"at most {self._max_length} characters (NANOVLLM_GRAMMAR_LENGTH), not {size}")
        self._read(params)
        return params

    def start(self, sequence: Sequence, grammar: StructuredOutputsParams) -> None:
        """Begins to compile a grammar. `sequence` waits until `collect` gives it the first mask."""
        matcher: GrammarMatcher

        def answered(allowed: str | None, mask: bytes) -> None:
            self._answers.put((matcher, allowed, mask))
            self._news.set()

        job = GrammarJob(next(self._numbers), grammar, [], answered)
        self._sequences[job.number] = sequence
        sequence.grammar = matcher = GrammarMatcher(job, self._submit)
        self._submit(matcher)

    def collect(self) -> list[Sequence]:
        """Gives masks to their matchers. Returns the sequences whose grammar failed, with the reason in `error`.

        Waits a little for the masks after the last step's tokens, so that their rows take part in the next one.
        """
        failed = []
        while True:
            self._news.clear()
            while not self._answers.empty():
                matcher, allowed, mask = self._answers.get()
                self._asked.pop(matcher, None)
                sequence = self._sequences.get(matcher.job.number)
                if sequence is None:  # it has ended
                    continue
                sequence.waits_for_grammar = False
                matcher.mask = np.frombuffer(mask, dtype=np.int32)
                if allowed is not None:
                    sequence.error = refused(matcher.job.params, allowed)
                    failed.append(sequence)
            patience = max(self._asked.values(), default=0.0) + _PATIENCE_SECONDS - time.monotonic()
            if patience <= 0 or not self._news.wait(patience):
                return failed

    def wait(self) -> None:
        """Waits a little for an answer, if one is awaited. For a caller that has nothing else to do."""
        if self._asked:
            self._news.wait(_IDLE_SECONDS)

    def shutdown(self) -> None:
        """Ends the process of grammars."""
        self._end()

    def _submit(self, matcher: GrammarMatcher) -> None:
        self._asked[matcher] = time.monotonic()
        self._sequences[matcher.job.number].waits_for_grammar = True
        self._process.submit(matcher.job)


def _read(process: GrammarProcess, numbers: Any, params: StructuredOutputsParams) -> None:
    """Has a grammar read. Raises InvalidArgumentError. A function, since a finalizer's object must not hold itself."""
    result: Future[str | None] = Future()
    process.submit(GrammarJob(next(numbers), params, None, lambda allowed, mask: result.set_result(allowed)))
    allowed = result.result()
    if allowed is not None:
        raise refused(params, allowed)


def _vocabulary(tokenizer: PreTrainedTokenizerBase, resolved: ResolvedConfig) -> str:
    """Returns xgrammar's description of the vocabulary."""
    import xgrammar

    sizes: dict[str, Any] = {"vocab_size": resolved.vocab_size, "stop_token_ids": list(resolved.eos_token_ids)}
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, **sizes)
    special = set(tokenizer.all_special_ids)  # they add nothing to the text, so no grammar may use them
    texts = [b"" if token_id in special else text for token_id, text in enumerate(info.decoded_vocab)]
    info = xgrammar.TokenizerInfo(texts, xgrammar.VocabType.RAW, add_prefix_space=info.add_prefix_space, **sizes)
    return str(info.serialize_json())
