from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from nanovllm.errors import BackendUnavailableError
from nanovllm.kernels import triton_support
from nanovllm.kernels.triton_support import next_power_of_2, pdl_options, runs_triton
from tests.processes import run_python

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of a missing package looks like
import torch
from nanovllm.kernels import paged_decode, paged_decode_fp8, paged_prefill, qk_norm_rope_store
from nanovllm.kernels import experts, rms_norm, sample, silu_and_mul, skinny_linear
print(rms_norm.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist())
try:
    rms_norm.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0, use_triton=True)
except Exception as error:
    print(type(error).__name__)
"""


def test_kernels_import_and_run_without_triton():
    result = run_python("-c", WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[[1.0, 1.0, 1.0, 1.0]]", "BackendUnavailableError"]


def test_cpu_tensors_take_the_reference_unless_asked():
    assert not runs_triton(torch.ones(1), None)
    assert not runs_triton(torch.ones(1), False)


def test_a_kernel_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr("nanovllm.kernels.triton_support.INTERPRETED", False)
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        runs_triton(torch.ones(1), True)


@pytest.mark.parametrize(("number", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(number, power):
    assert next_power_of_2(number) == power


def test_dependent_launch_is_for_hopper_gpus(monkeypatch):
    pdl = pdl_options.__wrapped__  # without its cache
    assert pdl(torch.device("cpu")) == {"PDL": False}
    for capability, expected in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert pdl(torch.device("cuda")).get("launch_pdl", False) is expected
        assert pdl(torch.device("cuda"), wanted=False) == {"PDL": False}


def test_variants_of_a_kernel_compile_beside_each_other_and_each_once(monkeypatch):
    """A launch never meets a kernel that another thread has compiled and not yet loaded, as Triton's own cache does."""
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    both_compile = threading.Barrier(2)
    compiled, loaded, launched = [], set(), []

    def run(*, x_ptr, SIZE):
        if SIZE not in compiled:
            compiled.append(SIZE)
            both_compile.wait(timeout=60)
            loaded.add(SIZE)
        launched.append(SIZE in loaded)

    kernel = triton_support._compiled_once(SimpleNamespace(run=run))
    threads = [threading.Thread(target=kernel.run, kwargs={"x_ptr": n, "SIZE": n % 2}) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(compiled) == [0, 1]
    assert launched == [True] * 4
