"""`--url`: what the client reads from servers that behave, and from servers that do not."""

from __future__ import annotations

import asyncio
import builtins
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from nanovllm.benchmarks.arrivals import OnlineRequest
from nanovllm.benchmarks.online import OnlineRun, RequestRecord, replay
from nanovllm.benchmarks.online_settings import Server
from nanovllm.benchmarks.openai_client import EventReader, ServerResponseError, open_server
from nanovllm.benchmarks.settings import WorkloadError
from nanovllm.cli.main import main
from tests.benchmarks import fake_openai_server as fake
from tests.processes import start_python


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    process = start_python("-m", "tests.benchmarks.fake_openai_server")
    assert process.stdout is not None
    yield Server(f"http://127.0.0.1:{process.stdout.readline().strip()}", fake.KEY, served_model_name=None)
    process.kill()
    process.communicate()


def records_of(server: Server, *kinds: int, output_len: int = 8) -> list[RequestRecord]:
    async def run() -> None:
        async with open_server(server, temperature=0.6) as engine:
            await replay(engine, measured)

    measured = OnlineRun([OnlineRequest(index, 0.0, [kind, 1, 2], output_len) for index, kind in enumerate(kinds)])
    asyncio.run(run())
    return sorted(measured.records, key=lambda record: record.index)


@pytest.mark.parametrize("kind", [fake.FINE, fake.SPLIT, fake.FINAL_USAGE])
def test_every_token_is_counted(server: Server, kind: int) -> None:
    """With usage in each event, in events cut in two, and with one usage at the end for events of two tokens."""
    (record,) = records_of(server, kind)
    assert record.error is None
    assert record.num_output_tokens == 8
    assert record.ttft is not None
    assert 0 < record.ttft <= record.latency


def test_the_command_measures_a_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The server gives what is asked for where the first token is 0, and so is every token of this vocabulary."""
    traffic = "--rates 100 --num-requests 5 --input-len 8:0 --output-len 10:0 --vocab-size 1 --burstiness 4"
    arguments = f"bench --workload online --url {server.url} --api-key {fake.KEY} {traffic}"
    assert main(arguments.split()) == 0
    text = capsys.readouterr().out
    assert f"{server.url}, 100 requests/s: 10 requests, 0 failed; 8 tokens in and 10 out on average" in text
    report = json.loads(text.splitlines()[-1])
    assert (report["url"], report["model"]) == (server.url, "fake")
    assert report["results"][0]["output_tokens_per_second"] > 0
    assert fake.KEY not in text


def test_the_address_may_end_in_v1(server: Server) -> None:
    (record,) = records_of(replace(server, url=f"{server.url}/v1/"), fake.FINE)
    assert record.error is None


def test_requests_that_fail_are_counted_beside_others(server: Server) -> None:
    expected = {
        fake.REFUSED: "ServerResponseError: status 429: the queue is full",
        fake.HTML: "ServerResponseError: status 502: '<html>xxx",
        fake.ERROR_LATER: "ServerResponseError: The stream has an error: the engine has ended",
        fake.NOT_JSON: "ServerResponseError: The stream has an event that is no completion: b'{not json'",
        fake.DISCONNECT: "ClientPayloadError: ",
        fake.NO_DONE: "ServerResponseError: The stream ended before [DONE].",
        fake.NO_USAGE: "ServerResponseError: The stream reports no usage",
        fake.SHORT: "It ended after 2 of 8 tokens.",
    }
    records = records_of(server, *expected, fake.FINE)
    for record, message in zip(records, expected.values(), strict=False):
        assert record.error is not None
        assert record.error.startswith(message)
        assert len(record.error) <= 300
    assert records[-1].error is None


def test_a_server_without_a_model_for_us_is_one_message(server: Server) -> None:
    with pytest.raises(WorkloadError, match="gives no model .*status 401: a key is needed.*check --url and --api-key"):
        records_of(replace(server, api_key=None), fake.FINE)
    with pytest.raises(WorkloadError, match="gives no model .*check --url"):
        records_of(Server("http://127.0.0.1:1", None, None), fake.FINE)
    with pytest.raises(WorkloadError, match="gives no model .*check --url"):
        records_of(Server("no address", None, None), fake.FINE)


def test_without_aiohttp_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_aiohttp(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "aiohttp":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_aiohttp)
    with pytest.raises(WorkloadError, match="pip install aiohttp"):
        records_of(Server("http://127.0.0.1:1", None, None), fake.FINE)


def test_events_are_the_same_however_they_are_cut() -> None:
    data = b"".join(fake.event(fake.completion(index)) for index in (1, 2, 3)) + b"event: x\r\ndata:[DONE]\r\n\r\n"
    for size in range(1, 40):
        events, numbers = EventReader(), []
        for start in range(0, len(data), size):
            assert not events.feed(data[start : start + size])
            numbers += [] if events.num_tokens is None else [events.num_tokens]
        assert numbers == [1, 2, 3]
        events.check_end()


def test_a_text_that_looks_like_usage_is_none() -> None:
    events = EventReader()
    assert events.feed(fake.event(fake.completion(None, text='"completion_tokens": 7')))
    assert events.num_tokens is None


@pytest.mark.parametrize("data", ["[]", "1", "{}", '{"usage": {}}', '{"usage": 3}', "\\", "null"])
def test_events_of_another_form_are_refused(data: str) -> None:
    with pytest.raises(ServerResponseError, match="no completion"):
        EventReader().feed(fake.event(data))


def test_the_client_has_time_for_more_tokens_than_it_is_meant_for(server: Server) -> None:
    """Its own work, not the time that passes: 120 requests/s of 190 tokens leave 44 µs a token, the best of three."""

    def seconds_a_token() -> float:
        started = time.process_time()
        records = records_of(server, *[fake.FINE] * 64, output_len=190)
        assert all(record.error is None for record in records)
        return (time.process_time() - started) / (64 * 190)

    assert min(seconds_a_token() for _ in range(3)) < 1 / (120 * 190)
