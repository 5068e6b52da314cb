"""What a request does to its logits, in the form in which it goes to the device (`kernels.shape_logits`)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nanovllm.engine.batch import IntArray


def token_mask(token_ids: Iterable[int], vocab_size: int) -> IntArray:
    """The mask that allows these tokens and no other: [ceil(vocab_size / 32)], bit t % 32 of word t // 32 for t."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
