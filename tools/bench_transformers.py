"""What `bench.py --compare transformers` measures: the same weights, prompts and output lengths in transformers.

The work is what a user of `generate` would ask for: all prompts in one batch, padded on the left, computed until the
longest output is there. Tokens that end a sequence are switched off, as they are in the benchmark itself.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from nanovllm.attention.selection import select_attention
from nanovllm.config import ResolvedConfig
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.model_config import BUILTIN_SHAPES, ModelConfig
from nanovllm.models.model_context import ModelContext
from nanovllm.models.registry import get_model_class
from nanovllm.utils.loader import load_dummy_weights, weight_plan
from tools.bench_workloads import Requests


class TransformersModel:
    """A model in transformers with the weights that an engine had, on its device and in its dtype."""

    def __init__(self, engine: ResolvedConfig, dummy_weights: bool, seed: int) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device = torch.device(engine.device)
        dtype: torch.dtype = getattr(torch, engine.dtype)
        if not dummy_weights:
            model = AutoModelForCausalLM.from_pretrained(engine.model, dtype=dtype).to(self.device)
        else:
            shape = BUILTIN_SHAPES.get(engine.model)
            config = AutoConfig.from_pretrained(engine.model) if shape is None else transformers_config(shape)
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            shape = ModelConfig.from_folder(engine.model) if shape is None else shape
            model.load_state_dict(_dummy_checkpoint(shape, self.device, dtype, seed))
        self.model: Any = model.eval()

    def generate(self, requests: Requests, temperature: float) -> tuple[float, list[list[int]]]:
        """Wall time in seconds, from token ids to token ids, and each request's tokens."""
        started = time.perf_counter()
        longest = max(map(len, requests.prompts))
        input_ids = torch.zeros(len(requests.prompts), longest, dtype=torch.long)  # [num_seqs, longest]
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(requests.prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        # What the checkpoint's own generation_config says (its end tokens, top-k) would be merged in.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max(requests.output_lens),
            pad_token_id=0,
            **({"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}),
        )
        output = self.model.generate(input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device))
        rows = output[:, longest:].tolist()
        tokens = [row[:count] for row, count in zip(rows, requests.output_lens, strict=True)]
        return time.perf_counter() - started, tokens


def transformers_config(shape: ModelConfig) -> Any:
    """A built-in shape as transformers wants it."""
    return AutoConfig.for_model(
        "qwen3",
        architectures=[shape.architecture],
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope.theta,
        tie_word_embeddings=shape.tie_word_embeddings,
        attention_bias=shape.attention_bias,
        max_position_embeddings=shape.max_position_embeddings,
    )


def _dummy_checkpoint(
    shape: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """The engine's dummy weights (a function of seed, device and shape) under their names in a checkpoint."""
    attention = select_attention("torch", device, dtype, shape.head_dim, None)  # not used: nothing is computed
    context = ModelContext(config=shape, backends=attention, parallel=TensorParallel(), dtype=dtype, device=device)
    model = get_model_class(shape.architecture)(context)
    load_dummy_weights(model, device, seed)
    parameters = dict(model.named_parameters())
    checkpoint = {
        part.name: parameters[name][part.row : part.row + part.num_rows]
        for name, parts in weight_plan(model).items()
        for part in parts
        if part.name is not None
    }
    if shape.tie_word_embeddings:
        checkpoint["lm_head.weight"] = checkpoint["model.embed_tokens.weight"]
    return checkpoint
