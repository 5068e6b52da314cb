"""GrammarMatcher: which tokens may come next, so that an output fits its schema, regex, choice or grammar."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from nanovllm.engine.batch import IntArray
from nanovllm.errors import InvalidArgumentError
from nanovllm.requests.grammar_process import GrammarJob
from nanovllm.sampling_params import StructuredOutputsParams


class GrammarMatcher:
    """Follows one output through its grammar. The work is done in the process of grammars.

    mask: [ceil(vocab_size / 32)] int32; bit t % 32 of word t // 32 is 1 where token t may come next.
    submit: has the job done for the tokens so far, and the mask updated later.
    """

    def __init__(self, job: GrammarJob, submit: Callable[[GrammarMatcher], None]) -> None:
        self.job = job
        self._submit = submit
        self.mask: IntArray = np.zeros(0, dtype=np.int32)

    def accept(self, token_id: int) -> None:
        """Takes the output's next token."""
        assert self.job.tokens is not None, "this job only reads"
        self.job.tokens.append(token_id)
        self._submit(self)

    def __del__(self) -> None:
        if self.job.child is not None:
            self.job.child.outbox.put({"drop": self.job.number})


def grammar_error(params: StructuredOutputsParams, why: object) -> InvalidArgumentError:
    """Returns the error for a grammar that cannot be used. why: the reason, such as an error of xgrammar."""
    reason = re.sub(r"\[\d\d:\d\d:\d\d\] \S+: (?:Check failed: .*? is false: )?", "", str(why)).strip().rstrip(".")
    reason = reason if len(reason) <= 400 else f"{reason[:200]} … {reason[-200:]}"
    return refused(params, f"what xgrammar can follow: {reason}")


def refused(params: StructuredOutputsParams, allowed: str) -> InvalidArgumentError:
    """Returns the error for what a request asks for. allowed: completes "it must be …"."""
    return InvalidArgumentError(f"structured_outputs.{params.kind}", getattr(params, params.kind), allowed)
