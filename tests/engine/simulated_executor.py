"""An executor without a model: it checks the memory that attention would read.

Each slot of the simulated cache holds a digest of the prefix that was current when it was written. A
step recomputes, for every token it computes, the digests of the whole context through the block table,
and fails on the first that is not there: a block freed too early, shared too early, or owned twice.
The next token is a function of the digest, so equal prefixes give equal tokens under any schedule. A row with a mask
draws among what the mask allows.

A draft model with a cache of its own beside it computes the same tokens, but for steps that leave it out, and drafts
after a step as the batch asks. Its cache is checked the same way, but for cached prefixes, of which it may lack tokens.
Some of its tokens are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanovllm.config import ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch, StepResult

VOCAB_SIZE = 50
EOS = 7
_ROOT = 12345


def make_config(**changes: object) -> ResolvedConfig:
    values: dict[str, object] = {
        "model": "simulated",
        "device": "cpu",
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "eos_token_ids": (EOS,),
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "kv_cache_dtype": "float32",
        "num_blocks": 32,
        "enable_prefix_caching": True,
        "use_cuda_graphs": False,
        "prefill_backend": "simulated",
        "decode_backend": "simulated",
        "pipeline_depth": 1,
        "max_prefill_tokens_beside_decode": None,
        "inter_token_latency_target_ms": None,
    }
    return ResolvedConfig(**{**values, **changes})  # type: ignore[arg-type]


def extend(digest: int, token: int) -> int:
    return (digest * 1_000_003 + token + 1) % (2**61 - 1)


def next_token(digest: int, mask: np.ndarray | None = None) -> int:
    allowed = range(VOCAB_SIZE)
    if mask is not None:
        allowed = [token for token in allowed if mask[token // 32] >> (token % 32) & 1]
    return allowed[(digest >> 7) % len(allowed)]


def expected_output(prompt: list[int], max_tokens: int, max_model_len: int, ignore_eos: bool = False) -> list[int]:
    """What a request must give, computed without any scheduling."""
    digest = _ROOT
    for token in prompt:
        digest = extend(digest, token)
    output: list[int] = []
    while len(output) < max_tokens and len(prompt) + len(output) < max_model_len:
        output.append(next_token(digest))
        digest = extend(digest, output[-1])
        if output[-1] == EOS and not ignore_eos:
            break
    return output


@dataclass
class Handle:
    token_ids: np.ndarray
    drafts: np.ndarray | None = None

    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        return StepResult(self.token_ids, drafts=self.drafts)


class SimulatedExecutor:
    def __init__(self, config: ResolvedConfig) -> None:
        self.resolved = config
        self.slots: dict[int, int] = {}
        self.draft_slots: dict[int, int] = {}  # of the draft model
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, dict[int, int]] = {}
        self.masks: dict[int, np.ndarray] = {}
        self.num_cached: dict[int, int] = {}  # of each row, the tokens of its cached prefix
        self.num_tokens_computed = 0
        self.fail_at_step: int | None = None
        self.is_shut_down = False

    def submit(self, batch: ScheduledBatch) -> Handle:
        if batch.step == self.fail_at_step:
            raise RuntimeError("the device failed")
        batch = ScheduledBatch.from_buffer(batch.buffer.copy())  # what another rank would read
        for row in batch.section("closed").tolist():
            del self.tokens[row], self.tables[row]
            self.masks.pop(row, None)
        offset = 0
        opened = batch.section("opened")
        for row, length in zip(opened["row"].tolist(), opened["num_tokens"].tolist(), strict=True):
            assert row not in self.tokens, "a row was opened twice"
            self.tokens[row] = batch.section("opened_tokens")[offset : offset + length].tolist()
            self.tables[row] = {}
            self.num_cached.pop(row, None)
            offset += length
        for row, index, block in batch.blocks.tolist():
            assert index not in self.tables[row], "an entry of a block table was written twice"
            assert 0 <= block < self.resolved.num_blocks
            self.tables[row][index] = block
        masked, mask_words = batch.section("masked"), batch.section("mask_words")
        if len(masked):
            self.masks.update(zip(masked.tolist(), mask_words.reshape(len(masked), -1), strict=True))
        drafts = batch.section("drafts").tolist()
        for row, source, offset, position, token in drafts:
            assert row >= self.resolved.max_num_seqs
            assert len(self.tokens[source]) == position - offset
            before = self.tokens[source] if offset == 0 else self.tokens[row - 1]
            self.tokens[row], self.tables[row] = [*before, token], self.tables[source]
        work = [(row, len(self.tokens[row]) - 1, 1) for row in batch.computed_rows.tolist()]
        work += [tuple(chunk) for chunk in batch.chunks.tolist()]
        for row, start, _ in batch.chunks.tolist():
            self.num_cached.setdefault(row, start)
        digests = {row: self._digests(row) for row, _, _ in work}
        assert len(digests) == len(work), "a row is in a step twice"
        assert all(length >= 1 for _, _, length in work), "an empty chunk has no query to sample from"
        for row, start, length in work:  # every layer stores all tokens before it attends
            for position in range(start, start + length):
                self.slots[self._slot(row, position)] = digests[row][position]
                if not batch.needs.skips_draft_model:
                    self.draft_slots[self._slot(row, position)] = digests[row][position]
                self.num_tokens_computed += 1
        for row, start, length in work:
            for position in range(start + length):
                assert self.slots.get(self._slot(row, position)) == digests[row][position], (
                    f"row {row}, position {position}: the cache does not hold this prefix"
                )
        sampled = []
        for row in [*batch.computed_rows.tolist(), *batch.final_chunks["row"].tolist()]:
            sampled.append(next_token(digests[row][-1], self.masks.get(row)))
            self.tokens[row].append(sampled[-1])
        for row, source, offset, position, token in drafts:
            before = source if offset == 0 else row - 1
            if len(self.tokens[source]) == position + 1 and self.tokens[before][position] == token:
                self.tokens[source].append(self.tokens[row][position + 1])
        for row, *_ in drafts:
            del self.tokens[row], self.tables[row]
        assert batch.num_tokens <= self.resolved.max_num_batched_tokens
        for row, start, length in batch.chunks.tolist():
            final = start + length == len(digests[row])
            assert final == (row in batch.sampled_rows), "exactly the chunks that end their tokens sample"
        proposals = batch.section("proposals").tolist()
        drafts_after = [self._draft(row, num_tokens) for row, num_tokens in proposals]
        longest = max(map(len, drafts_after), default=0)
        padded = [tokens + [-1] * (longest - len(tokens)) for tokens in drafts_after]
        return Handle(np.array(sampled, dtype=np.int32), np.array(padded, dtype=np.int32) if padded else None)

    def collect(self, handle: Handle) -> StepResult:
        return handle.wait()

    def synchronize(self) -> None: ...

    def capture_ahead(self) -> bool:
        return False

    def shutdown(self) -> None:
        self.is_shut_down = True

    def _digests(self, row: int) -> list[int]:
        digest, digests = _ROOT, []
        for token in self.tokens[row]:
            digest = extend(digest, token)
            digests.append(digest)
        return digests

    def _draft(self, row: int, num_tokens: int) -> list[int]:
        known = self.tokens[row]
        assert len(known) + num_tokens <= self.resolved.max_model_len
        for _ in range(num_tokens):
            digests = self._digests(row)
            self.draft_slots[self._slot(row, len(digests) - 1)] = digests[-1]
            holes = [at for at, digest in enumerate(digests) if self.draft_slots.get(self._slot(row, at)) != digest]
            assert all(position < self.num_cached[row] for position in holes), "the draft model's cache is wrong"
            is_right = digests[-1] % 6 > 0 and not holes
            self.tokens[row] = [*self.tokens[row], next_token(digests[-1]) if is_right else 0]
        drafted, self.tokens[row] = self.tokens[row][len(known) :], known
        return drafted

    def _slot(self, row: int, position: int) -> int:
        block_size = self.resolved.block_size
        return self.tables[row][position // block_size] * block_size + position % block_size
