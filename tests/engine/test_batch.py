"""The batch's one buffer: what goes in comes out, in the order in which it applies; nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.batch import (
    NO_LOGPROBS,
    SECTIONS,
    VERSION,
    Chunk,
    IntArray,
    LogitEdits,
    OpenedRow,
    PromptLogprobs,
    ScheduledBatch,
    StepNeeds,
    same_work,
)

IN_ORDER = [
    "closed",
    "opened",
    "opened_tokens",
    "blocks",
    "token_biases",
    "masked",
    "mask_words",
    "chunks",
    "prompt_logprobs",
    "drafts",
    "proposals",
    "decode_rows",
]
HEADER_SIZE = 8 + len(IN_ORDER)
MASK_WORDS = 2

int32 = st.integers(-(2**31), 2**31 - 1)
masks = st.lists(int32, min_size=MASK_WORDS, max_size=MASK_WORDS).map(lambda words: np.array(words, dtype=np.int32))
all_logit_edits = st.builds(
    LogitEdits,
    num_prompt_tokens=st.integers(0, 99),
    penalties=st.tuples(*[st.floats(-2, 2, width=32)] * 3),
    num_token_biases=st.integers(0, 9),
    token_biases=st.lists(int32, max_size=6).map(tuple),
    mask=st.none() | masks,
)
opened_rows = st.builds(
    OpenedRow,
    row=st.integers(0, 1000),
    token_ids=st.lists(int32, min_size=1, max_size=8).map(lambda ids: np.array(ids, dtype=np.int32)),
    temperature=st.floats(0, 2, width=32),
    seed=st.integers(-(2**63), 2**63 - 1),
    truncation=st.tuples(*[st.floats(0, 100, width=32)] * 3),
    logit_edits=st.none() | all_logit_edits,
)
triples = st.lists(st.tuples(int32, int32, int32), max_size=4)
changes = st.fixed_dictionaries(
    {
        "closed": st.lists(int32, max_size=4),
        "opened": st.lists(opened_rows, max_size=4, unique_by=lambda item: item.row),
        "blocks": triples,
        "token_masks": st.dictionaries(st.integers(0, 9), masks, max_size=3),
        "chunks": st.lists(st.builds(Chunk, int32, int32, int32), max_size=4),
        "prompt_logprobs": st.lists(st.builds(PromptLogprobs, *[int32] * 5), max_size=3),
        "drafts": st.lists(st.tuples(*[int32] * 5), max_size=4),
        "proposals": st.lists(st.tuples(int32, int32), max_size=4),
        "decode_rows": st.lists(int32, max_size=4),
    }
)


def example() -> ScheduledBatch:
    """Something in every section."""
    logit_edits = LogitEdits(3, (1.5, 0.0, 1.0), 1, (9, 8, 7, 5, 0), np.array([6], dtype=np.int32))
    return ScheduledBatch.build(
        7,
        closed=[4],
        opened=[OpenedRow(2, np.array([10, 11, 12], dtype=np.int32), 0.5, 2**40 + 3, logit_edits=logit_edits)],
        blocks=[(2, 0, 5), (0, 1, 6)],
        token_masks={3: np.array([-1], dtype=np.int32)},
        chunks=[Chunk(2, 0, 3), Chunk(1, 4, 2)],
        num_final_chunks=1,
        prompt_logprobs=[PromptLogprobs(chunk_token=0, row=2, position=0, num_tokens=2, num_top=20)],
        drafts=[(8, 3, 0, 6, 99), (9, 3, 1, 7, 98)],
        proposals=[(3, 4), (0, 2)],
        decode_rows=[0, 3],
    )


@given(step=st.integers(0, 2**31 - 1), values=changes, num_final=st.integers(0, 4))
def test_what_is_built_is_read_back(step: int, values: dict[str, Any], num_final: int) -> None:
    num_final = min(num_final, len(values["chunks"]))
    built = ScheduledBatch.build(step, num_final_chunks=num_final, **values)
    read = ScheduledBatch.from_buffer(np.frombuffer(built.buffer.tobytes(), dtype=np.int32))
    for batch in (built, read):
        assert (batch.step, batch.num_final_chunks) == (step, num_final)
        assert batch.section("closed").tolist() == values["closed"]
        assert batch.blocks.tolist() == values["blocks"]
        assert list(map(Chunk._make, batch.chunks.tolist())) == values["chunks"]
        assert batch.prompt_logprobs == values["prompt_logprobs"]
        assert batch.decode_rows.tolist() == values["decode_rows"]
        assert batch.section("drafts").tolist() == values["drafts"]
        assert batch.section("proposals").tolist() == values["proposals"]
        draft_rows = [draft[0] for draft in values["drafts"]]
        assert batch.computed_rows.tolist() == values["decode_rows"] + draft_rows
        assert batch.num_sampled == len(batch.computed_rows) + num_final
        assert len(set(batch.sampled_tokens.tolist())) == len(batch.sampled_rows) == batch.num_sampled - len(draft_rows)
        opened, records = values["opened"], batch.section("opened")
        assert records["row"].tolist() == [item.row for item in opened]
        assert records["num_tokens"].tolist() == [len(item.token_ids) for item in opened]
        assert records["temperature"].tolist() == [item.temperature for item in opened]
        assert records["seed"].tolist() == [item.seed for item in opened]
        assert records["truncation"].tolist() == [item.truncation for item in opened]
        of_rows = [(item.row, item.logit_edits or LogitEdits()) for item in opened]
        settings = records["logit_edits"]
        assert settings["num_prompt_tokens"].tolist() == [edits.num_prompt_tokens for _, edits in of_rows]
        assert settings["num_token_biases"].tolist() == [edits.num_token_biases for _, edits in of_rows]
        assert settings["has_penalties"].tolist() == [edits.penalties != (1, 0, 0) for _, edits in of_rows]
        assert settings["has_mask"].tolist() == [0] * len(opened)
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        penalties = zip(*(settings[name].tolist() for name in names), strict=True)
        assert list(penalties) == [edits.penalties for _, edits in of_rows]
        words = [(row, index, word) for row, edits in of_rows for index, word in enumerate(edits.token_biases)]
        assert batch.section("token_biases").tolist() == words
        own = {row: edits.mask.tolist() for row, edits in of_rows if edits.mask is not None}
        new = {row: mask.tolist() for row, mask in values["token_masks"].items()}
        masked, mask_words = batch.section("masked").tolist(), batch.section("mask_words").reshape(-1, MASK_WORDS)
        assert dict(zip(masked, mask_words.tolist(), strict=True)) == {**own, **new}
        assert len(set(masked)) == len(masked)  # once each: which of two would be the last is not defined on a GPU
        tokens = [token for item in opened for token in item.token_ids.tolist()]
        assert batch.section("opened_tokens").tolist() == tokens
        assert batch.sampled_rows.tolist() == values["decode_rows"] + [c.row for c in values["chunks"][:num_final]]


def test_sections_follow_the_header_in_the_order_in_which_they_apply() -> None:
    batch = example()
    assert list(batch.sections) == list(SECTIONS) == IN_ORDER
    offset = HEADER_SIZE
    for name in IN_ORDER:
        assert batch.sections[name].offset == offset
        offset = batch.sections[name].end
    assert offset == len(batch.buffer)
    assert batch.buffer[:HEADER_SIZE].tolist() == [
        *[VERSION, 7, 1],
        *[0, 0, NO_LOGPROBS, 0, 0],
        *[1, 1, 3, 2, 5, 2, 2, 2, 1, 2, 2, 4],
    ]
    assert batch.buffer[batch.sections["opened_tokens"].offset :].tolist() == [
        *[10, 11, 12],
        *[2, 0, 5, 0, 1, 6],
        *[2, 0, 9, 2, 1, 8, 2, 2, 7, 2, 3, 5, 2, 4, 0],
        *[2, 3],
        *[6, -1],
        *[2, 0, 3, 1, 4, 2],
        *[0, 2, 0, 2, 20],
        *[8, 3, 0, 6, 99, 9, 3, 1, 7, 98],
        *[3, 4, 0, 2],
        *[0, 3, 8, 9],
    ]
    assert batch.buffer.dtype == np.int32


def test_counts_of_tokens_and_samples() -> None:
    batch = example()
    assert batch.num_tokens == 2 + 2 + 3 + 2
    assert batch.num_sampled == 2 + 2 + 1
    assert batch.sampled_rows.tolist() == [0, 3, 2]  # decode rows, then the chunks that end their prompt
    assert batch.sampled_tokens.tolist() == [0, 1, 4]  # the tokens of draft rows are between them


@pytest.mark.parametrize(("edits_logits", "skips_draft_model"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("num_logprobs", [None, 0, 20])
@pytest.mark.parametrize(("shares_prefix", "truncates"), [(False, False), (True, False), (False, True), (True, True)])
def test_needs_stand_apart(
    *, shares_prefix: bool, truncates: bool, num_logprobs: int | None, edits_logits: bool, skips_draft_model: bool
) -> None:
    needs = StepNeeds(shares_prefix, truncates, num_logprobs, edits_logits, skips_draft_model)
    assert needs.all_logits is (truncates or edits_logits or num_logprobs is not None)
    assert ScheduledBatch.build(1, needs=needs).needs == needs
    assert ScheduledBatch.build(1).needs == StepNeeds()


def test_steps_that_differ_in_their_number_alone_are_the_same_work() -> None:
    def buffer(step: int, **contents: Any) -> IntArray:
        return ScheduledBatch.build(step, **{"decode_rows": [0, 3], **contents}).buffer

    assert same_work(buffer(1), buffer(2))
    assert same_work(buffer(1, closed=[4]), buffer(2, closed=[4]))
    others = [{"decode_rows": [0, 2]}, {"decode_rows": [0]}, {"closed": [4]}, {"needs": StepNeeds(truncates=True)}]
    assert not any(same_work(buffer(1), buffer(1, **contents)) for contents in others)
    assert not same_work(buffer(1, closed=[4], decode_rows=[]), buffer(1, decode_rows=[4]))


def test_reading_copies_nothing() -> None:
    buffer = example().buffer
    read = ScheduledBatch.from_buffer(buffer)
    assert all(np.shares_memory(read.section(name), buffer) for name in SECTIONS)


@pytest.mark.parametrize("version", [0, VERSION + 1, -1])
def test_another_version_is_refused(version: int) -> None:
    buffer = example().buffer.copy()
    buffer[0] = version
    with pytest.raises(ValueError, match=f"version {VERSION}"):
        ScheduledBatch.from_buffer(buffer)


def test_a_buffer_of_another_size_is_refused() -> None:
    buffer = example().buffer
    for size in range(len(buffer)):
        with pytest.raises(ValueError, match="scheduled batch"):
            ScheduledBatch.from_buffer(buffer[:size])
    with pytest.raises(ValueError, match=f"of {len(buffer)} words came as {len(buffer) + 1}"):
        ScheduledBatch.from_buffer(np.append(buffer, np.int32(0)))


def test_a_step_without_changes_is_its_header() -> None:
    assert len(ScheduledBatch.build(1).buffer) == HEADER_SIZE
