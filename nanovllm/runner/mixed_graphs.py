"""MixedGraphs: CUDA graphs of steps that compute prompt tokens, beside decode rows or alone.

Launched kernel by kernel from Python, such a step takes some 1 ms of the host per layer, whatever the prompts'
lengths, and all running requests wait for it. A graph is launched at once. It is captured for a `StepShape`, and a step
is padded to the smallest shape that it fits into: padding tokens are the null row's, and padding chunks are empty.

A step is two graphs: the model, for each shape, and then sampling, for each number of sampled rows and StepNeeds.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.engine.batch import IntArray, ScheduledBatch, StepNeeds
from nanovllm.kernels.logprobs import SampledTokens
from nanovllm.kernels.step_tokens import StepMakeUp
from nanovllm.logs import events
from nanovllm.runner.cuda_graph import DecodeGraphs, GraphPool
from nanovllm.utils.device_memory import free_memory
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_SMALLEST = 64  # tokens
_TOKENS_PER_CHUNK = 32  # a shape has room for chunks of this mean length
_MIN_CHUNKS = 8
_SPARE_MEMORY = 1 << 30  # bytes that graphs captured ahead of need leave free
_ROW_SIZES = (8, 32, 128, 512)


class StepShape(NamedTuple):
    """The size of a padded step."""

    num_tokens: int  # decode rows and chunks, all tokens
    num_rows: int  # decode rows, and sampled rows
    num_chunks: int


@dataclass(frozen=True)
class PaddedStep:
    """A padded step, as views of the graphs' input buffer on the device."""

    shape: StepShape
    make_up: StepMakeUp
    context_lens: torch.Tensor  # [num_chunks] int32
    sampled_rows: torch.Tensor  # [num_rows] int32: decode rows, rows of final chunks, null rows
    sampled_tokens: torch.Tensor  # [num_rows] int32, indices of tokens


Model = Callable[[PaddedStep, StepNeeds], torch.Tensor]  # returns hidden states of sampled tokens, [num_rows, hidden]
Sample = Callable[[torch.Tensor, torch.Tensor, StepNeeds], SampledTokens]  # takes hidden states, and rows [num_rows]


def token_sizes(max_tokens: int) -> list[int]:
    """Returns the token counts that get graphs: multiples of 64 up to 512, then a quarter of a power of two apart."""
    sizes, size = {max_tokens}, _SMALLEST
    while size < max_tokens:
        sizes.add(size)
        size += max(_SMALLEST, 1 << (size.bit_length() - 3))
    return sorted(sizes)


class MixedGraphs:
    """Captures and replays steps with chunks of up to `max_tokens` tokens in all.

    All graphs share the pool's memory, since only one runs at a time.
    """

    def __init__(
        self,
        pool: GraphPool,
        model: Model,
        sample: Sample,
        *,
        max_tokens: int,
        max_num_rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        null_row: int,
    ) -> None:
        self._pool, self._model, self._sample = pool, model, sample
        self._null_row = null_row
        self._row_sizes = sorted({*(size for size in _ROW_SIZES if size < max_num_rows), max_num_rows})
        self._token_sizes = token_sizes(max_tokens)
        largest = self._shape(max_tokens, max_num_rows)
        device = pool.device
        self._words = torch.zeros(_num_words(largest), dtype=torch.int32, device=device)  # the graphs' input
        self._hidden = torch.zeros(max_num_rows, hidden_size, dtype=dtype, device=device)  # from model to sampling
        self._models: dict[tuple[StepShape, StepNeeds], torch.cuda.CUDAGraph] = {}
        self._samplers: dict[tuple[int, StepNeeds], tuple[torch.cuda.CUDAGraph, SampledTokens]] = {}

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest step that is a graph."""
        return self._token_sizes[-1]

    @property
    def num_captured(self) -> int:
        return len(self._models) + len(self._samplers)

    def shape_of(self, batch: ScheduledBatch) -> StepShape | None:
        """Returns the shape to which a step is padded, or None for one that is too large."""
        num_rows = self._row_sizes[bisect.bisect_left(self._row_sizes, batch.num_sampled)]
        num_tokens = max(batch.num_tokens, num_rows)
        if len(batch.chunks) > _MIN_CHUNKS:
            num_tokens = max(num_tokens, len(batch.chunks) * _TOKENS_PER_CHUNK)
        if num_tokens > self.max_tokens:
            return None
        return self._shape(self._token_sizes[bisect.bisect_left(self._token_sizes, num_tokens)], num_rows)

    @staticmethod
    def _shape(num_tokens: int, num_rows: int) -> StepShape:
        return StepShape(num_tokens, num_rows, max(_MIN_CHUNKS, num_tokens // _TOKENS_PER_CHUNK))

    def replay(self, batch: ScheduledBatch, needs: StepNeeds, shape: StepShape) -> SampledTokens:
        """Runs a step with chunks. Returns a token for each sampled row, valid until the next replay."""
        words = torch.from_numpy(_pack(batch, shape, self._null_row))
        if self._words.device.type == "cuda":
            words = words.pin_memory()
        key = shape, _needs_of_model(needs)
        if key not in self._models:
            self.capture_model(shape, needs)
        num_sampled = batch.num_sampled
        if num_sampled and (shape.num_rows, needs) not in self._samplers:
            self.capture_sampler(shape.num_rows, needs)
        self._words[: len(words)].copy_(words, non_blocking=True)
        self._models[key].replay()
        if not num_sampled:  # only a chunk that does not reach the end of its prompt
            return SampledTokens(self._words[:0])
        graph, sampled = self._samplers[shape.num_rows, needs]
        graph.replay()
        return sampled.first(num_sampled)

    def capture_missing(self, needs: StepNeeds) -> Iterator[None]:
        """Captures the graphs that are missing, one for each item. The largest is first: others share its memory."""
        for num_rows in self._row_sizes:
            if (num_rows, needs) not in self._samplers:
                self.capture_sampler(num_rows, needs)
                yield
            for num_tokens in reversed(self._token_sizes):
                shape = self._shape(num_tokens, num_rows)
                if num_tokens >= num_rows and (shape, _needs_of_model(needs)) not in self._models:
                    self.capture_model(shape, needs)
                    yield

    def capture_model(self, shape: StepShape, needs: StepNeeds) -> None:
        """Captures the model for a shape. It runs on the null row only, so that no sequence changes."""
        began = time.perf_counter()
        nothing = _pack(ScheduledBatch.build(0), shape, self._null_row)
        self._words[: len(nothing)].copy_(torch.from_numpy(nothing))
        step = _unpack(self._words, shape)

        def run() -> None:
            self._hidden[: shape.num_rows].copy_(self._model(step, needs))

        self._models[shape, _needs_of_model(needs)], _ = self._pool.capture(run)
        self._log("model", began, shape.num_tokens, shape.num_rows, needs)

    def capture_sampler(self, num_rows: int, needs: StepNeeds) -> None:
        """Captures sampling for `num_rows` rows. It runs on the null row only."""
        began = time.perf_counter()
        rows = self._words[:num_rows]
        rows.fill_(self._null_row)
        hidden = self._hidden[:num_rows]  # [num_rows, hidden_size]
        self._samplers[num_rows, needs] = self._pool.capture(lambda: self._sample(hidden, rows, needs))
        self._log("sampling", began, num_rows, num_rows, needs)

    def _log(self, part: str, began: float, num_tokens: int, num_rows: int, needs: StepNeeds) -> None:
        events.graph_mixed_captured.log(
            logger,
            part=part,
            num_tokens=num_tokens,
            num_rows=num_rows,
            elapsed_ms=(time.perf_counter() - began) * 1e3,
            **asdict(needs),
            **self._pool.step.fields,
        )


def _needs_of_model(needs: StepNeeds) -> StepNeeds:
    """Returns the part of a step's needs that the graph of its model depends on."""
    return StepNeeds(shares_prefix=needs.shares_prefix, skips_draft_model=needs.skips_draft_model)


def missing_graphs(
    device: torch.device, decode: DecodeGraphs | None, drafts: DecodeGraphs | None, mixed: MixedGraphs | None
) -> Iterator[None]:
    """Captures the graphs that the steps of most requests need and that are missing, one for each item.

    Stops when little memory is left. drafts: those of the draft model; None without one.
    """
    present = [each for each in (decode, drafts, mixed) if each is not None]
    for needs in _usual_needs(has_draft_model=drafts is not None):
        for each in present:
            for _ in each.capture_missing(needs):
                yield
                if free_memory(device) < _SPARE_MEMORY:
                    return


def _usual_needs(*, has_draft_model: bool) -> list[StepNeeds]:
    """Returns the needs of the steps of most requests, the most frequent first."""
    return [
        StepNeeds(truncates=truncates, shares_prefix=shares_prefix, skips_draft_model=skips_draft_model)
        for shares_prefix in (False, True)
        for skips_draft_model in ((False, True) if has_draft_model else (False,))
        for truncates in (False, True)
    ]


def _sections(shape: StepShape) -> tuple[int, ...]:
    """Returns the words of each part of the input. The sampled rows come first, at the same place for all shapes."""
    rows, chunks = shape.num_rows, shape.num_chunks
    return rows, rows, rows, 1, chunks, chunks, chunks + 1, chunks


def _num_words(shape: StepShape) -> int:
    return sum(_sections(shape))


def _pack(batch: ScheduledBatch, shape: StepShape, null_row: int) -> IntArray:
    """Returns the input of the graphs for a step, [num_words]."""
    words: IntArray = np.zeros(_num_words(shape), dtype=np.int32)
    ends = np.cumsum(_sections(shape))[:-1]
    sampled_rows, sampled_tokens, decode_rows, num_decode, rows, starts, cu_seqlens, context_lens = np.split(
        words, ends
    )
    num_rows, num_chunks, num_final = len(batch.computed_rows), len(batch.chunks), batch.num_final_chunks
    lengths = batch.chunks["length"]
    ends_of_chunks = num_rows + np.cumsum(lengths)
    num_decode[0] = num_rows
    decode_rows[:num_rows], decode_rows[num_rows:] = batch.computed_rows, null_row
    rows[:num_chunks], rows[num_chunks:] = batch.chunks["row"], null_row
    starts[:num_chunks] = batch.chunks["start"]
    cu_seqlens[0] = num_rows
    cu_seqlens[1 : num_chunks + 1], cu_seqlens[num_chunks + 1 :] = ends_of_chunks, num_rows + lengths.sum()
    context_lens[:num_chunks], context_lens[num_chunks:] = batch.chunks["start"] + lengths, 1
    num_sampled = num_rows + num_final
    sampled_rows[:num_rows], sampled_rows[num_sampled:] = batch.computed_rows, null_row
    sampled_rows[num_rows:num_sampled] = batch.final_chunks["row"]
    sampled_tokens[:num_rows] = np.arange(num_rows)
    sampled_tokens[num_rows:num_sampled] = ends_of_chunks[:num_final] - 1
    return words


def _unpack(words: torch.Tensor, shape: StepShape) -> PaddedStep:
    """Returns the parts of the graphs' input as views."""
    parts = words[: _num_words(shape)].split(_sections(shape))
    sampled_rows, sampled_tokens, decode_rows, num_decode, rows, starts, cu_seqlens, context_lens = parts
    return PaddedStep(
        shape=shape,
        make_up=StepMakeUp(
            num_decode=num_decode,
            decode_rows=decode_rows,
            chunk_rows=rows,
            chunk_starts=starts,
            cu_seqlens_q=cu_seqlens,
        ),
        context_lens=context_lens,
        sampled_rows=sampled_rows,
        sampled_tokens=sampled_tokens,
    )
