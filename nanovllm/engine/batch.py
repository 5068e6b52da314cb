"""The two values that cross between deciding and computing, and the handle by which one waits for the other.

A `ScheduledBatch` is one int32 buffer made of changes. The same bytes go to the device in one copy
and, with several ranks, through shared memory; each section is a view of them.

    header         version, step, number of final chunks, the four words of `StepNeeds`, then the item count of each
                   section
    closed         row                                    rows that are free again
    opened         row, num_tokens, temperature's bits, seed's low and high word, bits of top_k, top_p and min_p as
                   float32, the seven words of `kernels.edit_logits.RowLogitEdits.asked`
    opened_tokens  token id                               the opened rows' tokens, one after another
    blocks         row, index in its block table, block
    edits          row, index, word                       of `RowLogitEdits.edits`
    masked         row                                    rows that may draw from now on what a mask allows, no more
    mask_words     word                                   their masks, one after another, until the row is closed
    chunks         row, start, length                     prompt tokens to compute in this step
    scored         index among the chunks' tokens, row, position, count, likeliest tokens   tokens of the chunks whose
                   next token, in the prompt, gets its log-probability
    decode_rows    row                                    rows that compute their last token

The changes apply in this order. Chunks that reach the end of their row's tokens come first (they are
the final ones, and sample a token); a step samples for every decode row, then for every final chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

VERSION = 7
NO_PENALTIES = (1.0, 0.0, 0.0)  # repetition, frequency, presence
# Name and width (int32 words an item) of each section, in order.
_SECTIONS = (
    *(("closed", 1), ("opened", 15), ("opened_tokens", 1), ("blocks", 3), ("edits", 3)),
    *(("masked", 1), ("mask_words", 1), ("chunks", 3), ("scored", 5), ("decode_rows", 1)),
)
_HEADER_FIELDS = 7
_HEADER_SIZE = _HEADER_FIELDS + len(_SECTIONS)


@dataclass(frozen=True)
class Section:
    """Where a section lies in the buffer: `width` words for each of `count` items, from `offset` on."""

    offset: int
    count: int
    width: int

    @property
    def end(self) -> int:
        return self.offset + self.count * self.width


@dataclass(frozen=True)
class StepNeeds:
    """What a step has to do beyond computing and drawing; where no row needs it, nothing of it runs.

    Decode steps with different needs are different CUDA graphs.
    """

    shares_prefix: bool = False  # a hint: enough decode rows begin with the same blocks for it to pay to look for them
    truncates: bool = False  # a row that samples uses top-k, top-p or min-p
    num_logprobs: int | None = None  # of the likeliest tokens, at least what such rows ask for; None: none asks
    edits_logits: bool = False  # such a row has penalties, biases, bans or a mask

    def words(self) -> tuple[int, ...]:
        asked = 0 if self.num_logprobs is None else self.num_logprobs + 1
        return self.shares_prefix, self.truncates, asked, self.edits_logits

    @classmethod
    def of_words(cls, shares_prefix: int, truncates: int, asked: int, edits_logits: int) -> StepNeeds:
        return cls(bool(shares_prefix), bool(truncates), int(asked) - 1 if asked else None, bool(edits_logits))

    @property
    def all_logits(self) -> bool:
        """Whether whole rows of logits must be in one place, where the vocabulary is cut over ranks."""
        return self.truncates or self.edits_logits or self.num_logprobs is not None


@dataclass(frozen=True)
class LogitEdits:
    """How a row's logits change before a token is drawn, in the form of `kernels.edit_logits.RowLogitEdits`."""

    num_prompt_tokens: int = 0
    penalties: tuple[float, float, float] = NO_PENALTIES
    num_edits: int = 0
    edits: tuple[int, ...] = ()
    mask: IntArray | None = None  # [ceil(vocab_size / 32)], from the start; None: all tokens are allowed

    def words(self) -> tuple[int, ...]:
        """`RowLogitEdits.asked`; a mask announces itself there when it comes."""
        penalties = np.array(self.penalties, dtype=np.float32).view(np.int32).tolist()
        return self.num_prompt_tokens, self.num_edits, self.penalties != NO_PENALTIES, 0, *penalties


@dataclass(frozen=True)
class OpenedRow:
    """A sequence takes a row: all its tokens known so far, and how it samples."""

    row: int
    token_ids: IntArray  # [num_tokens]
    temperature: float
    seed: int  # 64 bits
    truncation: tuple[float, float, float] = (0.0, 1.0, 0.0)  # top_k (0: off), top_p, min_p
    logit_edits: LogitEdits | None = None


@dataclass(frozen=True)
class ScheduledBatch:
    """One step's work. Build it with `ScheduledBatch.build`, or from received bytes with `from_buffer`."""

    buffer: IntArray
    sections: dict[str, Section]

    @classmethod
    def build(
        cls,
        step: int,
        *,
        closed: Seq[int] = (),
        opened: Seq[OpenedRow] = (),
        blocks: Seq[tuple[int, int, int]] | IntArray = (),
        token_masks: Mapping[int, IntArray] | None = None,
        chunks: Seq[tuple[int, int, int]] = (),
        num_final_chunks: int = 0,
        scored: Seq[tuple[int, int, int, int, int]] = (),
        decode_rows: Seq[int] | npt.NDArray[np.integer[Any]] = (),
        needs: StepNeeds | None = None,
    ) -> ScheduledBatch:
        """Packs the changes; see the module for what each tuple holds.

        token_masks: rows' new masks [ceil(vocab_size / 32)], beside those that opened rows come with.
        """
        num_opened_tokens = sum(len(item.token_ids) for item in opened)
        shaped = [(item.row, item.logit_edits or LogitEdits()) for item in opened]
        edits = [(row, *edit) for row, logit_edits in shaped for edit in enumerate(logit_edits.edits)]
        masks = {row: logit_edits.mask for row, logit_edits in shaped if logit_edits.mask is not None} | dict(
            token_masks or {}
        )
        counts = (
            *(len(closed), len(opened), num_opened_tokens, len(blocks), len(edits)),
            *(len(masks), sum(map(len, masks.values())), len(chunks), len(scored), len(decode_rows)),
        )
        sections = _layout(counts)
        buffer: IntArray = np.empty(sections["decode_rows"].end, dtype=np.int32)
        buffer[:_HEADER_SIZE] = (VERSION, step, num_final_chunks, *(needs or StepNeeds()).words(), *counts)
        batch = cls(buffer, sections)
        batch.closed[:] = closed
        batch.decode_rows[:] = decode_rows
        if len(blocks):
            batch.blocks[:] = blocks
        if chunks:
            batch.chunks[:] = chunks
        if scored:
            batch.scored[:] = scored
        if edits:
            batch.edits[:] = edits
        if masks:
            batch.masked[:] = list(masks)
            np.concatenate(list(masks.values()), out=batch.mask_words)
        if opened:
            items = batch.opened
            items[:, 0] = [item.row for item in opened]
            items[:, 1] = [len(item.token_ids) for item in opened]
            items[:, 2] = np.array([item.temperature for item in opened], dtype=np.float32).view(np.int32)
            items[:, 3:5] = np.array([item.seed for item in opened], dtype=np.int64).view(np.int32).reshape(-1, 2)
            items[:, 5:8] = np.array([item.truncation for item in opened], dtype=np.float32).view(np.int32)
            items[:, 8:] = [logit_edits.words() for _, logit_edits in shaped]
            np.concatenate([item.token_ids for item in opened], out=batch.opened_tokens)
        return batch

    @classmethod
    def from_buffer(cls, buffer: IntArray) -> ScheduledBatch:
        """Reads a batch from its bytes without copying. Raises ValueError for a buffer of another version or size."""
        if len(buffer) < _HEADER_SIZE or buffer[0] != VERSION:
            raise ValueError(f"not a scheduled batch of version {VERSION}: {buffer[:_HEADER_SIZE].tolist()}")
        sections = _layout(tuple(buffer[_HEADER_FIELDS:_HEADER_SIZE].tolist()))
        if len(buffer) != sections["decode_rows"].end:
            raise ValueError(f"a scheduled batch of {sections['decode_rows'].end} words came as {len(buffer)}")
        return cls(buffer, sections)

    def _view(self, name: str) -> IntArray:
        section = self.sections[name]
        view = self.buffer[section.offset : section.end]
        return view if section.width == 1 else view.reshape(section.count, section.width)

    @property
    def step(self) -> int:
        return int(self.buffer[1])

    @property
    def kind(self) -> str:
        if not len(self.chunks):
            return "decode"
        return "mixed" if len(self.decode_rows) else "prefill"

    @property
    def num_final_chunks(self) -> int:
        return int(self.buffer[2])

    @property
    def needs(self) -> StepNeeds:
        return StepNeeds.of_words(*self.buffer[3:_HEADER_FIELDS].tolist())

    @cached_property
    def closed(self) -> IntArray:  # [num_closed]
        return self._view("closed")

    @cached_property
    def opened(self) -> IntArray:  # [num_opened, 15]
        return self._view("opened")

    @cached_property
    def opened_tokens(self) -> IntArray:  # [num_opened_tokens]
        return self._view("opened_tokens")

    @cached_property
    def blocks(self) -> IntArray:  # [num_blocks, 3]
        return self._view("blocks")

    @cached_property
    def edits(self) -> IntArray:  # [num_edit_words, 3]
        return self._view("edits")

    @cached_property
    def masked(self) -> IntArray:  # [num_masked]
        return self._view("masked")

    @cached_property
    def mask_words(self) -> IntArray:  # [num_masked * ceil(vocab_size / 32)]
        return self._view("mask_words")

    @cached_property
    def chunks(self) -> IntArray:  # [num_chunks, 3]
        return self._view("chunks")

    @cached_property
    def scored(self) -> IntArray:  # [num_prompt_logprobs, 5]
        return self._view("scored")

    @cached_property
    def decode_rows(self) -> IntArray:  # [num_decode_rows]
        return self._view("decode_rows")

    @cached_property
    def sampled_rows(self) -> IntArray:
        """The rows that get a token in this step, in the order of `StepResult.token_ids`."""
        if not self.num_final_chunks:
            return self.decode_rows
        return np.concatenate([self.decode_rows, self.chunks[: self.num_final_chunks, 0]])

    @property
    def num_prefill_tokens(self) -> int:
        return int(self.chunks[:, 2].sum())

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decode_rows) + self.num_prefill_tokens


@dataclass(frozen=True)
class StepLogprobs:
    """Of each of the batch's `sampled_rows`, those included that did not ask, or of each token of a `scored` item."""

    tokens: npt.NDArray[np.float32]  # [num_tokens]
    ranks: IntArray  # [num_tokens], from 1
    top_ids: IntArray  # [num_tokens, num_top], likeliest first
    top: npt.NDArray[np.float32]  # [num_tokens, num_top]


@dataclass(frozen=True)
class StepResult:
    """What a step gave: one token for each of the batch's `sampled_rows`."""

    token_ids: IntArray  # [num_sampled_rows]
    gpu_ms: float | None = None  # time on the GPU, where it was measured
    logprobs: StepLogprobs | None = None  # where the batch asked
    prompt_logprobs: tuple[StepLogprobs, ...] = ()  # of each item of `scored`


class StepHandle(Protocol):
    """A step in flight."""

    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        """Blocks until the step's tokens are on the host, or `check`, called over and over meanwhile, raises."""
        ...


def _layout(counts: Seq[int]) -> dict[str, Section]:
    sections = {}
    offset = _HEADER_SIZE
    for (name, width), count in zip(_SECTIONS, counts, strict=True):
        sections[name] = Section(offset, count, width)
        offset = sections[name].end
    return sections
