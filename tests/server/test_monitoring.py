"""docs/monitoring.md and the Grafana dashboard name the metrics that a server has, all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm import AsyncLLM
from nanovllm.server.exposition import HELP
from tests.server.running_server import ENGINE, RunningServer, running_server
from tools.generate_monitoring_docs import generate_monitoring

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "monitoring.md"
DASHBOARD = DOCS / "grafana" / "nanovllm.json"
NAME = re.compile(r"vllm:[a-z_0-9]+")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One with speculative decoding, which has metrics of its own."""
    speculative = {"method": "ngram", "num_speculative_tokens": 2}
    with running_server(AsyncLLM("tiny", **ENGINE, speculative_config=speculative)) as running:
        yield running


def samples_of(server: RunningServer) -> set[str]:
    server.chat()
    text = server.client.get("/metrics").text
    return {line.split("{")[0] for line in text.splitlines() if line and not line.startswith("#")}


def families(samples: set[str]) -> set[str]:
    """The names without the suffixes of a histogram's samples; `_created` belongs to no dashboard."""
    histograms = {name.removesuffix("_bucket") for name in samples if name.endswith("_bucket")}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum", "created")}
    return histograms | {name for name in samples - parts if not name.endswith("_created")}


def test_the_table_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert generate_monitoring(text) == text, "run python tools/generate_monitoring_docs.py"


def test_each_metric_has_a_sentence(server: RunningServer) -> None:
    server.chat()
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        assert family.documentation == HELP[family.name]
        assert family.documentation.endswith(".")
        if family.name.endswith("_seconds"):
            assert "econds" in family.documentation


def test_the_page_has_every_metric_and_no_other(server: RunningServer) -> None:
    samples = samples_of(server)
    named = set(NAME.findall(PAGE.read_text(encoding="utf-8")))
    assert families(samples) <= named
    assert named <= families(samples) | samples


def test_the_dashboard_reads_metrics_that_exist(server: RunningServer) -> None:
    samples = samples_of(server)
    text = DASHBOARD.read_text(encoding="utf-8")
    named = set(NAME.findall(text))
    assert len(named) > 15
    assert named <= samples


def test_the_dashboard_can_be_imported() -> None:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} == {"timeseries"}
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "model_name"}
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert max(x for x, _ in cells) < 24  # columns of Grafana's grid
    assert len(set(cells)) == len(cells)  # no panel on another
