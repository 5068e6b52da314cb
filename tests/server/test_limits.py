"""Who may ask, how much, and what the log says about it."""

from __future__ import annotations

import importlib.util
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest

from nanovllm.outputs import RequestOutput
from nanovllm.server import http_protocol
from tests.logs.test_events import wrong_with
from tests.processes import PATIENCE, until
from tests.server.running_server import ANSWER, PROMPT, QUESTION, RunningServer, error_of, running_server

LONG: dict[str, Any] = {"prompt": "count", "ignore_eos": True, "max_tokens": 3000, "stream": True}


def requests_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if getattr(record, "event", "") == "http.request"]


# ---- keys


def test_a_key_is_needed_for_all_but_health(server: RunningServer) -> None:
    with running_server(server.engine, api_key=("first-key", "second-key")) as guarded:
        for path in ("/health", "/ping"):
            assert guarded.client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere"):
            assert error_of(guarded.client.get(path), 401)["code"] == "invalid_api_key"
        for headers in (
            {"Authorization": "Bearer first-key"},
            {"Authorization": "bearer second-key"},
            {"X-Api-Key": "second-key"},
        ):
            assert guarded.client.get("/v1/models", headers=headers).status_code == 200
        for wrong in (
            "Bearer first-ke",
            "Bearer first-key2",
            "first-key",
            "Bearer",
            "",
            "Basic first-key",
            "Bearer \xff",
        ):
            response = guarded.client.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")})
            assert error_of(response, 401)["message"] == "The API key is missing or wrong."
            assert response.headers["WWW-Authenticate"] == "Bearer"


def test_pages_of_other_origins_may_ask_only_if_they_are_listed(server: RunningServer) -> None:
    origin = {"Origin": "http://a.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers=origin).headers
    with running_server(server.engine, cors_origin=("http://a.example",), api_key=("key",)) as open_to_one:
        answer = open_to_one.client.options("/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://a.example"
        refused = open_to_one.client.get("/v1/models", headers={"Origin": "http://b.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_a_path_of_a_proxy_changes_nothing(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nanovllm")
    with running_server(server.engine, root_path="/llm", api_key=("key",)) as behind:
        assert behind.client.get("/health").status_code == 200
        assert error_of(behind.client.get("/v1/models"), 401)
        assert behind.client.get("/v1/models", headers={"X-Api-Key": "key"}).status_code == 200
    assert [(log["path"], log["status"]) for log in requests_of(caplog)] == [("/v1/models", 401), ("/v1/models", 200)]


# ---- sizes


def test_a_body_that_is_too_large(server: RunningServer) -> None:
    with running_server(server.engine, max_body=1) as limited:
        body = b'{"prompt": "' + b"a" * 10**6 + b'"}'
        headers = {"Content-Type": "application/json"}

        def in_chunks() -> Any:
            for start in range(0, len(body), 1000):
                yield body[start : start + 1000]

        for content in (body, in_chunks()):
            response = limited.client.post("/v1/completions", content=content, headers=headers)
            assert error_of(response, 413)["code"] == "body_too_large"
        assert limited.complete("a" * 1000, max_tokens=1)


@contextmanager
def open_request(server: RunningServer, head: bytes, version: bytes = b"1.1") -> Iterator[socket.socket]:
    """Yields a connection with the head of a request that asks for its end."""
    url = urlsplit(server.url)
    assert url.hostname is not None
    with socket.create_connection((url.hostname, url.port), timeout=PATIENCE) as connection:
        request = b"POST /v1/completions HTTP/%s\r\nHost: a\r\nConnection: close\r\n%s\r\n\r\n" % (version, head)
        connection.sendall(request)
        yield connection


@pytest.mark.parametrize(
    ("head", "piece", "last"),
    [
        (f"Content-Length: {20 * 10**6}".encode(), b" " * 10**6, b""),
        (b"Transfer-Encoding: chunked", b"F4240\r\n" + b" " * 10**6 + b"\r\n", b"0\r\n\r\n"),
    ],
    ids=["with its length", "in chunks"],
)
def test_a_client_that_reads_last_gets_the_answer_to_a_body_that_is_too_large(
    server: RunningServer, head: bytes, piece: bytes, last: bytes
) -> None:
    """The connection is closed after the body is read, and not reset, as closing it before would do."""
    with running_server(server.engine, max_body=1) as limited:
        for version in (b"1.1", b"1.0"):
            with open_request(limited, head, version) as connection:
                for _ in range(20):
                    connection.sendall(piece)
                connection.sendall(last)
                answer = b"".join(iter(partial(connection.recv, 4096), b""))
            assert answer.startswith(b"HTTP/1.1 413 "), answer
            assert b"connection: close" in answer
            assert b"body_too_large" in answer
        assert until(lambda: not limited.server.server_state.connections)


def test_a_client_that_goes_on_sending_is_not_read_for_ever(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "_LINGER_SECONDS", 0.2)
    head = f"Content-Length: {10**18}".encode()
    with running_server(server.engine, max_body=1) as limited, open_request(limited, head) as connection:
        endless = iter(partial(connection.sendall, b" " * 10**6), "")
        with pytest.raises(OSError, match="reset|pipe"):
            list(endless)


def test_a_full_queue(server: RunningServer) -> None:
    with running_server(server.engine, max_queue=0) as limited:
        with limited.client.stream("POST", "/v1/completions", json={**LONG, "n": 8, "temperature": 1}) as stream:
            lines = stream.iter_lines()
            next(lines)
            response = limited.post("/v1/completions", prompt="a")
            assert error_of(response, 429)["type"] == "rate_limit_error"
            assert int(response.headers["Retry-After"]) >= 1
            assert limited.client.get("/health").status_code == 200
        assert until(lambda: limited.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200)
        assert error_of(limited.post("/v1/completions", prompt="a", n=9), 429)


def test_more_requests_than_run_at_a_time_wait(server: RunningServer) -> None:
    answers: list[str] = []

    def ask() -> None:
        answers.append(server.chat()["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [ANSWER] * 24


# ---- ids and the access log


def test_the_id_of_a_request(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nanovllm")
    own = server.post("/v1/completions", prompt=PROMPT, temperature=0)
    given = server.client.post(
        "/v1/completions", json={"prompt": PROMPT, "temperature": 0}, headers={"X-Request-Id": "order 66"}
    )
    assert own.headers["X-Request-Id"] == own.json()["id"]
    assert given.headers["X-Request-Id"] == "order 66"

    def lines() -> list[dict[str, Any]]:
        """A line follows its answer, so those of the test before may come now."""
        return [log for log in requests_of(caplog) if log["request_id"] in (own.json()["id"], given.json()["id"])]

    assert until(lambda: len(lines()) == 2)
    first, second = lines()
    assert (first["request_id"], first["client_request_id"]) == (own.json()["id"], None)
    assert (second["request_id"], second["client_request_id"]) == (given.json()["id"], "order 66")
    ends = [record.fields for record in caplog.records if getattr(record, "event", "") == "request.finished"]
    assert [end["request_id"] for end in ends] == [own.json()["id"], given.json()["id"]]
    assert [end.get("client_request_id") for end in ends] == [None, "order 66"]


def test_the_access_log(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nanovllm")
    secret = {"messages": [{"role": "user", "content": "my secret"}], "temperature": 0, "max_tokens": 5}
    headers = {"Authorization": "Bearer secret-key", "X-Secret": "secret header", "Cookie": "secret"}
    server.client.post("/v1/chat/completions?key=secret", json=secret, headers=headers)
    server.stream("/v1/completions", prompt=PROMPT)
    server.client.get("/health")
    server.client.get("/metrics")
    server.client.post("/v1/completions", json={"prompt": 5})
    assert until(lambda: len(requests_of(caplog)) == 3)
    chat, stream, bad = requests_of(caplog)
    assert (chat["method"], chat["path"], chat["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (chat["num_output_tokens"], chat["num_prompt_tokens"] > 5, chat["duration_s"] > 0) == (5, True, True)
    assert (stream["status"], stream["num_prompt_tokens"], stream["num_output_tokens"]) == (200, 9, 4)
    assert (bad["status"], bad["num_prompt_tokens"]) == (400, None)
    assert "secret" not in caplog.text


def test_an_unknown_field_is_logged_once(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nanovllm")
    for _ in range(3):
        assert server.complete(brand_new_field="my secret", max_tokens=1)
    names = [record.fields["field"] for record in caplog.records if getattr(record, "event", "") == "field.ignored"]
    assert names == ["brand_new_field"]
    assert "my secret" not in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("opentelemetry") is None, reason="needs opentelemetry-api")
def test_the_trace_of_the_client_is_continued(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nanovllm")
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{span}-01"}
    for path, body in (("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": QUESTION})):
        caplog.clear()
        server.client.post(path, json={**body, "max_tokens": 2}, headers=headers)
        server.client.post(path, json={**body, "max_tokens": 2}, headers={"traceparent": "nonsense"})
        added = [record.fields for record in caplog.records if getattr(record, "event", "") == "request.added"]
        assert [each.get("trace_id") for each in added] == [trace, None]
        assert added[0]["span_id"] == span


def test_records_are_as_declared(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nanovllm")
    server.complete(another_new_field=1)
    server.client.get("/v1/models")
    with running_server(server.engine):
        pass
    server_records = [record for record in caplog.records if record.name.startswith("nanovllm.server")]
    assert {record.event for record in server_records} == {"http.request", "field.ignored", "server.started"}
    assert not [wrong for record in server_records if (wrong := wrong_with(record))]


# ---- errors of the server itself


def test_an_unexpected_error_is_logged_and_not_told(
    server: RunningServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server.service, "check_model", fail)
    response = server.post("/v1/completions", prompt="a")
    error = error_of(response, 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in response.text
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "server.error"]
    assert "/secret/path" in record.fields["traceback"]
    assert not wrong_with(record)


def test_an_error_in_a_stream_is_its_last_event(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = server.service.generate

    async def fail_after_two(*arguments: Any) -> Any:
        outputs: list[RequestOutput] = []
        async for output in generate(*arguments):
            yield output
            outputs.append(output)
            if len(outputs) == 2:
                raise RuntimeError("secret")

    monkeypatch.setattr(server.service, "generate", fail_after_two)
    response = server.client.post("/v1/completions", json={**LONG, "max_tokens": 100})
    *chunks, error, end = response.text.split("\n\n")
    assert end == ""
    assert error.startswith('data: {"error":{"message":"The server failed')
    assert len(chunks) == 2
    assert until(server.is_idle)
