"""The embedding and the LM head: one vocabulary table, sharded by rows across the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.context import LayerContext
from nanovllm.layers.linear_method import UnquantizedLinear
from nanovllm.layers.parameter import WeightPart, empty_parameter


class VocabParallelEmbedding(nn.Module):
    """The vocabulary table. Rank r holds `share` rows from r · share on; rows past the last token are zero padding.

    One class serves as embedding and LM head, because tied models use one table for both. The embedding looks up
    rows, so the table is neither quantised nor packed.
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
        """Returns the vectors of token ids: [num_tokens] → [num_tokens, hidden_size]."""
        if self.parallel.size == 1:
            return F.embedding(input_ids, self.weight)
        rows = input_ids - self.first
        is_local = (rows >= 0) & (rows < self.share)  # [num_tokens]; other ranks' tokens contribute 0
        vectors = F.embedding(rows.where(is_local, torch.zeros_like(rows)), self.weight) * is_local.unsqueeze(-1)
        return self.parallel.all_reduce(vectors)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits of all tokens on every rank: [num_rows, hidden_size] → [num_rows, vocab_size]."""
        logits = self.parallel.all_gather_last_dim(self._product(hidden))
        return logits[:, : self.vocab_size]

    def logits_share(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits of this rank's tokens, from `first` on and without padding.

        [num_rows, hidden_size] → [num_rows, tokens on this rank].
        """
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
