"""The kernels are accepted by Triton's compiler, which is stricter than its interpreter, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


NOT_REACHED = {"_prefix_attention_kernel", "_set_blocks_kernel"}  # their tests stop at the result of another kernel


@pytest.mark.heavy("compiles all kernels")
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """Those written in Gluon, whose types this does not cover, excepted."""
    outcome = tmp_path / "outcome.json"
    environment = {**os.environ, "COMPILED": str(outcome), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    plugins = ["-p", "tests.kernels.compile_for_hopper", "-p", "no:xdist", "-p", "no:cacheprovider"]
    without_this = ["--ignore", __file__]
    command = [sys.executable, "-m", "pytest", *plugins, "-q", "--tb=no", *without_this, "tests/kernels"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert outcome.exists(), run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads(outcome.read_text())
    assert found["errors"] == {}
    assert set(found["kernels"]) - set(found["compiled"]) == NOT_REACHED
