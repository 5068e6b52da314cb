"""The function trace: every call within nanovllm with time, thread, depth and place, on disk before it goes on."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovllm.config import EngineConfig
from nanovllm.diagnostics import function_trace
from nanovllm.diagnostics.function_trace import FunctionTrace, start_function_trace
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import InvalidArgumentError, NanoVLLMError
from nanovllm.logs import decode_rule as decode_log
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.stopwatch import Stopwatch
from tests.processes import PATIENCE, run_python, start_python

LINE = re.compile(r"(\d+\.\d{6}) (.{15}) (call  |return) +(\d+)  ( *)(\S+\.py):(\d+) (\S+)$")
Row = tuple[float, str, str, int, str, str]  # time, thread, event, depth, place, function


@pytest.fixture
def no_profiler():
    """pytest-cov and the like use the same hook: then there is nothing to test."""
    if sys.getprofile() is not None:
        pytest.skip("another profiler runs in this process")
    yield
    sys.setprofile(None)
    threading.setprofile(None)


def rows(path: Path) -> list[Row]:
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert header.startswith("# nanovllm function trace, pid ")
    found = []
    for text in lines:
        match = LINE.match(text)
        assert match, text
        seconds, thread, event, depth, indent, file, line, function = match.groups()
        assert len(indent) == 2 * max(int(depth) - 1, 0)
        found.append((float(seconds), thread.strip(), event.strip(), int(depth), f"{file}:{line}", function))
    return found


def test_off_unless_asked_for(monkeypatch, tmp_path, no_profiler):
    monkeypatch.chdir(tmp_path)
    for value in ("", "0"):
        monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", value)
        assert start_function_trace(0) is None
        assert sys.getprofile() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "rank", "name"),
    [
        ("1", 0, "nanovllm_trace_rank0.txt"),
        ("1", 3, "nanovllm_trace_rank3.txt"),
        ("calls.txt", 0, "calls.txt"),
        ("calls.txt", 2, "calls.txt.rank2"),
    ],
)
def test_a_file_a_rank(monkeypatch, tmp_path, no_profiler, value, rank, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", value)
    trace = start_function_trace(rank)
    trace.stop()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert f"rank {rank}," in (tmp_path / name).read_text()


def test_calls_and_returns_nest_and_name_their_place(tmp_path, no_profiler):
    trace = FunctionTrace(tmp_path / "trace.txt", 0)
    Stopwatch().lap("part")
    SamplingParams(temperature=0)
    trace.stop()
    SamplingParams(temperature=0)  # is not traced any more
    found = rows(tmp_path / "trace.txt")
    line = Stopwatch.lap.__code__.co_firstlineno
    assert [row[2:] for row in found if row[4] == f"utils/stopwatch.py:{line}"] == [
        ("call", 1, f"utils/stopwatch.py:{line}", "lap"),
        ("return", 1, f"utils/stopwatch.py:{line}", "lap"),
    ]
    checks = [row for row in found if row[4].startswith("sampling_params.py")]
    assert any(row[5] == "__post_init__" and row[3] >= 2 for row in checks), "called by the decorator in errors.py"
    assert sum(row[2] == "call" for row in checks) == sum(row[2] == "return" for row in checks)
    times = [row[0] for row in found]
    assert times == sorted(times)
    open_calls: list[str] = []
    for _, _, event, depth, place, _ in found:
        if event == "call":
            open_calls.append(place)
            assert depth == len(open_calls)
        else:
            assert (open_calls.pop(), depth - 1) == (place, len(open_calls))
    assert open_calls == []


def test_nothing_outside_the_package_is_in_it(tmp_path, no_profiler):
    trace = FunctionTrace(tmp_path / "trace.txt", 0)
    re.compile("a+b[cd]*e")
    Stopwatch()
    trace.stop()
    assert {row[4].split(":")[0] for row in rows(tmp_path / "trace.txt")} == {"utils/stopwatch.py"}


def test_an_exception_returns_too(tmp_path, no_profiler):
    trace = FunctionTrace(tmp_path / "trace.txt", 0)
    with pytest.raises(InvalidArgumentError):
        SamplingParams(temperature=-1)
    Stopwatch()
    trace.stop()
    assert rows(tmp_path / "trace.txt")[-1][3] == 1


def test_threads_that_start_later_have_their_name_and_depth(tmp_path, no_profiler):
    trace = FunctionTrace(tmp_path / "trace.txt", 0)
    worker = threading.Thread(target=Stopwatch, name="loader")
    worker.start()
    worker.join()
    trace.stop()
    assert {row[1] for row in rows(tmp_path / "trace.txt")} == {"loader"}


def test_one_trace_a_process_and_a_second_one_continues_the_file(monkeypatch, tmp_path, no_profiler):
    path = tmp_path / "trace.txt"
    monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", str(path))
    first = start_function_trace(0)
    assert start_function_trace(0) is None
    first.stop()
    first.stop()
    start_function_trace(0).stop()
    assert path.read_text().count("# nanovllm function trace") == 2


def test_another_profiler_is_not_pushed_aside(monkeypatch, tmp_path, no_profiler):
    monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", str(tmp_path / "trace.txt"))
    sys.setprofile(lambda frame, event, argument: None)
    with pytest.raises(InvalidArgumentError, match="NANOVLLM_TRACE_FUNCTION.*Another profiler runs"):
        start_function_trace(0)


def test_a_path_that_can_not_be_written_says_so(monkeypatch, tmp_path, no_profiler):
    monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", str(tmp_path / "no" / "trace.txt"))
    with pytest.raises(InvalidArgumentError, match="NANOVLLM_TRACE_FUNCTION.*No such file"):
        start_function_trace(0)
    assert sys.getprofile() is None


def test_the_engine_s_log_says_where_the_file_is(monkeypatch, tmp_path, no_profiler, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", "1")
    trace = start_function_trace(0)
    trace.engine_starting(EngineConfig("tiny"))
    trace.stop()
    start_function_trace(1).stop()
    assert caplog.messages == [
        f"Function trace of rank {rank}: {tmp_path / f'nanovllm_trace_rank{rank}.txt'}" for rank in (0, 1)
    ]


def test_a_start_that_fails_ends_the_trace(monkeypatch, tmp_path, no_profiler):
    monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", str(tmp_path / "trace.txt"))
    with pytest.raises(NanoVLLMError):
        LLMEngine.from_engine_args(EngineConfig(str(tmp_path / "no model")))
    assert sys.getprofile() is None


def test_the_file_is_not_closed_while_a_thread_writes(monkeypatch, tmp_path, no_profiler):
    writes, goes_on, closed = threading.Event(), threading.Event(), []
    trace = FunctionTrace(tmp_path / "trace.txt", 0)
    sys.setprofile(None)
    real = function_trace.os

    def write(file, data):
        writes.set()
        assert goes_on.wait(PATIENCE)
        assert closed == []
        return real.write(file, data)

    fake = SimpleNamespace(write=write, close=lambda file: closed.append(file) or real.close(file))
    monkeypatch.setattr(function_trace, "os", fake)
    writer = threading.Thread(target=Stopwatch)
    writer.start()
    assert writes.wait(PATIENCE)
    stopper = threading.Thread(target=trace.stop)
    threading.setprofile(None)
    stopper.start()
    goes_on.set()
    for thread in (writer, stopper):
        thread.join(PATIENCE)
    assert len(closed) == 1
    trace._write("after the end\n")
    assert "after the end" not in (tmp_path / "trace.txt").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_trace_with_a_warning(no_profiler, caplog):
    FunctionTrace(Path("/dev/full"), 0)
    Stopwatch()
    assert sys.getprofile() is None
    assert caplog.messages == ["/dev/full cannot be written (No space left on device): 1 lines are lost"]


def test_a_hang_leaves_its_last_call_on_disk(tmp_path):
    """The process is killed outright: what it wrote last is the call that does not return."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nanovllm.utils import stopwatch\n"
        "from nanovllm.diagnostics.function_trace import FunctionTrace\n"
        "FunctionTrace(Path(sys.argv[1]), 0)\n"
        "def hang():\n"
        "    print('hangs', flush=True)\n"
        "    while True: pass\n"
        "stopwatch.time.perf_counter = hang\n"
        "stopwatch.Stopwatch()\n"
    )
    path = tmp_path / "trace.txt"
    with start_python("-c", script, str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        process.kill()
    assert rows(path)[-1][2:] == (
        "call",
        1,
        f"utils/stopwatch.py:{Stopwatch.__init__.__code__.co_firstlineno}",
        "__init__",
    )


def test_the_engine_starts_it_and_ends_it(tmp_path):
    path = tmp_path / "trace.txt"
    script = (
        "import sys; from nanovllm import LLM, SamplingParams\n"
        "with LLM('tiny', device='cpu', num_kvcache_blocks=8) as llm:\n"
        "    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)\n"
        "assert sys.getprofile() is None\n"
    )
    done = run_python("-c", script, NANOVLLM_TRACE_FUNCTION=str(path), NANOVLLM_LOG_LEVEL="WARNING")
    assert done.returncode == 0, done.stderr
    functions = [row[5] for row in rows(path) if row[2] == "call"]
    assert functions.count("schedule") >= 3
    for name in ("prepare", "enqueue", "_step", "submit", "collect", "update", "compute_logits"):
        assert name in functions
    assert decode_log.DecodeLogPolicy.level_for.__name__ in functions
