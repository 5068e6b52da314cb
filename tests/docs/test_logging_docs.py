"""LOGGING.md's tables are what the code says, and the registry of events is in order."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

import pytest

import nanovllm
from nanovllm.logs.events import EVENTS
from nanovllm.logs.fields import FIELDS, fields_of
from nanovllm.logs.records import Event
from tools.generate_logging_docs import BLOCKS, DOCUMENT, generate

PACKAGE = Path(nanovllm.__file__).parent
HELPERS = {"emit", "log", "log_at"}


def test_the_tables_are_up_to_date() -> None:
    document = DOCUMENT.read_text("utf-8")
    assert generate(document) == document, "run python tools/generate_logging_docs.py"


def test_a_stale_table_is_rewritten() -> None:
    document = DOCUMENT.read_text("utf-8")
    stale = document.replace("tokens in a block of the KV cache", "blocks in a token")
    assert stale != document
    assert generate(stale) == document


def test_a_missing_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="not each of"):
        generate(DOCUMENT.read_text("utf-8").replace("<!-- generated: fields -->", ""))


@pytest.mark.parametrize("event", EVENTS.values(), ids=lambda event: event.name)
def test_every_event_is_whole(event: Event) -> None:
    assert set(event.more.split()) | set(event.optional.split()) <= set(FIELDS)
    levels = (event.levels,) if isinstance(event.levels, int) else event.levels
    assert all(logging.getLevelName(level) in ("DEBUG", "INFO", "WARNING", "ERROR") for level in levels)


def test_names_are_unique_and_every_field_is_used() -> None:
    from nanovllm.logs import events

    assert len(EVENTS) == sum(isinstance(value, Event) for value in vars(events).values())
    assert {name for event in EVENTS.values() for name in fields_of(event)} == set(FIELDS)
    assert list(FIELDS) == sorted(FIELDS)
    assert len(BLOCKS) == DOCUMENT.read_text("utf-8").count("<!-- generated:")


def calls_of_events() -> list[tuple[str, Event, set[str]]]:
    """(place, event, names of the fields) of every `events.name.log(...)` in the package that spells its fields out."""
    from nanovllm.logs import events

    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            if node.func.attr in HELPERS and isinstance(owner, ast.Attribute) and ast.unparse(owner.value) == "events":
                names = {keyword.arg for keyword in node.keywords} - {"in_summary"}
                if node.func.attr != "emit" and None not in names:
                    place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                    fields = {name for name in names if name and name != "in_summary"}
                    found.append((place, getattr(events, owner.attr), fields))
    return found


CALLS = calls_of_events()


def logger_of(path: Path) -> str:
    """The logger of a module, below `nanovllm`: the one that it names, or that of its own name."""
    named = re.search(r'setup_logger\("nanovllm\.([\w.]+)"\)', path.read_text("utf-8"))
    return named[1] if named else ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize(("place", "event", "names"), CALLS, ids=[place for place, _, _ in CALLS])
def test_a_call_names_the_fields_that_are_declared(place: str, event: Event, names: set[str]) -> None:
    """Also where no test runs: on a GPU, in another rank."""
    declared = fields_of(event)
    assert {name for name, (_, always) in declared.items() if always} <= names <= set(declared)
    assert logger_of(PACKAGE / place.partition(":")[0]) in event.loggers.split()


def test_most_events_are_logged_by_such_a_call() -> None:
    assert len({event.name for _, event, _ in CALLS}) > 25
