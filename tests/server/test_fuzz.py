"""A fuzzer over the OpenAPI document: bodies of the declared form and near it get an answer, and none is a 500."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from nanovllm.server.app import make_app
from nanovllm.server.service import Service
from nanovllm.server.settings import ServerSettings
from tests.processes import until
from tests.properties import examples
from tests.server.running_server import CONTINUATION, RunningServer

DOCUMENT = make_app(Service(ServerSettings(served_model_name=("tiny",)))).openapi()
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
)
# The last event of a stream, where it is not [DONE].
ENDS = {"/v1/messages": '{"type":"message_stop"}\n\n', "/v1/responses": "}}\n\n"}
ALLOWED = {200, 400, 404, 429}

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["user", "system", "tiny", "text", "function", "add", "a" * 300, "\ud800"]
)
NUMBERS = st.integers(-3, 40) | st.sampled_from([0.5, 1.0, 1e308, -1e-308, 10**20, -(2**63), 2**63, True])
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
# Blocks of messages and items of input, which the document declares as any objects.
KINDS = st.sampled_from(
    [
        *("text", "tool_use", "tool_result", "thinking", "image", "message", "input_text", "output_text", "function"),
        *("function_call", "function_call_output", "reasoning", "reasoning_text", "custom", "json_schema"),
    ]
)
KEYS = st.sampled_from(
    ["content", "text", "id", "name", "input", "tool_use_id", "call_id", "arguments", "output", "summary", "role"]
)
BLOCKS: st.SearchStrategy[Any] = st.recursive(
    st.fixed_dictionaries({"type": KINDS, "text": TEXTS}),
    lambda inner: st.builds(
        lambda kind, fields: {"type": kind, **fields},
        KINDS,
        st.dictionaries(KEYS, TEXTS | JUNK | st.lists(inner, max_size=2), max_size=5),
    ),
    max_leaves=3,
)


def of_schema(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a schema of the document, and sometimes others."""
    if "$ref" in schema:
        return of_schema(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return st.one_of(*map(of_schema, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")])) | JUNK
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        fields = {name: of_schema(each) for name, each in schema["properties"].items()}
        return sparse(fields, schema.get("required", []))
    if kind == "object":
        return st.dictionaries(TEXTS, JUNK, max_size=3) | BLOCKS
    if kind == "array":
        return st.lists(of_schema(schema["items"]), max_size=3)
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        "integer": st.integers(-2, 600) | NUMBERS,
        "number": st.floats(-3, 3) | NUMBERS,
        "string": TEXTS,
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return kinds.get(kind, JUNK)


@st.composite
def sparse(draw: st.DrawFn, fields: dict[str, st.SearchStrategy[Any]], required: list[str]) -> dict[str, Any]:
    """An object with the required fields and a few others: one with many is nearly always refused for one of them."""
    some = draw(st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True))
    return {name: draw(fields[name]) for name in {*required, *some}}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Any]:
    path = draw(st.sampled_from(PATHS))
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = draw(of_schema(schema))
    body |= draw(st.dictionaries(TEXTS, JUNK, max_size=1))
    if "completions" in path:  # no answer is long
        body |= {"max_tokens": draw(st.integers(-1, 8)), "max_completion_tokens": None}
    elif path == "/v1/messages":
        body["max_tokens"] = draw(st.integers(-1, 8))
    elif path == "/v1/responses":
        body["max_output_tokens"] = draw(st.integers(-1, 8))
    return path, body


@given(requests())
@settings(max_examples=examples(400), deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_is_an_error_of_the_server(server: RunningServer, request: tuple[str, Any]) -> None:
    path, body = request
    response = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code in ALLOWED, response.text
    if response.status_code != 200:
        is_anthropic = path.startswith("/v1/messages")
        expected = {"message", "type"} if is_anthropic else {"message", "type", "param", "code"}
        assert set(response.json()["error"]) == expected
        assert "Traceback" not in response.text
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith(ENDS.get(path, "data: [DONE]\n\n")), response.text
    else:
        assert response.json().get("error") is None


def test_the_server_lives_after_all(server: RunningServer) -> None:
    assert until(server.is_idle)
    assert server.complete()["choices"][0]["text"] == CONTINUATION
