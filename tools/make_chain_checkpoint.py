"""Makes a checkpoint whose next token is a function of the current one, for `bench.py --workload edit`.

    python tools/make_chain_checkpoint.py FOLDER --shape qwen3-0.6b
    python bench.py --model FOLDER --workload edit
    python bench.py --model FOLDER --workload edit --speculative-config '{"method": "suffix"}'

The model runs as any other of its shape, and takes as long. But its layers add nothing, as their last products are
zero, and the head has each token's embedding in the row of the token that follows it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanovllm.benchmarks.workloads import next_tokens
from nanovllm.models.builtin_shapes import PUBLISHED

SHAPES = [name for name, config in PUBLISHED.items() if config["model_type"] == "qwen3"]  # without experts


def make_chain_checkpoint(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes config.json and the weights of a Qwen3 of this configuration into `folder`. The head is not tied."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    embedding = torch.randn(config["vocab_size"], hidden, generator=generator)  # [vocab_size, hidden_size]
    embedding /= embedding.norm(dim=1, keepdim=True)
    head = torch.empty_like(embedding)
    head[torch.tensor(next_tokens(config["vocab_size"]))] = embedding
    weights = {
        "model.embed_tokens.weight": embedding.to(dtype),
        "lm_head.weight": head.to(dtype),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
        }
        zeros = {"self_attn.o_proj": (hidden, queries), "mlp.down_proj": (hidden, inner)}
        ones = {
            "self_attn.q_norm": head_dim,
            "self_attn.k_norm": head_dim,
            "input_layernorm": hidden,
            "post_attention_layernorm": hidden,
        }
        parts = {name: noise(*shape) for name, shape in shapes.items()}
        parts |= {name: torch.zeros(shape, dtype=dtype) for name, shape in zeros.items()}
        parts |= {name: torch.ones(size, dtype=dtype) for name, size in ones.items()}
        weights |= {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    save_file(weights, folder / "model.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    args = parser.parse_args(arguments)
    make_chain_checkpoint(args.folder, PUBLISHED[args.shape])


if __name__ == "__main__":
    main()
