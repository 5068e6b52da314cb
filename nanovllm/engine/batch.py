"""The two values that cross between deciding and computing, and the handle by which one waits for the other.

A `ScheduledBatch` is one int32 buffer made of changes: a header, then the sections of `SECTIONS`. The same bytes go
to the device in one copy and, with several ranks, through shared memory. On the host, a section is an array of records
with named fields that views the buffer; `runner.device_batch` is the same on the device.

The sections apply in their order. Chunks that reach the end of their row's tokens come first (they are the final
ones, and sample a token); a step samples for every decode row, then for every final chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nanovllm.kernels.columns import (
    LOGIT_EDITS,
    NO_TRUNCATION,
    TRUNCATION,
    WORD_BYTES,
    column_of,
    columns_of,
    num_words,
)

IntArray = npt.NDArray[np.int32]
RecordArray = npt.NDArray[np.void]

VERSION = 8
NO_LOGPROBS = -1  # in a column of integers: no log-probabilities
NO_PENALTIES = (1.0, 0.0, 0.0)  # repetition, frequency, presence


class Chunk(NamedTuple):
    """Prompt tokens to compute: `length` of the row's, from position `start`."""

    row: int
    start: int
    length: int


class PromptLogprobs(NamedTuple):
    """Log-probabilities to give: of the row's prompt tokens `position` + 1 … `position` + `num_tokens`.

    chunk_token: where the token at `position` stands among the step's chunks, which compute it and those after it.
    num_top: how many of the likeliest tokens to give beside each.
    """

    chunk_token: int
    row: int
    position: int
    num_tokens: int
    num_top: int


def _integers(*names: str) -> np.dtype[np.void]:
    return np.dtype([(name, np.int32) for name in names])


_INTEGER = np.dtype(np.int32)
OPENED = np.dtype(
    [
        ("row", np.int32),
        ("num_tokens", np.int32),
        ("temperature", np.float32),
        ("seed", np.int64),
        ("truncation", TRUNCATION),
        ("logit_edits", LOGIT_EDITS),
    ]
)
BLOCKS = _integers("row", "index", "block")  # entry `index` of the row's block table becomes `block`
SECTIONS: dict[str, np.dtype[Any]] = {
    "closed": _INTEGER,  # rows that are free again
    "opened": OPENED,  # rows that a sequence takes
    "opened_tokens": _INTEGER,  # the opened rows' tokens, one after another
    "blocks": BLOCKS,
    "token_biases": _integers("row", "index", "word"),  # word `index` of the row's token biases
    "masked": _INTEGER,  # rows that get a mask: until they close or get another, they draw only what it allows
    "mask_words": _INTEGER,  # their masks, one after another
    "chunks": _integers(*Chunk._fields),
    "prompt_logprobs": _integers(*PromptLogprobs._fields),
    "decode_rows": _INTEGER,  # rows that compute their last token
}
_HEADER = np.dtype(
    [
        ("version", np.int32),
        ("step", np.int32),
        ("num_final_chunks", np.int32),
        ("needs", _integers("shares_prefix", "truncates", "num_logprobs", "edits_logits")),
        ("counts", _integers(*SECTIONS)),  # items of each section
    ]
)
_HEADER_SIZE = num_words(_HEADER)
_STEP, _NUM_FINAL_CHUNKS = column_of(_HEADER, "step"), column_of(_HEADER, "num_final_chunks")
_NEEDS, _COUNTS = columns_of(_HEADER, "needs"), columns_of(_HEADER, "counts")


class Section(NamedTuple):
    """Where a section lies in the buffer: items of `record`, from word `offset` to word `end`."""

    offset: int
    end: int
    record: np.dtype[Any]

    def view(self, buffer: IntArray) -> npt.NDArray[Any]:
        """The section's items, as a view of the buffer."""
        return buffer[self.offset : self.end].view(self.record)


@dataclass(frozen=True)
class StepNeeds:
    """What a step has to do beyond computing and drawing; where no row needs it, nothing of it runs.

    Decode steps with different needs are different CUDA graphs.
    """

    shares_prefix: bool = False  # a hint: enough decode rows begin with the same blocks for it to pay to look for them
    truncates: bool = False  # a row that samples uses top-k, top-p or min-p
    num_logprobs: int | None = None  # likeliest tokens to give, at least what such rows ask for; None: none asks
    edits_logits: bool = False  # such a row has penalties, biases, bans or a mask

    def record(self) -> tuple[int, int, int, int]:
        num_logprobs = NO_LOGPROBS if self.num_logprobs is None else self.num_logprobs
        return self.shares_prefix, self.truncates, num_logprobs, self.edits_logits

    @classmethod
    def from_record(cls, record: Seq[int]) -> StepNeeds:
        shares_prefix, truncates, num_logprobs, edits_logits = record
        return cls(
            shares_prefix=bool(shares_prefix),
            truncates=bool(truncates),
            num_logprobs=None if num_logprobs == NO_LOGPROBS else num_logprobs,
            edits_logits=bool(edits_logits),
        )

    @property
    def all_logits(self) -> bool:
        """Whether whole rows of logits must be in one place, where the vocabulary is cut over ranks."""
        return self.truncates or self.edits_logits or self.num_logprobs is not None


@dataclass(frozen=True)
class LogitEdits:
    """How a row's logits change before a token is drawn, in the form that `kernels.logit_edits` reads."""

    num_prompt_tokens: int = 0
    penalties: tuple[float, float, float] = NO_PENALTIES
    num_token_biases: int = 0
    token_biases: tuple[int, ...] = ()  # words: the biases, then the endings that they name
    mask: IntArray | None = None  # [ceil(vocab_size / 32)], from the start; None: all tokens are allowed

    def record(self) -> tuple[float, ...]:
        """As LOGIT_EDITS. `has_mask` is 0: the section `masked` sets it."""
        return self.num_prompt_tokens, self.num_token_biases, self.penalties != NO_PENALTIES, 0, *self.penalties


_NO_LOGIT_EDITS = LogitEdits()


@dataclass(frozen=True)
class OpenedRow:
    """A sequence takes a row: all its tokens known so far, and how it samples."""

    row: int
    token_ids: IntArray  # [num_tokens]
    temperature: float
    seed: int  # 64 bits
    truncation: tuple[float, float, float] = NO_TRUNCATION  # top_k (0: off), top_p, min_p
    logit_edits: LogitEdits | None = None

    def record(self) -> tuple[Any, ...]:
        """As OPENED."""
        num_tokens, edits = len(self.token_ids), (self.logit_edits or _NO_LOGIT_EDITS).record()
        return self.row, num_tokens, self.temperature, self.seed, self.truncation, edits


@dataclass(frozen=True)
class ScheduledBatch:
    """One step's work. Build it with `ScheduledBatch.build`, or from received bytes with `from_buffer`."""

    buffer: IntArray
    sections: dict[str, Section]
    blocks: RecordArray  # [num_blocks], a view of its section, as are the next two
    chunks: RecordArray  # [num_chunks]
    decode_rows: IntArray  # [num_decode_rows]

    @classmethod
    def build(
        cls,
        step: int,
        *,
        closed: Seq[int] = (),
        opened: Seq[OpenedRow] = (),
        blocks: Seq[tuple[int, int, int]] | RecordArray = (),
        token_masks: Mapping[int, IntArray] | None = None,
        chunks: Seq[Chunk] = (),
        num_final_chunks: int = 0,
        prompt_logprobs: Seq[PromptLogprobs] = (),
        decode_rows: Seq[int] | npt.NDArray[np.integer[Any]] = (),
        needs: StepNeeds | None = None,
    ) -> ScheduledBatch:
        """Packs the changes.

        token_masks: rows' new masks [ceil(vocab_size / 32)], beside those that opened rows come with.
        """
        token_ids = [item.token_ids for item in opened]
        edits = [(item.row, item.logit_edits) for item in opened if item.logit_edits is not None]
        biases = [(row, *word) for row, of_row in edits for word in enumerate(of_row.token_biases)]
        masks = {row: of_row.mask for row, of_row in edits if of_row.mask is not None} | dict(token_masks or {})
        contents: dict[str, Any] = {
            "closed": closed,
            "opened": [item.record() for item in opened],
            "opened_tokens": np.concatenate(token_ids) if token_ids else (),
            "blocks": blocks,
            "token_biases": biases,
            "masked": list(masks),
            "mask_words": np.concatenate(list(masks.values())) if masks else (),
            "chunks": chunks,
            "prompt_logprobs": prompt_logprobs,
            "decode_rows": decode_rows,
        }
        counts = tuple(map(len, contents.values()))
        sections = _layout(counts)
        buffer: IntArray = np.empty(sections["decode_rows"].end, dtype=np.int32)
        header = (VERSION, step, num_final_chunks, (needs or StepNeeds()).record(), counts)
        buffer[:_HEADER_SIZE].view(_HEADER)[0] = header
        for name, items in contents.items():
            if len(items):
                sections[name].view(buffer)[:] = items
        return cls._over(buffer, sections)

    @classmethod
    def from_buffer(cls, buffer: IntArray) -> ScheduledBatch:
        """Reads a batch from its bytes without copying. Raises ValueError for a buffer of another version or size."""
        if len(buffer) < _HEADER_SIZE or buffer[0] != VERSION:
            raise ValueError(f"not a scheduled batch of version {VERSION}: {buffer[:_HEADER_SIZE].tolist()}")
        sections = _layout(buffer[_COUNTS].tolist())
        if len(buffer) != sections["decode_rows"].end:
            raise ValueError(f"a scheduled batch of {sections['decode_rows'].end} words came as {len(buffer)}")
        return cls._over(buffer, sections)

    @classmethod
    def _over(cls, buffer: IntArray, sections: dict[str, Section]) -> ScheduledBatch:
        return cls(
            buffer=buffer,
            sections=sections,
            blocks=sections["blocks"].view(buffer),
            chunks=sections["chunks"].view(buffer),
            decode_rows=sections["decode_rows"].view(buffer),
        )

    def section(self, name: str) -> npt.NDArray[Any]:
        """The section's items, as a view of the buffer."""
        return self.sections[name].view(self.buffer)

    @property
    def step(self) -> int:
        return int(self.buffer[_STEP])

    @property
    def kind(self) -> str:
        if not len(self.chunks):
            return "decode"
        return "mixed" if len(self.decode_rows) else "prefill"

    @property
    def num_final_chunks(self) -> int:
        return int(self.buffer[_NUM_FINAL_CHUNKS])

    @property
    def needs(self) -> StepNeeds:
        return StepNeeds.from_record(self.buffer[_NEEDS].tolist())

    @property
    def final_chunks(self) -> RecordArray:  # [num_final_chunks]
        return self.chunks[: self.num_final_chunks]

    @property
    def prompt_logprobs(self) -> list[PromptLogprobs]:
        return list(map(PromptLogprobs._make, self.section("prompt_logprobs").tolist()))

    @cached_property
    def sampled_rows(self) -> IntArray:
        """The rows that get a token in this step, in the order of `StepResult.token_ids`."""
        if not self.num_final_chunks:
            return self.decode_rows
        return np.concatenate([self.decode_rows, self.final_chunks["row"]])

    @property
    def num_prefill_tokens(self) -> int:
        return int(self.chunks["length"].sum())

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decode_rows) + self.num_prefill_tokens


@dataclass(frozen=True)
class StepLogprobs:
    """Log-probabilities: one a sampled row, also where it asks for none, or one a token of a `PromptLogprobs`."""

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
    prompt_logprobs: tuple[StepLogprobs, ...] = ()  # one for each of the batch's `prompt_logprobs`


class StepHandle(Protocol):
    """Waits for the result of one submitted step."""

    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        """Blocks until the step's tokens are on the host, or `check`, called over and over meanwhile, raises."""
        ...


def _layout(counts: Seq[int]) -> dict[str, Section]:
    sections = {}
    offset = _HEADER_SIZE
    for (name, record), count in zip(SECTIONS.items(), counts, strict=True):
        end = offset + count * record.itemsize // WORD_BYTES
        sections[name] = Section(offset, end, record)
        offset = end
    return sections
