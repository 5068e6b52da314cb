"""Every family against transformers: the same logits for every form of checkpoint and every way to cut the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.model_context import ModelContext
from nanovllm.models.registry import get_model_class
from tests.models.checkpoints import CASES, FAMILIES, load_reference, make_checkpoint
from tests.models.paged_model import TORCH_BACKENDS, PagedModel, load_model
from tests.models.ranks import logits_of_ranks
from tests.models.test_qwen3 import (
    TOLERANCE,
    add_in_place,
    fold_in,
    in_one_prefill,
    in_two_chunks,
    largest_difference,
    one_token_at_a_time,
    prompts,
)


def reference_logits(folder: Path, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    reference = load_reference(folder)
    with torch.inference_mode():
        return {seq: reference(torch.tensor([ids])).logits[0] for seq, ids in tokens.items()}


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_logits_equal_transformers(family: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, family, variant)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("max_shard_size" in FAMILIES[family].variants[variant])
    config = ModelConfig.from_folder(folder)
    tokens = prompts(config.vocab_size)
    expected = reference_logits(folder, tokens)
    model = load_model(folder)
    for schedule in (in_one_prefill, in_two_chunks, one_token_at_a_time):
        difference = largest_difference(schedule(PagedModel(model, config), tokens), expected)
        print(f"{family}, {variant}, {schedule.__name__}: largest logit difference {difference:.2e}")
        assert difference < TOLERANCE
    add_in_place(monkeypatch)  # what many tokens on a GPU take
    assert largest_difference(in_two_chunks(PagedModel(load_model(folder), config), tokens), expected) < TOLERANCE
    fold_in(monkeypatch)  # and few
    assert largest_difference(one_token_at_a_time(PagedModel(load_model(folder), config), tokens), expected) < TOLERANCE


# The variant of each family that has the most parts to share among ranks.
WITH_MOST_PARTS = {
    "llama": "biases",
    "mistral": "window",
    "qwen2": "window_from_layer_1_on",
    "qwen3": "window",
    "qwen3_moe": "first_layer_dense",
    "gemma3": "window_and_global_layers",
    "opt": "350m",
}


@pytest.mark.parametrize("folded", [False, True], ids=["separate", "folded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_together_equal_one(
    family: str, folded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, family, WITH_MOST_PARTS[family], vocab_size=321)
    config = ModelConfig.from_folder(folder)
    tokens = prompts(config.vocab_size)
    expected = PagedModel(load_model(folder), config).step(tokens)
    if folded:
        fold_in(monkeypatch)
    for result in logits_of_ranks(folder, 2, tokens):
        assert largest_difference(result, expected) < TOLERANCE


@pytest.mark.parametrize("num_kv_heads", [8, 4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_ranks_together_equal_one(family: str, num_kv_heads: int, tmp_path: Path) -> None:
    """Up to four ranks have the same KV head, and the last one's share of the vocabulary is smaller."""
    fields = {"num_attention_heads": 8, "num_key_value_heads": num_kv_heads, "vocab_size": 321}
    if family == "opt":
        del fields["num_key_value_heads"]
    folder = make_checkpoint(tmp_path, family, WITH_MOST_PARTS[family], **fields)
    tokens = prompts(321)
    expected = PagedModel(load_model(folder), ModelConfig.from_folder(folder)).step(tokens)
    for result in logits_of_ranks(folder, 8, tokens):
        assert largest_difference(result, expected) < TOLERANCE


COMMON = ("vocab_size", "hidden_size", "max_position_embeddings", "tie_word_embeddings")


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_are_left_out_mean_what_they_mean_to_transformers(family: str, tmp_path: Path) -> None:
    """A config.json of the fields without which nothing could be loaded."""
    of = FAMILIES[family]
    sizes = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 320}
    fields: dict[str, Any] = {"model_type": of.model_type, "intermediate_size": 96, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, theirs = ModelConfig.from_folder(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours.architecture == of.architecture
    for name in COMMON:
        assert getattr(ours, name) == getattr(theirs, name), name
    if ours.rope is not None:
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
        assert ours.rope.theta == theirs.rope_parameters.get("full_attention", theirs.rope_parameters)["rope_theta"]


NUM_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
    "gemma-3-1b": 999_885_952,
    "opt-125m": 125_239_296,
}


@pytest.mark.parametrize("name", BUILTIN_SHAPES)
def test_builtin_shapes_have_the_published_number_of_parameters(name: str) -> None:
    """Built on the meta device: it costs no memory."""
    config = BUILTIN_SHAPES[name]
    parallel = TensorParallel()
    context = ModelContext(
        config=config, backends=TORCH_BACKENDS, parallel=parallel, dtype=torch.bfloat16, device="meta"
    )
    model = get_model_class(config.architecture)(context)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]
