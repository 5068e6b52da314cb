"""The vocabulary's table, cut by rows over the ranks: from token ids to vectors, and from vectors to logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.context import LayerContext
from nanovllm.layers.linear_method import UnquantizedLinear
from nanovllm.layers.parameter import WeightPart, empty_parameter


class VocabParallelEmbedding(nn.Module):
    """Rank r holds rows r · share … of the table; rows past the last token are zero padding.

    One class for the embedding and the LM head, as tied models use one table for both. Rows are looked up in it, so
    it is neither quantised nor packed.
    """

    def __init__(self, context: LayerContext, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.parallel = context.parallel
        self.share = -(-vocab_size // self.parallel.size)  # rows on each rank, padding included
        self.first = self.parallel.rank * self.share
        self.weight = empty_parameter(self.share, hidden_size, dtype=context.dtype)
        self.method = UnquantizedLinear()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [num_tokens] → their vectors [num_tokens, hidden_size]."""
        if self.parallel.size == 1:
            return F.embedding(input_ids, self.weight)
        rows = input_ids - self.first
        mine = (rows >= 0) & (rows < self.share)  # [num_tokens]: the others' tokens give 0 here
        vectors = F.embedding(rows.where(mine, torch.zeros_like(rows)), self.weight) * mine.unsqueeze(-1)
        return self.parallel.all_reduce(vectors)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] → [num_rows, vocab_size], the same on every rank."""
        logits = self.parallel.all_gather_last_dim(self._product(hidden))
        return logits[:, : self.vocab_size]

    def logits_share(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] → [num_rows, tokens on this rank]: those from `first` on, without padding."""
        return self._product(hidden)[:, : max(self.vocab_size - self.first, 0)]

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        fuses = self.method.fuses(self, hidden)
        return (self.method.multiply_fused if fuses else self.method.multiply)(self, hidden)

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        hidden_size = self.weight.shape[1]
        start, stop = (min(self.first + rows, self.vocab_size) for rows in (0, self.share))
        table = WeightPart(f"{prefix}.weight", (self.vocab_size, hidden_size), 0, start, stop)
        padding = WeightPart(None, (self.share - table.num_rows, hidden_size), row=table.num_rows)
        return {f"{prefix}.weight": [table, padding]}
