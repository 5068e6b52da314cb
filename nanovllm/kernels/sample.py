"""Draws one token a row in one pass over the logits: greedy, or by the Gumbel-max trick.

argmax(logits / T + g) with independent Gumbel noise g is a draw from softmax(logits / T), without the softmax:
Gumbel, "Statistical Theory of Extreme Values", 1954. With g = -log(E), E exponential, the same token is
argmin(E · exp((m - logits) / T)) for any m; that form costs one logarithm less and loses no digits at small T.

The noise is a pure function of (seed, position, token id), so a seeded request draws the same token whatever row
or batch it is in. It is made by the "lowbias32" mixer (Wellons, https://nullprogram.com/blog/2018/07/31/), keyed by
the SplitMix64 mixer (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).
"""

from __future__ import annotations

import torch

from nanovllm.kernels.triton_support import jit, next_power_of_2, runs_triton, tl

_BLOCK_SIZE = 4096  # logits a program reads
_REFERENCE_PART = 1 << 18  # logits the reference works on at a time
_MAX_INVERSE_TEMPERATURE = 1e30  # keeps 0 · (1 / T) from becoming NaN for denormal temperatures
_MAX_LOGIT = 3.0e38  # infinities and NaN are drawn back to finite numbers, so that a row of them still gives an id


@jit
def _mix64(x: tl.tensor) -> tl.tensor:
    """The finaliser of SplitMix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def _mix32(x: tl.tensor) -> tl.tensor:
    """lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _noise_bits(seed: tl.tensor, position: tl.tensor, token_id: tl.tensor) -> tl.tensor:
    """32 random bits for each token id: two keyed rounds, the keys from one 64-bit mix a row."""
    row_key = _mix64(_mix64(seed.to(tl.uint64) + 0x9E3779B97F4A7C15) ^ position.to(tl.uint64))
    low_key = (row_key & 0xFFFFFFFF).to(tl.uint32)
    high_key = (row_key >> 32).to(tl.uint32)
    return _mix32(_mix32(token_id.to(tl.uint32) ^ low_key) ^ high_key)


@jit
def _exponential(bits: tl.tensor) -> tl.tensor:
    """-log(1 - w) for the uniform w = (bits + 0.5) / 2³². The winner has a small w: there the series is exact."""
    w = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = w * (1.0 + w * (0.5 + w * (0.33333334 + w * 0.25)))
    return tl.where(w < 0.015625, series, -tl.log(tl.maximum(1.0 - w, 2.9802322e-8)))


@jit
def _sample_block_kernel(
    logits_ptr: tl.tensor,
    temperatures_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    block_max_ptr: tl.tensor,
    block_weight_ptr: tl.tensor,
    block_token_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_blocks: tl.tensor,
    MAX_INVERSE_TEMPERATURE: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Program (block, row): the block's largest logit, its winner, and the winner's weight against that logit."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token_id = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = token_id < vocab_size
    logits = tl.load(logits_ptr + row * logits_stride + token_id, mask=mask, other=-MAX_LOGIT).to(tl.float32)
    logits = tl.where(logits == logits, tl.minimum(tl.maximum(logits, -MAX_LOGIT), MAX_LOGIT), -MAX_LOGIT)
    block_max = tl.max(logits, axis=0)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0.0:
        bits = _noise_bits(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), token_id)
        inverse_temperature = tl.minimum(1.0 / temperature, MAX_INVERSE_TEMPERATURE)
        weight = _exponential(bits) * tl.exp((block_max - logits) * inverse_temperature)
    else:
        weight = tl.where(logits == block_max, 1.0, float("inf"))
    weight = tl.where(mask, weight, float("inf"))
    best = tl.min(weight, axis=0)
    # The lowest id among equals, and never a masked one.
    token = tl.min(tl.where((weight == best) & mask, token_id, 0x7FFFFFFF), axis=0)
    partial = row * num_blocks + block
    tl.store(block_max_ptr + partial, block_max)
    tl.store(block_weight_ptr + partial, best)
    tl.store(block_token_ptr + partial, token)


@jit
def _merge_blocks_kernel(
    temperatures_ptr: tl.tensor,
    block_max_ptr: tl.tensor,
    block_weight_ptr: tl.tensor,
    block_token_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_blocks: tl.tensor,
    MAX_INVERSE_TEMPERATURE: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """One program a row: the blocks' winners, weighed against the row's largest logit."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_SIZE)
    mask = block < num_blocks
    partial = row * num_blocks + block
    block_max = tl.load(block_max_ptr + partial, mask=mask, other=-MAX_LOGIT)
    weight = tl.load(block_weight_ptr + partial, mask=mask, other=float("inf"))
    token = tl.load(block_token_ptr + partial, mask=mask, other=0x7FFFFFFF)
    row_max = tl.max(block_max, axis=0)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0.0:
        inverse_temperature = tl.minimum(1.0 / temperature, MAX_INVERSE_TEMPERATURE)
        weight = weight * tl.exp((row_max - block_max) * inverse_temperature)
    else:
        weight = tl.where(block_max == row_max, weight, float("inf"))
    best = tl.min(weight, axis=0)
    tl.store(out_ptr + row, tl.min(tl.where(weight == best, token, 0x7FFFFFFF), axis=0))


def _unsigned_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits of an int32 or int64 tensor taken as unsigned."""
    return (x >> bits) & ((1 << (8 * x.dtype.itemsize - bits)) - 1)


def _mix64_reference(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _unsigned_shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))  # signed products wrap as unsigned ones do
    x = (x ^ _unsigned_shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _unsigned_shift(x, 31)


def _mix32_reference(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _unsigned_shift(x, 16)) * 0x7FEB352D
    x = (x ^ _unsigned_shift(x, 15)) * (0x846CA68B - (1 << 32))
    return x ^ _unsigned_shift(x, 16)


def noise_bits_reference(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The kernel's 32 random bits for every row and token id: [num_rows, vocab_size] int32."""
    row_key = _mix64_reference(_mix64_reference(seeds.long() + (0x9E3779B97F4A7C15 - (1 << 64))) ^ positions.long())
    low_key, high_key = row_key.to(torch.int32).unsqueeze(1), (row_key >> 32).to(torch.int32).unsqueeze(1)
    token_id = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    return _mix32_reference(_mix32_reference(token_id ^ low_key) ^ high_key)


def sample_reference(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """What `sample` must equal, in plain torch; also what runs on a CPU, in parts that stay in its cache."""
    rows = max(_REFERENCE_PART // logits.shape[1], 1)
    parts = zip(*(part.split(rows) for part in (logits, temperatures, seeds, positions)), strict=True)
    tokens = [_sample_part(*part) for part in parts]
    return torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32, device=logits.device)


def _sample_part(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    logits = torch.nan_to_num(logits.float(), nan=-_MAX_LOGIT).clamp(-_MAX_LOGIT, _MAX_LOGIT)
    row_max = logits.amax(dim=-1, keepdim=True)  # [num_rows, 1]
    tokens = (logits == row_max).byte().argmax(dim=-1)  # [num_rows], the lowest id among equals
    drawn = (temperatures > 0).nonzero().squeeze(1)  # greedy rows need no noise
    if drawn.numel() > 0:
        bits = noise_bits_reference(seeds[drawn], positions[drawn], logits.shape[1])
        uniform = (bits.float() + (bits < 0) * 2.0**32 + 0.5) * 2.0**-32  # [num_drawn, vocab_size]
        inverse_temperature = (1.0 / temperatures[drawn]).clamp(max=_MAX_INVERSE_TEMPERATURE).unsqueeze(1)
        growth = torch.exp((row_max[drawn] - logits[drawn]) * inverse_temperature)
        tokens[drawn] = (-torch.log1p(-uniform) * growth).argmin(dim=-1)
    return tokens.to(torch.int32)


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """One token a row: the argmax where the temperature is 0 (lowest id among equals), else a draw.

    logits [num_rows, vocab_size] bf16, fp16 or fp32, rows may be strided; temperatures [num_rows] fp32, ≥ 0;
    seeds [num_rows] int64; positions [num_rows] int32 or int64 → [num_rows] int32. NaN counts as the lowest logit,
    and every row gives a valid id, whatever its logits are.
    """
    if not runs_triton(logits, use_triton):
        return sample_reference(logits, temperatures, seeds, positions)
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // _BLOCK_SIZE)
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)  # [num_rows]
    if num_rows == 0:
        return tokens
    block_max = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)  # [num_rows, num_blocks]
    block_weight = torch.empty_like(block_max)  # [num_rows, num_blocks]
    block_token = torch.empty_like(block_max, dtype=torch.int32)  # [num_rows, num_blocks]
    _sample_block_kernel[(num_blocks, num_rows)](
        logits,
        temperatures,
        seeds,
        positions,
        block_max,
        block_weight,
        block_token,
        logits.stride(0),
        vocab_size,
        num_blocks,
        MAX_INVERSE_TEMPERATURE=_MAX_INVERSE_TEMPERATURE,
        MAX_LOGIT=_MAX_LOGIT,
        BLOCK_SIZE=_BLOCK_SIZE,
        num_warps=8,
    )
    _merge_blocks_kernel[(num_rows,)](
        temperatures,
        block_max,
        block_weight,
        block_token,
        tokens,
        num_blocks,
        MAX_INVERSE_TEMPERATURE=_MAX_INVERSE_TEMPERATURE,
        MAX_LOGIT=_MAX_LOGIT,
        BLOCK_SIZE=next_power_of_2(num_blocks),
        num_warps=1,
    )
    return tokens
