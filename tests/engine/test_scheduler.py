"""What runs next: order of arrival, chunks, preemption, and releases that wait for steps in flight."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.prefill_policy import PrefillBudget
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import InvalidLogitsError
from nanovllm.kernels.columns import INVALID_TOKEN
from tests.engine.scheduler_driver import TOKEN, Driver, fill_the_cache
from tests.engine.simulated_executor import EOS
from tests.properties import examples


def chunks(batch: ScheduledBatch | None) -> list[tuple[int, ...]]:
    assert batch is not None
    return [tuple(chunk) for chunk in batch.chunks.tolist()]


# ---- order and budget


def test_first_come_first_served() -> None:
    """A prompt that waits for blocks holds everybody back who came after it, however small."""
    driver = Driver(num_blocks=8, block_size=4)
    running, large, small = driver.add(16, max_tokens=2), driver.add(20), driver.add(1)
    driver.step()
    assert [s.status for s in (running, large, small)] == [SequenceStatus.DECODING] + [SequenceStatus.WAITING] * 2
    driver.step()
    assert running.status is SequenceStatus.FINISHED
    driver.step()
    assert [large.status, small.status] == [SequenceStatus.PREFILLING, SequenceStatus.WAITING]


def test_a_prompt_longer_than_the_budget_runs_in_chunks_and_the_next_fills_what_is_left() -> None:
    driver = Driver(max_num_batched_tokens=16)
    long, short = driver.add(40), driver.add(6)
    assert chunks(driver.step()) == [(0, 0, 16)]
    assert long.status is SequenceStatus.PREFILLING
    assert chunks(driver.step()) == [(0, 16, 16)]
    batch = driver.step()
    assert chunks(batch) == [(0, 32, 8), (1, 0, 6)]
    assert batch.num_final_chunks == 2
    assert batch.sampled_rows.tolist() == [0, 1]
    assert long.status is short.status is SequenceStatus.DECODING


def test_only_chunks_that_end_their_prompt_sample() -> None:
    driver = Driver(max_num_batched_tokens=16)
    driver.add(10)
    driver.add(10)
    batch = driver.step()
    assert chunks(batch) == [(0, 0, 10), (1, 0, 6)]
    assert batch.num_final_chunks == 1
    assert batch.sampled_rows.tolist() == [0]


def test_decode_comes_before_prefill() -> None:
    driver = Driver(max_num_batched_tokens=4)
    driver.add(2)
    driver.add(2)
    driver.step()
    driver.add(9)
    batch = driver.step()
    assert batch.decode_rows.tolist() == [0, 1]
    assert chunks(batch) == [(2, 0, 2)]  # four less two
    assert batch.sampled_rows.tolist() == [0, 1]


def test_the_longest_context_comes_first() -> None:
    driver = Driver(max_num_batched_tokens=32, max_model_len=64)
    for prompt_len in (3, 7, 5, 7):
        driver.add(prompt_len)
    driver.step()
    assert driver.step().decode_rows.tolist() == [1, 3, 2, 0]


def test_rows_that_share_a_prefix_decode_side_by_side(caplog: pytest.LogCaptureFixture) -> None:
    """Two groups of 16 and one row of its own, arriving in turns; one group alone is too small."""
    caplog.set_level(logging.INFO, logger="nanovllm.engine.scheduler")
    driver = Driver(max_num_seqs=40, max_num_batched_tokens=10_000, max_model_len=1700, num_blocks=5000)
    first, second = list(range(1, 1601)), list(range(2001, 3601))
    driver.add_tokens(list(range(5000, 6650)))
    for index in range(16):
        driver.add_tokens([*first, *range(4000 + 100 * index, 4001 + 101 * index)])
        driver.add_tokens([*second, 10_000 + index])
    driver.step()
    caplog.clear()
    batch = driver.step()
    assert batch.needs.shares_prefix
    record = next(record for record in caplog.records if record.event == "batch.shares_prefix")
    assert record.fields == {"num_sharing": 32, "size": 33, "saved_tokens": 2 * 15 * 1600, "step": batch.step}
    groups = [[row for row in range(1, 33) if row % 2 == odd] for odd in (1, 0)]
    arranged = batch.decode_rows.tolist()
    assert sorted([sorted(arranged[:16]), sorted(arranged[16:32])]) == sorted(groups)
    assert arranged[32:] == [0]
    assert [row for row in arranged if row % 2] == list(range(31, 0, -2))  # in a group, longest first
    caplog.clear()
    assert driver.step().needs.shares_prefix
    assert not [record for record in caplog.records if record.event == "batch.shares_prefix"]  # said once


@pytest.mark.parametrize(
    ("sharers", "prefix_len", "shares"),
    [(15, 1600, False), (16, 1300, False), (16, 1400, True), (100, 255, False), (100, 256, True)],
)
def test_few_sharers_and_short_prefixes_are_left_alone(sharers: int, prefix_len: int, shares: bool) -> None:
    """20,000 tokens must be saved by 16 rows or more, each with 256 in common or more."""
    driver = Driver(max_num_seqs=100, max_num_batched_tokens=10_000, max_model_len=1700, num_blocks=5000)
    for index in range(sharers):
        driver.add_tokens([*range(1, prefix_len + 1), 2000 + index])
    while driver.scheduler.waiting:
        driver.step()
    assert driver.step().needs.shares_prefix is shares


def test_a_step_admits_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device computes the first prompts while the host admits the next ones."""
    monkeypatch.setattr("nanovllm.engine.scheduler._MAX_ADMISSIONS", 3)
    driver = Driver(max_num_seqs=100, max_num_batched_tokens=10_000)
    for index in range(9):
        driver.add_tokens([1, 2, 3, 4 + index])
    budgets: list[PrefillBudget] = []
    monkeypatch.setattr(driver.scheduler._observer, "prefill_budgeted", budgets.append)
    assert [len(driver.step().chunks) for _ in range(4)] == [3, 3, 3, 0]
    assert budgets[:2] == [PrefillBudget(12, "max_admissions")] * 2
    assert budgets[2].reason == "max_num_batched_tokens", "nobody waits any longer"


def test_the_long_prompt_takes_what_the_admitted_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three short prompts of 10 tokens go before it in each step, whose quarter of 40 has room for a fourth."""
    monkeypatch.setattr("nanovllm.engine.scheduler._MAX_ADMISSIONS", 3)
    driver = Driver(max_num_seqs=100, max_num_batched_tokens=160, max_model_len=10_000, num_blocks=5000)
    long = driver.add(5000)
    driver.step()
    for index in range(20):
        driver.add_tokens([1 + index] * 10)
    for _ in range(4):
        batch = driver.step()
        *short, rest = batch.chunks["length"].tolist()
        assert short == [10, 10, 10]
        assert rest == 160 - 30 - len(batch.decode_rows)
        assert batch.chunks["row"][-1] == long.row


def test_prefill_beside_decode_is_bounded_and_alone_it_is_not() -> None:
    driver = Driver(max_num_batched_tokens=16, max_prefill_tokens_beside_decode=3, max_model_len=64)
    driver.add(14, max_tokens=4)
    assert chunks(driver.step()) == [(0, 0, 14)]  # nothing decodes yet
    driver.add(10)
    for start in (0, 3, 6):
        batch = driver.step()
        assert batch.decode_rows.tolist() == [0]
        assert chunks(batch) == [(1, start, 3)]
    assert chunks(driver.step()) == [(1, 9, 1)]  # the first has ended


def test_no_more_sequences_run_than_there_are_rows() -> None:
    driver = Driver(max_num_seqs=2, max_num_batched_tokens=64)
    for _ in range(3):
        driver.add(3, max_tokens=2)
    assert len(chunks(driver.step())) == 2
    assert chunks(driver.step()) == []
    assert len(chunks(driver.step())) == 1
    assert [s.seq_id for s in driver.scheduler.rows.running()] == [2]


def test_a_full_prefix_hit_computes_one_block_and_counts_the_rest_as_cached() -> None:
    driver = Driver(block_size=4)
    first = driver.add_tokens(list(range(8)), max_tokens=1)
    driver.step()
    second = driver.add_tokens(list(range(8)), max_tokens=1)
    assert chunks(driver.step()) == [(0, 4, 4)]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 4)


def test_only_what_a_step_has_computed_is_shared() -> None:
    driver = Driver(max_num_batched_tokens=16, block_size=4)
    prompt = list(range(100, 140))
    driver.scheduler.abort(driver.add_tokens(prompt))
    first = driver.add_tokens(prompt)
    driver.step()
    driver.scheduler.abort(first)  # its other chunks never ran
    second = driver.add_tokens(prompt)
    driver.step()
    assert second.num_cached_tokens == 16


def test_a_block_is_shared_once_its_last_token_is_computed_not_when_it_is_known() -> None:
    driver = Driver(block_size=4)
    first = driver.add_tokens([5, 6, 7])
    driver.step()  # the fourth token is known; its key and value come with the next step
    driver.scheduler.abort(first)
    second = driver.add_tokens([5, 6, 7, TOKEN, 9])
    driver.step()
    driver.step()
    third = driver.add_tokens([5, 6, 7, TOKEN, 9])
    driver.step()
    assert (second.num_cached_tokens, third.num_cached_tokens) == (0, 4)


def test_blocks_filled_in_decode_are_shared() -> None:
    driver = Driver(block_size=4)
    driver.add_tokens([5, 6, 7], max_tokens=7)
    for _ in range(7):
        driver.step()
    follow_up = driver.add_tokens([5, 6, 7, *[TOKEN] * 7])
    driver.step()
    assert follow_up.num_cached_tokens == 8


# ---- limits and ends


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_step_is_planned_past_the_limit(depth: int) -> None:
    driver = Driver(max_model_len=8)
    sequence = driver.add(3, max_tokens=100)
    num_steps = 0
    while driver.scheduler.has_unfinished:
        while len(driver.in_flight) < depth and driver.launch():
            num_steps += 1
        driver.collect()
    assert (num_steps, len(sequence.output_token_ids), sequence.finish_reason) == (5, 5, "length")


def test_end_of_sequence_ends_what_does_not_ignore_it() -> None:
    driver = Driver(eos_token_ids=(EOS, 3))
    params = [SamplingParams(ignore_eos=ignore_eos) for ignore_eos in (False, True)]
    sequences = [Sequence.from_prompt(i, f"r{i}", [5, 6], p, max_model_len=64, seed=0) for i, p in enumerate(params)]
    for sequence in sequences:
        driver.scheduler.add(sequence)
    driver.launch()
    assert driver.collect(token=3) == [sequences[0]]
    assert sequences[0].finish_reason == "stop"
    assert sequences[0].output_token_ids.tolist() == [3]
    assert sequences[1].status is SequenceStatus.DECODING


def test_a_token_of_a_step_in_flight_is_dropped_when_the_sequence_has_stopped() -> None:
    driver = Driver()
    sequence = driver.add(3)
    driver.launch()
    driver.launch()
    assert driver.collect(token=EOS) == [sequence]
    assert driver.num_free_blocks == 31  # the step in flight writes the block
    assert driver.launch() is None
    assert driver.collect(token=EOS) == []
    assert sequence.output_token_ids.tolist() == [EOS]
    assert driver.num_free_blocks == 32
    assert not driver.scheduler.has_unfinished


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "in flight", "preempted"])
def test_abort_frees_everything(state: str) -> None:
    driver = Driver(max_num_batched_tokens=4, num_blocks=16, max_num_seqs=1 if state == "waiting" else 4)
    other = driver.add(1)
    sequence = driver.add(10)
    driver.step()
    if state in ("decoding", "in flight", "preempted"):
        for _ in range(4):
            driver.step()
    if state in ("in flight", "preempted"):
        driver.launch()
    if state == "preempted":
        driver.preempt(sequence)
    expected = {"waiting": SequenceStatus.WAITING, "prefilling": SequenceStatus.PREFILLING}
    expected |= {"preempted": SequenceStatus.PREEMPTED}
    assert sequence.status is expected.get(state, SequenceStatus.DECODING)
    output_len = 0 if sequence.row is None else int(driver.scheduler.rows.num_tokens[sequence.row]) - 10
    driver.scheduler.abort(sequence)
    driver.scheduler.abort(sequence)  # a second time does nothing
    assert sequence.status is SequenceStatus.FINISHED
    assert sequence.finish_reason == "abort"
    assert len(sequence.output_token_ids) == output_len
    assert sequence not in driver.scheduler.waiting
    while driver.in_flight:
        driver.collect()
    driver.step()
    assert sequence.row is None
    assert driver.scheduler.rows.running() == [other]
    driver.scheduler.abort(other)
    assert driver.num_free_blocks == 16


# ---- preemption


def test_the_youngest_is_preempted_and_queues_by_its_arrival() -> None:
    driver, (*running, late) = fill_the_cache(num_waiting=1)
    driver.step()
    batch = driver.step()
    assert [s.status for s in running] == [SequenceStatus.DECODING] + [SequenceStatus.WAITING] * 2
    assert driver.metrics.totals.num_preemptions == 2
    assert batch.decode_rows.tolist() == [0]
    assert list(driver.scheduler.waiting) == [running[1], running[2], late]
    assert [len(s.output_token_ids) for s in running[1:]] == [1, 1]  # what was generated is kept


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    driver, sequences = fill_the_cache()
    prompts = [s.token_ids.tolist() for s in sequences]
    for _ in range(200):
        if driver.scheduler.has_unfinished:
            driver.step()
    assert driver.metrics.totals.num_preemptions == 2
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.token_ids.tolist() == prompt + [TOKEN] * 8


def test_what_comes_back_brings_its_own_tokens_and_counts_no_hit_on_itself() -> None:
    driver = Driver()
    sequences = [driver.add(6, max_tokens=4), driver.add(7, max_tokens=4)]
    prompts = [s.token_ids.tolist() for s in sequences]
    driver.step()
    for sequence in sequences:  # the first now gets the second's row
        driver.preempt(sequence)
    while driver.scheduler.has_unfinished:
        driver.step()
    assert [s.token_ids.tolist() for s in sequences] == [prompt + [TOKEN] * 4 for prompt in prompts]
    assert [s.num_cached_tokens for s in sequences] == [0, 0]


def test_the_queue_is_in_order_of_arrival_whoever_leaves_first() -> None:
    driver = Driver(max_num_batched_tokens=64)
    sequences = [driver.add(4) for _ in range(3)]
    driver.launch()
    for index in (1, 0, 2):
        driver.preempt(sequences[index])
    driver.collect()
    assert list(driver.scheduler.waiting) == sequences


def test_a_sequence_in_prefill_is_preempted_too() -> None:
    driver = Driver(num_blocks=4, block_size=4, max_num_batched_tokens=5, max_model_len=16)
    first, second = driver.add(4), driver.add(9)
    driver.step()
    assert (first.status, second.status) == (SequenceStatus.DECODING, SequenceStatus.PREFILLING)
    batch = driver.step()
    assert second.status is SequenceStatus.WAITING
    assert batch.decode_rows.tolist() == [first.row]
    assert chunks(batch) == []
    assert batch.section("closed").tolist() == [1]


def test_blocks_that_steps_in_flight_write_are_counted_as_coming() -> None:
    """One block is needed: with two steps in flight it comes late, and nobody else has to go for it."""
    driver = Driver(num_blocks=5, block_size=4, max_num_seqs=3, max_model_len=20)
    oldest, middle, youngest = driver.add(4), driver.add(3), driver.add(9)
    driver.launch()
    batch = driver.launch()  # plans from counts: the tokens of the first step are not known yet
    assert driver.metrics.totals.num_preemptions == 1
    assert batch is not None
    assert batch.decode_rows.tolist() == [middle.row]  # has room; the oldest sits out until the block comes
    assert youngest.status is SequenceStatus.PREEMPTED
    assert driver.num_free_blocks == 0
    assert driver.launch() is None  # both need a block now, and three are coming
    assert driver.metrics.totals.num_preemptions == 1
    driver.collect()
    assert youngest.status is SequenceStatus.WAITING
    assert len(youngest.output_token_ids) == 1  # its token of the step in flight was computed properly
    assert driver.num_free_blocks == 3
    batch = driver.launch()
    assert batch is not None
    assert batch.decode_rows.tolist() == [oldest.row, middle.row]
    assert driver.metrics.totals.num_preemptions == 1


def test_a_block_that_is_there_goes_to_the_oldest() -> None:
    driver = Driver(num_blocks=6, block_size=4, max_num_seqs=3, max_model_len=20, max_num_batched_tokens=32)
    oldest, _, _ = driver.add(4), driver.add(4), driver.add(9)
    driver.launch()
    batch = driver.launch()
    assert batch is not None
    assert batch.decode_rows.tolist() == [oldest.row]
    assert driver.metrics.totals.num_preemptions == 1


def test_the_last_one_left_gives_nothing_back() -> None:
    """The door lets nothing in that does not fit alone; even if it did, the oldest keeps what it has."""
    driver = Driver(num_blocks=1, block_size=4, max_model_len=64)
    sequence = driver.add(4)
    driver.step()
    assert driver.launch() is None
    assert sequence.status is SequenceStatus.DECODING
    assert driver.metrics.totals.num_preemptions == 0


@settings(max_examples=examples(150), deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=8),
    block_size=st.sampled_from([1, 2, 4]),
    spare_blocks=st.integers(0, 6),
    depth=st.integers(1, 3),
)
def test_the_oldest_is_never_preempted_and_ends_come_in_bounded_time(
    requests: list[tuple[int, int]], block_size: int, spare_blocks: int, depth: int
) -> None:
    num_blocks = -(-24 // block_size) + spare_blocks
    driver = Driver(num_blocks=num_blocks, block_size=block_size, max_model_len=24, max_num_seqs=8)
    sequences = [driver.add(*request) for request in requests]
    num_steps = 0
    while driver.scheduler.has_unfinished:
        while len(driver.in_flight) < depth:
            oldest = next(s for s in sequences if s.status is not SequenceStatus.FINISHED)
            runs = oldest.status in (SequenceStatus.PREFILLING, SequenceStatus.DECODING)
            batch = driver.launch()
            assert oldest.row is not None or not runs, "the oldest lost its row"
            assert oldest.status is not SequenceStatus.PREEMPTED or not runs
            if batch is None:
                break
        driver.collect()
        num_steps += 1
        assert [s.seq_id for s in driver.scheduler.waiting] == sorted(s.seq_id for s in driver.scheduler.waiting)
        assert num_steps <= 24 * 8
    assert [len(s.output_token_ids) for s in sequences] == [max_tokens for _, max_tokens in requests]
    assert driver.num_free_blocks == num_blocks


# ---- rows without a valid token


def test_a_row_without_a_valid_token_ends_with_an_error_and_without_that_token() -> None:
    driver = Driver()
    first, second = driver.add(5), driver.add(5)
    driver.launch()
    batch = driver.in_flight.popleft()
    ended = driver.scheduler.update(batch, StepResult(np.array([INVALID_TOKEN, TOKEN], dtype=np.int32)))
    driver.check()
    assert ended == [first]
    assert isinstance(first.error, InvalidLogitsError)
    assert (first.finish_reason, len(first.output_token_ids), first.first_token) == ("abort", 0, None)
    assert (first.row, second.error, second.status) == (None, None, SequenceStatus.DECODING)
    driver.step()
    assert len(driver.scheduler.rows.known_tokens(second.row)) == 7


def test_a_row_that_later_steps_compute_is_released_after_them() -> None:
    driver = Driver(pipeline_depth=3)
    sequence = driver.add(5)
    driver.step()
    for _ in range(3):
        driver.launch()
    assert driver.collect(INVALID_TOKEN) == [sequence]
    assert sequence.row is not None
    assert driver.collect(INVALID_TOKEN) == driver.collect() == []
    assert (sequence.row, len(sequence.output_token_ids), driver.scheduler.has_unfinished) == (None, 1, False)


def test_a_preempted_sequence_without_a_valid_token_does_not_come_back() -> None:
    driver = Driver(num_blocks=5, block_size=4, max_num_seqs=3, max_model_len=20)
    oldest, middle, youngest = driver.add(4), driver.add(3), driver.add(9)
    driver.launch()
    driver.launch()
    assert youngest.status is SequenceStatus.PREEMPTED
    assert driver.collect(INVALID_TOKEN) == [oldest, middle, youngest]
    driver.collect()
    assert not driver.scheduler.has_unfinished
    assert driver.num_free_blocks == 5
