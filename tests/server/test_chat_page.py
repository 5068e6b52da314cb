"""The chat page and its events: what the answers hold, and who gets them."""

from __future__ import annotations

import base64
import hashlib
import logging
import re

import pytest

from nanovllm.logs import events
from nanovllm.logs.recent_events import RecentEvents
from nanovllm.utils.logger import setup_logger
from tests.processes import until
from tests.server.live import ScriptedEngine, live_server, scripted_service
from tests.server.running_server import RunningServer, answer_of, error_of


def test_the_policy_allows_the_pages_own_script_and_style_alone(server: RunningServer) -> None:
    response = server.client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = dict(each.split(" ", 1) for each in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_the_page_refers_to_nothing_outside_and_never_parses_texts_as_markup(server: RunningServer) -> None:
    text = server.client.get("/").text
    assert "://" not in text
    assert re.findall(r'\b(?:href|src)="(?!data:,")', text) == []
    assert re.findall(r'\son\w+="|\sstyle="', text) == [], "the policy forbids inline handlers and styles"
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser", text) == []


def test_events_of_requests_are_kept_and_served(server: RunningServer) -> None:
    request_id = server.chat()["id"]

    def messages() -> list[str]:
        kept = answer_of(server.client.get("/events"))["events"]
        return [each["message"] for each in kept if each["event"] == "request.finished"]

    assert until(lambda: any(request_id in message for message in messages()))


def test_events_hold_the_last_hundred_and_no_others() -> None:
    handler, logger = RecentEvents(), setup_logger("nanovllm.server.test")
    logger.addHandler(handler)
    try:
        for number in range(120):
            events.server_draining.log(logger, num_unfinished=number, threshold=1.0)
            events.engine_model.log(logger, model="/home/someone/model")
            logger.info("a line of a program")
    finally:
        logger.removeHandler(handler)
    kept = handler.latest()
    assert len(kept) == 100
    assert {each.event for each in kept} == {"server.draining"}
    assert kept[-1].message.startswith("Shutting down: 119 ")
    assert kept[0].message.startswith("Shutting down: 20 ")


def test_the_console_still_writes_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    package_logger, handler = logging.getLogger("nanovllm"), RecentEvents()
    captured = list(logging.getLogger().handlers)  # pytest's, which take the console's place
    package_logger.addHandler(handler)
    for each in captured:
        logging.getLogger().removeHandler(each)
    try:
        events.server_draining.log(setup_logger("nanovllm.server.serve"), num_unfinished=7, threshold=1.0)
    finally:
        package_logger.removeHandler(handler)
        for each in captured:
            logging.getLogger().addHandler(each)
    assert "7 unfinished requests" in capsys.readouterr().err


def test_with_a_key_the_page_is_open_and_all_it_shows_is_not() -> None:
    import httpx2

    with live_server(scripted_service(ScriptedEngine(), api_key=("secret",))) as url:
        assert httpx2.get(url, trust_env=False).status_code == 200
        assert error_of(httpx2.get(f"{url}/events", trust_env=False), 401)["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer secret"}
        assert answer_of(httpx2.get(f"{url}/events", headers=headers, trust_env=False)) == {"events": []}
