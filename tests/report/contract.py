"""The part of the log that programs may rely on: names of events, their levels, and their fields with their types.

python -m tests.report.contract    # writes contract.json anew, after SCHEMA was raised
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.logs.events import EVENTS, SCHEMA
from nanovllm.logs.fields import fields_of

FILE = Path(__file__).with_name("contract.json")
STABLE = (
    "engine.versions", "engine.init", "engine.model", "engine.config", "engine.resolved", "engine.startup",
    "engine.start_failed", "engine.exit", "model.config", "model.weights", "model.loaded", "attention.selected",
    "kv_cache.sizing", "kv_cache.config", "kv_cache.allocated", "kv_cache.memory", "generation.memory",
    "generation.start", "generation.complete", "request.added", "request.finished", "request.failed",
    "sequence.finished", "sequence.preempted", "batch.prefill", "batch.decode", "step.done", "graph.captured",
    "blocks.allocated", "engine.statistics", "engine.error", "engine.interrupted", "engine.slow", "communication",
)  # fmt: skip


def contract() -> dict[str, Any]:
    """Returns the events of STABLE as the code declares them now."""
    events = {}
    for name in STABLE:
        event = EVENTS[name]
        fields = {field: _type(kind.type) for field, (kind, _) in fields_of(event).items()}
        levels = event.levels if isinstance(event.levels, tuple) else (event.levels,)
        events[name] = {"levels": list(levels), "fields": fields}
    return {"schema": SCHEMA, "events": events}


def _type(kind: object) -> str:
    return kind.__name__ if type(kind) is type else str(kind)


if __name__ == "__main__":
    FILE.write_text(json.dumps(contract(), indent=1) + "\n", encoding="utf-8")
