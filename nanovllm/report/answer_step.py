"""The answer on one step: what it computed, for whom, how long it took, and what held it up."""

from __future__ import annotations

from nanovllm.errors import shown
from nanovllm.report.answer import Answer
from nanovllm.report.log_file import Record, count, number
from nanovllm.report.preemptions import Preemption
from nanovllm.report.run import Run
from nanovllm.report.steps import StepStory
from nanovllm.report.summary import Summary
from nanovllm.report.words import clock_text, listed, plural, time_text

_AT_INFO = "INFO has the times of the slowest step of each interval only: NANOVLLM_LOG_LEVEL=DEBUG adds each step."


def answer_step(summary: Summary) -> Answer:
    """Describes the step in each engine of the log that ran it; the newest engine comes first."""
    step = summary.watch.step
    assert step is not None
    runs = [run for run in reversed(summary.runs) if _ran(run.story, step)]
    if not runs:
        last = max((run.story.last for run in summary.runs), default=0)
        text = f"No step {step} is in the log: " + (f"its steps are 1 to {last}." if last else "it has no steps.")
        return Answer({"error": "unknown step", "step": step, "last_step": last}, [text], found=False)
    described = [_describe(run, step) for run in runs]
    facts, lines = described[0]
    for other, words in described[1:]:
        lines += [f"Engine {other['engine']}: {words[0]}", *words[1:]]
    if len(described) > 1:
        facts["other_engines"] = [other for other, _ in described[1:]]
    return Answer(facts, lines)


def _ran(story: StepStory, step: int) -> bool:
    return story.is_known or 0 < step <= story.last


def _describe(run: Run, step: int) -> tuple[Record, list[str]]:
    story = run.story
    records = {record["event"]: record for record in story.records if count(record, "rank") == 0}
    done, prefill, decode = (records.get(name) for name in ("step.done", "batch.prefill", "batch.decode"))
    slowest = records.get("engine.statistics")  # the last one: that of the run, if it is there
    prompt_tokens, decode_seqs = _contents(story, done, slowest)
    lines = [f"Step {step}{_when(run, story)}: {_contents_text(prompt_tokens, decode_seqs)}.{_duration(done, slowest)}"]
    names = [str(name) for record in (prefill, decode) if record is not None for name in _items(record, "seqs")]
    if names:
        known = story.requests
        lines.append(f"Its sequences: {listed(names, 16)}.")
        requests = list(dict.fromkeys(known[seq_id] for seq_id in map(_seq_id, names) if seq_id in known))
    else:
        requests = [str(name) for name in _items(slowest or {}, "slowest_step_request_ids")]
        requests = requests or list(dict.fromkeys(story.requests.values()))
    if requests:
        lines.append(f"Requests: {listed([shown(name) for name in requests], 16)}.")
    preemptions = [Preemption.of(record) for record in story.records if record["event"] == "sequence.preempted"]
    lines += [f"It preempted seq {one.seq_id} for {one.beneficiary}: it {one.shortage}." for one in preemptions]
    messages = [record for record in story.records if record["event"] == "communication"]
    if messages:
        lines.append(_messages_text(messages))
    lines += [
        str(record.get("message"))[:300]
        for record in story.records
        if record["event"] in ("engine.slow", "engine.error", "engine.interrupted")
    ]
    lines += _ends(story, step)
    if done is None:
        lines.append(_AT_INFO)
    facts = {
        "step": step,
        "engine": run.number,
        "prompt_tokens": prompt_tokens,
        "decode_seqs": decode_seqs,
        "kind": _kind(prompt_tokens, decode_seqs),
        "wall_ms": number(done or {}, "wall_ms"),
        "since_previous_ms": number(slowest or {}, "slowest_step_ms"),
        "gpu_ms": number(done or slowest or {}, "gpu_ms" if done else "slowest_step_gpu_ms"),
        "requests": requests,
        "sequences": names,
        "preemptions": [one.facts() for one in preemptions],
        "communication_ms": sum(number(record, "elapsed_ms") or 0.0 for record in messages) if messages else None,
        "answer": lines[0],
    }
    return facts, lines


def _contents(story: StepStory, done: Record | None, slowest: Record | None) -> tuple[int, int | None]:
    """Returns the step's prompt tokens and decoding sequences. At INFO, a step between two lines is like the first."""
    if done is not None:
        return count(done, "num_prefill_tokens"), count(done, "num_decode_seqs")
    if slowest is not None:
        return count(slowest, "slowest_step_prompt_tokens"), count(slowest, "slowest_step_decode_seqs")
    lines = {record["event"]: record for record in story.records}
    tokens = count(lines.get("batch.prefill", {}), "batched_tokens")
    if "batch.decode" in lines:
        return tokens, count(lines["batch.decode"], "size")
    if tokens:
        return tokens, 0
    before = story.before
    return 0, count(before, "size") if before is not None and before["event"] == "batch.decode" else None


def _kind(prompt_tokens: int, decode_seqs: int | None) -> str:
    if prompt_tokens:
        return "mixed" if decode_seqs else "prefill"
    return "decode"


def _contents_text(prompt_tokens: int, decode_seqs: int | None) -> str:
    parts = [f"prefill of {plural(prompt_tokens, 'token')}"] if prompt_tokens else []
    if decode_seqs:
        parts.append(f"decode of {plural(decode_seqs, 'sequence')}")
    return " beside ".join(parts) or "decode; its size is not in the log"


def _when(run: Run, story: StepStory) -> str:
    record = next((one for one in story.records if one["event"].startswith("batch.")), None)
    return "" if record is None else f" (scheduled at {clock_text(run.start, record['mono'])})"


def _duration(done: Record | None, slowest: Record | None) -> str:
    text = ""
    if done is not None:
        wall, gpu = number(done, "wall_ms") or 0.0, number(done, "gpu_ms")
        text = f" It took {time_text(wall / 1e3)}" + ("" if gpu is None else f", {time_text(gpu / 1e3)} on the GPU")
        text += f"; then {count(done, 'used_blocks')} of {count(done, 'num_blocks')} blocks were in use."
    if slowest is not None:
        whole = "run" if slowest.get("final") is True else "its interval"
        since = (number(slowest, "slowest_step_ms") or 0.0) / 1e3
        text += f" It was the slowest of the {whole}: {time_text(since)} after the step before it."
    return text


def _messages_text(messages: list[Record]) -> str:
    elapsed = sum(number(record, "elapsed_ms") or 0.0 for record in messages)
    waited = sum(number(record, "wait_ms") or 0.0 for record in messages)
    text = f"{plural(len(messages), 'message')} between ranks: {time_text(elapsed / 1e3)}"
    return f"{text}, of which {time_text(waited / 1e3)} waiting."


def _ends(story: StepStory, step: int) -> list[str]:
    lines = []
    for field, text in (
        ("first_step", "It was the first step of"),
        ("last_step", "It was the last step of"),
        ("stall_step", "It ended the longest wait of"),
    ):
        names = [shown(str(end.get("request_id"))) for end in story.ends if count(end, field) == step]
        if names:
            lines.append(f"{text} {listed(names, 16)}.")
    return lines


def _items(record: Record, field: str) -> list[object]:
    value = record.get(field)
    return value if isinstance(value, list) else []


def _seq_id(name: str) -> int:
    digits = name.removeprefix("seq_").partition("(")[0]
    return int(digits) if digits.isdecimal() and len(digits) < 18 else -1
