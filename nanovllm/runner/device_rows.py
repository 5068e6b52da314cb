"""DeviceRows: what the device knows of every running sequence, as tensors indexed by row.

The counterpart of the scheduler's `RowTable`. A step's batch changes it, decoding advances it; nothing
is rebuilt from Python lists, and nothing is read back but the sampled tokens.

One row more than can run, the null row, stands for padding. It is one token long and its block table
holds the null block, which belongs to nobody: whatever padding writes, it touches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.attention.interface import AttentionMetadata, DecodeMetadata, PrefillMetadata
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.errors import OutOfMemoryError
from nanovllm.kernels.decode_state import append_tokens, read_decode_tokens
from nanovllm.kernels.logit_edits import RowLogitEdits, edit_logits
from nanovllm.kernels.shared_prefix import find_shared_prefixes
from nanovllm.kernels.truncate import NO_TRUNCATION
from nanovllm.utils.device_memory import GB


@dataclass(frozen=True)
class ModelInputs:
    """One forward pass: decode rows first, then the chunks."""

    input_ids: torch.Tensor  # [num_tokens] int32
    positions: torch.Tensor  # [num_tokens] int64
    attention: AttentionMetadata
    sampled_rows: torch.Tensor  # [num_sampled] int32
    sampled_tokens: torch.Tensor | None  # [num_sampled] int64, where in the batch they stand; None: all, in order


class DeviceRows:
    """Tensors of `max_num_seqs` rows and the null row.

    block tables point into a cache of `null_block` blocks and the null block after them.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        null_block: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        num_rows = max_num_seqs + 1
        max_blocks = -(-max_model_len // block_size)
        self.null_row = max_num_seqs
        self.null_block = null_block
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.device = device
        self.token_ids = torch.zeros(num_rows, max_model_len + 1, dtype=torch.int32, device=device)
        self.lengths = torch.ones(num_rows, dtype=torch.int32, device=device)  # tokens known, the last one not computed
        self.block_tables = torch.full((num_rows, max_blocks), null_block, dtype=torch.int32, device=device)
        self.temperatures = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(num_rows, dtype=torch.int64, device=device)
        # top_k, top_p, min_p: `kernels.truncate`
        self.truncations = torch.tensor([NO_TRUNCATION], device=device).repeat(num_rows, 1)
        self.logit_edits = RowLogitEdits.zeros(num_rows, vocab_size, device)

    def apply(self, batch: ScheduledBatch, words: torch.Tensor) -> None:
        """Makes the batch's changes; `words` is its buffer on the device, int32."""

        def section(name: str) -> torch.Tensor:
            place = batch.sections[name]
            return words[place.offset : place.end].view(place.count, place.width)

        if batch.sections["closed"].count:
            closed = section("closed").squeeze(1).long()
            self.lengths.index_fill_(0, closed, 1)  # assigning a number would copy it to the device, and wait
            self.block_tables.index_fill_(0, closed, self.null_block)
        if batch.sections["opened"].count:
            rows, num_tokens, temperature, *_ = opened = section("opened").unbind(1)
            self.lengths[rows] = num_tokens
            self.temperatures[rows] = temperature.contiguous().view(torch.float32)
            self.seeds[rows] = torch.stack(opened[3:5], dim=1).view(torch.int64).squeeze(1)
            self.truncations[rows] = section("opened")[:, 5:8].contiguous().view(torch.float32)
            self.logit_edits.asked[rows] = section("opened")[:, 8:]
            tokens = section("opened_tokens").squeeze(1)
            token_rows, positions = _expand(rows, torch.zeros_like(rows), num_tokens, len(tokens))
            self.token_ids[token_rows, positions] = tokens
        if batch.sections["blocks"].count:
            rows, indices, blocks = section("blocks").unbind(1)
            self.block_tables[rows, indices] = blocks
        if batch.sections["edits"].count:
            rows, indices, edits = section("edits").unbind(1)
            self.logit_edits.edits[rows, indices] = edits
        if batch.sections["masked"].count:
            rows = section("masked").squeeze(1).long()
            self.logit_edits.masks[rows] = section("mask_words").view(len(rows), -1)
            self.logit_edits.asked[:, 3].index_fill_(0, rows, 1)

    def decode_inputs(self, rows: torch.Tensor, query_group: int | None = None) -> ModelInputs:
        """Each of `rows` [num_rows] int32 computes its last token. Runs inside a captured graph.

        query_group: query heads that share a KV head, where prefixes that rows share are to be found; else None.
        """
        tokens = read_decode_tokens(rows, self.token_ids, self.lengths, self.block_tables, self.block_size)
        shared = None
        if query_group is not None:
            shared = find_shared_prefixes(tokens.block_tables, tokens.context_lens, self.block_size, query_group)
        return ModelInputs(
            input_ids=tokens.input_ids,
            positions=tokens.positions,
            attention=AttentionMetadata(
                slot_mapping=tokens.slot_mapping,
                num_decode_tokens=len(rows),
                decode=DecodeMetadata(tokens.context_lens, tokens.block_tables, self.max_model_len, shared),
                prefill=None,
            ),
            sampled_rows=rows,
            sampled_tokens=None,
        )

    def mixed_inputs(self, batch: ScheduledBatch, words: torch.Tensor, query_group: int | None = None) -> ModelInputs:
        """The batch's decode rows and chunks together. Shapes and bounds come from the host: nothing is waited for."""
        place = batch.sections["chunks"]
        rows, starts, lengths = words[place.offset : place.end].view(place.count, 3).t().contiguous().unbind(0)
        num_tokens = batch.num_prefill_tokens
        ends = lengths.cumsum(0)
        token_rows, positions = _expand(rows, starts, lengths, num_tokens)
        context_lens = starts + lengths
        prefill = PrefillMetadata(
            cu_seqlens_q=torch.cat([ends.new_zeros(1), ends]).int(),
            context_lens=context_lens,
            block_tables=self.block_tables[rows],
            max_seqlen_q=int(batch.chunks[:, 2].max()),
            max_seqlen_k=int((batch.chunks[:, 1] + batch.chunks[:, 2]).max()),
        )
        slots = self._slots(token_rows, positions)
        input_ids = self.token_ids[token_rows, positions]
        final = batch.num_final_chunks
        if not batch.sections["decode_rows"].count:
            metadata = AttentionMetadata(slots, 0, None, prefill)
            return ModelInputs(input_ids, positions, metadata, rows[:final], ends[:final] - 1)
        place = batch.sections["decode_rows"]
        decode = self.decode_inputs(words[place.offset : place.end], query_group)
        metadata = AttentionMetadata(
            torch.cat([decode.attention.slot_mapping, slots]), place.count, decode.attention.decode, prefill
        )
        return ModelInputs(
            input_ids=torch.cat([decode.input_ids, input_ids]),
            positions=torch.cat([decode.positions, positions]),
            attention=metadata,
            sampled_rows=torch.cat([decode.sampled_rows, rows[:final]]),
            sampled_tokens=torch.cat([torch.arange(place.count, device=self.device), place.count + ends[:final] - 1]),
        )

    def append(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Adds one token to each of `rows` [num_rows] int32, except the null row. Runs inside a captured graph."""
        append_tokens(rows, token_ids, self.token_ids, self.lengths, self.null_row)

    def shape(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What tokens are drawn from: logits [num_rows, vocab_size] of `rows`, shaped. Runs inside a captured graph."""
        try:
            return edit_logits(logits, rows, self.token_ids, self.lengths, self.logit_edits)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"Penalties, biases, bans and masks need {logits.numel() * 4 / GB:.2f} GB and more for {len(rows)} "
                f"rows, which {self.device} does not have left: {error} Lower gpu_memory_utilization, max_num_seqs."
            ) from error

    def _slots(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = self.block_tables[rows, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size


def _expand(
    rows: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and position of each token of the ranges (row, start … start + length), one after another.

    `num_tokens` is the sum of `lengths`, known on the host, so that nothing is waited for.
    """
    first = lengths.cumsum(0) - lengths  # where each range begins in the flat batch
    token_rows = torch.repeat_interleave(rows, lengths, output_size=num_tokens)
    offsets = torch.repeat_interleave(starts.long() - first, lengths, output_size=num_tokens)
    return token_rows, torch.arange(num_tokens, device=rows.device) + offsets
