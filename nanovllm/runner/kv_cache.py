"""The size of the KV cache: how large a block is, and how many fit. docs/kv-cache.md has a worked example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.attention.interface import LayerKVCache
from nanovllm.errors import OutOfMemoryError
from nanovllm.models.model_config import ModelConfig
from nanovllm.utils import env
from nanovllm.utils.device_memory import GB, free_cpu_memory

_SCALE_DTYPE = torch.float32
_CPU_SHARE = 0.25  # of the free memory, when NANOVLLM_CPU_KVCACHE_GB is not set


@dataclass(frozen=True)
class KVCacheShape:
    """The shape of one rank's cache. In FP8, keys and values each have a scale for every token and KV head.

    draft: the cache of a draft model, whose blocks have the same numbers and hold the same tokens.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    draft: KVCacheShape | None = None

    @classmethod
    def of(
        cls, model: ModelConfig, block_size: int, dtype: torch.dtype, num_kv_heads: int | None = None
    ) -> KVCacheShape:
        """Returns the shape for a model. num_kv_heads: the KV heads of this rank; None: all."""
        return cls(model.num_layers, num_kv_heads or model.num_kv_heads, model.head_dim, block_size, dtype)

    @property
    def has_scales(self) -> bool:
        return self.dtype is torch.float8_e4m3fn

    @property
    def block_bytes(self) -> int:
        """Bytes of the keys and values of one block in all layers, scales and the draft model's included."""
        head_bytes = self.head_dim * self.dtype.itemsize + (_SCALE_DTYPE.itemsize if self.has_scales else 0)
        own = self.block_size * 2 * self.num_layers * self.num_kv_heads * head_bytes
        return own + (0 if self.draft is None else self.draft.block_bytes)

    def allocate(self, num_blocks: int, device: torch.device) -> list[LayerKVCache]:
        """Returns a cache for each layer, of `num_blocks` blocks and the null block after them. The draft's are last.

        They are zeroed: attention multiplies entries past the end of a sequence by zero, which NaN would survive.
        """
        blocks = (self.num_layers, 2, num_blocks + 1)
        draft = [] if self.draft is None else self.draft.allocate(num_blocks, device)
        pages = _zeros((*blocks, self.block_size, self.num_kv_heads, self.head_dim), self.dtype, device)
        if not self.has_scales:
            return [LayerKVCache(key, value) for key, value in pages] + draft
        scales = _zeros((*blocks, self.num_kv_heads, self.block_size), _SCALE_DTYPE, device)
        return [LayerKVCache(*page, *scale) for page, scale in zip(pages, scales, strict=True)] + draft


def _zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # numpy's zeros, unlike torch's, take no memory until they are written to.
    zeros = np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(zeros).view(dtype).view(size)


@dataclass(frozen=True)
class GPUMemory:
    """A GPU's memory before the KV cache is allocated, in bytes."""

    total: int  # of the device
    utilization: float  # the fraction of it that the engine may use
    weights: int
    activations: int  # of the largest steps; not in use now
    free: int  # now, without the memory of weights, CUDA context and other processes

    @property
    def available(self) -> int:
        """Bytes for the cache: the engine's share less weights and activations, and never more than is free."""
        share = int(self.total * self.utilization) - self.weights
        return min(share, self.free) - self.activations

    def num_blocks(self, shape: KVCacheShape) -> int:
        """Returns how many blocks fit. Raises OutOfMemoryError, which has the numbers, when not even one does."""
        num_blocks = self.available // shape.block_bytes - 1  # one of them is the null block
        if num_blocks < 1:
            raise OutOfMemoryError(
                f"No memory is left for the KV cache: the GPU has {self.total / GB:.2f} GB, of which "
                f"gpu_memory_utilization={self.utilization} allows {self.total * self.utilization / GB:.2f} GB; "
                f"weights take {self.weights / GB:.2f} GB, activations {self.activations / GB:.2f} GB, "
                f"{self.free / GB:.2f} GB are free now, and a block "
                f"needs {shape.block_bytes / GB:.4f} GB. {self._way_out(2 * shape.block_bytes + self.activations)}"
            )
        return num_blocks

    def _way_out(self, needed: int) -> str:
        """Returns what to change when `needed` bytes beside the weights are not available."""
        others = (
            f"end the other processes on this GPU, which hold {(self.total - self.free - self.weights) / GB:.2f} GB"
        )
        lower = "lower max_num_batched_tokens or max_num_seqs, which activations grow with"
        if self.free < needed:  # a larger share does not help when other processes hold the memory
            return f"{others[0].upper()}{others[1:]}, or {lower}."
        share = math.ceil(100 * (self.weights + needed) / self.total) / 100
        return f"Raise gpu_memory_utilization to {share} or more, {lower}, or {others}."


def lower_cache_size(num_kvcache_blocks: int | None, free: int, block_bytes: int, device: torch.device) -> str:
    """Returns the setting to lower so that the cache fits into `free` bytes: the one that the user made."""
    if num_kvcache_blocks is not None:
        return f"num_kvcache_blocks below {free // block_bytes} (or leave it out)"
    return "gpu_memory_utilization" if device.type == "cuda" else f"NANOVLLM_CPU_KVCACHE_GB below {free / GB:.2f}"


def num_cpu_blocks(shape: KVCacheShape, max_num_seqs: int, max_model_len: int, num_ranks: int = 1) -> int:
    """Returns the number of blocks on a CPU. Raises OutOfMemoryError when not even one fits.

    On all ranks together they fill NANOVLLM_CPU_KVCACHE_GB if it is set, else a quarter of the free memory, or what all
    rows can use if that is less.
    """
    asked = env.cpu_kvcache_gb()
    block_bytes = num_ranks * shape.block_bytes  # the ranks share the machine's memory
    if asked is None:
        blocks_of_all_rows = max_num_seqs * -(-max_model_len // shape.block_size)
        num_blocks = min(int(free_cpu_memory() * _CPU_SHARE) // block_bytes, blocks_of_all_rows)
    else:
        num_blocks = int(asked * GB) // block_bytes
    if num_blocks < 1:
        raise OutOfMemoryError(
            f"The KV cache needs at least one block of {block_bytes / GB:.4f} GB, and there is "
            f"{free_cpu_memory() * _CPU_SHARE / GB if asked is None else asked:.4f} GB for it. Raise "
            f"NANOVLLM_CPU_KVCACHE_GB to {math.ceil(block_bytes / GB * 1e4) / 1e4} or more, or lower "
            f"kvcache_block_size={shape.block_size}."
        )
    return num_blocks
