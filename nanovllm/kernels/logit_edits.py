"""Changes rows' logits before a token is drawn: penalties, token biases, masks of allowed tokens.

In this order: repetition, frequency and presence penalty (Keskar et al., "CTRL", 2019, for the first), then token
biases, then the mask. A token bias adds a number to one token's logit while the row is short enough and ends in given
tokens. It serves `logit_bias` (always), `min_tokens` (bans end-of-sequence up to a length) and `bad_words` (bans a
word's last token after its others).

Each step counts a row's tokens again. That costs little, because attention reads thousands of times more for each
token, and no counts have to survive preemption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.config import MAX_BIAS_WORDS
from nanovllm.kernels.columns import BIAS_WIDTH, LOGIT_EDITS, TOKEN_BIAS, column_of, num_words
from nanovllm.kernels.triton_support import constant, jit_with_varying, join_launch_chain, pdl_options, runs_triton, tl

_BLOCK_SIZE = 2048  # logits a program edits
_HISTORY_PROGRAMS = 8  # per row
_PART = 1 << 23  # logits whose counts are in memory at a time

_SETTINGS_WIDTH = constant(num_words(LOGIT_EDITS))
_NUM_PROMPT_TOKENS = constant(column_of(LOGIT_EDITS, "num_prompt_tokens"))
_NUM_TOKEN_BIASES = constant(column_of(LOGIT_EDITS, "num_token_biases"))
_HAS_PENALTIES = constant(column_of(LOGIT_EDITS, "has_penalties"))
_HAS_MASK = constant(column_of(LOGIT_EDITS, "has_mask"))
_REPETITION = constant(column_of(LOGIT_EDITS, "repetition_penalty"))
_FREQUENCY = constant(column_of(LOGIT_EDITS, "frequency_penalty"))
_PRESENCE = constant(column_of(LOGIT_EDITS, "presence_penalty"))
_BIAS_WIDTH = constant(BIAS_WIDTH)
_TOKEN_ID = constant(column_of(TOKEN_BIAS, "token_id"))
_BIAS = constant(column_of(TOKEN_BIAS, "bias"))
_UNTIL_LENGTH = constant(column_of(TOKEN_BIAS, "until_length"))
_ENDING_START = constant(column_of(TOKEN_BIAS, "ending_start"))
_ENDING_LENGTH = constant(column_of(TOKEN_BIAS, "ending_length"))


@dataclass(frozen=True)
class RowLogitEdits:
    """The edits of each row's logits, indexed by row. Zeros change nothing.

    settings: [all_rows, words of `columns.LOGIT_EDITS`] int32.
    token_biases: [all_rows, MAX_BIAS_WORDS] int32: items of `columns.TOKEN_BIAS`, then the endings that they name.
    masks: [all_rows, ceil(vocab_size / 32)] int32: token t is allowed if bit t % 32 of word t // 32 is 1.
    """

    settings: torch.Tensor
    token_biases: torch.Tensor
    masks: torch.Tensor

    @classmethod
    def zeros(cls, num_rows: int, vocab_size: int, device: torch.device) -> RowLogitEdits:
        widths = (num_words(LOGIT_EDITS), MAX_BIAS_WORDS, -(-vocab_size // 32))
        return cls(*(torch.zeros(num_rows, width, dtype=torch.int32, device=device) for width in widths))


@jit_with_varying("rows_ptr")
def _count_tokens_kernel(
    rows_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    settings_ptr: tl.tensor,
    biases_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    added_ptr: tl.tensor,
    max_tokens: tl.tensor,
    max_bias_words: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (part, row): counts its part of the row's tokens, and adds up its part of the row's token biases.

    A count is how often the output has a token; bit 30 is set where the prompt has it. A token's biases may be
    added in any order: all but one of them are bans, and next to a ban the other does not matter.
    """
    join_launch_chain(PDL)
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    state = tl.load(rows_ptr + row).to(tl.int64)
    settings_ptr += state * _SETTINGS_WIDTH
    history_ptr = token_ids_ptr + state * max_tokens
    length = tl.load(lengths_ptr + state)
    prompt_length = tl.load(settings_ptr + _NUM_PROMPT_TOKENS)
    if tl.load(settings_ptr + _HAS_PENALTIES) != 0:
        for first in range(part * BLOCK_SIZE, length, num_parts * BLOCK_SIZE):
            position = first + tl.arange(0, BLOCK_SIZE)
            token_id = tl.load(history_ptr + position, mask=position < length, other=0)
            count_ptr = counts_ptr + row * vocab_size + token_id
            tl.atomic_or(count_ptr, 0x40000000, mask=position < prompt_length)
            tl.atomic_add(count_ptr, 1, mask=(position >= prompt_length) & (position < length))
    num_biases = tl.load(settings_ptr + _NUM_TOKEN_BIASES)
    biases_ptr += state * max_bias_words
    for first in range(part * BLOCK_SIZE, num_biases, num_parts * BLOCK_SIZE):
        bias = first + tl.arange(0, BLOCK_SIZE)
        inside = bias < num_biases
        bias_ptr = biases_ptr + bias * _BIAS_WIDTH
        token_id = tl.load(bias_ptr + _TOKEN_ID, mask=inside, other=0)
        value = tl.load(bias_ptr + _BIAS, mask=inside, other=0).to(tl.float32, bitcast=True)
        until_length = tl.load(bias_ptr + _UNTIL_LENGTH, mask=inside, other=0)
        ending_start = tl.load(bias_ptr + _ENDING_START, mask=inside, other=0)
        ending_length = tl.load(bias_ptr + _ENDING_LENGTH, mask=inside, other=0)
        applies = inside & (length < until_length) & (ending_length <= length - prompt_length)
        for index in range(0, tl.max(tl.where(applies, ending_length, 0), axis=0)):
            compared = applies & (index < ending_length)
            said = tl.load(history_ptr + length - ending_length + index, mask=compared, other=0)
            applies = applies & (said == tl.load(biases_ptr + ending_start + index, mask=compared, other=0))
        tl.atomic_add(added_ptr + row * vocab_size + token_id, value, mask=applies)


@jit_with_varying("rows_ptr")
def _edit_logits_kernel(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    added_ptr: tl.tensor,
    settings_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    mask_words: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (block, row): edits the block's logits."""
    join_launch_chain(PDL)
    row = tl.program_id(1).to(tl.int64)
    state = tl.load(rows_ptr + row).to(tl.int64)
    settings_ptr += state * _SETTINGS_WIDTH
    token_id = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = token_id < vocab_size
    logits = tl.load(logits_ptr + row * logits_stride + token_id, mask=inside, other=0.0).to(tl.float32)
    if tl.load(settings_ptr + _HAS_PENALTIES) != 0:
        repetition = tl.load(settings_ptr + _REPETITION).to(tl.float32, bitcast=True)
        frequency = tl.load(settings_ptr + _FREQUENCY).to(tl.float32, bitcast=True)
        presence = tl.load(settings_ptr + _PRESENCE).to(tl.float32, bitcast=True)
        counts = tl.load(counts_ptr + row * vocab_size + token_id, mask=inside, other=0)
        repeated = tl.where(logits > 0.0, logits / repetition, logits * repetition)
        in_output = (counts & 0x3FFFFFFF).to(tl.float32)
        logits = tl.where(counts != 0, repeated, logits) - frequency * in_output
        logits -= tl.where(in_output > 0.0, presence, 0.0)
    if tl.load(settings_ptr + _NUM_TOKEN_BIASES) != 0:
        logits += tl.load(added_ptr + row * vocab_size + token_id, mask=inside, other=0.0)
    if tl.load(settings_ptr + _HAS_MASK) != 0:
        words = tl.load(masks_ptr + state * mask_words + token_id // 32, mask=inside, other=0)
        logits = tl.where(((words >> (token_id % 32)) & 1) != 0, logits, -float("inf"))
    tl.store(out_ptr + row * vocab_size + token_id, logits, mask=inside)


def edit_logits_reference(
    logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor, logit_edits: RowLogitEdits
) -> torch.Tensor:
    """Reference for `edit_logits`, row by row in plain torch; also used on CPUs."""
    edited = logits.to(torch.float32, copy=True)  # [num_rows, vocab_size]
    settings = logit_edits.settings[rows].numpy(force=True).view(LOGIT_EDITS)[:, 0]  # [num_rows]
    for out, row, length, own in zip(edited, rows.tolist(), lengths[rows].tolist(), settings, strict=True):
        prompt, output = token_ids[row, :length].tensor_split([int(own["num_prompt_tokens"])])
        if own["has_penalties"]:
            repetition = float(own["repetition_penalty"])
            counts = torch.bincount(output, minlength=len(out))
            repeated = torch.where(out > 0, out / repetition, out * repetition)
            torch.where(counts.index_fill(0, prompt.long(), 1) > 0, repeated, out, out=out)
            out.sub_(float(own["frequency_penalty"]) * counts)
            out.sub_(float(own["presence_penalty"]) * (counts > 0))
        if own["num_token_biases"]:
            words = logit_edits.token_biases[row].numpy(force=True)
            _add_token_biases(out, words, int(own["num_token_biases"]), length, output.tolist())
        if own["has_mask"]:
            bits = logit_edits.masks[row].unsqueeze(1) >> torch.arange(32, device=out.device)
            out.masked_fill_((bits & 1).flatten()[: len(out)] == 0, -torch.inf)
    return edited


def _add_token_biases(
    out: torch.Tensor, words: npt.NDArray[np.int32], num_biases: int, length: int, output: list[int]
) -> None:
    """Adds to one row's logits [vocab_size], in place. words [MAX_BIAS_WORDS]; output: the tokens after the prompt."""
    biases = words[: num_biases * BIAS_WIDTH].view(TOKEN_BIAS)
    applies = []
    for bias in biases:
        start, size = int(bias["ending_start"]), int(bias["ending_length"])
        ends = output[max(len(output) - size, 0) :] == words[start : start + size].tolist()
        applies.append(ends and length < bias["until_length"])
    token_ids, values = (torch.from_numpy(biases[name][applies]).to(out.device) for name in ("token_id", "bias"))
    out.index_add_(0, token_ids, values)


def edit_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    lengths: torch.Tensor,
    logit_edits: RowLogitEdits,
    *,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns the logits that tokens are drawn from; rows without edits are unchanged.

    logits [num_rows, vocab_size] bf16, fp16 or fp32, rows may be strided; rows [num_rows] int32: each row's index
    in token_ids [all_rows, max_tokens] int32, lengths [all_rows] int32 and `logit_edits` → a new
    [num_rows, vocab_size] fp32. Tokens that a mask does not allow get -inf.
    """
    if not len(logits) or not runs_triton(logits, use_triton):
        return edit_logits_reference(logits, rows, token_ids, lengths, logit_edits)
    vocab_size, options = logits.shape[1], pdl_options(logits.device)
    edited = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)  # [num_rows, vocab_size]
    size = max(_PART // vocab_size, 1)
    for part, part_rows, out in zip(logits.split(size), rows.split(size), edited.split(size), strict=True):
        counts = torch.zeros(part.shape, dtype=torch.int32, device=part.device)  # [rows of the part, vocab_size]
        added = torch.zeros(part.shape, dtype=torch.float32, device=part.device)  # [rows of the part, vocab_size]
        _count_tokens_kernel[(_HISTORY_PROGRAMS, len(part))](
            rows_ptr=part_rows,
            token_ids_ptr=token_ids,
            lengths_ptr=lengths,
            settings_ptr=logit_edits.settings,
            biases_ptr=logit_edits.token_biases,
            counts_ptr=counts,
            added_ptr=added,
            max_tokens=token_ids.shape[1],
            max_bias_words=logit_edits.token_biases.shape[1],
            vocab_size=vocab_size,
            BLOCK_SIZE=256,
            **options,
        )
        _edit_logits_kernel[(-(-vocab_size // _BLOCK_SIZE), len(part))](
            logits_ptr=part,
            rows_ptr=part_rows,
            counts_ptr=counts,
            added_ptr=added,
            settings_ptr=logit_edits.settings,
            masks_ptr=logit_edits.masks,
            out_ptr=out,
            logits_stride=part.stride(0),
            vocab_size=vocab_size,
            mask_words=logit_edits.masks.shape[1],
            BLOCK_SIZE=_BLOCK_SIZE,
            **options,
        )
    return edited
