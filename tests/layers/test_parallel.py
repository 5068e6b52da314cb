"""Shares of the ranks, and that the pieces of all ranks make the whole weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanovllm.errors import InvalidArgumentError
from nanovllm.layers.context import LayerContext
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.parallel import TensorParallel
from tests.models.paged_model import load_model
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint


def test_shares() -> None:
    assert TensorParallel(1, 4).divide("intermediate_size", 12) == 3
    assert [TensorParallel(0, size).divide_kv_heads(4) for size in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert [TensorParallel(rank, 8).first_kv_head(2) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_what_cannot_be_shared_evenly() -> None:
    with pytest.raises(InvalidArgumentError, match=r"tensor_parallel_size=5 .* divisor of the model's vocab=12"):
        TensorParallel(0, 5).divide("vocab", 12)
    for size in (3, 6):
        with pytest.raises(InvalidArgumentError, match=f"tensor_parallel_size={size} .* num_kv_heads=4"):
            TensorParallel(0, size).divide_kv_heads(4)


def test_one_rank_needs_no_group() -> None:
    tensor = torch.ones(2, 3)
    assert TensorParallel().all_reduce(tensor) is tensor
    assert TensorParallel().all_gather_last_dim(tensor) is tensor


@pytest.mark.parametrize("vocab_size", [5, 8, 321])
def test_the_ranks_logits_are_the_vocabulary_s_without_padding(vocab_size: int) -> None:
    """A padded row's logit is 0: were it among them, it could be drawn."""
    torch.manual_seed(0)
    table, hidden = torch.randn(vocab_size, 16), torch.randn(3, 16)
    shares = []
    for rank in range(4):
        context = LayerContext(parallel=TensorParallel(rank, 4), dtype=torch.float32)
        head = VocabParallelEmbedding(context, vocab_size, 16)
        head.to_empty(device="cpu")
        rows = table[head.first : head.first + head.share]
        with torch.no_grad():
            head.weight.zero_()
            head.weight[: len(rows)] = rows
            shares.append(head.logits_share(hidden))
    logits = torch.cat(shares, dim=1)
    assert logits.shape == (3, vocab_size)
    torch.testing.assert_close(logits, hidden @ table.T)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, {"attention_bias": True, "vocab_size": 321}),
        (4, {"attention_bias": True, "vocab_size": 321}),  # 2 KV heads on 4 ranks
        (4, {"tie_word_embeddings": True, "vocab_size": 5}),  # the last rank's table is padding alone
    ],
)
def test_the_ranks_weights_make_the_checkpoint(size: int, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = make_qwen3_checkpoint(tmp_path, num_hidden_layers=1, **overrides)
    full = load_file(folder / "model.safetensors")
    ranks = [dict(load_model(folder, TensorParallel(rank, size)).named_parameters()) for rank in range(size)]
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    head_dim = 32
    query_rows, kv_rows = 4 * head_dim // size, 2 * head_dim // min(size, 2)

    def joined(name: str, start: int = 0, stop: int | None = None, dim: int = 0, every: int = 1) -> torch.Tensor:
        return torch.cat([parameters[name][start:stop] for parameters in ranks[::every]], dim)

    kinds = ("weight", "bias") if overrides.get("attention_bias") else ("weight",)
    for kind in kinds:
        qkv = f"{attention}.qkv_proj.{kind}"
        value_start = query_rows + kv_rows
        every = max(1, size // 2)  # ranks that share a KV head hold the same rows
        assert torch.equal(joined(qkv, 0, query_rows), full[f"{attention}.q_proj.{kind}"])
        assert torch.equal(joined(qkv, query_rows, value_start, every=every), full[f"{attention}.k_proj.{kind}"])
        assert torch.equal(joined(qkv, value_start, None, every=every), full[f"{attention}.v_proj.{kind}"])
        for first in range(0, size, every):
            for twin in ranks[first + 1 : first + every]:
                assert torch.equal(twin[qkv][query_rows:], ranks[first][qkv][query_rows:])
    inner = 96 // size
    assert torch.equal(joined(f"{mlp}.gate_up_proj.weight", 0, inner), full[f"{mlp}.gate_proj.weight"])
    assert torch.equal(joined(f"{mlp}.gate_up_proj.weight", inner), full[f"{mlp}.up_proj.weight"])
    for name in (f"{attention}.o_proj", f"{mlp}.down_proj"):
        assert torch.equal(joined(f"{name}.weight", dim=1), full[f"{name}.weight"])
    tables = (
        ("model.embed_tokens.weight",)
        if "tie_word_embeddings" in overrides
        else (
            "model.embed_tokens.weight",
            "lm_head.weight",
        )
    )
    for name in tables:
        table = joined(name)
        vocab_size = overrides["vocab_size"]
        assert torch.equal(table[:vocab_size], full[name])
        assert table.shape[0] % size == 0
        assert not table[vocab_size:].any()
    norm = "model.layers.0.input_layernorm.weight"
    assert all(torch.equal(parameters[norm], full[norm]) for parameters in ranks)
