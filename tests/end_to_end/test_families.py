"""Every family gives transformers' greedy tokens, whatever the schedule, and on two ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from nanovllm import LLM, RequestOutputKind, SamplingParams
from tests.end_to_end.test_oracle import engine_tokens, reference_tokens
from tests.models.checkpoints import CASES, FAMILIES, make_checkpoint
from tests.models.test_families import WITH_MOST_PARTS
from tests.requests.tokenizer_kinds import BYTES

NUM_TOKENS = 24


def prompts_that_share(rng: random.Random) -> list[list[int]]:
    """Prompts of up to 60 tokens, some of which begin alike."""
    common = [rng.randrange(3, 320) for _ in range(40)]
    return [
        common[: rng.choice((0, 17, 40))] + [rng.randrange(3, 320) for _ in range(rng.randint(1, 20))]
        for _ in range(12)
    ]


def random_schedule(rng: random.Random) -> dict[str, Any]:
    """Settings under which prompts are computed in chunks, and sequences wait for blocks or are preempted."""
    return {
        "kvcache_block_size": (block_size := rng.choice((4, 16))),
        "num_kvcache_blocks": 120 // block_size,
        "max_num_seqs": rng.randint(2, 8),
        "max_num_batched_tokens": rng.randint(8, 64),
        "enable_prefix_caching": rng.random() < 0.7,
        "pipeline_depth": rng.randint(1, 2),
        "max_model_len": 96,
    }


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_tokens_equal_transformers_under_any_schedule(family: str, variant: str, tmp_path: Path) -> None:
    rng = random.Random(f"{family} {variant}")
    folder = make_checkpoint(tmp_path, family, variant)
    prompts = prompts_that_share(rng)
    expected = reference_tokens(folder, prompts, NUM_TOKENS)
    for _ in range(2):
        schedule = random_schedule(rng)
        assert engine_tokens(folder, prompts, NUM_TOKENS, **schedule) == expected, schedule


@pytest.mark.parametrize(
    ("family", "variant"),
    [("mistral", "window"), ("gemma3", "window_and_global_layers"), ("qwen3_moe", "first_layer_dense")],
)
def test_windows_and_experts_with_an_fp8_cache(family: str, variant: str, tmp_path: Path) -> None:
    """The same tokens under any schedule; rounding keys and values gives others than transformers'."""
    rng = random.Random(f"{family} {variant}")
    folder = make_checkpoint(tmp_path, family, variant)
    prompts = prompts_that_share(rng)
    fp8 = {"kv_cache_dtype": "fp8"}
    expected = engine_tokens(folder, prompts, NUM_TOKENS, **fp8, enable_prefix_caching=False)
    for _ in range(2):
        assert engine_tokens(folder, prompts, NUM_TOKENS, **fp8, **random_schedule(rng)) == expected


@pytest.mark.heavy("starts two processes for each family")
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_two_ranks_equal_transformers(family: str, tmp_path: Path) -> None:
    rng = random.Random(family)
    folder = make_checkpoint(tmp_path, family, WITH_MOST_PARTS[family])
    prompts = prompts_that_share(rng)
    expected = reference_tokens(folder, prompts, NUM_TOKENS)
    settings = random_schedule(rng) | {"tensor_parallel_size": 2}
    assert engine_tokens(folder, prompts, NUM_TOKENS, **settings) == expected


def save_sentencepiece_tokenizer(folder: Path) -> Any:
    """Saves a tokenizer of Llama's kind: a BOS before every text, `▁` for spaces, and a token for every byte."""
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "x", "▁a", "▁x"])}
    merges = [("▁", "a"), ("▁", "x")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    wrapped.save_pretrained(folder)
    return wrapped


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """One BOS before a text and before a chat, and the same text at once and as a stream."""
    folder = make_checkpoint(tmp_path, "llama")
    tokenizer = save_sentencepiece_tokenizer(folder)
    settings: Any = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True, "seed": 3}
    params = SamplingParams(**settings)
    with LLM(str(folder), device="cpu", num_kvcache_blocks=32) as llm:
        output = llm.generate("a x é", params, use_tqdm=False)[0]
        assert output.prompt_token_ids == [1, *tokenizer.convert_tokens_to_ids(["▁a", "▁x", "▁", "<0xC3>", "<0xA9>"])]
        completion = output.outputs[0]
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert "\ufffd" in completion.text, "the output has no bytes that are not a character"
        parts = llm.stream("a x é", SamplingParams(**settings, output_kind=RequestOutputKind.DELTA))
        assert "".join(part.outputs[0].text for part in parts) == completion.text
        chat = llm.chat([{"role": "user", "content": "a"}], params, use_tqdm=False)[0]
        assert chat.prompt_token_ids.count(1) == 1
