"""The command's answers, against logs of known figures."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nanovllm.report.__main__ import main
from tests.processes import ROOT
from tests.report.synthetic_log import Line, finished, line, simulated, startup, write


def slow_log() -> list[Line]:
    """A request that queues 7.7 s, is preempted twice, and runs beside another one; the cache has 40 blocks of 16."""
    lines = startup()
    for record in lines:
        if record["event"] == "engine.resolved":
            record["num_blocks"] = 40
    shortage = {"needed": 3, "free_before": 0, "coming": 0, "freed": 30, "num_tokens": 480}
    victim = {"seq_id": 7, "request_id": "slow"}
    first = line(18.5, "batch.prefill", "INFO", step=5, size=1, batched_tokens=480, seqs=["seq_7(len=480,cached=0)"])
    lines += [
        first,
        line(20.0, "sequence.preempted", "INFO", **victim, **shortage, step=8, for_seq_id=12, for_request_id="a"),
        line(30.0, "batch.prefill", "INFO", step=20, size=1, batched_tokens=480, seqs=["seq_7(len=480,cached=0)"]),
        line(31.0, "sequence.preempted", "INFO", **victim, **shortage, step=22, for_seq_id=40, for_request_id="b"),
        line(40.0, "batch.decode", "INFO", step=30, decode_step=28, size=4, preempted=0, seqs=[]),
        line(41.0, "batch.decode", "INFO", step=40, decode_step=38, size=4, preempted=0, seqs=[]),
    ]
    slow = {
        "request_id": "slow", "seq_id": 7, "prompt": 480, "cached": 0, "out": 41, "arrival": 10.0, "scheduled": 17.7,
        "token": 18.1, "preemptions": 2, "preempted_s": 28.5, "behind": 24, "usage": 0.98,
    }  # fmt: skip
    quick = {**slow, "request_id": "quick", "seq_id": 8, "preemptions": 0, "preempted_s": 0.0, "behind": 0}
    quick |= {"scheduled": 10.5, "token": 11.0, "usage": 0.0}
    return [*lines, finished(quick, 16.0), finished(slow, 49.1)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "run.jsonl", slow_log())


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


def facts(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(answer(capsys, *arguments, "--json"))


# ---- a request


def test_why_a_request_was_slow(log, capsys):
    words = answer(capsys, log, "--request", "slow").splitlines()
    assert words[0].startswith(
        "39.1 s: 7.7 queued behind 24 requests (cache 98 % full), 0.4 prefill, 28.5 preempted twice "
        "(for seq 12 and seq 40; needed 3 blocks, 0 free), 2.5 decoding. "
    )
    assert any(text.startswith("Preempted at 08:00:20.000 in step 8 for seq 12 ('a')") for text in words)
    assert "NANOVLLM_LOG_LEVEL=DEBUG" in words[-1]


@pytest.mark.parametrize(("num_blocks", "needed"), [(40, 43), (100, 103)])
def test_the_advice_is_what_the_run_needed(tmp_path, capsys, num_blocks, needed):
    """All blocks are in use and three more are needed; any 64 sequences of the two take 66 blocks."""
    lines = slow_log()
    for record in lines:
        if record["event"] == "engine.resolved":
            record["num_blocks"] = num_blocks
    given = facts(capsys, write(tmp_path / "run.jsonl", lines), "--request", "slow")
    advice = {one["setting"]: one["value"] for one in given["advice"]}
    assert advice["num_kvcache_blocks"] == needed
    assert advice.get("max_num_seqs") == (1 if num_blocks == 40 else 2)
    assert f"from {num_blocks} to {needed} or more" in given["answer"]


def test_what_a_gpu_s_cache_needs_is_a_share_of_its_memory(tmp_path, capsys):
    sizing = line(5.0, "kv_cache.sizing", "INFO", total_gb=80.0, utilization=0.5)
    allocated = line(5.1, "kv_cache.allocated", "INFO", num_blocks=40, total_gb=40.0)
    given = facts(capsys, write(tmp_path / "run.jsonl", [sizing, allocated, *slow_log()]), "--request", "slow")
    (memory,) = [one for one in given["advice"] if one["setting"] == "gpu_memory_utilization"]
    assert memory["value"] == pytest.approx(0.5 + 3 / 80, abs=0.01)


def test_an_unknown_id_names_the_nearest(log, capsys):
    assert main([str(log), "--request", "slwo"]) == 1
    assert "No request 'slwo' is in the log. The nearest ids are 'slow'" in capsys.readouterr().err
    assert main([str(log), "--request", "slwo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["nearest"][0] == "slow"


def test_a_completion_s_id_leads_to_its_request(tmp_path, capsys):
    lines = slow_log()
    lines[-1]["completions"] = [{"index": 0, "seq_id": 7, "num_output_tokens": 41}]
    words = answer(capsys, write(tmp_path / "run.jsonl", lines), "--request", "slow/0")
    assert words.startswith("'slow/0' is a completion of 'slow', which is:\n39.1 s")


def test_the_clients_name_of_a_request_leads_to_it(tmp_path, capsys):
    lines = slow_log()
    lines[-1]["client_request_id"] = "order 66"
    words = answer(capsys, write(tmp_path / "run.jsonl", lines), "--request", "order 66")
    assert words.startswith("'order 66' is the client's name of 'slow', which is:\n39.1 s")


def test_of_several_requests_with_an_id_the_last_one_is_described(tmp_path, capsys):
    later = [{**record, "engine_id": 1} for record in slow_log()]
    path = write(tmp_path / "run.jsonl", [*slow_log(), *later])
    assert "1 other request of the log had this id; this is the last one, of engine 2." in answer(
        capsys, path, "--request", "slow"
    )


def test_a_request_that_has_not_ended(tmp_path, capsys):
    lines = [record for record in slow_log() if record.get("request_id") != "slow" or record["event"][0] == "s"]
    words = answer(capsys, write(tmp_path / "run.jsonl", lines), "--request", "slow")
    assert "had not finished" in words
    assert "it is preempted and waits for blocks" in words


def test_a_refused_request_says_why(tmp_path, capsys):
    refused = {**finished({**_EMPTY, "request_id": "no"}, 1.0), "cause": "refused", "error": "prompt is empty"}
    refused["first_step"] = None
    words = answer(capsys, write(tmp_path / "run.jsonl", [*startup(), refused]), "--request", "no")
    assert words.startswith("Refused at once: prompt is empty\n")


_EMPTY = {"seq_id": 0, "prompt": 0, "cached": 0, "out": 0, "arrival": 1, "scheduled": 1, "token": 1, "preemptions": 0}


# ---- the slowest, a step, the run


@pytest.mark.parametrize(("by", "field"), [("ttft", "ttft_s"), ("e2e", "e2e_s"), ("queue", "queue_s")])
def test_the_slowest_come_in_order(tmp_path, capsys, by, field):
    path = write(tmp_path / "run.jsonl", simulated(80, num_blocks=200))
    ends = [record for record in map(json.loads, path.open()) if record["event"] == "request.finished"]
    expected = sorted((record[field] for record in ends), reverse=True)[:7]
    assert [one[field] for one in facts(capsys, path, "--slowest", 7, "--by", by)] == expected


def test_a_step_at_info_is_like_the_line_before_it(log, capsys):
    given = facts(capsys, log, "--step", 35)
    assert (given["kind"], given["decode_seqs"], given["wall_ms"]) == ("decode", 4, None)
    assert "NANOVLLM_LOG_LEVEL=DEBUG adds each step" in answer(capsys, log, "--step", 35)
    prefill = facts(capsys, log, "--step", 20)
    assert (prefill["kind"], prefill["prompt_tokens"]) == ("prefill", 480)
    assert facts(capsys, log, "--step", 8)["preemptions"][0]["for_seq_id"] == 12


@pytest.mark.parametrize(("finals", "whole"), [([False], "its interval"), ([False, True], "run")])
def test_the_slowest_step_of_an_interval_and_of_the_run(tmp_path, capsys, finals, whole):
    slowest = {"slowest_step": 30, "slowest_step_ms": 80.0, "slowest_step_kind": "decode"}
    ends = [line(50.0 + final, "engine.statistics", "INFO", final=final, **slowest) for final in finals]
    log = write(tmp_path / "run.jsonl", [*slow_log(), *ends])
    assert f"It was the slowest of the {whole}: 80.0 ms" in answer(capsys, log, "--step", 30)


def test_an_unknown_step_says_which_there_are(log, capsys):
    assert main([str(log), "--step", "900"]) == 1
    assert "its steps are 1 to 40" in capsys.readouterr().err


def test_a_step_at_debug_has_its_time(tmp_path, capsys):
    path = write(tmp_path / "run.jsonl", simulated(20))
    done = next(r for r in map(json.loads, path.open()) if r["event"] == "step.done" and r["step"] == 9)
    given = facts(capsys, path, "--step", 9)
    assert given["wall_ms"] == pytest.approx(done["wall_ms"])
    assert given["decode_seqs"] == done["num_decode_seqs"]


def test_the_summary_names_the_limit_and_the_setting(log, capsys):
    words = answer(capsys, log, "--summary")
    assert words.startswith("Verdict: The KV cache was too small: 2 preemptions")
    assert "num_kvcache_blocks from 40 to 43 or more" in words
    (engine,) = facts(capsys, log, "--summary")["engines"]
    assert engine["verdict"]["limit"] == "preemption"
    assert engine["requests"]["by_cause"] == {"length": 2}


def test_a_comparison_names_figures_and_settings_that_differ(tmp_path, log, capsys):
    lines = slow_log()
    for record in lines:
        if record["event"] == "engine.resolved":
            record["num_blocks"] = 90
    other = write(tmp_path / "other.jsonl", [r for r in lines if r["event"] != "sequence.preempted"])
    words = answer(capsys, log, "--compare", other)
    assert "preemptions: 2 → 0 (-100 %)" in words
    assert "num_blocks: 40 → 90" in words
    assert facts(capsys, log, "--compare", other)["settings"] == {"num_blocks": {"first": 40, "second": 90}}


# ---- how it is read


def test_broken_and_foreign_lines_are_skipped_and_counted(tmp_path, capsys):
    path = write(tmp_path / "run.jsonl", slow_log())
    with path.open("a") as file:
        file.write('Traceback (most recent call last):\n{"a": 1}\n{"event": "request.finished", "mono": 12')
    assert facts(capsys, path, "--summary")["broken_lines"] == 3
    assert "3 of" in answer(capsys, path, "--summary")


def test_standard_input(log):
    command = [sys.executable, "-m", "nanovllm.report", "-", "--request", "slow"]
    done = subprocess.run(command, stdin=log.open("rb"), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("39.1 s")


def test_a_pipe_that_stays_open_is_followed_until_the_request_ends(log):
    command = [sys.executable, "-m", "nanovllm.report", "-", "--request", "slow", "--follow"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(log.read_bytes())
        reader.stdin.flush()
        assert reader.stdout.readline().startswith(b"39.1 s")


def test_a_growing_log_is_followed_until_the_request_ends(tmp_path, capsys):
    lines = [json.dumps(record) + "\n" for record in slow_log()]
    path = tmp_path / "run.jsonl"
    path.write_text("".join(lines[:-1]) + lines[-1][:40])  # a line that is not complete
    codes: list[int] = []
    reader = threading.Thread(target=lambda: codes.append(main([str(path), "--request", "slow", "--follow"])))
    reader.start()
    reader.join(0.5)
    assert reader.is_alive()
    with path.open("a") as file:
        file.write(lines[-1][40:])
    reader.join(60)
    assert codes == [0]
    assert capsys.readouterr().out.startswith("39.1 s")


def test_other_ranks_files_beside_it_are_read(log, capsys):
    record = {**line(19.0, "kv_cache.memory", "INFO", pid=5, resident_bytes=123_000_000), "rank": 1}
    message = {**line(19.5, "communication", pid=5, operation="all_reduce", elapsed_ms=4.0, wait_ms=3.0), "rank": 1}
    write(log.with_name("run.jsonl.rank1"), [record, message])
    (engine,) = facts(capsys, log, "--summary")["engines"]
    assert engine["memory"]["1"]["kv_cache.memory"]["resident_bytes"] == 123_000_000
    assert engine["communication"]["1"]["all_reduce"]["wait_ms"] == 3.0


@pytest.mark.parametrize("value", [None, "text", [], [{}], {}, True, -5, 1e308])
@pytest.mark.parametrize("question", [("--request", "slow"), ("--slowest", 3), ("--step", 8), ("--summary",)])
def test_fields_of_unexpected_kinds_harm_no_answer(tmp_path, capsys, value, question):
    damaged = [{**r, name: value} for r in slow_log() for name in r.keys() - {"event", "mono"}]
    path = write(tmp_path / "run.jsonl", [*slow_log(), *damaged])
    facts(capsys, path, *question)
    answer(capsys, path, *question)


def test_a_question_and_a_page_exclude_each_other(log, capsys):
    assert main([str(log), "--summary", "-o", "x.html"]) == 2
    assert main([str(log), "--follow"]) == 2
