"""The kernels are accepted by Triton's compiler, which is stricter than its interpreter, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


ROOT = Path(__file__).parents[2]
NOT_REACHED = {"_prefix_attention_kernel", "_set_blocks_kernel"}  # their tests stop at the result of another kernel


def compiler_environment(tmp_path: Path) -> dict[str, str]:
    """Without the interpreter, and without what was compiled before."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "TRITON_CACHE_DIR": str(tmp_path / "cache")}


@pytest.mark.heavy("compiles all kernels")
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """Those written in Gluon have a test of their own, since they compile only with the arguments of a Hopper GPU."""
    outcome = tmp_path / "outcome.json"
    environment = {**compiler_environment(tmp_path), "COMPILED": str(outcome)}
    plugins = ["-p", "tests.kernels.compile_for_hopper", "-p", "no:xdist", "-p", "no:cacheprovider"]
    emulated = ["test_gluon_emulator.py", "test_paged_prefill_hopper.py"]  # launch nothing
    replaced = "test_early_keys.py"  # has kernels call Python, as in the interpreter
    left_out = [f"--ignore={Path(__file__).with_name(name)}" for name in [Path(__file__).name, *emulated, replaced]]
    command = [sys.executable, "-m", "pytest", *plugins, "-q", "--tb=no", *left_out, "tests/kernels"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome.exists(), run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads(outcome.read_text())
    assert found["errors"] == {}
    assert set(found["kernels"]) - set(found["compiled"]) == NOT_REACHED


def is_lossless(report: str) -> bool:
    """A warp may save a few words outside its inner loop, which costs nothing; sums are hundreds of bytes."""
    spilled = re.search(r"(\d+) bytes spill stores", report)
    return spilled is not None and int(spilled[1]) <= 32 and "serialized" not in report


@pytest.mark.heavy("compiles kernels of many instructions, sixty times")
def test_the_kernels_in_gluon_compile_for_hopper_without_loss(tmp_path: Path) -> None:
    """ptxas spills no registers in a loop and does not make matrix instructions wait for one another."""
    command = [sys.executable, "-m", "tests.kernels.compile_gluon_for_hopper"]
    run = subprocess.run(command, cwd=ROOT, env=compiler_environment(tmp_path), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    reports = json.loads(run.stdout)
    if not reports:
        pytest.skip("Gluon is enabled for Triton 3.6 and 3.7 alone")
    lossy = [f"{case}: {report}" for case, report in reports.items() if not is_lossless(report)]
    assert lossy == [], "\n".join(lossy)
