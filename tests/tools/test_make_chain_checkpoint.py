"""tools/make_chain_checkpoint.py: a checkpoint whose next token is a function of the current one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.benchmarks.workloads import EditWorkload, next_tokens
from nanovllm.models.builtin_shapes import PUBLISHED
from tests.small_llm import generate, load, token_ids
from tools import make_chain_checkpoint
from tools.make_chain_checkpoint import SHAPES

SMALL = {
    **PUBLISHED["qwen3-0.6b"],
    "vocab_size": 512,
    "hidden_size": 256,  # large enough that no two tokens are alike
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "eos_token_id": 0,
}


def test_an_edit_is_what_the_model_writes_and_drafts_foresee(tmp_path: Path) -> None:
    make_chain_checkpoint.make_chain_checkpoint(tmp_path, SMALL, torch.float32)
    requests = EditWorkload("", 1, (300, 300), (200, 200)).draw(1, 512, seed=0)
    following, text = next_tokens(512), [requests.prompts[0][-1]]
    while len(text) <= 200:
        text.append(following[text[-1]])
    params = SamplingParams(temperature=0.6, seed=1, max_tokens=200, ignore_eos=True)
    speculative = {"method": "ngram", "num_speculative_tokens": 7}
    with load(tmp_path, num_kvcache_blocks=40, max_model_len=512, speculative_config=speculative) as llm:
        assert token_ids(generate(llm, requests.prompts, params)) == [text[1:]]
        statistics = llm.llm_engine.statistics
    assert statistics.num_steps < 80, "for 200 tokens"
    assert statistics.num_accepted_tokens > 100


def test_the_shapes_are_those_of_dense_qwen3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert {PUBLISHED[name]["model_type"] for name in SHAPES} == {"qwen3"}
    with pytest.raises(SystemExit):
        make_chain_checkpoint.main([str(tmp_path), "--shape", "qwen3-30b-a3b"])
    assert "invalid choice: 'qwen3-30b-a3b'" in capsys.readouterr().err
