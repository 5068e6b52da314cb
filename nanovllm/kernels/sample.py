"""Draws one token per row in one pass over the logits: greedy, or by the Gumbel-max trick.

argmax(logits / T + g) with independent Gumbel noise g is a draw from softmax(logits / T), without the softmax:
Gumbel, "Statistical Theory of Extreme Values", 1954. Here g = -log(E) with E exponential.

The noise is a pure function of (seed, position, token id), so a seeded request draws the same token whatever row
or batch it is in. It is made by the "lowbias32" mixer (Wellons, https://nullprogram.com/blog/2018/07/31/), keyed at
two places by the SplitMix64 mixer (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).
"""

from __future__ import annotations

import torch

from nanovllm.kernels.columns import INVALID_TOKEN
from nanovllm.kernels.triton_support import (
    INTERPRETED,
    constant,
    jit,
    jit_with_varying,
    join_launch_chain,
    libdevice,
    next_power_of_2,
    pdl_options,
    runs_triton,
    tl,
)

_BLOCK_SIZE = 2048  # logits a program reads
_REFERENCE_PART = 1 << 18  # logits the reference works on at a time
MAX_SCALE = 1e6  # the largest 1 / T: beyond it noise no longer matters, and products would overflow
_NO_TOKEN = 0x7FFFFFFF
MAX_LOGIT = 1e30  # -inf counts as -MAX_LOGIT, so that a row of it still gives an id
_INVALID = constant(INVALID_TOKEN)


@jit
def _mix64(x: tl.tensor) -> tl.tensor:
    """The finaliser of SplitMix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def _noise_bits(seed: tl.tensor, position: tl.tensor, token_id: tl.tensor) -> tl.tensor:
    """32 random bits for each token id: lowbias32, half of the row's 64-bit key before it, half within."""
    key = _mix64(_mix64(seed.to(tl.uint64) + 0x9E3779B97F4A7C15) ^ position.to(tl.uint64))
    x = token_id.to(tl.uint32) ^ (key & 0xFFFFFFFF).to(tl.uint32)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _log(x: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """The hardware's logarithm, absolute error 2⁻²² around 1: a few instructions where the exact one takes many."""
    return tl.log(x) if INTERPRETED else libdevice.fast_logf(x)


@jit
def _gumbel(bits: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """-log(-log(1 - w)) for the uniform w = (bits + 0.5) / 2³². A winner's w is small: there a series is exact."""
    w = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = w + w * w * (0.5 + w * 0.33333334)
    exponential = tl.where(w < 0.00390625, series, -_log(tl.maximum(1.0 - w, 5.9604645e-8), INTERPRETED))
    return -_log(exponential, INTERPRETED)


@jit_with_varying("rows_ptr")
def _sample_block_kernel(
    logits_ptr: tl.tensor,
    temperatures_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    block_score_ptr: tl.tensor,
    block_token_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    first_token: tl.tensor,
    num_blocks: tl.tensor,
    MAX_SCALE: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    TRUNCATES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (block, row): the block's best score, and the lowest token id that has it.

    NaN scores +inf, as +inf does, so that it wins wherever it is. A row with such a winner is invalid.
    """
    join_launch_chain(PDL)
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token_id = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row_ptr = logits_ptr + row * logits_stride
    logits = tl.load(row_ptr + token_id, mask=token_id < vocab_size, other=-float("inf")).to(tl.float32)
    scores = tl.where(logits < float("inf"), tl.maximum(logits, -MAX_LOGIT), float("inf"))  # NaN compares false
    state = tl.load(rows_ptr + row)
    temperature = tl.load(temperatures_ptr + state)
    if temperature > 0.0:
        bits = _noise_bits(tl.load(seeds_ptr + state), tl.load(positions_ptr + state), first_token + token_id)
        scale = tl.minimum(1.0 / temperature, MAX_SCALE)
        drawn = scores * scale + _gumbel(bits, INTERPRETED)
        if TRUNCATES:
            drawn = tl.where(scores >= tl.load(thresholds_ptr + row), drawn, -float("inf"))
        scores = drawn
    best = tl.max(scores, axis=0)
    token = tl.min(tl.where(scores == best, token_id, 0x7FFFFFFF), axis=0)
    tl.store(block_score_ptr + row * num_blocks + block, best)
    # In a row of nothing but -inf the masked ids behind the vocabulary may win.
    token = first_token + tl.minimum(token, vocab_size - 1)
    tl.store(block_token_ptr + row * num_blocks + block, tl.where(best < float("inf"), token, _INVALID))


@jit
def _merge_blocks_kernel(
    block_score_ptr: tl.tensor,
    block_token_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per row: the best of the blocks' winners."""
    join_launch_chain(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_SIZE)
    mask = block < num_blocks
    scores = tl.load(block_score_ptr + row * num_blocks + block, mask=mask, other=-float("inf"))
    tokens = tl.load(block_token_ptr + row * num_blocks + block, mask=mask, other=0x7FFFFFFF)
    tl.store(out_ptr + row, tl.min(tl.where(scores == tl.max(scores, axis=0), tokens, 0x7FFFFFFF), axis=0))


def _unsigned_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits of an int32 or int64 tensor taken as unsigned."""
    return (x >> bits) & ((1 << (8 * x.dtype.itemsize - bits)) - 1)


def _mix64_reference(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _unsigned_shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))  # signed products wrap as unsigned ones do
    x = (x ^ _unsigned_shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _unsigned_shift(x, 31)


def noise_bits_reference(
    seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int, first_token: int = 0
) -> torch.Tensor:
    """The kernel's 32 random bits for every row and token id from `first_token` on: [num_rows, vocab_size] int32."""
    key = _mix64_reference(_mix64_reference(seeds.long() + (0x9E3779B97F4A7C15 - (1 << 64))) ^ positions.long())
    low_key, high_key = key.to(torch.int32).unsqueeze(1), (key >> 32).to(torch.int32).unsqueeze(1)
    token_ids = torch.arange(first_token, first_token + vocab_size, dtype=torch.int32, device=seeds.device)
    x = token_ids ^ low_key
    x = ((x ^ _unsigned_shift(x, 16)) * 0x7FEB352D) ^ high_key
    x = (x ^ _unsigned_shift(x, 15)) * (0x846CA68B - (1 << 32))
    return x ^ _unsigned_shift(x, 16)


def sample_reference(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    thresholds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference for `sample` in plain torch; also used on CPUs, in parts that stay in its cache."""
    return _best_reference(logits, temperatures, seeds, positions, rows, 0, thresholds)[1]


def _best_reference(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    first_token: int,
    thresholds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each row's best score and its token: [num_rows] fp32, [num_rows] int32."""
    part_size = max(_REFERENCE_PART // logits.shape[1], 1)
    if thresholds is None:
        thresholds = torch.full((), -torch.inf, device=logits.device).expand(len(logits))
    inputs = (logits, temperatures[rows], seeds[rows], positions[rows], thresholds)
    parts = zip(*(part.split(part_size) for part in inputs), strict=True)
    best = [_best_of_part(first_token, *part) for part in parts]
    if not best:
        return torch.empty(0, device=logits.device), torch.empty(0, dtype=torch.int32, device=logits.device)
    scores, tokens = zip(*best, strict=True)
    return torch.cat(scores), torch.cat(tokens)


def _best_of_part(
    first_token: int,
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    thresholds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.float().clamp(min=-MAX_LOGIT)  # [num_rows, vocab_size]; NaN stays NaN, and is its row's maximum
    drawn = (temperatures > 0).unsqueeze(1)  # [num_rows, 1]
    if drawn.any():
        bits = noise_bits_reference(seeds, positions, logits.shape[1], first_token)
        uniform = (bits.float() + (bits < 0) * 2.0**32 + 0.5) * 2.0**-32  # [num_rows, vocab_size]
        gumbel = uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()
        scale = (1.0 / temperatures).clamp(max=MAX_SCALE).unsqueeze(1)
        below = drawn & (scores < thresholds.unsqueeze(1))
        scores = torch.where(drawn, scores * scale + gumbel, scores).masked_fill_(below, -torch.inf)
    best = scores.amax(dim=-1, keepdim=True)  # [num_rows, 1]
    # As bytes: argmax gives the lowest id among equals.
    tokens = (scores == best).byte().argmax(dim=-1).to(torch.int32) + first_token
    best = best.squeeze(1).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return best, tokens.masked_fill_(best == torch.inf, INVALID_TOKEN)


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    *,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns one token per row of logits: the argmax at temperature 0 (lowest id among equals), otherwise a draw.

    logits [num_rows, vocab_size] bf16, fp16 or fp32, rows may be strided; rows [num_rows] int32: each row's index in
    the next three; temperatures [all_rows] fp32, ≥ 0; seeds [all_rows] int64; positions [all_rows] int32
    or int64; thresholds [num_rows] fp32: tokens with lower logits are not drawn (`kernels.truncate`)
    → [num_rows] int32, INVALID_TOKEN for a row with a logit that is NaN or +inf; -inf is a valid logit.
    """
    if not runs_triton(logits, use_triton):
        return sample_reference(logits, temperatures, seeds, positions, rows, thresholds)
    num_rows = len(logits)
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)  # [num_rows]
    if num_rows == 0:
        return tokens
    block_score, block_token = _best_of_blocks(logits, temperatures, seeds, positions, rows, 0, thresholds)
    num_blocks = block_score.shape[1]
    _merge_blocks_kernel[(num_rows,)](
        block_score_ptr=block_score,
        block_token_ptr=block_token,
        out_ptr=tokens,
        num_blocks=num_blocks,
        BLOCK_SIZE=next_power_of_2(num_blocks),
        num_warps=1,
        **pdl_options(logits.device),
    )
    return tokens


def sample_candidates(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    first_token: int,
    *,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns this rank's winners where the vocabulary is sharded; `best_candidates` chooses one for each row.

    As `sample`, but logits [num_rows, tokens on this rank] are those of tokens `first_token` … (there may be none)
    → [num_rows, 2] int32: the bits of the winner's fp32 score, and its token.
    """
    if not logits.shape[1]:
        scores = logits.new_full((len(logits),), -torch.inf, dtype=torch.float32)
        tokens = torch.full_like(scores, _NO_TOKEN, dtype=torch.int32)
    elif runs_triton(logits, use_triton) and len(logits):
        scores, tokens = _lowest_best(
            *_best_of_blocks(logits, temperatures, seeds, positions, rows, first_token), dim=1
        )
    else:
        scores, tokens = _best_reference(logits, temperatures, seeds, positions, rows, first_token)
    return torch.stack([scores.view(torch.int32), tokens], dim=1)


def best_candidates(candidates: torch.Tensor) -> torch.Tensor:
    """Returns tokens [num_rows] int32 from the ranks' candidates [num_ranks, num_rows, 2]: of equals the lowest id."""
    scores, tokens = candidates.unbind(-1)
    return _lowest_best(scores.contiguous().view(torch.float32), tokens, dim=0)[1]


def _lowest_best(scores: torch.Tensor, tokens: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = scores.amax(dim=dim, keepdim=True)
    return best.squeeze(dim), tokens.masked_fill(scores != best, _NO_TOKEN).amin(dim=dim)


def _best_of_blocks(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    first_token: int,
    thresholds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the best score and its token of each row and block of logits: [num_rows, num_blocks] fp32 and int32."""
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // _BLOCK_SIZE)
    block_score = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)  # [num_rows, num_blocks]
    block_token = torch.empty_like(block_score, dtype=torch.int32)  # [num_rows, num_blocks]
    _sample_block_kernel[(num_blocks, num_rows)](
        logits_ptr=logits,
        temperatures_ptr=temperatures,
        seeds_ptr=seeds,
        positions_ptr=positions,
        rows_ptr=rows,
        thresholds_ptr=thresholds,
        block_score_ptr=block_score,
        block_token_ptr=block_token,
        logits_stride=logits.stride(0),
        vocab_size=vocab_size,
        first_token=first_token,
        num_blocks=num_blocks,
        MAX_SCALE=MAX_SCALE,
        MAX_LOGIT=MAX_LOGIT,
        TRUNCATES=thresholds is not None,
        BLOCK_SIZE=_BLOCK_SIZE,
        INTERPRETED=INTERPRETED,
        num_warps=2,
        **pdl_options(logits.device),
    )
    return block_score, block_token
