"""What an FP8 KV cache costs in accuracy: the tiny checkpoint with it and without, and bounds on the difference.

docs/kv-cache.md reports the same figures; `pytest -s tests/end_to_end/test_fp8_cache.py` prints them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, BackendUnavailableError, InvalidArgumentError, SamplingParams
from nanovllm.runner import model_plan
from tests.end_to_end.test_oracle import random_prompts

HELD_OUT = json.loads((Path(__file__).parents[1] / "data" / "heldout_additions.json").read_text(encoding="utf-8"))
CHATS = [[{"role": "user", "content": item["prompt"]}] for item in HELD_OUT]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_BLOCKS = 1000  # so that other tests find memory on the same GPU


def answers(device: str, kv_cache_dtype: str) -> list[tuple[str, list[int]]]:
    """Greedy (text, tokens) of each chat."""
    with LLM("tiny", device=device, kv_cache_dtype=kv_cache_dtype, num_kvcache_blocks=NUM_BLOCKS) as llm:
        outputs = llm.chat(CHATS, SamplingParams(temperature=0, max_tokens=50), use_tqdm=False)
    return [(output["text"], output["token_ids"]) for output in outputs]


@pytest.mark.parametrize("device", DEVICES)
def test_the_tiny_checkpoint_still_adds(device: str) -> None:
    exact, quantized = answers(device, "auto"), answers(device, "fp8")
    score = sum(text == item["answer"] for (text, _), item in zip(quantized, HELD_OUT, strict=True)) / len(HELD_OUT)
    agreement = sum(one == other for one, other in zip(exact, quantized, strict=True)) / len(HELD_OUT)
    print(f"{device}: held-out additions with an FP8 cache: {score:.1%} exact, {agreement:.1%} as without it")
    assert score >= 0.95
    assert agreement >= 0.98


def logits_and_tokens(device: str, prompts: list[list[int]], **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding, one prompt after another: ([prompt, 32 steps, vocab_size] float32, [prompt, 32 steps])."""
    recorded: list[torch.Tensor] = []
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "max_num_seqs": 1}
    arguments |= {"device": device, "num_kvcache_blocks": NUM_BLOCKS}
    with LLM("tiny", **arguments, **settings) as llm:
        model = llm.llm_engine.executor._runner.model
        compute_logits = model.compute_logits

        def record(hidden: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = compute_logits(hidden)
            recorded.append(logits.float().cpu())
            return logits

        model.compute_logits = record
        outputs = llm.generate(prompts, params, use_tqdm=False)
    logits = torch.cat(recorded).unflatten(0, (len(prompts), 32))
    tokens = torch.tensor([output["token_ids"] for output in outputs])
    assert torch.equal(logits.argmax(-1), tokens)
    return logits, tokens


@pytest.mark.parametrize("device", DEVICES)
def test_logits_stay_close_and_greedy_tokens_mostly_agree(device: str) -> None:
    """On random prompts, where nothing is certain. Logits are compared as long as their contexts are the same."""
    prompts = random_prompts(300, seed=5, num_prompts=32)
    exact, exact_tokens = logits_and_tokens(device, prompts)
    quantized, tokens = logits_and_tokens(device, prompts, kv_cache_dtype="fp8")
    same = (exact_tokens == tokens).cumprod(dim=1).bool()  # [prompt, step]
    compared = torch.cat((torch.ones(len(prompts), 1, dtype=torch.bool), same[:, :-1]), dim=1)
    difference = (quantized - exact)[compared].norm(dim=-1) / exact[compared].norm(dim=-1)
    agreement = float((exact.argmax(-1) == quantized.argmax(-1))[compared].double().mean())
    print(
        f"{device}: {len(difference)} logit vectors: relative error median {difference.median():.4f}, "
        f"largest {difference.max():.4f}; the same greedy token in {agreement:.1%}"
    )
    assert 1e-4 < difference.median() < 0.03
    assert difference.max() < 0.2
    assert agreement > 0.95


def test_flash_attn_by_name_is_refused_with_the_way_out() -> None:
    with pytest.raises(BackendUnavailableError, match="leave attention_backend at 'auto'"):
        LLM("tiny", device="cpu", kv_cache_dtype="fp8", attention_backend="flash_attn")


def test_a_gpu_without_fp8_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    resolve = model_plan._resolve_kv_cache_dtype
    with pytest.raises(
        InvalidArgumentError, match="kv_cache_dtype.*'auto' on this GPU.*A100 has compute capability 8.0"
    ):
        resolve("fp8_e4m3", torch.bfloat16, torch.device("cuda"))
    assert resolve("auto", torch.bfloat16, torch.device("cuda")) is torch.bfloat16
    assert resolve("fp8_e4m3", torch.float32, torch.device("cpu")) is torch.float8_e4m3fn
