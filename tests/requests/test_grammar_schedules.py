"""Rows whose mask follows their tokens: the same tokens under any schedule, whenever their grammar is compiled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams, StructuredOutputsParams
from nanovllm.engine.sequence import Sequence
from tests.engine.simulated_executor import _ROOT, EOS, VOCAB_SIZE, extend, next_token
from tests.engine.test_schedules import Request, check_output, engines, make_engine, prompts, run
from tests.properties import examples

GUIDED = {"regex": "what is compiled is ours here"}


class Matcher:
    """Allows some tokens; which ones follows from all tokens so far. Any other, or one too many, is a failure.

    submit: is called after each token, with what makes the mask after it.
    """

    def __init__(self, submit: Callable[[Callable[[], None]], None]) -> None:
        self._digest = _ROOT
        self._submit = submit
        submit(self.fill)

    def fill(self) -> None:
        bits = np.zeros(64, dtype=np.uint8)
        bits[[token for token in range(VOCAB_SIZE) if extend(self._digest, token) % 5 == 0] or [EOS]] = 1
        self.mask = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> None:
        assert self.mask[token_id // 32] >> (token_id % 32) & 1, "a token was drawn with another mask than its own"
        self._digest = extend(self._digest, token_id)
        self.mask = np.zeros(2, dtype=np.int32)  # until it is filled
        self._submit(self.fill)


class Compiler:
    """As `grammar_compiler.GrammarCompiler`; each grammar, and each mask, takes so many calls of `collect`."""

    def __init__(self, delays: list[int]) -> None:
        self._delays = deque(delays)
        self._left: dict[Sequence, tuple[int, Callable[[], None]]] = {}

    def read(self, params: StructuredOutputsParams) -> object:
        return params

    def start(self, sequence: Sequence, grammar: object) -> None:
        assert grammar == sequence.params.structured_outputs
        sequence.grammar = Matcher(partial(self._submit, sequence))  # type: ignore[assignment]

    def collect(self) -> list[Sequence]:
        for sequence, (left, fill) in list(self._left.items()):
            self._left[sequence] = left - 1, fill
            if left == 0:
                del self._left[sequence]
                sequence.waits_for_grammar = False
                fill()
        return []

    def wait(self) -> None:
        """Answers come with the calls of `collect` alone."""

    def _submit(self, sequence: Sequence, fill: Callable[[], None]) -> None:
        sequence.waits_for_grammar = True
        self._left[sequence] = self._delays[0], fill
        self._delays.rotate()


def expected_output(request: Request, max_model_len: int) -> list[int]:
    matcher = Matcher(lambda fill: fill()) if request.params.structured_outputs is not None else None
    digest = _ROOT
    for token in request.prompt:
        digest = extend(digest, token)
    output: list[int] = []
    while len(output) < (request.params.max_tokens or 0) and len(request.prompt) + len(output) < max_model_len:
        output.append(next_token(digest, None if matcher is None else matcher.mask))
        if output[-1] == EOS:
            break
        digest = extend(digest, output[-1])
        if matcher is not None:
            matcher.accept(output[-1])
    return output


requests = st.builds(
    Request,
    prompts,
    st.builds(SamplingParams, max_tokens=st.integers(1, 30), structured_outputs=st.sampled_from([None, GUIDED])),
    arrives_at_step=st.integers(0, 20),
    aborted_at_step=st.none() | st.integers(0, 40),
)


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    engines,
    st.lists(requests, min_size=1, max_size=12),
    st.integers(0, 20),
    st.lists(st.integers(0, 8), min_size=1, max_size=5),
)
def test_answers_do_not_depend_on_the_schedule(
    engine_values: dict[str, int], wanted: list[Request], spare_blocks: int, delays: list[int]
) -> None:
    largest = max(len(r.prompt) + (r.params.max_tokens or 0) for r in wanted)
    num_blocks = -(-largest // engine_values["block_size"]) + spare_blocks
    max_model_len = min(64, num_blocks * engine_values["block_size"])
    engine = make_engine(**engine_values, num_blocks=num_blocks, max_model_len=max_model_len)
    engine._grammars = engine.preparation._grammars = Compiler(delays)  # type: ignore[assignment]
    run(engine, wanted)
    for request in wanted:
        check_output(request, expected_output(request, max_model_len))
    assert engine.scheduler.block_manager.num_free_blocks == num_blocks
    assert engine.scheduler.rows.is_empty
