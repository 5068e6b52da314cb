"""What the scheduler says, word for word, and which decode steps are worth a line at INFO."""

from __future__ import annotations

import logging

import pytest

from tests.engine.scheduler_driver import Driver, fill_the_cache
from tests.engine.simulated_executor import EOS

LOGGER = "nanovllm.engine.scheduler"


def lines(caplog: pytest.LogCaptureFixture, start: str) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.getMessage().startswith(start)]


def test_prefill_and_decode_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    driver = Driver(max_num_batched_tokens=64)
    driver.add_tokens([*range(10, 20)], max_tokens=3)
    driver.step()
    driver.add_tokens([*range(10, 18), 3], max_tokens=3)
    driver.step()
    assert [message for _, message in lines(caplog, "Scheduled")] == [
        "Scheduled PREFILL batch: size=1, batched_tokens=10, seqs=[seq_0(len=10,cached=0)]",
        "Scheduled PREFILL batch: size=1, batched_tokens=1, seqs=[seq_1(len=9,cached=8)]",
        "Scheduled DECODE batch (step 1): size=1, preempted=0, seqs=[seq_0(len=11)]",
    ]
    fields = next(r.fields for r in caplog.records if r.event == "batch.decode")
    seqs = ["seq_0(len=11)"]
    assert fields == {
        **{"step": 2, "decode_step": 1, "size": 1, "preempted": 0},
        **{"shares_prefix": False, "seqs": seqs},
    }
    caplog.clear()
    driver.step(token=EOS)
    assert [(r.event, r.levelname, r.getMessage()) for r in caplog.records if r.name == LOGGER] == [
        (
            "batch.decode",
            "INFO",
            "Scheduled DECODE batch (step 2): size=2, preempted=0, seqs=[seq_0(len=12), seq_1(len=10)]",
        ),
        ("sequence.finished", "DEBUG", "Sequence finished: seq_id=0, output_len=3, reason=eos"),
        ("sequence.finished", "DEBUG", "Sequence finished: seq_id=1, output_len=2, reason=eos"),
        ("batch.postprocess", "DEBUG", "Postprocess: 2/2 sequences finished"),
    ]


def test_preemption_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    driver, _ = fill_the_cache()
    driver.step()
    caplog.clear()
    driver.step()
    assert lines(caplog, "Preempted") == [
        (
            "INFO",
            "Preempted seq_id=2: freed=1 blocks, 0 more when its steps in flight end, "
            "5 tokens to compute again, free_blocks=1, for seq_id=0 (needed 3 blocks, 0 free)",
        ),
        (
            "INFO",
            "Preempted seq_id=1: freed=1 blocks, 0 more when its steps in flight end, "
            "5 tokens to compute again, free_blocks=2, for seq_id=0 (needed 2 blocks, 1 free)",
        ),
    ]
    fields = [record.fields for record in caplog.records if record.event == "sequence.preempted"]
    assert [(each["request_id"], each["for_request_id"], each["step"]) for each in fields] == [
        ("r2", "r0", 2),
        ("r1", "r0", 2),
    ]
    assert lines(caplog, "Scheduled DECODE")[0] == (
        "INFO",
        "Scheduled DECODE batch (step 1): size=1, preempted=2, seqs=[seq_0(len=5)]",
    )
    driver.step()
    assert "preempted=0" in lines(caplog, "Scheduled DECODE")[1][1]


def test_reasons_in_the_finished_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    driver = Driver()
    driver.add(2, max_tokens=1)
    aborted = driver.add(2)
    driver.step()
    driver.scheduler.abort(aborted)
    assert [message for _, message in lines(caplog, "Sequence finished")] == [
        "Sequence finished: seq_id=0, output_len=1, reason=max_tokens",
        "Sequence finished: seq_id=1, output_len=1, reason=abort",
    ]


def test_decode_steps_at_info_are_the_first_every_tenth_and_changes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOVLLM_LOG_DECODE_INTERVAL", raising=False)
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    driver = Driver()
    driver.add(2, max_tokens=27)
    driver.add(2, max_tokens=15)
    while driver.scheduler.has_unfinished:
        driver.step()
    levels = [level for level, _ in lines(caplog, "Scheduled DECODE")]
    assert len(levels) == 26
    # Step 15 is the first without the second sequence.
    assert [index for index, level in enumerate(levels, start=1) if level == "INFO"] == [1, 10, 15, 20]
    assert set(levels) == {"INFO", "DEBUG"}
    caplog.clear()
    driver.add(2, max_tokens=3)  # the next generation shows its first step, and counts from one
    while driver.scheduler.has_unfinished:
        driver.step()
    assert [(level, message[:31]) for level, message in lines(caplog, "Scheduled DECODE")] == [
        ("INFO", "Scheduled DECODE batch (step 1)"),
        ("DEBUG", "Scheduled DECODE batch (step 2)"),
    ]


def test_long_lists_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    driver = Driver(max_num_seqs=20, max_num_batched_tokens=64)
    for _ in range(20):
        driver.add(1)
    driver.step()
    driver.step()
    prefill, decode = [record.fields["seqs"] for record in caplog.records if record.name == LOGGER]
    for seqs, last in [(prefill, "seq_15(len=1,cached=0)"), (decode, "seq_15(len=2)")]:
        assert len(seqs) == 17
        assert seqs[15:] == [last, "… +4 more"]
