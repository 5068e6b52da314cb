"""On a GPU: every family gives transformers' tokens in fp32, with CUDA graphs and without, and the same in bf16."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.end_to_end.test_families import NUM_TOKENS, prompts_that_share
from tests.end_to_end.test_oracle import engine_tokens, reference_tokens
from tests.models.checkpoints import CASES, FAMILIES, make_checkpoint
from tests.models.test_families import WITH_MOST_PARTS

pytestmark = pytest.mark.gpu
ON_GPU: dict[str, Any] = {"device": "cuda", "attention_backend": "triton", "num_kvcache_blocks": 64, "max_num_seqs": 8}


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_fp32_tokens_equal_transformers(family: str, variant: str, enforce_eager: bool, tmp_path: Path) -> None:
    """Batches of one row too: these have products of their own."""
    folder = make_checkpoint(tmp_path, family, variant)
    prompts = prompts_that_share(random.Random(0))
    expected = reference_tokens(folder, prompts, NUM_TOKENS)
    settings = {**ON_GPU, "enforce_eager": enforce_eager}
    assert engine_tokens(folder, prompts, NUM_TOKENS, **settings) == expected
    assert engine_tokens(folder, prompts, NUM_TOKENS, **{**settings, "max_num_seqs": 1}) == expected


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_bf16_log_probabilities_are_those_of_the_torch_backend(family: str, head_dim: int, tmp_path: Path) -> None:
    """Heads of 64 and 128 take the prefill kernel for Hopper, where the GPU is one."""
    folder = make_checkpoint(tmp_path, family, WITH_MOST_PARTS[family], head_dim=head_dim)
    prompts = [prompt * 4 for prompt in prompts_that_share(random.Random(0))]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)

    def logprobs(attention_backend: str) -> torch.Tensor:
        """Those of every prompt token but the first, all prompts one after another."""
        settings = {**ON_GPU, "num_kvcache_blocks": 256, "attention_backend": attention_backend}
        with LLM(str(folder), dtype="bfloat16", skip_tokenizer_init=True, **settings) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        entries = [entry for output in outputs for entry in (output.prompt_logprobs or []) if entry is not None]
        return torch.tensor([next(iter(entry.values())).logprob for entry in entries])

    difference = (logprobs("triton") - logprobs("torch")).abs()
    print(f"{family}, head_dim={head_dim}: mean difference {difference.mean():.3f}, largest {difference.max():.3f}")
    assert difference.mean() < 0.1
