"""A new engine in a forked child, after torch ran in the parent."""

from __future__ import annotations

import os

import pytest

from nanovllm import InvalidStateError
from nanovllm.runner.cpu_threads import load_torch
from tests.processes import run_python

SCRIPT = """
import os, signal, sys, torch

def fork(child):
    process = os.fork()
    if process == 0:
        signal.alarm(120)  # it would wait forever
        child()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7

def run():
    from nanovllm import LLM, SamplingParams
    with LLM("tiny", device="cpu", num_kvcache_blocks=64, skip_tokenizer_init=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=3)
        print(llm.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0].token_ids, flush=True)

torch.set_num_threads(2)
torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # starts the second thread
fork(run)  # which imports nanovllm in the child
run()
fork(run)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_an_engine_in_a_forked_child_uses_one_thread() -> None:
    run = run_python("-W", "ignore", "-c", SCRIPT, NANOVLLM_LOG_LEVEL="runner.cpu_threads=INFO", OMP_NUM_THREADS="2")
    assert run.returncode == 0, run.stderr
    tokens = [line for line in run.stdout.splitlines() if line.startswith("[") and line.endswith("]")]
    assert len(tokens) == 3
    assert len(set(tokens)) == 1
    said = run.stdout + run.stderr
    assert said.count("CPU threads: 1 (this process was forked, and torch may be its parent's: spawn it") == 2
    assert said.count("CPU threads: 2 (set before the engine started)") == 1


def test_a_gpu_that_the_parent_had_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    for device in ("cuda", "auto"):
        with pytest.raises(InvalidStateError, match=f"device='{device}' cannot be used here: this process was forked"):
            load_torch(device)
    assert not load_torch("cpu")
