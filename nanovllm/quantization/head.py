"""DequantizedHead: an LM head that a checkpoint quantises. It is kept in the model's dtype, as the embedding is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.linear_method import UnquantizedLinear
from nanovllm.layers.parallel import Shard
from nanovllm.quantization.matrix import Format, MatrixPart
from nanovllm.utils.loader import Source


class DequantizedHead(UnquantizedLinear):
    """Reads the table of an LM head in a format of quantised matrices."""

    def __init__(self, form: Format) -> None:
        self.form = form

    def sources(self, head: VocabParallelEmbedding, prefix: str) -> list[Source]:
        return self.form.sources(_part(head, prefix))

    def store(self, head: VocabParallelEmbedding, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        dense = self.form.read(_part(head, prefix), tensors).dequantized()
        head.weight.zero_()  # rows past the last token
        head.weight[: len(dense)] = dense

    def empty_unquantized(self, head: VocabParallelEmbedding) -> torch.Tensor:
        return torch.empty_like(head.weight)

    def store_unquantized(self, head: VocabParallelEmbedding, weight: torch.Tensor) -> None:
        head.weight.copy_(weight)


def _part(head: VocabParallelEmbedding, prefix: str) -> MatrixPart:
    start, stop = (min(head.first + rows, head.vocab_size) for rows in (0, head.share))
    return MatrixPart(prefix, Shard(head.vocab_size, start, stop), Shard.whole(head.weight.shape[1]))
