"""Reads the grammar of a request with structured outputs into EBNF. Refuses what cannot be enforced."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias

from nanovllm.requests.grammar_ebnf import UnenforceableError, any_of, without_lookahead
from nanovllm.requests.grammar_json import json_grammar
from nanovllm.requests.grammar_matcher import grammar_error
from nanovllm.requests.grammar_regex import read_regex
from nanovllm.requests.grammar_tags import enforced_tag
from nanovllm.sampling_params import StructuredOutputsParams

Grammar: TypeAlias = Any  # xgrammar.Grammar, not compiled yet

_LARK_TEXTS = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|//[^\n]*|#[^\n]*')
_reading = threading.Lock()  # stderr is the process's


def read_grammar(params: StructuredOutputsParams) -> Grammar:
    """Reads what an output must look like. Raises InvalidArgumentError if xgrammar cannot enforce it."""
    from xgrammar import Grammar as Reader

    try:
        with _warnings_raised():
            if params.structural_tag is not None:
                return Reader.from_structural_tag(_structural_tag(params))
            if params.grammar is not None and not re.search(r"^\s*[\w-]+\s*::=", params.grammar, re.MULTILINE):
                return Reader.from_lark(_lark(params.grammar))
            return Reader.from_ebnf(ebnf(params))
    except RecursionError:
        raise grammar_error(params, "it is nested too deep") from None
    except Exception as error:  # xgrammar raises many kinds
        raise grammar_error(params, error) from None


def ebnf(params: StructuredOutputsParams) -> str:
    """Returns what the output must look like as EBNF. Raises UnenforceableError, ValueError and `re.error`."""
    if params.kind in ("json", "json_object"):
        text = str(params.json) if params.json else '{"type": "object"}'
        schema = json.loads(text, parse_constant=_refuse_constant)
        return json_grammar(schema, any_whitespace=not params.disable_any_whitespace)
    if params.regex is not None:
        return f"root ::= {read_regex(params.regex).expression}"
    if params.choice is not None:
        return f"root ::= {any_of(params.choice)}"
    return without_lookahead(str(params.grammar))


def _structural_tag(params: StructuredOutputsParams) -> str:
    given = json.loads(str(params.structural_tag), parse_constant=_refuse_constant)
    return json.dumps(enforced_tag(given, any_whitespace=not params.disable_any_whitespace))


def _lark(text: str) -> str:
    if "%json" in _LARK_TEXTS.sub("", text):
        raise UnenforceableError("'%json' is not supported: write the rules out, or ask for `json`")
    return text


@contextmanager
def _warnings_raised() -> Iterator[None]:
    """Raises what xgrammar warns of in the block, since that would not be enforced. It writes warnings to stderr."""
    with tempfile.TemporaryFile() as file, _reading:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        _, found, warning = file.read().decode(errors="replace").partition("Warning: ")
        if found:
            raise UnenforceableError(warning.split("\n[")[0].strip())


def _refuse_constant(name: str) -> NoReturn:
    raise UnenforceableError(f"{name} is not JSON")
