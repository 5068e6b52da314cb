"""The endpoints that monitors and tools ask: models, tokenizer, health, load, version, metrics."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm import __version__
from tests.server.running_server import PROMPT, QUESTION, RunningServer, answer_of, error_of


def test_models(server: RunningServer) -> None:
    cards = answer_of(server.client.get("/v1/models"))["data"]
    assert [(card["id"], card["root"], card["max_model_len"]) for card in cards] == [
        ("tiny", "tiny", 4096),
        ("small", "tiny", 4096),
    ]
    assert answer_of(server.client.get("/v1/models/small"))["id"] == "small"
    assert error_of(server.client.get("/v1/models/other/name"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health(server: RunningServer, path: str) -> None:
    response = server.client.get(path)
    assert (response.status_code, response.content) == (200, b"")


def test_version_and_load(server: RunningServer) -> None:
    assert answer_of(server.client.get("/version")) == {"version": __version__}
    assert answer_of(server.client.get("/load")) == {"server_load": 0}


def test_tokenize_and_detokenize(server: RunningServer) -> None:
    answer = answer_of(server.post("/tokenize", prompt=PROMPT, return_token_strs=True))
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 9
    assert answer["max_model_len"] == 4096
    assert answer_of(server.post("/detokenize", tokens=answer["tokens"])) == {"prompt": PROMPT}
    assert answer_of(server.post("/detokenize", tokens=[])) == {"prompt": ""}


def test_tokens_of_a_conversation_are_those_of_the_request(server: RunningServer) -> None:
    answer = answer_of(server.post("/tokenize", messages=QUESTION, model="tiny"))
    assert answer["count"] == server.chat()["usage"]["prompt_tokens"]


def test_tokenizer_info(server: RunningServer) -> None:
    info = answer_of(server.client.get("/tokenizer_info"))
    assert info["eos_token"] == "<|im_end|>"
    assert "messages" in info["chat_template"]


GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"}
COUNTERS = {
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
}


def test_metrics_have_the_names_that_dashboards_read(server: RunningServer) -> None:
    usage = server.complete(n=1)["usage"]
    text = server.client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    kinds = dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(HISTOGRAMS, "histogram")
    assert {name: family.type for name, family in families.items()} == {f"vllm:{n}": kind for n, kind in kinds.items()}
    for family in families.values():
        assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)
    assert "vllm:generation_tokens_total{" in text
    (generated,) = families["vllm:generation_tokens"].samples
    assert generated.value >= usage["completion_tokens"]
    reasons = {sample.labels["finished_reason"] for sample in families["vllm:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}
    (config,) = families["vllm:cache_config_info"].samples
    assert (config.labels["block_size"], config.labels["num_gpu_blocks"]) == ("16", "512")
    ends = [sample for sample in families["vllm:e2e_request_latency_seconds"].samples if sample.name.endswith("_count")]
    assert ends[0].value >= 1


def test_the_openapi_document_describes_every_endpoint(server: RunningServer) -> None:
    document = answer_of(server.client.get("/openapi.json"))
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize"} <= set(document["paths"])
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("/CompletionRequest")
