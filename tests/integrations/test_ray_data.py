"""Ray Data on two actors: rows in and out, actors and engines that are killed, and examples/ray_batch.py."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from nanovllm import LLM, SamplingParams
from nanovllm.integrations.ray import generate
from nanovllm.integrations.ray.data import OUTPUT_COLUMNS, read_row
from tests.distributed.rank_processes import ONLY_LINUX, is_alive, processes
from tests.processes import ROOT, WATCHDOG, start_python, until

pytestmark = [ONLY_LINUX, pytest.mark.heavy("starts Ray")]

ENGINE: dict[str, Any] = {"model": "tiny", "device": "cpu", "num_kvcache_blocks": 256, "max_num_seqs": 16}
PARAMS = SamplingParams(max_tokens=5)


def descendants(pid: int) -> set[int]:
    """The processes that `pid` has started, and those that they have started, and so on."""
    parents = {child: parent for child, _, parent, _ in processes()}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    if " " in sys.executable:
        pytest.skip("Ray starts no worker where Python's path has a space")
    before = descendants(os.getpid())
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    started = descendants(os.getpid()) - before
    ray.shutdown()
    assert until(lambda: not any(map(is_alive, started)))


def tokens_of_an_llm(rows: list[dict[str, Any]]) -> dict[int, list[int]]:
    """The tokens that an engine gives each row, from the last to the first."""
    found = {}
    with LLM(**ENGINE) as llm:
        for row in reversed(rows):
            request = read_row(row, None, PARAMS, seed=0)
            if request.messages is not None:
                (output,) = llm.chat(request.messages, request.params, use_tqdm=False)
            else:
                (output,) = llm.generate(request.prompt, request.params, use_tqdm=False)
            found[row["id"]] = output.outputs[0].token_ids
    return found


def test_rows_in_and_rows_out(cluster: None) -> None:
    rows: list[dict[str, Any]] = [
        *({"id": number, "prompt": f"{number} + 1 =", "messages": None} for number in range(100)),
        {"id": 100, "prompt": None, "messages": [{"role": "user", "content": "Hello"}]},
        {"id": 101, "prompt": "Hello", "messages": None, "sampling_params": {"temperature": 0.0, "max_tokens": 3}},
        {"id": 102, "prompt": "Hello", "messages": None, "sampling_params": {"seed": 7}},
    ]
    bad = [
        {"id": 103, "prompt": None, "messages": None, "sampling_params": {"max_tokens": 3}},
        {"id": 104, "prompt": "Hello", "messages": None, "sampling_params": {"max_tokens": 0}},
    ]
    dataset = ray.data.from_items([{"sampling_params": None, "nested": {"a": [1, None]}, **row} for row in rows + bad])
    # A job of two actors, which know neither which rows they get nor in which batches.
    out = generate(dataset, **ENGINE, sampling_params=PARAMS, concurrency=2, batch_size=8).take_all()
    by_id = {row["id"]: row for row in out}
    assert sorted(row["id"] for row in out) == [*range(105)]
    assert {name for row in out for name in row} == {*dataset.columns(), *OUTPUT_COLUMNS.names}
    assert all(row["nested"] == {"a": [1, None]} for row in out)
    for row in bad:
        assert by_id[row["id"]]["error"]
        assert by_id[row["id"]]["generated_tokens"] is None
    expected = tokens_of_an_llm(rows)
    for number, tokens in expected.items():
        assert (by_id[number]["error"], by_id[number]["generated_tokens"]) == (None, tokens)


def children_of(pid: int) -> list[int]:
    return [child for child, state, parent, _ in processes() if parent == pid and state != "Z"]


def test_no_row_is_lost_or_doubled_with_an_actor_or_an_engine(cluster: None, tmp_path: Path) -> None:
    """The first actor that reads row 20 is killed, and the engine of the first one that reads 65 rows."""
    rows = [{"id": number, "prompt": f"{number} + 1 ="} for number in range(160)]
    num_read = 0

    def is_first(name: str) -> bool:
        try:
            with open(tmp_path / name, "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def read(row: Any) -> Any:
        nonlocal num_read
        num_read += 1
        if row["id"] == 20 and is_first("actor"):
            os.kill(os.getpid(), signal.SIGKILL)
        # It has at most 32 rows at a time, so it has had outputs by then.
        if num_read == 65 and is_first("engine"):
            for engine in children_of(os.getpid()):
                os.kill(engine, signal.SIGKILL)
        return row

    dataset = ray.data.from_items(rows, override_num_blocks=20)
    arguments = {"sampling_params": PARAMS, "preprocess": read, "concurrency": 2, "batch_size": 8}
    out = generate(dataset, **ENGINE, engine_process=True, **arguments).take_all()
    assert sorted(row["id"] for row in out) == [*range(160)]
    assert {row["id"]: row["generated_tokens"] for row in out} == tokens_of_an_llm(rows)
    lost = [int((tmp_path / name).read_text()) for name in ("actor", "engine")]
    assert until(lambda: not any(map(is_alive, lost)))


def test_the_example_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    rows = [{"id": f"row {number}", "prompt": f"{number} + 1 =", "when": "2024-01-01"} for number in range(200)]
    long = {"max_tokens": 2000, "ignore_eos": True}  # so that the job is not over before it is interrupted
    lines = [json.dumps(row) for row in [*rows, *({"prompt": "x", "sampling_params": long} for _ in range(3))]]
    lines.append("not JSON")  # in the same batch, so it is done by the second job
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out" / "output.jsonl"

    def start() -> Any:
        options = ["--model", "tiny", "--concurrency", "2", "--max-tokens", "5", "--batch-size", "8"]
        files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
        return start_python(str(ROOT / "examples" / "ray_batch.py"), *options, *files, "--device", "cpu")

    job = start()
    assert until(lambda: output.exists() and output.stat().st_size > 0)
    started = descendants(job.pid)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
    _, errors = job.communicate(timeout=WATCHDOG)
    assert job.returncode == 130, errors
    assert "Interrupted. The same command goes on from here." in errors
    assert until(lambda: not any(map(is_alive, started)))
    first = output.read_text().splitlines()
    with open(output, "a") as file:
        file.write('{"line_number": 4, "genera')  # as if it had been killed there

    job = start()
    _, errors = job.communicate(timeout=WATCHDOG)
    assert job.returncode == 1, errors
    assert f"{len(lines) - len(first)} rows, with errors in" in errors
    texts = output.read_text().splitlines()
    assert texts[: len(first)] == first
    found = {row["line_number"]: row for row in map(json.loads, texts)}
    assert len(texts) == len(found) == len(lines)
    assert "must be what preprocess takes (JSONDecodeError" in found[len(lines)].pop("error")
    for number, row in enumerate(rows, 1):
        assert found[number].items() >= row.items()
        assert found[number]["error"] is None


def test_a_field_with_the_name_of_an_output_is_refused_by_the_example(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello", "line_number": 3}\n')
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    job = start_python(str(ROOT / "examples" / "ray_batch.py"), "--model", "tiny", *files)
    _, errors = job.communicate(timeout=WATCHDOG)
    assert job.returncode == 2
    assert "column='line_number' is not allowed" in errors.splitlines()[-1]
