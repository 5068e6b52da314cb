"""deploy/: the manifests agree with each other and with a server, and an endpoint picker finds what it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.engine_args import AsyncEngineArgs
from nanovllm.server.options import make_parser, read_settings
from tests.processes import ROOT
from tests.server.running_server import RunningServer, running_server
from tools.play_endpoint_picker import REQUIRED, Endpoint, MissingMetric, main, pick, read_gauges

FOLDER = ROOT / "deploy" / "kubernetes"


def manifests(name: str) -> dict[str, Any]:
    """Returns the objects of a file by their kind."""
    return {each.get("kind", ""): each for each in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def container() -> dict[str, Any]:
    (container,) = manifests("deployment.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def test_the_deployment_s_options_probes_and_time_to_drain(container: dict[str, Any], server: RunningServer) -> None:
    args = make_parser("nanovllm serve").parse_args(container["args"])
    settings = read_settings(args)
    AsyncEngineArgs.from_cli_args(args)
    pod = manifests("deployment.yaml")["Deployment"]["spec"]["template"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > settings.drain_timeout
    assert settings.port == container["ports"][0]["containerPort"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(settings.port)
    paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    for path in [*paths, pod["metadata"]["annotations"]["prometheus.io/path"]]:
        assert server.client.get(path).status_code == 200


def test_all_objects_select_the_same_pods(container: dict[str, Any]) -> None:
    deployment = manifests("deployment.yaml")["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    pool = manifests("gateway.yaml")["InferencePool"]
    service = manifests("deployment.yaml")["Service"]
    selectors = [deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    assert [*selectors, pool["spec"]["selector"]["matchLabels"]] == [labels] * 3
    assert pool["spec"]["targetPorts"] == [{"number": container["ports"][0]["containerPort"]}]
    (backend,) = manifests("gateway.yaml")["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    target = manifests("hpa.yaml")["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}


def test_the_autoscaler_s_metric_is_one_that_a_server_has(server: RunningServer) -> None:
    ((rule,),) = manifests("prometheus-adapter.yaml")[""]["rules"].values()
    series = rule["seriesQuery"].partition("{")[0]
    assert f"sum({series}{{<<.LabelMatchers>>}})" in rule["metricsQuery"]
    (metric,) = manifests("hpa.yaml")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    text = server.client.get("/metrics").text
    assert series in {family.name for family in text_string_to_metric_families(text)}


def test_the_image_starts_a_server(tmp_path: Path) -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    command = json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT "))
    assert [Path(command[0]).name, command[1]] == ["nanovllm", "serve"]
    assert read_settings(make_parser("nanovllm serve").parse_args([*command[2:], "tiny"])).host == "0.0.0.0"
    assert all(line in (ROOT / "docs" / "serving.md").read_text(encoding="utf-8") for line in lines[1:])


def test_a_picker_sends_prefixes_to_the_server_that_has_them(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_server() as other:
        urls = [server.url, other.url]
        arguments = ["--requests", "12", "--prefixes", "2", "--max-tokens", "4", "--at-once", "2"]
        monkeypatch.setattr(sys, "argv", ["play_endpoint_picker.py", *urls, *arguments])
        assert main() == 0
        counts = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
        assert sum(counts) == 12
        hits = [running.engine.metrics.prefix_cache_hits for running in (server, other)]
        assert all(hit > 0 for hit, count in zip(hits, counts, strict=True) if count > 2)


def test_the_pick_depends_on_queue_cache_and_prefix() -> None:
    waiting, running, usage = REQUIRED
    idle, full = ({waiting: 0.0, running: 0.0, usage: 0.1}, {waiting: 9.0, running: 8.0, usage: 0.9})
    endpoints = [Endpoint("a", True, full), Endpoint("b", True, idle), Endpoint("c", False)]
    assert pick(endpoints, "x").url == "b"
    endpoints[0].gauges = {**idle, usage: 0.2}
    assert pick(endpoints, "x").url == "b"
    endpoints[0].prefixes.add("x")
    assert pick(endpoints, "x").url == "a"


def test_a_server_without_a_metric_is_named(server: RunningServer) -> None:
    text = server.client.get("/metrics").text
    assert set(read_gauges(text)) == set(REQUIRED)
    for missing in (*REQUIRED, "vllm:cache_config_info"):
        with pytest.raises(MissingMetric, match=missing):
            read_gauges("\n".join(line for line in text.splitlines() if missing not in line))
