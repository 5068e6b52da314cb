"""See the logging system work on the checkpoint that ships with the package.

    python test_logging.py            runs every demonstration below, prints its lines and checks them
    python test_logging.py silence    runs those whose name contains the word
    pytest test_logging.py            checks the same without printing

LOGGING.md explains what appears here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from nanovllm import LLM, SamplingParams
from nanovllm.utils.logger import configure_logging

LINE = re.compile(r"\[[^\]]+\] \[nanovllm\.(?P<logger>[\w.]+)\] \[(?P<level>[A-Z]+)\] (?P<message>.*)")
MEMORY = r"(GPU Memory \[Device \d+\]: Allocated=.+GB, Reserved=.+GB.*|CPU Memory \[this process\]: .+GB)"
SEQS = r"seqs=\[seq_\d+\(len=\d+{}\)(, seq_\d+\(len=\d+{}\))*(, … \+\d+ more)?\]"

# (logger, message as a regular expression): each must appear at this level.
INFO_LINES = [
    ("engine.llm_engine", r"={80}"),
    ("engine.llm_engine", r"Initializing LLMEngine"),
    ("engine.llm_engine", r"Model: \S.*"),
    ("engine.llm_engine", r"Configuration: tensor_parallel_size=1, max_model_len=\d+, .*"),
    ("engine.model_runner", r"Initializing ModelRunner \(rank 0\)"),
    ("engine.model_runner", r"\[Rank 0\] Loading model: \S.*"),
    ("engine.model_runner", r"Model config: num_layers=\d+, hidden_size=\d+, .*"),
    ("engine.model_runner", rf"After model loading - {MEMORY}"),
    ("engine.model_runner", r"KV cache configuration: num_kv_heads=2, head_dim=64, block_size=\d+, dtype=float32"),
    ("engine.model_runner", r"Allocating KV cache"),
    ("engine.model_runner", r"Allocating \d+ KV cache blocks, total_size=\d+\.\d\dGB"),
    ("engine.model_runner", rf"After KV cache allocation - {MEMORY}"),
    ("engine.llm_engine", r"-{80}"),
    ("engine.llm_engine", r"Starting generation for 2 prompts"),
    ("engine.llm_engine", r"Total prompt tokens: [1-9]\d*"),
    (
        "engine.scheduler",
        rf"Scheduled PREFILL batch: size=2, batched_tokens=\d+, {SEQS.format(',cached=0', ',cached=0')}",
    ),
    ("engine.scheduler", rf"Scheduled DECODE batch \(step 1\): size=2, preempted=0, {SEQS.format('', '')}"),
    ("engine.scheduler", rf"Scheduled DECODE batch \(step 10\): size=2, preempted=0, {SEQS.format('', '')}"),
    (
        "engine.llm_engine",
        r"Generation complete: 12 steps, total_output_tokens=24, prefill_time=\d+\.\d\ds, decode_time=\d+\.\d\ds",
    ),
    ("engine.llm_engine", rf"After generation - {MEMORY}"),
]

DEBUG_LINES = [
    ("engine.model_runner", r"\[Rank 0\] Preparing PREFILL batch: 2 sequences"),
    (
        "engine.model_runner",
        r"\[Rank 0\] PREFILL tensors: input_ids=\[\d+\], positions=\[\d+\], slot_mapping=\[\d+\].*",
    ),
    ("engine.model_runner", r"\[Rank 0\] PREFILL: max_seqlen_q=\d+, max_seqlen_k=\d+, total_tokens=\d+"),
    ("engine.model_runner", r"\[Rank 0\] Preparing DECODE batch: 2 sequences"),
    (
        "engine.model_runner",
        r"\[Rank 0\] DECODE tensors: input_ids=\[2\], positions=\[2\], context_lens=\[2\], block_tables=\[2, \d+\].*",
    ),
    ("engine.model_runner", r"\[START\] \[Rank 0\] Model forward PREFILL"),
    ("engine.model_runner", r"\[END\] \[Rank 0\] Model forward PREFILL - Elapsed: \d+\.\d\dms.*"),
    ("engine.model_runner", r"\[START\] \[Rank 0\] Model forward DECODE"),
    ("engine.model_runner", r"\[END\] \[Rank 0\] Model forward DECODE - Elapsed: \d+\.\d\dms.*"),
    ("engine.model_runner", r"\[Rank 0\] Output: logits=\[2, \d+\]"),
    ("engine.block_manager", r"Allocating blocks for seq_id=0, num_blocks=\d+"),
    ("engine.block_manager", r"Allocated blocks for seq_id=0: new=\d+, cache_hits=0, free_blocks=\d+, used_blocks=\d+"),
    ("engine.block_manager", r"Deallocated blocks for seq_id=0: freed=(\d+)/\1, free_blocks=\d+"),
    ("layers.attention", r"Attention forward: is_prefill=True, q=\[\d+, \d+, 64\], k=\[\d+, 2, 64\], v=\[\d+, 2, 64\]"),
    ("layers.attention", r"Attention forward: is_prefill=False, q=\[2, \d+, 64\], k=\[2, 2, 64\], v=\[2, 2, 64\]"),
    ("layers.attention", r"Storing KV cache: N=2, num_heads=2, head_dim=64, num_slots=2"),
    ("layers.attention", r"Decode attention: k_cache=\[\d+(, \d+)*\], v_cache=\[\d+(, \d+)*\]"),
    ("layers.attention", r"Attention output: \[2, \d+, 64\]"),
    ("engine.scheduler", r"Scheduled DECODE batch \(step 2\): size=2, preempted=0, .*"),
    ("engine.scheduler", r"Sequence finished: seq_id=0, output_len=12, reason=max_tokens"),
    ("engine.scheduler", r"Postprocess: 2/2 sequences finished"),
]


class Recorder:
    """Stands in for standard error: keeps what is written and shows it too."""

    def __init__(self) -> None:
        self.shown_on = sys.stderr
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        self.shown_on.write(text)
        return len(text)

    def flush(self) -> None:
        self.shown_on.flush()

    @property
    def lines(self) -> list[re.Match[str]]:
        """What was logged; a line that is not in the text format is a failure."""
        matches = [LINE.fullmatch(line) for line in self.text.splitlines()]
        assert all(matches), self.text
        return [match for match in matches if match]


@contextlib.contextmanager
def recording(level: str, **variables: str) -> Iterator[Recorder]:
    """A program of its own, as far as logging goes: this level, a bare root logger, the variables alone."""
    saved = dict(os.environ), logging.root.handlers
    for name in [name for name in os.environ if name.startswith("NANOVLLM_LOG")]:
        del os.environ[name]
    os.environ.update(variables, NANOVLLM_LOG_LEVEL=level)
    logging.root.handlers = []
    recorder = Recorder()
    try:
        with contextlib.redirect_stderr(recorder):
            yield recorder
    finally:
        os.environ.clear()
        os.environ.update(saved[0])
        logging.root.handlers = saved[1]
        configure_logging()


def generate(max_tokens: tuple[int, ...] = (12, 12), **settings: object) -> None:
    """Two prompts (or as many as there are `max_tokens`) through a new engine, greedily."""
    prompts = ["introduce yourself", "list all prime numbers within 100", "count from 3 to 9"][: len(max_tokens)]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in max_tokens]
    with LLM("tiny", device="cpu", **{"max_model_len": 256, "num_kvcache_blocks": 64, **settings}) as llm:
        llm.generate(prompts, params, use_tqdm=False)


def check(lines: list[re.Match[str]], level: str, expected: list[tuple[str, str]]) -> None:
    logged = [(line["logger"], line["message"]) for line in lines if line["level"] == level]
    missing = [
        f"nanovllm.{logger}: {pattern}"
        for logger, pattern in expected
        if not any(logger == other and re.fullmatch(pattern, message) for other, message in logged)
    ]
    assert not missing, f"no line at {level} like\n" + "\n".join(missing)


def decode_steps(lines: list[re.Match[str]], level: str) -> list[int]:
    steps = [
        re.match(r"Scheduled DECODE batch \(step (\d+)\)", line["message"]) for line in lines if line["level"] == level
    ]
    return [int(step[1]) for step in steps if step]


def test_info() -> None:
    """INFO: start-up, prefill batches, decode batches at key moments, memory."""
    with recording("INFO") as recorder:
        generate()
    check(recorder.lines, "INFO", INFO_LINES)
    assert {line["level"] for line in recorder.lines} == {"INFO"}


def test_debug() -> None:
    """DEBUG: every step, shapes, blocks, attention, timings."""
    with recording("DEBUG") as recorder:
        generate()
    check(recorder.lines, "INFO", INFO_LINES)
    check(recorder.lines, "DEBUG", DEBUG_LINES)
    starts, ends = (
        [line["message"] for line in recorder.lines if line["message"].startswith(word)]
        for word in ("[START]", "[END]")
    )
    assert len(starts) == len(ends) == 12  # one prefill and eleven decode steps


def test_silence() -> None:
    """WARNING: nothing at all is printed."""
    output = Recorder()
    with recording("WARNING") as recorder, contextlib.redirect_stdout(output):
        generate()
    assert recorder.text == output.text == ""


def test_levels_per_part() -> None:
    """The scheduler at DEBUG, the block manager at INFO, all else from WARNING on."""
    with recording("WARNING,scheduler=DEBUG,engine.block_manager=INFO") as recorder:
        generate()
    assert {line["logger"] for line in recorder.lines} == {"engine.scheduler"}
    assert {line["level"] for line in recorder.lines} == {"INFO", "DEBUG"}


def test_unknown_level() -> None:
    """A level that does not exist: one warning that names the valid ones, then INFO."""
    with recording("LOUD") as recorder:
        generate()
    (warning,) = [line for line in recorder.lines if line["level"] == "WARNING"]
    assert "'LOUD'" in warning["message"]
    assert "DEBUG, INFO, WARNING, ERROR, CRITICAL" in warning["message"]
    check(recorder.lines, "INFO", INFO_LINES)


def test_decode_frequency() -> None:
    """Of 19 decode steps INFO has the first, every 5th, and the one after a sequence has finished."""
    with recording("INFO,scheduler=DEBUG", NANOVLLM_LOG_DECODE_INTERVAL="5") as recorder:
        generate(max_tokens=(8, 20))
    assert decode_steps(recorder.lines, "INFO") == [1, 5, 8, 10, 15]
    assert decode_steps(recorder.lines, "DEBUG") == [2, 3, 4, 6, 7, 9, 11, 12, 13, 14, 16, 17, 18, 19]


def test_each_generation_shows_its_first_decode_step() -> None:
    """A second generation on the same engine, no different from the first: its first decode step is at INFO too."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    settings = {"device": "cpu", "max_model_len": 256, "num_kvcache_blocks": 64}
    with recording("INFO", NANOVLLM_LOG_DECODE_INTERVAL="1000") as recorder, LLM("tiny", **settings) as llm:
        for _ in range(2):
            llm.generate("count from 3 to 9", params, use_tqdm=False)
    assert decode_steps(recorder.lines, "INFO") == [1, 1]


def test_preemption() -> None:
    """A KV cache too small for both sequences: one gives way, and INFO says so."""
    with recording("INFO", NANOVLLM_LOG_DECODE_INTERVAL="1000") as recorder:
        generate(max_tokens=(70, 70), max_model_len=96, num_kvcache_blocks=6, kvcache_block_size=16)
    messages = [line["message"] for line in recorder.lines]
    assert any(re.match(r"Preempted seq_id=1: freed=[1-9]\d* blocks, ", message) for message in messages)
    assert any(re.match(r"Scheduled DECODE batch \(step \d+\): size=1, preempted=1, ", message) for message in messages)


def test_basic_config() -> None:
    """The user's own basicConfig decides the format, and no line appears twice."""
    with recording("INFO") as recorder:
        logging.basicConfig(format="MY FORMAT %(name)s %(message)s")
        generate()
    lines = recorder.text.splitlines()
    assert all(line.startswith("MY FORMAT nanovllm.") for line in lines)
    once = Counter(line.split(" ", 3)[-1] for line in lines)
    for sentence in (
        "Initializing LLMEngine",
        "Initializing ModelRunner (rank 0)",
        "Starting generation for 2 prompts",
    ):
        assert once[sentence] == 1


def test_json() -> None:
    """NANOVLLM_LOG_FORMAT=json: one object a line, the same sentences, and numbers as numbers."""
    with recording("DEBUG", NANOVLLM_LOG_FORMAT="json") as recorder:
        generate()
    entries = [json.loads(line) for line in recorder.text.splitlines()]
    envelope = ["ts", "mono", "level", "logger", "event", "message", "pid", "rank"]
    assert all(list(entry)[:8] == envelope for entry in entries)
    assert [entry["mono"] for entry in entries] == sorted(entry["mono"] for entry in entries)
    (prefill,) = [entry for entry in entries if entry["event"] == "batch.prefill"]
    assert prefill["message"].startswith(
        f"Scheduled PREFILL batch: size=2, batched_tokens={prefill['batched_tokens']}, "
    )
    steps = [entry for entry in entries if entry["event"] == "step.done"]
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert sum(entry["num_output_tokens"] for entry in steps) == 24
    finished = [entry for entry in entries if entry["event"] == "sequence.finished"]
    assert {entry["request_id"] for entry in finished} == {"generate-0", "generate-1"}
    assert all(entry["arrival"] < entry["first_token"] < entry["finished"] < entries[-1]["mono"] for entry in finished)


def test_file() -> None:
    """NANOVLLM_LOG_FILE: the console's lines in a file, which is written also when the user takes the console."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.log"
        with recording("INFO", NANOVLLM_LOG_FILE=str(path)) as recorder:
            generate()
        # The line with the versions is the file's first; on the console it comes after "Initializing LLMEngine".
        assert sorted(path.read_text("utf-8").splitlines()) == sorted(recorder.text.splitlines())
        assert "Versions: nanovllm=" in path.read_text("utf-8").splitlines()[0]
        check([match for line in recorder.text.splitlines() if (match := LINE.fullmatch(line))], "INFO", INFO_LINES)
        with recording("INFO", NANOVLLM_LOG_FILE=str(path)) as theirs:
            logging.basicConfig(format="MY FORMAT %(message)s")
            generate()
        added = path.read_text("utf-8").splitlines()[len(recorder.text.splitlines()) :]
        messages = [match["message"] for line in added if (match := LINE.fullmatch(line))]
        assert [f"MY FORMAT {message}" for message in messages] == theirs.text.splitlines()


def test_texts_only_when_asked_for() -> None:
    """NANOVLLM_LOG_PROMPTS=1, and no other way, shows what was asked and answered."""
    for switch, shown in (("0", False), ("1", True)):
        with recording("DEBUG", NANOVLLM_LOG_FORMAT="json", NANOVLLM_LOG_PROMPTS=switch) as recorder:
            generate()
        assert ("introduce yourself" in recorder.text) is shown
        assert ('"text": ' in recorder.text) is shown


class ShowEvents(logging.Handler):
    """A handler of the user's own: the data instead of the sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        print(f"{record.levelname:7} {record.event:24} {record.fields}", file=sys.stderr)


def documented_events() -> dict[str, tuple[str, str, str]]:
    """Event → (levels, loggers, fields) as LOGGING.md's tables have them."""
    rows = Path(__file__).with_name("LOGGING.md").read_text("utf-8").splitlines()
    cells = [re.split(r" ?\| ?", row) for row in rows if re.match(r"\| `[a-z_.]+` \| [A-Z]+", row)]
    return {row[1].strip("`"): (row[2], row[3], row[5]) for row in cells}


def test_own_handler() -> None:
    """A handler of one's own sees event and fields, each as LOGGING.md lists it, and no prompt's text."""
    handler = ShowEvents()
    with recording("DEBUG"):
        logging.getLogger("nanovllm").addHandler(handler)
        try:
            generate(max_tokens=(2, 3))
        finally:
            logging.getLogger("nanovllm").removeHandler(handler)
    documented = documented_events()
    wrong = []
    for record in handler.records:
        event, fields = record.event, record.fields
        levels, loggers, names = documented.get(event, ("", "", ""))
        if record.levelname not in levels or f"`{record.name.removeprefix('nanovllm.')}`" not in loggers:
            wrong.append(f"{event} at {record.levelname} of {record.name}")
        elif "by its name" not in names:
            always, sometimes = set(re.findall(r"`(\w+)`(?!\?)", names)), set(re.findall(r"`(\w+)`\?", names))
            if not always <= set(fields) <= always | sometimes:
                wrong.append(f"{event} with {fields}")
        assert "introduce" not in record.getMessage() + str(fields)
    assert not wrong, "LOGGING.md does not have\n" + "\n".join(sorted(set(wrong)))
    seen = {record.event for record in handler.records}
    assert {"engine.init", "batch.prefill", "blocks.freed", "attention.output", "section.end"} <= seen


DEMONSTRATIONS: list[Callable[[], None]] = [
    test_info,
    test_debug,
    test_silence,
    test_levels_per_part,
    test_unknown_level,
    test_decode_frequency,
    test_each_generation_shows_its_first_decode_step,
    test_preemption,
    test_basic_config,
    test_json,
    test_file,
    test_texts_only_when_asked_for,
    test_own_handler,
]


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [demonstration for demonstration in DEMONSTRATIONS if word in demonstration.__name__]
    for demonstration in chosen:
        print(f"\n##### {demonstration.__doc__}", file=sys.stderr)
        demonstration()
        print("##### as expected", file=sys.stderr)
    print(f"{len(chosen)} of {len(DEMONSTRATIONS)} demonstrations ran, each as expected.")


if __name__ == "__main__":
    main()
