"""The oracle: transformers, on the same checkpoint, gives the same greedy tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER
from tests.models.qwen3_checkpoints import VARIANTS, make_qwen3_checkpoint

NUM_PROMPTS = 64
NUM_TOKENS = 64


def random_prompts(vocab_size: int, seed: int = 0, num_prompts: int = NUM_PROMPTS) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(generator.randint(1, 40))] for _ in range(num_prompts)]


def reference_tokens(
    folder: Path, prompts: list[list[int]], num_tokens: int = NUM_TOKENS, device: str = "cpu"
) -> list[list[int]]:
    """Greedy continuations by transformers in fp32, EOS or not, all prompts in one left-padded batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    tokens = []
    with torch.inference_mode():
        for _ in range(num_tokens):
            out = model(input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            input_ids = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(input_ids)
            mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)
            positions = positions[:, -1:] + 1
    return torch.cat(tokens, dim=1).tolist()


def engine_tokens(folder: Path, prompts: list[list[int]], num_tokens: int = NUM_TOKENS, **settings: object) -> list:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    arguments = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, **settings}
    with LLM(str(folder), **arguments) as llm:
        return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_shapes(tmp_path: Path, variant: str) -> None:
    folder = make_qwen3_checkpoint(tmp_path, **VARIANTS[variant])
    prompts = random_prompts(320)
    assert engine_tokens(folder, prompts) == reference_tokens(folder, prompts)


def test_tiny_checkpoint() -> None:
    prompts = random_prompts(300, seed=1)
    assert engine_tokens(TINY_MODEL_FOLDER, prompts) == reference_tokens(TINY_MODEL_FOLDER, prompts)
