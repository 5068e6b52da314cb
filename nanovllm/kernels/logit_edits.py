"""Changes rows' logits before a token is drawn: penalties, what is added to single tokens, masks of allowed ones.

In this order: repetition, frequency and presence penalty (Keskar et al., "CTRL", 2019, for the first), then *edits*,
then the mask. An edit adds a number to one token's logit while the row is short enough and ends in given tokens: a
bias always, a ban of end-of-sequence up to a length, a ban of a word's last token behind its others.

How often a token was said is counted anew in each step, from the row's tokens: attention reads thousands of times
more of each of them, and there are no counts to carry along, over preemption for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.config import BIAS_WIDTH, MAX_BIAS_WORDS
from nanovllm.kernels.triton_support import jit_with_varying, join_launch_chain, pdl_options, runs_triton, tl

ASKED_WIDTH = 7
_BLOCK_SIZE = 2048  # logits a program shapes
_HISTORY_PROGRAMS = 8  # a row
_PART = 1 << 23  # logits whose counts are in memory at a time


@dataclass(frozen=True)
class RowLogitEdits:
    """What changes each row's logits, indexed by row. Made of zeros, it changes nothing."""

    # [all_rows, ASKED_WIDTH] int32: prompt tokens, edits, whether there are penalties and a mask (0 or 1), and the
    # bits of the penalties in fp32: repetition, frequency, presence
    asked: torch.Tensor
    # [all_rows, MAX_BIAS_WORDS] int32: edits of BIAS_WIDTH words, then the tokens that they name. An edit is a token,
    # the bits of the fp32 to add to it, the length from which it does so no more, and where the tokens begin that the
    # output must end in, and how many they are
    edits: torch.Tensor
    masks: (
        torch.Tensor
    )  # [all_rows, ceil(vocab_size / 32)] int32: token t is allowed if bit t % 32 of word t // 32 is 1

    @classmethod
    def zeros(cls, num_rows: int, vocab_size: int, device: torch.device) -> RowLogitEdits:
        widths = (ASKED_WIDTH, MAX_BIAS_WORDS, -(-vocab_size // 32))
        return cls(*(torch.zeros(num_rows, width, dtype=torch.int32, device=device) for width in widths))


@jit_with_varying("rows_ptr")
def _count_tokens_kernel(
    rows_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    asked_ptr: tl.tensor,
    edits_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    added_ptr: tl.tensor,
    max_tokens: tl.tensor,
    max_bias_words: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (part, row): every so many of the row's tokens, into their counts; so many edits, into what they add.

    A count is how often the output has a token, and bit 30: the prompt has it. Edits of one token add up in any
    order: all but one of them are bans, next to which nothing else counts.
    """
    join_launch_chain(PDL)
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    state = tl.load(rows_ptr + row).to(tl.int64)
    asked_ptr += state * 7
    history_ptr = token_ids_ptr + state * max_tokens
    length = tl.load(lengths_ptr + state)
    prompt_length = tl.load(asked_ptr)
    if tl.load(asked_ptr + 2) != 0:
        for first in range(part * BLOCK_SIZE, length, num_parts * BLOCK_SIZE):
            position = first + tl.arange(0, BLOCK_SIZE)
            token_id = tl.load(history_ptr + position, mask=position < length, other=0)
            count_ptr = counts_ptr + row * vocab_size + token_id
            tl.atomic_or(count_ptr, 0x40000000, mask=position < prompt_length)
            tl.atomic_add(count_ptr, 1, mask=(position >= prompt_length) & (position < length))
    num_edits = tl.load(asked_ptr + 1)
    edits_ptr += state * max_bias_words
    for first in range(part * BLOCK_SIZE, num_edits, num_parts * BLOCK_SIZE):
        edit = first + tl.arange(0, BLOCK_SIZE)
        inside = edit < num_edits
        token_id = tl.load(edits_ptr + edit * 5, mask=inside, other=0)
        value = tl.load(edits_ptr + edit * 5 + 1, mask=inside, other=0).to(tl.float32, bitcast=True)
        until = tl.load(edits_ptr + edit * 5 + 2, mask=inside, other=0)
        start = tl.load(edits_ptr + edit * 5 + 3, mask=inside, other=0)
        ending = tl.load(edits_ptr + edit * 5 + 4, mask=inside, other=0)
        applies = inside & (length < until) & (ending <= length - prompt_length)
        for index in range(0, tl.max(tl.where(applies, ending, 0), axis=0)):
            compared = applies & (index < ending)
            said = tl.load(history_ptr + length - ending + index, mask=compared, other=0)
            applies = applies & (said == tl.load(edits_ptr + start + index, mask=compared, other=0))
        tl.atomic_add(added_ptr + row * vocab_size + token_id, value, mask=applies)


@jit_with_varying("rows_ptr")
def _edit_logits_kernel(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    added_ptr: tl.tensor,
    asked_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    mask_words: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (block, row): the block's logits, shaped."""
    join_launch_chain(PDL)
    row = tl.program_id(1).to(tl.int64)
    state = tl.load(rows_ptr + row).to(tl.int64)
    asked_ptr += state * 7
    token_id = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = token_id < vocab_size
    logits = tl.load(logits_ptr + row * logits_stride + token_id, mask=inside, other=0.0).to(tl.float32)
    if tl.load(asked_ptr + 2) != 0:
        repetition = tl.load(asked_ptr + 4).to(tl.float32, bitcast=True)
        frequency = tl.load(asked_ptr + 5).to(tl.float32, bitcast=True)
        presence = tl.load(asked_ptr + 6).to(tl.float32, bitcast=True)
        counts = tl.load(counts_ptr + row * vocab_size + token_id, mask=inside, other=0)
        repeated = tl.where(logits > 0.0, logits / repetition, logits * repetition)
        in_output = (counts & 0x3FFFFFFF).to(tl.float32)
        logits = tl.where(counts != 0, repeated, logits) - frequency * in_output
        logits -= tl.where(in_output > 0.0, presence, 0.0)
    if tl.load(asked_ptr + 1) != 0:
        logits += tl.load(added_ptr + row * vocab_size + token_id, mask=inside, other=0.0)
    if tl.load(asked_ptr + 3) != 0:
        words = tl.load(masks_ptr + state * mask_words + token_id // 32, mask=inside, other=0)
        logits = tl.where(((words >> (token_id % 32)) & 1) != 0, logits, -float("inf"))
    tl.store(out_ptr + row * vocab_size + token_id, logits, mask=inside)


def edit_logits_reference(
    logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor, logit_edits: RowLogitEdits
) -> torch.Tensor:
    """What `edit_logits` must equal, row by row in plain torch; also what runs on a CPU."""
    shaped = logits.to(torch.float32, copy=True)  # [num_rows, vocab_size]
    for out, row, length in zip(shaped, rows.tolist(), lengths[rows].tolist(), strict=True):
        prompt_length, num_edits, is_penalised, is_masked = logit_edits.asked[row, :4].tolist()
        prompt, output = token_ids[row, :length].tensor_split([prompt_length])
        if is_penalised:
            repetition, frequency, presence = logit_edits.asked[row, 4:].view(torch.float32)
            counts = torch.bincount(output, minlength=len(out))
            repeated = torch.where(out > 0, out / repetition, out * repetition)
            torch.where(counts.index_fill(0, prompt.long(), 1) > 0, repeated, out, out=out)
            out.sub_(frequency * counts).sub_(presence * (counts > 0))
        if num_edits:
            edits = logit_edits.edits[row]
            items, words, said = edits[: num_edits * BIAS_WIDTH].view(-1, BIAS_WIDTH), edits.tolist(), output.tolist()
            fits = [
                length < until and said[max(len(said) - ending, 0) :] == words[start : start + ending]
                for _, _, until, start, ending in items.tolist()
            ]
            out.index_add_(0, items[fits, 0], items[fits, 1].view(torch.float32))
        if is_masked:
            bits = logit_edits.masks[row].unsqueeze(1) >> torch.arange(32, device=out.device)
            out.masked_fill_((bits & 1).flatten()[: len(out)] == 0, -torch.inf)
    return shaped


def edit_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    lengths: torch.Tensor,
    logit_edits: RowLogitEdits,
    *,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """The logits that tokens are drawn from; rows that ask for nothing are as they were.

    logits [num_rows, vocab_size] bf16, fp16 or fp32, rows may be strided; rows [num_rows] int32: where in token_ids
    [all_rows, max_tokens] int32, lengths [all_rows] int32 and `logit_edits` each row's values are → a new
    [num_rows, vocab_size] fp32. What a mask leaves out is -inf.
    """
    if not len(logits) or not runs_triton(logits, use_triton):
        return edit_logits_reference(logits, rows, token_ids, lengths, logit_edits)
    vocab_size, options = logits.shape[1], pdl_options(logits.device)
    shaped = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    size = max(_PART // vocab_size, 1)
    for part, of_rows, out in zip(logits.split(size), rows.split(size), shaped.split(size), strict=True):
        counts = torch.zeros(part.shape, dtype=torch.int32, device=part.device)  # [part's rows, vocab_size]
        added = torch.zeros(part.shape, dtype=torch.float32, device=part.device)
        _count_tokens_kernel[(_HISTORY_PROGRAMS, len(part))](
            *(of_rows, token_ids, lengths, logit_edits.asked, logit_edits.edits, counts, added),
            *(token_ids.shape[1], logit_edits.edits.shape[1], vocab_size),
            BLOCK_SIZE=256,
            **options,
        )
        _edit_logits_kernel[(-(-vocab_size // _BLOCK_SIZE), len(part))](
            *(part, of_rows, counts, added, logit_edits.asked, logit_edits.masks, out),
            *(part.stride(0), vocab_size, logit_edits.masks.shape[1]),
            BLOCK_SIZE=_BLOCK_SIZE,
            **options,
        )
    return shaped
