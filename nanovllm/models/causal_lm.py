"""The interface between a model and the engine, which every model file in this folder implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from nanovllm.attention.interface import AttentionMetadata, LayerKVCache
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.models.model_context import ModelContext
from nanovllm.utils.loader import CheckpointForm


class CausalLM(nn.Module, ABC):
    """A decoder-only language model on one rank.

    Built on the meta device, except buffers, which are computed on the context's device; `utils.loader` fills the
    parameters. Modules are named as in the checkpoint, and those with parameters have `weight_parts` (see
    `utils.loader`). Models of the usual form build on `models.decoder`.
    """

    checkpoint_form = CheckpointForm()
    redundant_weights: frozenset[str]  # checkpoint tensors that may be present and are not needed
    lm_head: VocabParallelEmbedding

    @abstractmethod
    def __init__(self, context: ModelContext) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        """Runs the layers over a step's tokens and stores their keys and values in one cache per layer.

        input_ids [num_tokens] int32 or int64, positions [num_tokens] int64 → [num_tokens, hidden_size].
        """

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the rows that are sampled: [num_rows, hidden_size] → [num_rows, vocab_size]."""
