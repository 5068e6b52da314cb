"""What crosses between the scheduler and the model runner: a `ScheduledBatch` one way, a `StepResult` back.

A `ScheduledBatch` describes a step as changes to the rows that the device already holds, and the tokens to compute. It
is one int32 buffer: a header, then the sections in the order of `SECTIONS`. The same bytes are copied to the device at
once and, with several ranks, sent through shared memory. On the host, a section is a view of the buffer as an array of
records with named fields; `runner.device_batch` is its counterpart on the device.

Sections are applied in order. A chunk is final when it reaches the end of its row's tokens; final chunks come before
all others. A step samples one token for every decode row, then one for every draft row, then one for every final chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nanovllm.kernels.columns import (
    BLOCKS,
    DRAFTS,
    NO_TRUNCATION,
    OPENED,
    WORD_BYTES,
    column_of,
    columns_of,
    num_words,
)

IntArray = npt.NDArray[np.int32]
RecordArray = npt.NDArray[np.void]

VERSION = 11
NO_LOGPROBS = -1  # where an integer says how many log-probabilities to return: none, not even the token's own
NO_PENALTIES = (1.0, 0.0, 0.0)  # repetition, frequency, presence


class Chunk(NamedTuple):
    """Prompt tokens to compute: `length` tokens of `row`, from position `start`."""

    row: int
    start: int
    length: int


class PromptLogprobs(NamedTuple):
    """Log-probabilities to return: those of the row's prompt tokens `position` + 1 … `position` + `num_tokens`.

    chunk_token: the index of the token at `position` among the tokens of all chunks of the step. Its hidden state and
    the `num_tokens` - 1 after it give the log-probabilities.
    num_top: how many of the most likely tokens to return for each.
    """

    chunk_token: int
    row: int
    position: int
    num_tokens: int
    num_top: int


def _integers(*names: str) -> np.dtype[np.void]:
    return np.dtype([(name, np.int32) for name in names])


_INTEGER = np.dtype(np.int32)
SECTIONS: dict[str, np.dtype[Any]] = {
    "closed": _INTEGER,  # rows that become free
    "opened": OPENED,  # rows that a sequence takes
    "opened_tokens": _INTEGER,  # the opened rows' tokens, one after another
    "blocks": BLOCKS,
    "token_biases": _integers("row", "index", "word"),  # word `index` of the row's token biases
    "masked": _INTEGER,  # rows that get a mask of allowed tokens, which holds until they close or get another
    "mask_words": _INTEGER,  # these rows' masks, one after another
    "chunks": _integers(*Chunk._fields),
    "prompt_logprobs": _integers(*PromptLogprobs._fields),
    "drafts": DRAFTS,
    "proposals": _integers("row", "num_tokens"),  # tokens that the draft model drafts after the step, longest first
    "decode_rows": _INTEGER,  # rows that compute their last token, then the rows of `drafts`, which do so, too
}
_HEADER = np.dtype(
    [
        ("version", np.int32),
        ("step", np.int32),
        ("num_final_chunks", np.int32),
        ("needs", _integers("shares_prefix", "truncates", "num_logprobs", "edits_logits", "skips_draft_model")),
        ("counts", _integers(*SECTIONS)),  # items of each section
    ]
)
_HEADER_SIZE = num_words(_HEADER)
_STEP, _NUM_FINAL_CHUNKS = column_of(_HEADER, "step"), column_of(_HEADER, "num_final_chunks")
_NEEDS, _COUNTS = columns_of(_HEADER, "needs"), columns_of(_HEADER, "counts")


class Section(NamedTuple):
    """The place of a section in the buffer: items of dtype `record`, from word `offset` to before word `end`."""

    offset: int
    end: int
    record: np.dtype[Any]
    no_items: npt.NDArray[Any]  # [0], since most sections of most steps are empty, and a view of records takes long

    def view(self, buffer: IntArray) -> npt.NDArray[Any]:
        """Returns the section's items as a view of the buffer, [num_items]."""
        return buffer[self.offset : self.end].view(self.record) if self.offset < self.end else self.no_items


@dataclass(frozen=True)
class StepNeeds:
    """The optional work of a step. A part that none of the sampled rows needs does not run.

    Decode steps with different needs are different CUDA graphs.
    """

    shares_prefix: bool = False  # a hint: enough decode rows begin with the same blocks that finding them pays
    truncates: bool = False  # a sampled row uses top-k, top-p or min-p
    num_logprobs: int | None = None  # most likely tokens to return, at least the most that a row asks for; None: none
    edits_logits: bool = False  # a sampled row has penalties, biases, bans or a mask
    skips_draft_model: bool = False  # the draft model, if there is one, does not compute the tokens

    def record(self) -> tuple[int, int, int, int, int]:
        """Returns the values of the header's field `needs`."""
        num_logprobs = NO_LOGPROBS if self.num_logprobs is None else self.num_logprobs
        return self.shares_prefix, self.truncates, num_logprobs, self.edits_logits, self.skips_draft_model

    @classmethod
    def from_record(cls, record: Seq[int]) -> StepNeeds:
        shares_prefix, truncates, num_logprobs, edits_logits, skips_draft_model = record
        return cls(
            shares_prefix=bool(shares_prefix),
            truncates=bool(truncates),
            num_logprobs=None if num_logprobs == NO_LOGPROBS else num_logprobs,
            edits_logits=bool(edits_logits),
            skips_draft_model=bool(skips_draft_model),
        )

    @property
    def all_logits(self) -> bool:
        """Whether each rank needs the logits of the whole vocabulary, not only of its share."""
        return self.truncates or self.edits_logits or self.num_logprobs is not None


@dataclass(frozen=True)
class LogitEdits:
    """How a row's logits change before a token is drawn, in the form that `kernels.logit_edits` reads."""

    num_prompt_tokens: int = 0
    penalties: tuple[float, float, float] = NO_PENALTIES
    num_token_biases: int = 0
    token_biases: tuple[int, ...] = ()  # words: a TOKEN_BIAS for each, then the endings that these refer to
    mask: IntArray | None = None  # [ceil(vocab_size / 32)], when the row is opened; None: all tokens are allowed

    def record(self) -> tuple[float, ...]:
        """Returns the values of a LOGIT_EDITS record. `has_mask` is 0: the section `masked` sets it."""
        return self.num_prompt_tokens, self.num_token_biases, self.penalties != NO_PENALTIES, 0, *self.penalties


_NO_LOGIT_EDITS = LogitEdits()


@dataclass(frozen=True)
class OpenedRow:
    """A row that a sequence takes, with all tokens known so far and its sampling parameters."""

    row: int
    token_ids: IntArray  # [num_tokens]
    temperature: float
    seed: int  # 64 bits
    truncation: tuple[float, float, float] = NO_TRUNCATION  # top_k (0: off), top_p, min_p
    logit_edits: LogitEdits | None = None

    def record(self) -> tuple[Any, ...]:
        """Returns the values of an OPENED record."""
        num_tokens, edits = len(self.token_ids), (self.logit_edits or _NO_LOGIT_EDITS).record()
        return self.row, num_tokens, self.temperature, self.seed, self.truncation, edits


@dataclass(frozen=True)
class ScheduledBatch:
    """One step's work. Build it with `ScheduledBatch.build`, or from received bytes with `from_buffer`."""

    buffer: IntArray
    sections: Mapping[str, Section]
    blocks: RecordArray  # [num_blocks], a view of its section, as are the next two
    chunks: RecordArray  # [num_chunks]
    computed_rows: IntArray  # [num_decode_rows + num_drafts], decode rows, then draft rows
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
        drafts: Seq[tuple[int, int, int, int, int]] = (),
        proposals: Seq[tuple[int, int]] = (),
        decode_rows: Seq[int] | npt.NDArray[np.integer[Any]] = (),
        needs: StepNeeds | None = None,
    ) -> ScheduledBatch:
        """Packs a step into a buffer.

        token_masks: new masks [ceil(vocab_size / 32)] by row, in addition to those in `opened`.
        drafts: items of DRAFTS.
        """
        token_ids = [item.token_ids for item in opened]
        edits = [(item.row, item.logit_edits) for item in opened if item.logit_edits is not None]
        biases = [(row, *word) for row, edit in edits for word in enumerate(edit.token_biases)]
        masks = {row: edit.mask for row, edit in edits if edit.mask is not None} | dict(token_masks or {})
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
            "drafts": drafts,
            "proposals": proposals,
            "decode_rows": np.append(decode_rows, [draft[0] for draft in drafts]) if drafts else decode_rows,
        }
        counts = tuple(map(len, contents.values()))
        sections = _layout(counts)
        buffer: IntArray = np.empty(sections["decode_rows"].end, dtype=np.int32)
        buffer[:_HEADER_SIZE] = VERSION, step, num_final_chunks, *(needs or StepNeeds()).record(), *counts
        for name, items in contents.items():
            if len(items):
                sections[name].view(buffer)[:] = items
        return cls._over(buffer, sections)

    @classmethod
    def from_buffer(cls, buffer: IntArray) -> ScheduledBatch:
        """Reads a batch from its bytes without copying. Raises ValueError for a buffer of another version or size."""
        if len(buffer) < _HEADER_SIZE or buffer[0] != VERSION:
            raise ValueError(f"not a scheduled batch of version {VERSION}: {buffer[:_HEADER_SIZE].tolist()}")
        sections = _layout(tuple(buffer[_COUNTS].tolist()))
        if len(buffer) != sections["decode_rows"].end:
            raise ValueError(f"a scheduled batch of {sections['decode_rows'].end} words came as {len(buffer)}")
        return cls._over(buffer, sections)

    @classmethod
    def _over(cls, buffer: IntArray, sections: Mapping[str, Section]) -> ScheduledBatch:
        computed_rows, num_drafts = sections["decode_rows"].view(buffer), len(sections["drafts"].view(buffer))
        return cls(
            buffer=buffer,
            sections=sections,
            blocks=sections["blocks"].view(buffer),
            chunks=sections["chunks"].view(buffer),
            computed_rows=computed_rows,
            decode_rows=computed_rows[: len(computed_rows) - num_drafts],
        )

    def section(self, name: str) -> npt.NDArray[Any]:
        """Returns the section's items as a view of the buffer, [num_items]."""
        return self.sections[name].view(self.buffer)

    @property
    def step(self) -> int:
        return int(self.buffer[_STEP])

    @property
    def kind(self) -> str:
        """What the step computes: "prefill", "decode", or "mixed" for both."""
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

    @property
    def num_sampled(self) -> int:
        """Tokens that the step samples, those of draft rows included."""
        return len(self.computed_rows) + self.num_final_chunks

    @property
    def sampled_tokens(self) -> npt.NDArray[np.intp]:
        """Where in `StepResult.token_ids` the tokens of `sampled_rows` are, [num_sampled_rows]."""
        num_rows = len(self.decode_rows)
        tokens = np.arange(num_rows + self.num_final_chunks)
        tokens[num_rows:] += len(self.computed_rows) - num_rows
        return tokens

    @cached_property
    def sampled_rows(self) -> npt.NDArray[np.intp]:
        """The rows of sequences that get a token in this step, [num_sampled_rows]: decode rows, then final chunks.

        NumPy takes indices of this type fastest; `scheduled_rows` has it, too.
        """
        if not self.num_final_chunks:
            return self.decode_rows.astype(np.intp)
        return np.concatenate([self.decode_rows, self.final_chunks["row"]], dtype=np.intp)

    @cached_property
    def scheduled_rows(self) -> npt.NDArray[np.intp]:
        """The rows of sequences for which this step computes something: decode rows, then those of chunks."""
        if not len(self.chunks):
            return self.sampled_rows
        return np.concatenate([self.decode_rows, self.chunks["row"]], dtype=np.intp)

    @cached_property
    def num_prefill_tokens(self) -> int:
        return int(self.chunks["length"].sum()) if len(self.chunks) else 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.computed_rows) + self.num_prefill_tokens


@dataclass(frozen=True)
class StepLogprobs:
    """Log-probabilities of tokens: one for every sampled token, or one for every token of a `PromptLogprobs`."""

    tokens: npt.NDArray[np.float32]  # [num_tokens]
    ranks: IntArray  # [num_tokens], from 1
    top_ids: IntArray  # [num_tokens, num_top], most likely first
    top: npt.NDArray[np.float32]  # [num_tokens, num_top]


@dataclass(frozen=True)
class StepResult:
    """The result of a step: its tokens, of decode rows, then of draft rows, then of final chunks."""

    token_ids: IntArray  # [num_sampled], INVALID_TOKEN where the row's logits are NaN or infinite
    gpu_ms: float | None = None  # time on the GPU; None if it was not measured
    logprobs: StepLogprobs | None = None  # None if no row asked for them
    prompt_logprobs: tuple[StepLogprobs, ...] = ()  # one for each of the batch's `prompt_logprobs`
    drafts: IntArray | None = None  # [num_proposals, longest], past a proposal's own length any; None: no proposals


class StepHandle(Protocol):
    """Waits for the result of one submitted step."""

    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        """Blocks until the step's tokens are on the host. Calls `check` repeatedly meanwhile; it may raise."""
        ...


def same_work(buffer: IntArray, other: IntArray) -> bool:
    """Returns whether two buffers are equal but for the step's number, as those of two decode steps mostly are."""
    return np.array_equal(buffer[_STEP + 1 :], other[_STEP + 1 :])


@lru_cache(maxsize=16)
def _layout(counts: tuple[int, ...]) -> Mapping[str, Section]:
    """Returns the sections of a buffer. counts: the number of items of each."""
    sections = {}
    offset = _HEADER_SIZE
    for (name, record), count in zip(SECTIONS.items(), counts, strict=True):
        end = offset + count * record.itemsize // WORD_BYTES
        sections[name] = Section(offset, end, record, np.empty(0, record))
        offset = end
    return sections
