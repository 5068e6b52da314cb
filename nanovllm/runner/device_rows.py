"""DeviceRows: what the device knows of every running sequence, as tensors indexed by row.

The counterpart of the scheduler's `RowTable`. Batches change it, and sampling appends tokens to it. It is never rebuilt
from Python lists, and only sampled tokens and log-probabilities are read back.

Further rows, the draft rows, are copies of others with drafted tokens appended, made anew for each step that has any.
One more row, the null row, serves as padding. It is one token long, and its block table holds only the null block,
which no sequence owns: what padding writes goes there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.attention.interface import AttentionMetadata, DecodeMetadata, PrefillMetadata
from nanovllm.kernels.columns import LOGIT_EDITS, NO_TRUNCATION, column_of
from nanovllm.kernels.decode_state import append_tokens, read_decode_tokens
from nanovllm.kernels.draft_rows import accept_drafts, open_draft_rows
from nanovllm.kernels.logit_edits import RowLogitEdits
from nanovllm.kernels.row_changes import OpenedRows, close_rows, open_rows, set_blocks
from nanovllm.kernels.shared_prefix import find_shared_prefixes
from nanovllm.kernels.step_tokens import read_step_tokens
from nanovllm.runner.device_batch import DeviceBatch
from nanovllm.runner.mixed_graphs import PaddedStep


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of one forward pass: the tokens of the decode rows first, then those of the chunks."""

    input_ids: torch.Tensor  # [num_tokens] int32
    positions: torch.Tensor  # [num_tokens] int64
    attention: AttentionMetadata
    sampled_rows: torch.Tensor  # [num_sampled] int32
    sampled_tokens: torch.Tensor | None  # [num_sampled] integers, indices of tokens; None: all tokens, in order


class DeviceRows:
    """Tensors of `max_num_rows` rows and the null row.

    max_num_rows: of sequences, then of drafts. null_block: the number of the null block, which follows the blocks of
    the KV cache.
    """

    def __init__(
        self,
        max_num_rows: int,
        max_model_len: int,
        block_size: int,
        null_block: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        num_rows = max_num_rows + 1
        max_blocks = -(-max_model_len // block_size)
        self.null_row = max_num_rows
        self.null_block = null_block
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.device = device
        self.token_ids = torch.zeros(num_rows, max_model_len + 1, dtype=torch.int32, device=device)
        # Known tokens of each row. The keys and values of a decoding row's last one are not computed yet.
        self.lengths = torch.ones(num_rows, dtype=torch.int32, device=device)
        self.block_tables = torch.full((num_rows, max_blocks), null_block, dtype=torch.int32, device=device)
        self.temperatures = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.truncations = torch.tensor([NO_TRUNCATION], device=device).repeat(num_rows, 1)  # columns of TRUNCATION
        self.logit_edits = RowLogitEdits.zeros(num_rows, vocab_size, device)
        self._opened = OpenedRows(
            token_ids=self.token_ids,
            lengths=self.lengths,
            temperatures=self.temperatures,
            seeds=self.seeds,
            truncations=self.truncations,
            logit_edits=self.logit_edits.settings,
        )

    def apply(self, batch: DeviceBatch) -> None:
        """Applies the batch's changes, in the order of its sections."""
        if batch.has("closed"):
            close_rows(batch.values("closed"), self.lengths, self.block_tables, self.null_block)
        if batch.has("opened"):
            open_rows(batch.records("opened"), batch.values("opened_tokens"), self._opened)
        if batch.has("blocks"):
            set_blocks(batch.records("blocks"), self.block_tables)
        if batch.has("token_biases"):
            biases = batch.columns("token_biases")
            self.logit_edits.token_biases[biases["row"], biases["index"]] = biases["word"]
        if batch.has("masked"):
            masked = batch.values("masked").long()
            self.logit_edits.masks[masked] = batch.values("mask_words").view(len(masked), -1)
            self.logit_edits.settings[:, column_of(LOGIT_EDITS, "has_mask")].index_fill_(0, masked, 1)
        if batch.has("drafts"):
            open_draft_rows(batch.records("drafts"), self._opened, self.logit_edits, self.block_tables)

    def decode_inputs(self, rows: torch.Tensor, query_group: int | None = None) -> ModelInputs:
        """Returns the inputs of a step in which each of `rows` [num_rows] int32 computes its last token.

        Runs inside a captured graph. query_group: number of query heads that share a KV head, to look for prefixes that
        rows share; None: do not look for any.
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
                first_prefill_token=len(rows),
            ),
            sampled_rows=rows,
            sampled_tokens=None,
        )

    def mixed_inputs(self, batch: DeviceBatch, query_group: int | None = None) -> ModelInputs:
        """Returns the inputs of a step that computes the batch's decode rows and chunks.

        Shapes and bounds are taken from the host, so that nothing waits for the device.
        """
        chunks, host_chunks = batch.columns("chunks", contiguous=True), batch.host.chunks
        rows, starts, lengths = chunks["row"], chunks["start"], chunks["length"]
        ends = lengths.cumsum(0)
        token_rows, positions = _expand(rows, starts, lengths, batch.host.num_prefill_tokens)
        prefill = PrefillMetadata(
            cu_seqlens_q=torch.cat([ends.new_zeros(1), ends]).int(),
            context_lens=starts + lengths,
            block_tables=self.block_tables[rows],
            max_seqlen_q=int(host_chunks["length"].max()),
            max_seqlen_k=int((host_chunks["start"] + host_chunks["length"]).max()),
        )
        slots = self._slots(token_rows, positions)
        input_ids = self.token_ids[token_rows, positions]
        final_rows, last_tokens = (part[: batch.host.num_final_chunks] for part in (rows, ends - 1))
        num_decode = len(batch.host.computed_rows)
        if not num_decode:
            attention = AttentionMetadata(
                slots, num_decode_tokens=0, decode=None, prefill=prefill, first_prefill_token=0
            )
            return ModelInputs(input_ids, positions, attention, final_rows, last_tokens)
        decode = self.decode_inputs(batch.values("decode_rows"), query_group)
        return ModelInputs(
            input_ids=torch.cat([decode.input_ids, input_ids]),
            positions=torch.cat([decode.positions, positions]),
            attention=AttentionMetadata(
                slot_mapping=torch.cat([decode.attention.slot_mapping, slots]),
                num_decode_tokens=num_decode,
                decode=decode.attention.decode,
                prefill=prefill,
                first_prefill_token=num_decode,
            ),
            sampled_rows=torch.cat([decode.sampled_rows, final_rows]),
            sampled_tokens=torch.cat([torch.arange(num_decode, device=self.device), num_decode + last_tokens]),
        )

    def padded_inputs(self, step: PaddedStep, query_group: int | None = None) -> ModelInputs:
        """Returns the inputs of a padded step with chunks. Runs inside a captured graph.

        All decode rows of its shape attend, and read the query at their place in the flat batch. What the padding among
        them writes there is overwritten by the chunks.
        """
        make_up, num_tokens = step.make_up, step.shape.num_tokens
        tokens = read_step_tokens(make_up, self.token_ids, self.lengths, self.block_tables, self.block_size, num_tokens)
        context_lens = self.lengths[make_up.decode_rows]
        block_tables = self.block_tables[make_up.decode_rows]
        shared = None
        if query_group is not None:
            shared = find_shared_prefixes(block_tables, context_lens, self.block_size, query_group)
        return ModelInputs(
            input_ids=tokens.input_ids,
            positions=tokens.positions,
            attention=AttentionMetadata(
                slot_mapping=tokens.slot_mapping,
                num_decode_tokens=step.shape.num_rows,
                decode=DecodeMetadata(context_lens, block_tables, self.max_model_len, shared),
                prefill=PrefillMetadata(
                    cu_seqlens_q=make_up.cu_seqlens_q,
                    context_lens=step.context_lens,
                    block_tables=self.block_tables[make_up.chunk_rows],
                    max_seqlen_q=num_tokens,
                    max_seqlen_k=self.max_model_len,
                ),
                first_prefill_token=0,
            ),
            sampled_rows=step.sampled_rows,
            sampled_tokens=step.sampled_tokens,
        )

    def append(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Appends one token to each of `rows` [num_rows] int32, except the null row. Runs inside a captured graph."""
        append_tokens(rows, token_ids, self.token_ids, self.lengths, self.null_row)

    def accept(self, batch: DeviceBatch) -> None:
        """Appends to each row the tokens that its draft rows sampled after right drafts, once the step has run."""
        accept_drafts(batch.records("drafts"), self.token_ids, self.lengths)

    def _slots(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns the cache slot of each token, [num_tokens] int64."""
        blocks = self.block_tables[rows, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size


def _expand(
    rows: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns row and position [num_tokens] of every token of the ranges `starts` to before `starts + lengths`.

    num_tokens: the sum of `lengths`, given by the host so that nothing waits for the device.
    """
    first = lengths.cumsum(0) - lengths  # where each range begins in the flat batch
    token_rows = torch.repeat_interleave(rows, lengths, output_size=num_tokens)
    offsets = torch.repeat_interleave(starts.long() - first, lengths, output_size=num_tokens)
    return token_rows, torch.arange(num_tokens, device=rows.device) + offsets
