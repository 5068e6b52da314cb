"""Our Qwen3 against transformers': the same logits for every form of checkpoint and every way to cut the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.errors import InvalidArgumentError, ModelLoadError
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from tests.models.paged_model import PagedModel, fp32_context, load_model
from tests.models.qwen3_checkpoints import VARIANTS, load_reference, make_qwen3_checkpoint
from tests.models.ranks import logits_of_ranks

TOLERANCE = 1e-4
LENGTHS = (13, 1, 30)


def prompts(vocab_size: int) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(1)
    return {
        seq: torch.randint(vocab_size, (length,), generator=generator).tolist() for seq, length in enumerate(LENGTHS)
    }


def reference_logits(folder: Path, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    reference = load_reference(folder)
    with torch.inference_mode():
        return {seq: reference(torch.tensor([ids])).logits[0] for seq, ids in tokens.items()}


def largest_difference(ours: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> float:
    assert all(ours[seq].shape == expected[seq].shape for seq in expected)
    return max(float((ours[seq] - expected[seq]).abs().max()) for seq in expected)


def in_one_prefill(run: PagedModel, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    return run.step(tokens)


def in_two_chunks(run: PagedModel, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    first = run.step({seq: ids[: (len(ids) + 1) // 2] for seq, ids in tokens.items()})
    second = run.step({seq: ids[(len(ids) + 1) // 2 :] for seq, ids in tokens.items() if len(ids) > 1})
    return {seq: torch.cat([first[seq], second[seq]]) if seq in second else first[seq] for seq in tokens}


def one_token_at_a_time(run: PagedModel, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    """Sequence i joins at step i, so that decode rows and prefill chunks share a batch."""
    pieces: dict[int, list[torch.Tensor]] = {seq: [] for seq in tokens}
    for step in range(max(LENGTHS) + len(LENGTHS)):
        due = {seq: ids[step - seq] for seq, ids in tokens.items() if 0 <= step - seq < len(ids)}
        for seq, logits in run.step({seq: [token] for seq, token in due.items()}).items() if due else ():
            pieces[seq].append(logits)
    return {seq: torch.cat(parts) for seq, parts in pieces.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    folder = make_qwen3_checkpoint(tmp_path, **VARIANTS[variant])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (variant == "sharded")
    config = ModelConfig.from_folder(folder)
    tokens = prompts(config.vocab_size)
    expected = reference_logits(folder, tokens)
    model = load_model(folder)
    assert all(not parameter.requires_grad for parameter in model.parameters())
    for schedule in (in_one_prefill, in_two_chunks, one_token_at_a_time):
        difference = largest_difference(schedule(PagedModel(model, config), tokens), expected)
        print(f"{variant}, {schedule.__name__}: largest logit difference {difference:.2e}")
        assert difference < TOLERANCE


def fold_in(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every product takes the kernel for few tokens, here its reference. Returns a list that grows with each."""
    calls: list[bool] = []

    def choose(hidden: torch.Tensor, weight: torch.Tensor, gated: bool, only_adds: bool) -> str:
        calls.append(True)
        return "skinny"

    monkeypatch.setattr("nanovllm.kernels.fused_linear._choose", choose)
    monkeypatch.setattr("nanovllm.experts.experts_method.suits_chosen_experts", lambda hidden: True)
    return calls


def add_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product after which the residual stream is added stores the sum in the stream's place."""

    def choose(hidden: torch.Tensor, weight: torch.Tensor, gated: bool, only_adds: bool) -> str | None:
        return "blas" if only_adds else None

    monkeypatch.setattr("nanovllm.kernels.fused_linear._choose", choose)


@pytest.mark.parametrize("variant", ["tied", "rope_yarn"])
def test_logits_equal_transformers_with_norms_and_additions_folded_in(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What few tokens on a GPU take, by the products' reference: the stream goes through the layers in one piece."""
    calls = fold_in(monkeypatch)
    folder = make_qwen3_checkpoint(tmp_path, **VARIANTS[variant])
    config = ModelConfig.from_folder(folder)
    tokens = prompts(config.vocab_size)
    folded = one_token_at_a_time(PagedModel(load_model(folder), config), tokens)
    assert calls
    assert largest_difference(folded, reference_logits(folder, tokens)) < TOLERANCE


def test_a_tied_checkpoint_may_bring_its_head_along(tmp_path: Path) -> None:
    """Some publishers save the tied table twice; it is read once and held once."""
    folder = make_qwen3_checkpoint(tmp_path, **VARIANTS["tied"])
    without_head = load_model(folder)
    content = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in content
    save_file(content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    with_head = load_model(folder)
    assert [name for name, _ in with_head.named_parameters()] == [name for name, _ in without_head.named_parameters()]
    assert with_head.lm_head.weight is with_head.model.embed_tokens.weight


def test_an_untied_checkpoint_must_bring_its_head(tmp_path: Path) -> None:
    folder = make_qwen3_checkpoint(tmp_path)
    content = load_file(folder / "model.safetensors")
    del content["lm_head.weight"]
    save_file(content, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"missing from the checkpoint: lm_head\.weight"):
        load_model(folder)


def test_scaled_rope_counts(tmp_path: Path) -> None:
    """The comparison above would see a wrong angle: without its scaling, a model's logits are far away."""
    folder = make_qwen3_checkpoint(tmp_path, **VARIANTS["rope_yarn"])
    config = ModelConfig.from_folder(folder, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    model = Qwen3ForCausalLM(fp32_context(config))
    scaled = load_model(folder)
    model.load_state_dict(scaled.state_dict(), assign=True)
    tokens = prompts(config.vocab_size)
    expected = PagedModel(scaled, config).step(tokens)
    assert largest_difference(PagedModel(model, config).step(tokens), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("folded", [False, True], ids=["separate", "folded"])
@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, {"attention_bias": True}),
        (2, {"tie_word_embeddings": True, "vocab_size": 321}),
        (4, {"num_attention_heads": 8, "vocab_size": 322}),
    ],
)
def test_ranks_together_equal_one(
    size: int, overrides: dict[str, Any], folded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank loads its own part; with real sums between them, all give the logits of the whole model."""
    folder = make_qwen3_checkpoint(tmp_path, **overrides)
    config = ModelConfig.from_folder(folder)
    tokens = prompts(config.vocab_size)
    expected = PagedModel(load_model(folder), config).step(tokens)
    if folded:
        fold_in(monkeypatch)
    for result in logits_of_ranks(folder, size, tokens):
        difference = largest_difference(result, expected)
        print(f"{size} ranks: largest logit difference {difference:.2e}")
        assert difference < TOLERANCE


def test_ranks_that_cannot_share_the_heads(tmp_path: Path) -> None:
    folder = make_qwen3_checkpoint(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"tensor_parallel_size=3 .* num_attention_heads=4"):
        load_model(folder, TensorParallel(0, 3))
