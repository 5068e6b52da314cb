"""An LLM on a small random checkpoint, and short ways to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm import LLM, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def load(folder: Path, **settings: Any) -> LLM:
    arguments = {"device": "cpu", "skip_tokenizer_init": True, "max_num_seqs": 8, "num_kvcache_blocks": 64}
    return LLM(str(folder), **{**arguments, **settings})


def generate(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def assert_empty(llm: LLM) -> None:
    engine = llm.llm_engine
    assert engine.scheduler.block_manager.num_used_blocks == 0
    assert engine.scheduler.rows.is_empty
    assert not engine.scheduler.waiting
    assert not engine.has_unfinished_requests()
