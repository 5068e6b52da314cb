"""The draft model on the device: a second model whose KV cache has the blocks of the first.

`ModelWithDraft` computes the tokens of a step with both models. So whatever the model has in a block of its cache, the
draft model has in its own block of that number: chunks of prompts, cached prefixes and preempted rows need nothing of
their own. A step of which no row has drafts any more runs the model alone. `DraftSteps` lets the draft model decode
some tokens further after a step. These are the drafts that the next step may verify (docs/speculation.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from nanovllm.attention.interface import AttentionMetadata, LayerKVCache
from nanovllm.engine.batch import StepNeeds
from nanovllm.kernels.logprobs import SampledTokens
from nanovllm.models.causal_lm import CausalLM
from nanovllm.runner.cuda_graph import DecodeGraphs
from nanovllm.runner.device_batch import DeviceBatch
from nanovllm.runner.device_rows import DeviceRows, ModelInputs
from nanovllm.runner.sampler import Sampler
from nanovllm.speculative_config import MAX_DRAFTING_ROWS


class ModelWithDraft(CausalLM):
    """A model, and the draft model beside it, which computes the same tokens. The hidden states are the model's.

    The draft model's layers have the last of the KV caches.
    """

    def __init__(self, target: CausalLM, draft: CausalLM, num_draft_layers: int) -> None:
        torch.nn.Module.__init__(self)
        self.target, self.draft = target, draft
        self.lm_head = target.lm_head
        self._num_draft_layers = num_draft_layers

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_caches: Sequence[LayerKVCache],
    ) -> torch.Tensor:
        hidden: torch.Tensor = self.target(input_ids, positions, metadata, self.target_caches(kv_caches))
        if metadata.decode is not None:  # shared prefixes were looked for with the model's own number of heads
            metadata = replace(metadata, decode=replace(metadata.decode, shared=None))
        self.draft(input_ids, positions, metadata, self.draft_caches(kv_caches))
        return hidden

    def target_caches(self, kv_caches: Sequence[LayerKVCache]) -> Sequence[LayerKVCache]:
        """Returns the caches of the model alone."""
        return kv_caches[: -self._num_draft_layers]

    def draft_caches(self, kv_caches: Sequence[LayerKVCache]) -> Sequence[LayerKVCache]:
        """Returns the caches of the draft model alone."""
        return kv_caches[-self._num_draft_layers :]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.target.compute_logits(hidden)

    @property
    def draft_cost(self) -> float:
        """The draft model's weights as a share of the model's: about what a token of it takes of a step."""
        sizes = [sum(weight.nbytes for weight in model.parameters()) for model in (self.draft, self.target)]
        return sizes[0] / sizes[1]


class DraftingRunner(Protocol):
    """The part of the model runner that draft steps use."""

    model: CausalLM
    rows: DeviceRows
    kv_caches: list[LayerKVCache]
    sampler: Sampler


class DraftSteps:
    """What a step does about drafts: which models it runs, and, once its tokens are sampled, which drafts are right.

    It also makes the drafts that the next step may verify.
    """

    def __init__(self, runner: DraftingRunner) -> None:
        self._runner = runner
        self._graphs: DecodeGraphs | None = None

    def make_graphs(self, decode_graphs: DecodeGraphs | None) -> DecodeGraphs | None:
        """Returns the graphs of draft steps, which share the memory of those of decode steps; None without both."""
        if decode_graphs is not None and isinstance(self._runner.model, ModelWithDraft):
            null_row = self._runner.rows.null_row
            num_rows = min(MAX_DRAFTING_ROWS, null_row)
            self._graphs = _DraftGraphs(decode_graphs.pool, self._decode, num_rows, null_row)
        return self._graphs

    def run_model(self, inputs: ModelInputs, needs: StepNeeds) -> torch.Tensor:
        """Returns the model's hidden states [num_tokens, hidden_size]. Runs the draft model, too, if there is one.

        The draft model is left out of steps that need no drafts.
        """
        model: CausalLM = self._runner.model
        kv_caches: Sequence[LayerKVCache] = self._runner.kv_caches
        if needs.skips_draft_model and isinstance(model, ModelWithDraft):
            kv_caches = model.target_caches(kv_caches)
            model = model.target
        hidden: torch.Tensor = model(inputs.input_ids, inputs.positions, inputs.attention, kv_caches)
        return hidden

    def finish(self, batch: DeviceBatch, sampled: SampledTokens) -> SampledTokens:
        """Returns what a step sampled, with the drafts that it asks for."""
        rows = self._runner.rows
        if batch.has("drafts"):
            rows.accept(batch)
        if not batch.has("proposals"):
            return sampled
        if self._graphs is not None:  # the graphs below write to the memory of the step's own
            sampled = sampled.map(torch.clone)
        needs = replace(batch.host.needs, shares_prefix=False, num_logprobs=None)
        sizes = batch.host.section("proposals")["num_tokens"]  # largest first
        drafting = batch.columns("proposals", contiguous=True)["row"]  # [num_proposals]
        lengths = rows.lengths[drafting]
        longest = int(sizes[0])
        for size in range(longest):
            unfinished = drafting[: int(np.count_nonzero(sizes > size))]
            if self._graphs is None:
                self._decode(unfinished, needs)
            else:
                self._graphs.replay(unfinished, needs)
        # The drafts follow the rows' tokens, where the next tokens overwrite them.
        positions = lengths.long().unsqueeze(1) + torch.arange(longest, device=lengths.device)
        drafts = rows.token_ids[drafting.unsqueeze(1), positions.clamp_(max=rows.max_model_len)]
        rows.lengths[drafting] = lengths
        return replace(sampled, drafts=drafts)

    def _decode(self, drafting: torch.Tensor, needs: StepNeeds) -> SampledTokens:
        """Appends a token of the draft model to each of `drafting` [num_rows] int32. A CUDA graph records this.

        It is drawn with the seed, temperature and edits of its row, as the model's own token at this position will be.
        """
        runner = self._runner
        model, rows = runner.model, runner.rows
        assert isinstance(model, ModelWithDraft), "a batch with proposals is for an engine with a draft model"
        inputs = rows.decode_inputs(drafting)
        draft, takes_all = model.draft, runner.sampler.takes_all_logits(needs)
        kv_caches = model.draft_caches(runner.kv_caches)
        hidden = draft(inputs.input_ids, inputs.positions, inputs.attention, kv_caches)
        logits = draft.compute_logits(hidden) if takes_all else draft.lm_head.logits_share(hidden)
        sampled = runner.sampler(logits, drafting, rows, needs)
        rows.append(drafting, sampled.token_ids)
        return sampled


class _DraftGraphs(DecodeGraphs):
    """Graphs of draft steps, which never look for shared prefixes, and always run the draft model."""

    def capture_missing(self, needs: StepNeeds) -> Iterator[None]:
        never = needs.shares_prefix or needs.skips_draft_model
        return iter(()) if never else super().capture_missing(needs)
