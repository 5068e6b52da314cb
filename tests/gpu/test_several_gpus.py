"""Ranks on GPUs of their own: the tokens of one GPU, and an end when one of them is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from nanovllm import LLM, SamplingParams, WorkerError
from tests.distributed.rank_processes import is_alive, pids_of
from tests.processes import WATCHDOG

COUNT = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(COUNT < 2, reason="fewer than two GPUs")]
SIZES = [size for size in (2, 4, 8) if size <= COUNT]
DRAWN = SamplingParams(seed=1, temperature=0.8, max_tokens=80, ignore_eos=True)
PARAMS = [DRAWN, replace(DRAWN, temperature=0), replace(DRAWN, top_k=20, top_p=0.9, logprobs=3)]


def load(size: int) -> LLM:
    arguments = {"dtype": "float32", "max_model_len": 1024, "skip_tokenizer_init": True}
    return LLM("tiny", **arguments, tensor_parallel_size=size)


def prompts(count: int) -> list[list[int]]:
    return [[(7 * row + 13 * position) % 500 + 1 for position in range(60)] for row in range(count)]


@pytest.mark.parametrize("size", SIZES)
def test_the_tokens_of_one_gpu(size: int) -> None:
    params = [PARAMS[row % len(PARAMS)] for row in range(40)]
    answers = []
    for ranks in (1, size):
        with load(ranks) as llm:
            assert llm.llm_engine.resolved.use_cuda_graphs
            outputs = [llm.generate(prompts(count), params[:count], use_tqdm=False) for count in (1, 40)]
            answers.append([[output["token_ids"] for output in each] for each in outputs])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_is_killed_while_it_decodes_ends_the_others(size: int) -> None:
    killed = []

    def kill() -> None:
        killed.append(time.perf_counter())
        os.kill(pids[0], signal.SIGKILL)

    llm = load(size)
    pids = pids_of(llm)
    try:
        llm.generate(prompts(16), DRAWN, use_tqdm=False)  # graphs are captured
        threading.Timer(0.2, kill).start()
        with pytest.raises(WorkerError, match="was killed by SIGKILL"):
            llm.generate(prompts(16), replace(DRAWN, max_tokens=900), use_tqdm=False)
        assert time.perf_counter() - killed[0] < WATCHDOG
    finally:
        started = time.perf_counter()
        llm.exit()
    assert time.perf_counter() - started < WATCHDOG
    assert not any(map(is_alive, pids))
    with load(size) as again:
        assert len(again.generate(prompts(2), DRAWN, use_tqdm=False)) == 2
