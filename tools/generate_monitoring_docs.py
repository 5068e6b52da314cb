"""Generates the table of metrics in docs/monitoring.md from their declarations.

python tools/generate_monitoring_docs.py          rewrites what is between the markers
python tools/generate_monitoring_docs.py --check  exit status 1 if that would change anything
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.observer import Load
from nanovllm.metrics import Counter
from nanovllm.server.exposition import HELP
from tools.generate_logging_docs import code, generate, table, update

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "monitoring.md"


def metrics() -> str:
    """Returns the table of metrics."""
    snapshot = replace(EngineMetrics().snapshot(Load(0, 0, 0, 1)), accepted_per_position=(0,))  # with drafts
    kinds = {metric.name: type(metric) for metric in snapshot.metrics()}
    rows = (
        [code(f"{name}_total" if kinds[name] is Counter else name), kinds[name].__name__.lower(), text]
        for name, text in HELP.items()
    )
    return table("metric | type | meaning", rows)


BLOCKS = {"metrics": metrics}


def generate_monitoring(document: str) -> str:
    return generate(document, BLOCKS)


if __name__ == "__main__":
    sys.exit(update(DOCUMENT, generate_monitoring))
