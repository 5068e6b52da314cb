"""Finds the lowest logit that top-k, top-p and min-p keep of a row, without sorting it.

Which tokens are kept depends on the order of the logits alone, so one threshold per row is enough. min-p needs the
row's maximum only. For top-k and top-p the number is found by bisection: floats order as integers made of their
bits do, and each pass over the row counts, or adds up the probabilities of, what lies above a pivot. 16-bit logits
have 16 bits to find, and far fewer values lie between the maximum and the 50th of a row.

The order is that of vLLM: temperature, min-p, top-k, then top-p over the probabilities that are left. Tokens
tied with the last one kept are kept too: no token is preferred for its id, and `top_k` may keep more than k.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.columns import TRUNCATION, column_of, num_words
from nanovllm.kernels.sample import MAX_LOGIT, MAX_SCALE
from nanovllm.kernels.triton_support import (
    INTERPRETED,
    constant,
    jit,
    jit_with_varying,
    join_launch_chain,
    pdl_options,
    runs_triton,
    tl,
)

_BLOCK_SIZE = 8192  # logits a program reads at a time
_INTERPRETED_BLOCK_SIZE = 1024
_REFERENCE_PART = 1 << 18  # logits the reference sorts at a time
# Low bits of a logit's fp32 form that carry no information, so that the search can skip them.
_SPARE_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
_WIDTH = constant(num_words(TRUNCATION))
_TOP_K = constant(column_of(TRUNCATION, "top_k"))
_TOP_P = constant(column_of(TRUNCATION, "top_p"))
_MIN_P = constant(column_of(TRUNCATION, "min_p"))


@jit
def _to_key(x: tl.tensor) -> tl.tensor:
    """Returns int32 keys that order as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _load_clean(row_ptr: tl.tensor, token_id: tl.tensor, vocab_size: tl.tensor, MAX_LOGIT: tl.constexpr) -> tl.tensor:
    """Loads logits as sampling reads them: finite, one zero; -inf past the end of the row."""
    logits = tl.load(row_ptr + token_id, mask=token_id < vocab_size, other=0.0).to(tl.float32)
    clean = tl.where(logits >= -MAX_LOGIT, tl.minimum(logits, MAX_LOGIT), -MAX_LOGIT)  # NaN compares false
    return tl.where(token_id < vocab_size, tl.where(clean == 0.0, 0.0, clean), -float("inf"))


@jit
def _amount_above(
    row_ptr: tl.tensor,
    vocab_size: tl.tensor,
    floor: tl.tensor,
    pivot: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    IN_PROBABILITY: tl.constexpr,
    SPARE_BITS: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Returns how many logits ≥ floor have keys ≥ pivot, or the sum of their probabilities, that of `best` being 1.

    Sums are taken in one order, whatever the pivot: rounded, they still never fall as more is added up.
    """
    amounts = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for first in range(0, vocab_size, BLOCK_SIZE):
        logits = _load_clean(row_ptr, first + tl.arange(0, BLOCK_SIZE), vocab_size, MAX_LOGIT)
        kept = (logits >= floor) & ((_to_key(logits) >> SPARE_BITS) >= pivot)
        if IN_PROBABILITY:
            amounts += tl.where(kept, tl.exp((logits - best) * scale), 0.0)
        else:
            amounts += tl.where(kept, 1.0, 0.0)
    return tl.sum(amounts, axis=0)


@jit
def _lowest_with(
    amount: tl.tensor,
    row_ptr: tl.tensor,
    vocab_size: tl.tensor,
    floor: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    IN_PROBABILITY: tl.constexpr,
    SPARE_BITS: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Returns the highest number ≥ floor above which the row has `amount`, or floor if it has less."""
    low = (_to_key(floor) >> SPARE_BITS).to(tl.int64)
    high = (_to_key(best) >> SPARE_BITS).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        above = _amount_above(
            row_ptr,
            vocab_size,
            floor,
            middle.to(tl.int32),
            best,
            scale,
            IN_PROBABILITY,
            SPARE_BITS,
            MAX_LOGIT,
            BLOCK_SIZE,
        )
        enough = above >= amount
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    key = low.to(tl.int32) << SPARE_BITS
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.maximum(bits.to(tl.float32, bitcast=True), floor)


@jit_with_varying("rows_ptr")
def _keep_thresholds_kernel(
    logits_ptr: tl.tensor,
    temperatures_ptr: tl.tensor,
    truncations_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    SPARE_BITS: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per row; one that keeps everything ends at once."""
    join_launch_chain(PDL)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    state = tl.load(rows_ptr + row).to(tl.int64)
    temperature = tl.load(temperatures_ptr + state)
    truncations_ptr += state * _WIDTH
    top_k = tl.load(truncations_ptr + _TOP_K)
    top_p = tl.load(truncations_ptr + _TOP_P)
    min_p = tl.load(truncations_ptr + _MIN_P)
    floor = tl.full([], -float("inf"), dtype=tl.float32)
    if (temperature > 0.0) & ((top_k > 0.0) | (top_p < 1.0) | (min_p > 0.0)):
        scale = tl.minimum(1.0 / temperature, MAX_SCALE)
        highest = tl.full([BLOCK_SIZE], -float("inf"), dtype=tl.float32)
        for first in range(0, vocab_size, BLOCK_SIZE):
            token_id = first + tl.arange(0, BLOCK_SIZE)
            highest = tl.maximum(highest, _load_clean(row_ptr, token_id, vocab_size, MAX_LOGIT))
        best = tl.max(highest, axis=0)
        floor = tl.full([], -MAX_LOGIT, dtype=tl.float32)
        if min_p > 0.0:
            floor = tl.maximum(floor, tl.minimum(best + tl.log(min_p) / scale, best))
        if top_k > 0.0:
            floor = _lowest_with(
                top_k, row_ptr, vocab_size, floor, best, scale, False, SPARE_BITS, MAX_LOGIT, BLOCK_SIZE
            )
        if top_p < 1.0:
            everything = tl.full([], -0x80000000, dtype=tl.int32)
            total = _amount_above(
                row_ptr, vocab_size, floor, everything, best, scale, True, SPARE_BITS, MAX_LOGIT, BLOCK_SIZE
            )
            wanted = tl.maximum(top_p * total, 1e-30)  # above nothing there must not be enough
            floor = _lowest_with(
                wanted, row_ptr, vocab_size, floor, best, scale, True, SPARE_BITS, MAX_LOGIT, BLOCK_SIZE
            )
    tl.store(out_ptr + row, floor)


def _top_k_top_p_min_p(truncations: torch.Tensor) -> list[torch.Tensor]:
    return [truncations[..., column_of(TRUNCATION, name)] for name in ("top_k", "top_p", "min_p")]


def keep_thresholds_reference(
    logits: torch.Tensor, temperatures: torch.Tensor, truncations: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Reference for `keep_thresholds`, equal but for rounding in top-p's sums, by sorting; also used on CPUs."""
    thresholds = torch.full((len(logits),), -torch.inf, device=logits.device)
    top_ks, top_ps, min_ps = _top_k_top_p_min_p(truncations[rows])  # each [num_rows]
    asked = (temperatures[rows] > 0) & ((top_ks > 0) | (top_ps < 1) | (min_ps > 0))
    for part in asked.nonzero().squeeze(1).split(max(_REFERENCE_PART // logits.shape[1], 1)):
        thresholds[part] = _thresholds_of_part(logits[part], temperatures[rows[part]], truncations[rows[part]])
    return thresholds


def _thresholds_of_part(logits: torch.Tensor, temperatures: torch.Tensor, truncations: torch.Tensor) -> torch.Tensor:
    top_ks, top_ps, min_ps = _top_k_top_p_min_p(truncations.unsqueeze(1))  # each [num_rows, 1]
    scale = (1.0 / temperatures).clamp(max=MAX_SCALE).unsqueeze(1)
    clean = torch.nan_to_num(logits.float(), nan=-MAX_LOGIT).clamp_(-MAX_LOGIT, MAX_LOGIT)
    ordered = clean.sort(dim=1, descending=True).values  # [num_rows, vocab_size]
    best, vocab_size = ordered[:, :1], logits.shape[1]
    floor = torch.minimum(best + min_ps.log() / scale, best)
    last = torch.where(top_ks > 0, top_ks, vocab_size).clamp(max=vocab_size).long() - 1
    floor = torch.maximum(floor, ordered.gather(1, last))
    mass = ((ordered - best).double() * scale).exp_().masked_fill_(ordered < floor, 0).cumsum_(dim=1)
    last = (mass < top_ps * mass[:, -1:]).sum(dim=1, keepdim=True).clamp_(max=vocab_size - 1)
    return torch.where(top_ps < 1, torch.maximum(floor, ordered.gather(1, last)), floor).squeeze(1)


def keep_thresholds(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    truncations: torch.Tensor,
    rows: torch.Tensor,
    *,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns a number for each row of logits: exactly the tokens whose logits are not below it may be drawn.

    logits [num_rows, vocab_size] bf16, fp16 or fp32, rows may be strided; rows [num_rows] int32: each row's index in
    the next two; temperatures [all_rows] fp32, ≥ 0; truncations [all_rows, 3] fp32, the columns of
    `columns.TRUNCATION`: top_k (0: off), top_p (1: off), min_p (0: off) → [num_rows] fp32, -inf for rows that keep
    everything and greedy ones.
    """
    if not runs_triton(logits, use_triton):
        return keep_thresholds_reference(logits, temperatures, truncations, rows)
    thresholds = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _keep_thresholds_kernel[(len(logits),)](
            logits_ptr=logits,
            temperatures_ptr=temperatures,
            truncations_ptr=truncations,
            rows_ptr=rows,
            out_ptr=thresholds,
            logits_stride=logits.stride(0),
            vocab_size=logits.shape[1],
            SPARE_BITS=_SPARE_BITS[logits.dtype],
            MAX_SCALE=MAX_SCALE,
            MAX_LOGIT=MAX_LOGIT,
            BLOCK_SIZE=_INTERPRETED_BLOCK_SIZE if INTERPRETED else _BLOCK_SIZE,
            num_warps=16,
            **pdl_options(logits.device),
        )
    return thresholds
