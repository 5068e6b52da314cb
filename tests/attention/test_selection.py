from __future__ import annotations

import logging
import sys

import pytest
import torch

from nanovllm.attention.selection import decide, find_problem, select_attention
from nanovllm.config import ATTENTION_BACKENDS
from nanovllm.errors import BackendUnavailableError, InvalidArgumentError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NO_PACKAGES = {"flash_attn_4": "it is missing", "flash_attn": "too old"}


def no_problem(name: str) -> None:
    return None


def names(decision) -> tuple[str, str]:
    return decision.prefill, decision.decode


def test_where_everything_runs_the_fastest_are_taken():
    decision = decide("auto", None, no_problem)
    assert names(decision) == ("flash_attn_4", "triton")
    assert decision.block_size == 16
    assert "passed over" not in decision.prefill_reason + decision.decode_reason
    assert "H200" in decision.prefill_reason
    assert "H200" in decision.decode_reason


def test_each_better_candidate_that_was_passed_over_is_named_with_its_reason():
    problems = {**NO_PACKAGES, "triton": "no compiler"}
    decision = decide("auto", None, problems.get)
    assert names(decision) == ("torch", "torch")
    for name, why in problems.items():
        assert f"{name} passed over: {why}" in decision.prefill_reason
    assert "triton passed over: no compiler" in decision.decode_reason


def test_without_packages_triton_serves_both():
    decision = decide("auto", None, NO_PACKAGES.get)
    assert names(decision) == ("triton", "triton")
    assert "flash_attn_4 passed over: it is missing" in decision.prefill_reason


def test_nothing_is_looked_for_behind_the_first_that_runs():
    asked = []
    decide("auto", None, lambda name: asked.append(name))
    assert "flash_attn" not in asked
    assert "torch" not in asked


def test_without_triton_a_gpu_takes_flash_attention_2_and_its_pages():
    decision = decide("auto", None, {"flash_attn_4": "missing", "triton": "missing"}.get)
    assert names(decision) == ("flash_attn", "flash_attn")
    assert decision.block_size == 256


@pytest.mark.parametrize(("problems", "prefill"), [({}, "flash_attn_4"), ({"flash_attn_4": "missing"}, "flash_attn")])
def test_flash_attention_by_name(problems, prefill):
    decision = decide("flash_attn", None, problems.get)
    assert names(decision) == (prefill, "flash_attn")
    assert decision.block_size == 256


def test_a_requested_page_size_stays():
    assert decide("flash_attn", 512, no_problem).block_size == 512
    assert decide("torch", 4, no_problem).block_size == 4


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_request_by_name_is_kept_to(name):
    decision = decide(name, None, no_problem)
    assert names(decision) == (name, name)
    assert decision.prefill_reason == decision.decode_reason == f"attention_backend={name}"


@pytest.mark.parametrize("name", ["triton", "flash_attn"])
def test_asking_by_name_for_what_cannot_run_says_why_and_what_to_do(name):
    with pytest.raises(BackendUnavailableError, match=f"{name}.*no such thing.*'auto'"):
        decide(name, None, {name: "no such thing", "flash_attn_4": "missing"}.get)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InvalidArgumentError, match=", ".join(ATTENTION_BACKENDS)):
        decide("fa3", None, no_problem)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_4"])
@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "why"),
    [
        (CPU, torch.bfloat16, 64, "no CUDA device"),
        (CUDA, torch.float32, 64, "dtype float32"),
        (CUDA, torch.bfloat16, 512, "head_dim 512"),
        (CUDA, torch.bfloat16, 20, "head_dim 20"),
    ],
)
def test_what_rules_flash_attention_out_before_it_is_imported(name, device, dtype, head_dim, why):
    assert why in (find_problem(name, "auto", device, dtype, head_dim, None) or "")


def test_flash_attention_4_is_passed_over_where_our_hopper_kernel_runs_unless_asked_for(monkeypatch):
    served = []

    def takes_on_hopper(device, dtype, head_dim, block_size):
        served.append((device, dtype, head_dim, block_size))
        return head_dim == 128

    monkeypatch.setattr("nanovllm.attention.selection.takes_on_hopper", takes_on_hopper)
    monkeypatch.setattr("nanovllm.attention.selection.flash_attn_4_problem", lambda device: None)
    problem = find_problem("flash_attn_4", "auto", CUDA, torch.bfloat16, 128, None)
    assert problem is not None
    assert problem.startswith("our own kernel")
    assert find_problem("flash_attn_4", "auto", CUDA, torch.bfloat16, 96, 32) is None
    assert find_problem("flash_attn_4", "flash_attn", CUDA, torch.bfloat16, 128, None) is None
    assert served == [(CUDA, torch.bfloat16, 128, 16), (CUDA, torch.bfloat16, 96, 32)]


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_4"])
def test_flash_attention_is_passed_over_for_an_fp8_cache(name):
    problem = find_problem(name, "auto", CUDA, torch.bfloat16, 128, None, fp8_cache=True)
    assert problem is not None
    assert problem.startswith("kv_cache_dtype=fp8")


def test_an_fp8_cache_on_a_gpu_takes_our_kernels_and_says_why():
    def problem_of(name):
        return find_problem(name, "auto", CUDA, torch.bfloat16, 128, None, fp8_cache=True)

    decision = decide("auto", None, problem_of)
    assert names(decision) == ("triton", "triton")
    assert "flash_attn_4 passed over: kv_cache_dtype=fp8" in decision.prefill_reason
    with pytest.raises(BackendUnavailableError, match="flash_attn.*kv_cache_dtype=fp8.*'auto'"):
        decide("flash_attn", None, problem_of)


@pytest.mark.parametrize(("block_size", "readable"), [(None, True), (256, True), (512, True), (16, False)])
def test_page_sizes_that_flash_attention_2_reads(monkeypatch, block_size, readable):
    monkeypatch.setattr("nanovllm.attention.selection.flash_attn_problem", lambda device, dtype, head_dim: None)
    problem = find_problem("flash_attn", "flash_attn", CUDA, torch.bfloat16, 128, block_size)
    assert problem == (None if readable else "block_size=16 is not a multiple of 256")


def test_a_package_that_is_missing_is_the_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # what an import of a missing package looks like
    problem = find_problem("flash_attn", "auto", CUDA, torch.bfloat16, 128, None)
    assert problem is not None
    assert problem.startswith("package flash-attn is not importable (ModuleNotFoundError")


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
