"""Generates the tables of arguments in docs/api.md from their declarations.

python tools/generate_api_docs.py          rewrites what is between the markers
python tools/generate_api_docs.py --check  exit status 1 if that would change anything
"""

from __future__ import annotations

import sys
from dataclasses import MISSING
from functools import partial
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm.compat import unsupported
from nanovllm.config import EngineConfig
from nanovllm.requests.chat import ChatOptions
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from nanovllm.server.settings import ServerSettings
from nanovllm.utils.arguments import arguments_of
from tools.generate_logging_docs import code, generate, table, update

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "api.md"


def arguments(cls: type) -> str:
    rows = (
        [
            code(argument.name),
            "" if argument.default is MISSING else code(repr(argument.default)),
            argument.rule.allowed,
            argument.help,
        ]
        for argument in arguments_of(cls)
    )
    return table("argument | default | allowed | meaning", rows)


def not_supported() -> str:
    """Returns the table of what vLLM has and nanovllm does not."""
    tables = {
        "`LLM`, `AsyncLLM`": unsupported.ENGINE_ARGUMENTS,
        "`nanovllm serve`": unsupported.SERVER_ARGUMENTS,
        "`SamplingParams`": unsupported.SAMPLING_FIELDS,
        "a request": unsupported.REQUEST_ARGUMENTS,
        "a prompt": unsupported.PROMPT_KEYS,
    }
    rows = [
        [code(name), callee, entry.passes.allowed, entry.reason, f"{entry.missing}. {entry.hint}".strip(". ")]
        for callee, entries in tables.items()
        for name, entry in entries.items()
    ]
    for refusal, names in groupby(unsupported.METHODS, key=unsupported.METHODS.__getitem__):
        rows.append(
            [", ".join(code(f"{name}()") for name in names), "an engine", "", "", ". ".join(refusal).strip(". ")]
        )
    return table("name | of | what passes | has no effect, because | not supported", rows)


BLOCKS = {
    "arguments of LLM": partial(arguments, EngineConfig),
    "options of chat": partial(arguments, ChatOptions),
    "fields of SamplingParams": partial(arguments, SamplingParams),
    "fields of StructuredOutputsParams": partial(arguments, StructuredOutputsParams),
    "options of the server": partial(arguments, ServerSettings),
    "not supported": not_supported,
}


def generate_api(document: str) -> str:
    return generate(document, BLOCKS)


if __name__ == "__main__":
    sys.exit(update(DOCUMENT, generate_api))
