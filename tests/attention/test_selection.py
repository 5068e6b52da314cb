from __future__ import annotations

import logging

import pytest
import torch

from nanovllm.attention.selection import REQUESTS, decide, find_problems, select_attention, static_flash_attn_problem
from nanovllm.errors import BackendUnavailableError, InvalidArgumentError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_everything_runs():
    decision = decide("auto", None, {})
    assert decision.prefill == "flash_attn_4"
    assert "passed over" not in decision.prefill_reason + decision.decode_reason


def test_each_better_candidate_that_was_passed_over_is_named_with_its_reason():
    problems = {"flash_attn_4": "it is missing", "flash_attn": "too old", "triton": "no compiler"}
    decision = decide("auto", None, problems)
    assert (decision.prefill, decision.decode, decision.block_size) == ("torch", "torch", 16)
    for name, why in problems.items():
        assert f"{name} passed over: {why}" in decision.prefill_reason
    assert "triton passed over: no compiler" in decision.decode_reason


def test_triton_alone():
    decision = decide("auto", None, {"flash_attn_4": "missing", "flash_attn": "missing"})
    assert (decision.prefill, decision.decode, decision.block_size) == ("triton", "triton", 16)


def test_flash_attention_asks_for_pages_of_256():
    decision = decide("flash_attn", None, {"flash_attn_4": "missing"})
    assert (decision.prefill, decision.decode, decision.block_size) == ("flash_attn", "flash_attn", 256)


def test_a_requested_page_size_stays():
    assert decide("flash_attn", 512, {}).block_size == 512
    assert decide("torch", 4, {}).block_size == 4


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_request_by_name_is_kept_to(name):
    decision = decide(name, None, {})
    assert (decision.prefill, decision.decode) == (name, name)
    assert decision.prefill_reason == f"attention_backend={name}"


@pytest.mark.parametrize("name", ["triton", "flash_attn"])
def test_asking_by_name_for_what_cannot_run_says_why_and_what_to_do(name):
    with pytest.raises(BackendUnavailableError, match=f"{name}.*no such thing.*'auto'"):
        decide(name, None, {name: "no such thing", "flash_attn_4": "missing"})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InvalidArgumentError, match=", ".join(REQUESTS)):
        decide("fa3", None, {})


@pytest.mark.parametrize(
    ("device_type", "dtype", "head_dim", "why"),
    [
        ("cpu", torch.bfloat16, 64, "no CUDA device"),
        ("cuda", torch.float32, 64, "dtype float32"),
        ("cuda", torch.bfloat16, 512, "head_dim 512"),
        ("cuda", torch.bfloat16, 20, "head_dim 20"),
    ],
)
def test_what_rules_flash_attention_out(device_type, dtype, head_dim, why):
    assert why in (static_flash_attn_problem(device_type, dtype, head_dim) or "")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_does_not_rule_flash_attention_out(head_dim):
    assert static_flash_attn_problem("cuda", torch.float16, head_dim) is None


def test_a_page_size_that_flash_attention_cannot_read_is_its_problem(monkeypatch):
    monkeypatch.setattr("nanovllm.attention.selection.flash_attn_4_problem", lambda device: None)
    monkeypatch.setattr("nanovllm.attention.selection.flash_attn_problem", lambda device, dtype, head_dim: None)
    problems = find_problems("flash_attn", CUDA, torch.bfloat16, 128, 16)
    assert problems["flash_attn"] == "block_size=16 is not a multiple of 256"
    assert "flash_attn" not in find_problems("flash_attn", CUDA, torch.bfloat16, 128, 512)


def test_without_the_packages_the_problem_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    monkeypatch.setattr("nanovllm.attention.selection.flash_attn_4_problem", lambda device: "not installed")
    problems = find_problems("auto", CUDA, torch.bfloat16, 128, None)
    assert "flash-attn is not importable" in problems["flash_attn"]
    assert problems["flash_attn_4"] == "not installed"


def test_a_cpu_takes_torch_and_the_log_says_why(caplog):
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        selection = select_attention("auto", CPU, torch.float32, 64, None)
    assert (selection.prefill.name, selection.decode.name, selection.block_size) == ("torch", "torch", 16)
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "attention.selected"]
    sentence = record.getMessage()
    assert sentence.startswith("Attention backends: prefill=torch (")
    assert "triton passed over: no CUDA device" in sentence
    assert sentence.endswith("block_size=16")
    assert record.fields["decode"] == "torch"


def test_flash_attention_on_a_cpu_is_refused():
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        select_attention("flash_attn", CPU, torch.bfloat16, 64, None)


def test_triton_on_a_cpu_runs_in_the_interpreter_alone(monkeypatch):
    monkeypatch.setattr("nanovllm.attention.selection.INTERPRETED", True)
    assert select_attention("triton", CPU, torch.float32, 64, None).decode.name == "triton"
    monkeypatch.setattr("nanovllm.attention.selection.INTERPRETED", False)
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        select_attention("triton", CPU, torch.float32, 64, None)
