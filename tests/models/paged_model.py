"""Runs a model over a paged cache, step by step, with blocks allocated in a shuffled order."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import torch

from nanovllm.attention.interface import AttentionMetadata, DecodeMetadata, LayerKVCache, PrefillMetadata
from nanovllm.attention.torch_backend import TorchBackend
from nanovllm.layers.linear_method import LinearMethod, UnquantizedLinear
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.model_context import ModelContext
from nanovllm.models.registry import get_model_class
from nanovllm.quantization.registry import read_quantization
from nanovllm.utils.loader import load_weights

CPU = torch.device("cpu")
TORCH_BACKENDS = SimpleNamespace(prefill=TorchBackend(), decode=TorchBackend())


def fp32_context(
    config: ModelConfig, parallel: TensorParallel | None = None, linear_method: LinearMethod | None = None
) -> ModelContext:
    """What a model on the CPU is built with, in fp32, with the torch backend."""
    return ModelContext(
        config=config,
        backends=TORCH_BACKENDS,
        parallel=parallel or TensorParallel(),
        dtype=torch.float32,
        device=CPU,
        linear_method=linear_method or UnquantizedLinear(),
    )


def load_model(folder: Path, parallel: TensorParallel | None = None, quantization: str | None = None) -> CausalLM:
    """The model of a folder on the CPU, in fp32, with the torch backend."""
    config = ModelConfig.from_folder(folder)
    model = get_model_class(config.architecture)(fp32_context(config, parallel))
    if (quantized := read_quantization(quantization, config.quantization_config)) is not None:
        quantized.apply(model, CPU)
    load_weights(model, folder, CPU, model.redundant_weights, form=model.checkpoint_form)
    return model


class PagedModel:
    """`step` computes some tokens of some sequences and gives the logits of each of them."""

    def __init__(self, model: CausalLM, config: ModelConfig, num_kv_heads: int | None = None) -> None:
        self.model = model
        self.block_size = 4
        num_blocks = 64
        shape = (num_blocks, self.block_size, num_kv_heads or config.num_kv_heads, config.head_dim)
        # What has not been written must not be read: it would show as NaN.
        self.kv_caches = [
            LayerKVCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in range(config.num_layers)
        ]
        self.free_blocks = list(range(num_blocks))
        random.Random(0).shuffle(self.free_blocks)
        self.block_tables: dict[int, list[int]] = {}
        self.context_lens: dict[int, int] = {}

    @torch.inference_mode()
    def step(self, work: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Sequence id → its next tokens; gives sequence id → logits [num_tokens, vocab_size].

        One token of a sequence that has a context decodes; all else prefills.
        """
        decodes = [seq for seq, tokens in work.items() if len(tokens) == 1 and self.context_lens.get(seq, 0) > 0]
        prefills = [seq for seq in work if seq not in decodes]
        positions: list[int] = []
        slots: list[int] = []
        for seq in decodes + prefills:
            start = self.context_lens.get(seq, 0)
            end = self.context_lens[seq] = start + len(work[seq])
            table = self.block_tables.setdefault(seq, [])
            while len(table) * self.block_size < end:
                table.append(self.free_blocks.pop())
            positions += range(start, end)
            slots += [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, end)]
        metadata = AttentionMetadata(
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            num_decode_tokens=len(decodes),
            decode=self._decode_metadata(decodes) if decodes else None,
            prefill=self._prefill_metadata(prefills, work) if prefills else None,
            first_prefill_token=len(decodes),
        )
        input_ids = torch.tensor([token for seq in decodes + prefills for token in work[seq]], dtype=torch.int32)
        hidden = self.model(input_ids, torch.tensor(positions), metadata, self.kv_caches)
        logits = self.model.compute_logits(hidden).split([len(work[seq]) for seq in decodes + prefills])
        return dict(zip(decodes + prefills, logits, strict=True))

    def _decode_metadata(self, seqs: list[int]) -> DecodeMetadata:
        lens = [self.context_lens[seq] for seq in seqs]
        return DecodeMetadata(torch.tensor(lens, dtype=torch.int32), self._tables(seqs), max(lens))

    def _prefill_metadata(self, seqs: list[int], work: dict[int, list[int]]) -> PrefillMetadata:
        query_lens = [len(work[seq]) for seq in seqs]
        lens = [self.context_lens[seq] for seq in seqs]
        starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        return PrefillMetadata(
            starts, torch.tensor(lens, dtype=torch.int32), self._tables(seqs), max(query_lens), max(lens)
        )

    def _tables(self, seqs: list[int]) -> torch.Tensor:
        width = max(len(self.block_tables[seq]) for seq in seqs)
        rows = [self.block_tables[seq] + [0] * (width - len(self.block_tables[seq])) for seq in seqs]
        return torch.tensor(rows, dtype=torch.int32)
