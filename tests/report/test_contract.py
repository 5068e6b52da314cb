"""The contract with programs that read logs: an event or a field of it changes only with events.SCHEMA."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.processes import ROOT
from tests.report.contract import FILE, STABLE, contract

AGAIN = "raise SCHEMA in nanovllm/logs/events.py, run `python -m tests.report.contract`, and add a line to CHANGELOG.md"


def broken_promises(promised: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what a reader of `promised` would miss in `now`. More events, levels and fields are no break."""
    if promised["schema"] != now["schema"]:
        return [f"contract.json is of schema {promised['schema']}, the code of {now['schema']}"]
    found = []
    for name, event in promised["events"].items():
        current = now["events"].get(name)
        if current is None:
            found.append(f"{name} is gone")
            continue
        if not set(event["levels"]) <= set(current["levels"]):
            found.append(f"{name} has other levels")
        for field, kind in event["fields"].items():
            if current["fields"].get(field) != kind:
                found.append(f"{name}.{field} was {kind} and is {current['fields'].get(field, 'gone')}")
    return found


def test_no_stable_event_or_field_changes_without_the_schema() -> None:
    try:
        now = contract()
    except KeyError as gone:
        pytest.fail(f"{gone} is no event any more: {AGAIN}")
    assert broken_promises(json.loads(FILE.read_text("utf-8")), now) == [], AGAIN


def test_a_break_is_found() -> None:
    now = contract()
    for change in ("event", "level", "field", "type", "schema"):
        changed = copy.deepcopy(now)
        event = changed["events"]["request.finished"]
        if change == "event":
            del changed["events"]["request.finished"]
        elif change == "level":
            event["levels"] = [10]
        elif change == "field":
            del event["fields"]["queue_s"]
        elif change == "type":
            event["fields"]["queue_s"] = "int"
        else:
            changed["schema"] += 1
        assert broken_promises(now, changed), change
    assert broken_promises(now, {**now, "events": {**now["events"], "more": {}}}) == []


def test_the_contract_is_whole_and_documented() -> None:
    assert tuple(json.loads(FILE.read_text("utf-8"))["events"]) == STABLE
    section = (ROOT / "LOGGING.md").read_text("utf-8").partition("## What programs can rely on")[2]
    section = section.partition("\n## ")[0]
    assert [name for name in STABLE if f"`{name}`" not in section] == []
