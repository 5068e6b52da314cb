"""Bad requests: each has a status and an error that names the field, and the server lives on."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from tests.processes import PATIENCE
from tests.server.running_server import CONTINUATION, PROMPT, QUESTION, RunningServer, error_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SECRET = "my secret prompt"


@pytest.fixture(autouse=True)
def the_server_lives(server: RunningServer) -> Iterator[None]:
    yield
    assert server.complete()["choices"][0]["text"] == CONTINUATION


def assert_bad(response: Any, status: int, param: str | None, word: str = "") -> None:
    error = error_of(response, status)
    assert error["param"] == param
    assert word in error["message"]
    assert len(error["message"]) < 1000
    for leaked in (SECRET, "Traceback", "/site-packages/", "/nanovllm/", "pydantic"):
        assert leaked not in response.text
    assert response.headers["X-Request-Id"]


BAD_VALUES: list[tuple[str, Any]] = [
    ("temperature", -1),
    ("temperature", 2.5),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", 1e308),
    ("temperature", [1]),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 2),
    ("n", 0),
    ("n", 10**9),
    ("n", "2"),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 10**400),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", "many"),
    ("min_tokens", -1),
    ("stop", ""),
    ("stop", [""]),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [10**9]),
    ("stop_token_ids", "7"),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {"100000": 1}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [512]),
    ("bad_words", [" "]),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("prompt_logprobs", -2),
    ("prompt_logprobs", 21),
    ("ignore_eos", "yes"),
    ("stream", "yes"),
    ("model", 3),
    ("cache_salt", ""),
    ("priority", 1),
    ("use_beam_search", True),
    ("service_tier", "flex"),
    ("prompt_embeds", "AAAA"),
    ("logits_processors", ["a.b"]),
    ("best_of", 4),
    ("truncate_prompt_tokens", 5),
    ("store", True),
    ("response_format", "json"),
    ("guided_choice", []),
    ("guided_regex", "("),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_bad_value_is_named(server: RunningServer, path: str, name: str, value: Any) -> None:
    prompt: dict[str, Any] = {"prompt": SECRET} if path == COMPLETIONS else {"messages": QUESTION}
    response = server.client.post(path, content=json.dumps({**prompt, name: value}), headers=JSON)
    param = error_of(response, 400)["param"]
    assert param is None or param.split(".")[0] == name or (name, param) == ("stop", "stop.0")
    assert_bad(response, 400, param)


def chat(messages: Any = QUESTION, **fields: Any) -> bytes:
    return json.dumps({"messages": messages, **fields}).encode()


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


def tool(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def response(**format: Any) -> bytes:
    return json.dumps({"input": "a", "text": {"format": {"type": "json_schema", "name": "a", **format}}}).encode()


JSON = {"Content-Type": "application/json"}
BAD_BODIES: list[tuple[str, str, bytes, str | None]] = [
    ("empty", COMPLETIONS, b"", None),
    ("half", COMPLETIONS, b'{"prompt": "my secret prompt', None),
    ("text", COMPLETIONS, b'"my secret prompt"', None),
    ("list", CHAT, b"[]", None),
    ("null", CHAT, b"null", None),
    ("number", CHAT, b"1e999", None),
    ("invalid UTF-8", COMPLETIONS, b'{"prompt": "\xff\xfe"}', None),
    ("UTF-16", COMPLETIONS, '{"prompt": 1}'.encode("utf-16"), "prompt"),
    ("half a surrogate pair", COMPLETIONS, b'{"prompt": "\\ud800"}', "prompt"),
    ("nested lists", COMPLETIONS, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ("nested objects", CHAT, b'{"messages": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", None),
    ("nested a little", CHAT, b'{"messages": [], "tools": ' + b"[" * 500 + b"]" * 500 + b"}", "messages"),
    ("digits", COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", None),
    ("not a number", COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', "temperature"),
    ("no prompt", COMPLETIONS, b"{}", "prompt"),
    ("no messages", CHAT, b"{}", "messages"),
    ("prompt null", COMPLETIONS, b'{"prompt": null}', "prompt"),
    ("prompt empty", COMPLETIONS, b'{"prompt": ""}', "prompt"),
    ("prompt list empty", COMPLETIONS, b'{"prompt": []}', "prompt"),
    ("prompt of booleans", COMPLETIONS, b'{"prompt": [true, 5]}', "prompt"),
    ("prompt of nothing", COMPLETIONS, b'{"prompt": [[]]}', "prompt"),
    ("prompt mixed", COMPLETIONS, b'{"prompt": ["a", 1]}', "prompt"),
    ("token too large", COMPLETIONS, b'{"prompt": [512]}', "prompt"),
    ("token negative", COMPLETIONS, b'{"prompt": [-1]}', "prompt"),
    ("logprobs", COMPLETIONS, b'{"prompt": "a", "logprobs": 21}', "logprobs"),
    ("suffix", COMPLETIONS, b'{"prompt": "a", "suffix": "b"}', "suffix"),
    ("stream options", COMPLETIONS, b'{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options"),
    ("messages empty", CHAT, b'{"messages": []}', "messages"),
    ("message a text", CHAT, b'{"messages": ["my secret prompt"]}', "messages.0"),
    ("no role", CHAT, b'{"messages": [{"content": "my secret prompt"}]}', "messages.0.role"),
    ("role unknown", CHAT, b'{"messages": [{"role": "wizard", "content": "my secret prompt"}]}', "messages"),
    ("content a number", CHAT, b'{"messages": [{"role": "user", "content": 5}]}', "messages.0.content"),
    (
        "top logprobs alone",
        CHAT,
        b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}',
        "top_logprobs",
    ),
    ("schema", COMPLETIONS, b'{"prompt": "a", "guided_json": {"type": 3}}', "guided_json"),
    ("regex", COMPLETIONS, b'{"prompt": "a", "guided_regex": "("}', "guided_regex"),
    ("grammar", COMPLETIONS, b'{"prompt": "a", "structured_outputs": {"grammar": "("}}', "structured_outputs.grammar"),
    ("prompt of fractions", COMPLETIONS, b'{"prompt": [1.5, 2]}', "prompt"),
    ("prompt nested thrice", COMPLETIONS, b'{"prompt": [[[1]]]}', "prompt"),
    ("gzip", COMPLETIONS, gzip.compress(b'{"prompt": "my secret prompt"}'), None),
    ("two objects", COMPLETIONS, b'{"prompt": "a"}{"prompt": "b"}', None),
    ("infinite bias", COMPLETIONS, b'{"prompt": "a", "logit_bias": {"1": -Infinity}}', "logit_bias"),
    ("logprobs true", COMPLETIONS, b'{"prompt": "a", "logprobs": true}', "logprobs"),
    ("reasoning limit", CHAT, chat(thinking_token_budget=5), "thinking_token_budget"),
    ("top logprobs", CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    ("logprobs a number", CHAT, chat(logprobs=5), "logprobs"),
    ("max completion tokens", CHAT, chat(max_tokens=5, max_completion_tokens=0), "max_completion_tokens"),
    (
        "response format",
        CHAT,
        chat(response_format=schema({"uniqueItems": True})),
        "response_format.json_schema.schema",
    ),
    ("no value", CHAT, chat(response_format=schema({"enum": []})), "response_format.json_schema.schema"),
    ("two forms", CHAT, chat(response_format={"type": "json_object"}, guided_regex="a"), "guided_regex"),
    ("tool recursive", CHAT, chat(tools=tool({"$ref": "#"}), tool_choice="required"), "tools"),
    (
        "tool elsewhere",
        CHAT,
        chat(tools=tool({"properties": {"a": {"$ref": "http://x"}}}), tool_choice="required"),
        "tools",
    ),
    ("tool choice", CHAT, chat(tools=tool({}), tool_choice="any"), "tool_choice"),
    ("tool choice alone", CHAT, chat(tool_choice="required"), "tools"),
    ("tool of another type", CHAT, chat(tools=[{"type": "retrieval"}]), "tools.0.type"),
    ("content nested", CHAT, chat([{"role": "user", "content": [["my secret prompt"]]}]), "messages.0.content"),
    ("image", CHAT, chat([{"role": "user", "content": [{"type": "image_url"}]}]), "messages.0.content.0"),
    ("part without text", CHAT, chat([{"role": "user", "content": [{"type": "text"}]}]), "messages.0.content.0"),
    ("tool first", CHAT, chat([{"role": "tool", "tool_call_id": "a", "content": "my secret prompt"}]), "messages"),
    (
        "continue and begin",
        CHAT,
        chat(add_generation_prompt=True, continue_final_message=True),
        "add_generation_prompt",
    ),
    ("variables", CHAT, chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    ("response's tokens", "/v1/responses", b'{"input": "a", "max_output_tokens": 0}', "max_output_tokens"),
    ("response's schema", "/v1/responses", response(schema={"contains": {}}), "text.format.schema"),
    ("kind", COMPLETIONS, b'{"prompt": "a", "structured_outputs": {"xml": "a"}}', None),
    ("tokens", "/detokenize", b'{"tokens": [512]}', "tokens"),
    ("nothing to tokenise", "/tokenize", b"{}", "prompt"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"), [each[1:] for each in BAD_BODIES], ids=[each[0] for each in BAD_BODIES]
)
def test_a_bad_body(server: RunningServer, path: str, body: bytes, param: str | None) -> None:
    response = server.client.post(path, content=body, headers=JSON)
    error_of(response, 400)
    assert_bad(response, 400, param)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"prompt": "\xff"}', "is not JSON in UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000, "is nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", "has a number with too many digits"),
        (b'{"prompt": "\\ud800"}', "without half of a surrogate pair"),
    ],
)
def test_the_error_says_why_a_body_cannot_be_read(server: RunningServer, body: bytes, reason: str) -> None:
    response = server.client.post(COMPLETIONS, content=body, headers=JSON)
    assert reason in error_of(response, 400)["message"]


def test_a_prompt_of_ten_megabytes(server: RunningServer) -> None:
    assert_bad(server.post(COMPLETIONS, prompt="word " * 2_000_000), 400, "prompt", "tokens")
    many = [{"role": "user", "content": "word " * 2_000_000}]
    assert error_of(server.post(CHAT, messages=many), 400)["code"] == "context_length_exceeded"


def test_a_prompt_that_is_too_long(server: RunningServer) -> None:
    error = error_of(server.post(COMPLETIONS, prompt=[5] * 5000), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "max_model_len=4096" in error["message"]


def test_another_content_type(server: RunningServer) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        response = server.client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
        assert_bad(response, 400, None, "Content-Type: application/json")


def test_another_model(server: RunningServer) -> None:
    response = server.post(COMPLETIONS, prompt=SECRET, model="gpt-4")
    assert_bad(response, 404, "model", "tiny, small")
    assert error_of(response, 404)["code"] == "model_not_found"
    assert server.complete(model="small")["model"] == "tiny"


def test_an_unknown_path_and_method(server: RunningServer) -> None:
    assert_bad(server.client.get("/v1/secrets"), 404, None, "begin with /v1")
    assert_bad(server.client.get(COMPLETIONS), 405, None, "POST alone")


def test_a_slash_at_the_end_and_a_head_request(server: RunningServer) -> None:
    assert server.client.get("/v1/models/").json()["data"][0]["id"] == "tiny"
    assert server.post(f"{COMPLETIONS}/", prompt="a", max_tokens=1).status_code == 200
    assert [server.client.head(path).status_code for path in ("/", "/health", "/ping/")] == [200, 200, 200]


def test_a_field_of_several_types_is_explained(server: RunningServer) -> None:
    message = error_of(server.post(COMPLETIONS, prompt=[1.5]), 400)["message"]
    assert message == "prompt must be a text, a list of token ids, or a list of several texts or lists of token ids."
    assert error_of(server.post(CHAT), 400)["message"] == "messages: Field required."
    assert error_of(server.post(COMPLETIONS), 400)["message"] == "prompt: Field required."
    assert error_of(server.post("/tokenize", prompt=1), 400)["message"] == "prompt: Input should be a valid string."


def test_all_logprobs(server: RunningServer) -> None:
    content = server.chat(logprobs=True, top_logprobs=-1, max_tokens=1)["choices"][0]["logprobs"]["content"]
    assert len(content[0]["top_logprobs"]) == 512


def request_bytes(headers: bytes = b"", body: bytes = b'{"prompt": "27 + 58 =", "temperature": 0}') -> bytes:
    length = f"Content-Length: {len(body)}\r\n".encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + length
    return head + headers + b"\r\n" + body


def answer_to(server: RunningServer, data: bytes) -> bytes:
    """Sends bytes as they are and returns the answer, which ends with the usage."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(data)
        answer = b""
        while b'"total_tokens"' not in answer and (chunk := connection.recv(4096)):
            answer += chunk
    return answer


def test_an_offer_of_http_2_is_ignored(server: RunningServer) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQC\r\n"
    assert b'"text":" 85"' in answer_to(server, request_bytes(offer))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_to_a_client_of_http_1_0_is_not_chunked(server: RunningServer, path: str) -> None:
    """It ends with the connection, even if the client asks to keep it."""
    fields = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": QUESTION}
    body = json.dumps({**fields, "temperature": 0, "stream": True}).encode()
    head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nConnection: keep-alive\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(partial(connection.recv, 4096), b""))
    answer_head, _, events = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in answer_head.lower()
    assert b"connection: close" in answer_head.lower()
    *chunks, done, end = events.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(json.loads(each.removeprefix("data: "))["object"] for each in chunks)


def test_an_answer_to_a_client_of_http_1_0_has_its_length(server: RunningServer) -> None:
    answer = answer_to(server, request_bytes().replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"content-length: " in answer.lower()
    assert b'"text":" 85"' in answer


def test_a_head_without_end_is_refused(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: ")
        with suppress(OSError):  # the server closes the connection
            for _ in range(1000):
                connection.sendall(b"a" * 100_000)
            raise AssertionError("a head of 100 MB is read")
    large = answer_to(server, request_bytes(body=b" " * 300_000 + b'{"prompt": "a"}'))
    assert large.startswith(b"HTTP/1.1 200"), "a body may be larger than a head"


def test_embeddings_say_that_there_are_none(server: RunningServer) -> None:
    assert_bad(server.post("/v1/embeddings", input="a", model="tiny"), 400, "model", "embeddings")


def exchange_bytes(server: RunningServer, data: bytes) -> bytes:
    """Sends bytes as they are and returns the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    return answer


@pytest.mark.parametrize("name", ["a b\tc", "x" * 129, "\xe9", ""])
def test_a_request_id_that_is_no_name(server: RunningServer, name: str) -> None:
    response = server.client.get("/v1/models", headers={"X-Request-Id": name.encode("latin-1")})
    assert_bad(response, 400, "X-Request-Id")


def test_headers_cannot_be_injected(server: RunningServer) -> None:
    for value in (b"a\rSet-Cookie: b", b"a\nSet-Cookie: b", b"a%0d%0aSet-Cookie: b", b"a\x00b"):
        answer = exchange_bytes(server, b"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: " + value + b"\r\n\r\n")
        assert b"set-cookie:" not in answer.lower().partition(b"\r\n\r\n")[0].replace(value.lower(), b"")


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"]
)
def test_what_is_not_http(server: RunningServer, data: bytes) -> None:
    answer = exchange_bytes(server, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
