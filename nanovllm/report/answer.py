"""Answers on requests: why one was slow, and which were the slowest."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from nanovllm.errors import shown
from nanovllm.report.advice import Advice, CacheNeed, advice_text, cache_advice, prefill_advice, queue_advice
from nanovllm.report.log_file import Record, count, number
from nanovllm.report.preemptions import Preemption
from nanovllm.report.requests import RequestLife
from nanovllm.report.run import Run
from nanovllm.report.summary import Summary
from nanovllm.report.watch import BY_FIELD
from nanovllm.report.words import Unit, listed, per_cent, plural, time_text, times_text

_SIGNIFICANT = 0.1  # of the time; a smaller part is not what made a request slow
_NAMES = {"queue_s": "queued", "prefill_s": "prefill", "preempted_s": "preempted", "decode_s": "decoding"}
_ENDS = {
    "eos": "ended with an end-of-sequence token",
    "stop": "ended at a stop string or stop token",
    "length": "ended at max_tokens or the model's length",
    "abort": "was aborted",
    "left": "was left by its caller, who closed the stream",
    "refused": "was refused",
    "failed": "failed",
}
AT_INFO = (
    "The log has no DEBUG records: the single steps of the request, and the times of its other gaps, are not in it "
    "(NANOVLLM_LOG_LEVEL=DEBUG)."
)


@dataclass(frozen=True)
class Answer:
    """An answer in words, and as data."""

    facts: object
    lines: list[str]
    found: bool = True


def answer_request(summary: Summary) -> Answer:
    """Says how the request of the question spent its time, and which setting would have shortened it."""
    wanted = summary.watch.request_id
    assert wanted is not None
    runs = [run for run in summary.runs if run.requests.wanted is not None]
    if not runs:
        return _unknown_request(summary, wanted)
    run = runs[-1]
    life = run.requests.wanted
    assert life is not None
    facts, lines = describe(run, CacheNeed.of(run), life)
    if life.request_id != wanted:
        is_clients = wanted == life.end.get("client_request_id")
        kind = "the client's name of" if is_clients else "a completion of"
        lines.insert(0, f"{shown(wanted)} is {kind} {shown(life.request_id)}, which is:")
    others = sum(each.requests.num_wanted for each in runs) - bool(life.end)
    if others > 0:
        times = plural(others, "other request")
        lines.append(f"{times} of the log had this id; this is the last one, of engine {run.number}.")
    facts["num_others_with_this_id"] = max(others, 0)
    return Answer(facts, lines)


def _unknown_request(summary: Summary, wanted: str) -> Answer:
    ids = dict.fromkeys(one for run in summary.runs for one in reversed(run.requests.last_ids))
    nearest = difflib.get_close_matches(wanted, ids, n=3, cutoff=0.0) if ids else []
    text = f"No request {shown(wanted)} is in the log."
    if nearest:
        text += f" The nearest ids are {listed([shown(one) for one in nearest])}."
    if not any(run.at_debug for run in summary.runs):
        text += " At INFO a request is in the log when it has ended, or was preempted."
    return Answer({"error": "unknown request", "request_id": wanted, "nearest": nearest}, [text], found=False)


def answer_slowest(summary: Summary) -> Answer:
    """Lists the slowest requests of the log, each with the parts of its time."""
    by = summary.watch.by
    field = BY_FIELD[by]
    needs = {run.number: CacheNeed.of(run) for run in summary.runs}
    found = [(life.seconds(field), run, life) for run in summary.runs for life in run.requests.slowest[by].first()]
    found.sort(key=lambda entry: -entry[0])
    facts: list[Record] = []
    lines: list[str] = []
    for place, (seconds, run, life) in enumerate(found[: summary.watch.num_slowest], start=1):
        one, words = describe(run, needs[run.number], life)
        facts.append(one)
        engine = f" (engine {run.number})" if len(summary.runs) > 1 else ""
        value = "" if by == "e2e" else f"{by} {time_text(seconds)}; "
        lines.append(f"{place}. {shown(life.request_id)}{engine}: {value}{words[0]}")
    return Answer(facts, lines or [f"No request of the log has the figure {field}."])


def describe(run: Run, need: CacheNeed | None, life: RequestLife) -> tuple[Record, list[str]]:
    """Returns a request's figures, and its story: one sentence on its time, then what is behind it."""
    if not life.end:
        return _unfinished(run, life)
    end = life.end
    advice = request_advice(run, need, life)
    first = _time_sentence(life)
    lines = [f"{first} {advice_text(advice)}".strip(), _course(run, life)]
    lines += [_preemption_sentence(run, one) for one in life.preemptions]
    lines += [text for text in (_stall_sentence(life), _tokens_sentence(run, life)) if text]
    if not run.at_debug and life.first_scheduled is not None:
        lines.append(AT_INFO)
    facts = {
        **{name: value for name, value in end.items() if name not in ("mono", "seconds")},
        "engine": run.number,
        "preemptions": [one.facts() for one in life.preemptions],
        "first_scheduled_at": run.moment(life.first_scheduled),
        "ended_at": run.moment(life.finished),
        "advice": [one.facts() for one in advice],
        "answer": lines[0],
    }
    return facts, lines


def _time_sentence(life: RequestLife) -> str:
    end = life.end
    total = life.seconds("e2e_s")
    unit = Unit.of(total)
    if life.cause == "refused":
        return f"Refused at once: {str(end.get('error', 'the log has no reason'))[:500]}"
    queued = f"{unit.number(life.seconds('queue_s'))} queued"
    behind, usage = count(end, "queued_behind"), number(end, "kv_cache_usage") or 0.0
    queued += f" behind {plural(behind, 'request')}" if behind else ""
    queued += f" (cache {per_cent(usage)} full)" if usage >= 0.005 else ""
    parts = [queued, f"{unit.number(life.seconds('prefill_s'))} prefill"]
    if life.num_preemptions:
        for_whom = list(dict.fromkeys(one.beneficiary for one in life.preemptions))
        most = max(life.preemptions, key=lambda one: one.needed - one.free_before, default=None)
        detail = f" (for {listed(for_whom)}; {most.shortage})" if most is not None else ""
        seconds = unit.number(life.seconds("preempted_s"))
        parts.append(f"{seconds} preempted {times_text(life.num_preemptions)}{detail}")
    parts.append(f"{unit.number(life.seconds('decode_s'))} decoding")
    return f"{unit.text(total)}: {', '.join(parts)}."


def _course(run: Run, life: RequestLife) -> str:
    end = life.end
    text = f"{shown(life.request_id)} {_ENDS.get(life.cause, 'ended')}"
    if end.get("stop_reason") is not None:
        text += f" ({shown(end['stop_reason'])})"
    if life.cause == "failed":
        text += f" ({str(end.get('error', ''))[:300]})"
    text += f" at {run.moment(life.finished)}"
    if number(end, "last_step") is not None:
        text += f", after step {count(end, 'last_step')}"
    if life.first_scheduled is None:
        return f"{text}; it was never scheduled."
    text += f"; first scheduled at {run.moment(life.first_scheduled)} in step {count(end, 'first_step')}"
    if life.first_token is None:
        return f"{text}; it has no token."
    return f"{text}, first token at {run.moment(life.first_token)} ({time_text(life.seconds('ttft_s'))} after arrival)."


def _preemption_sentence(run: Run, one: Preemption) -> str:
    whom = one.beneficiary if one.for_request_id is None else f"{one.beneficiary} ({shown(one.for_request_id)})"
    return (
        f"Preempted at {run.moment(one.at)} in step {one.step} for {whom}: the step {one.shortage}; "
        f"{plural(one.num_tokens, 'token')} to compute again."
    )


def _stall_sentence(life: RequestLife) -> str:
    end = life.end
    if number(end, "longest_stall_s") is None:
        return ""
    return (
        f"Longest wait between two tokens: {time_text(life.seconds('longest_stall_s'))}, which step "
        f"{count(end, 'stall_step')} ended: {str(end.get('stall_reason'))[:300]}."
    )


def _tokens_sentence(run: Run, life: RequestLife) -> str:
    if life.cause == "refused":
        return ""
    text = f"{plural(life.num_prompt_tokens, 'prompt token')} ({life.num_cached_tokens:,} from the prefix cache), "
    text += f"{plural(life.output_len, 'output token')}"
    gap, median = number(life.end, "itl_s"), run.requests.latencies["itl_ms"]
    if gap is not None and median.count:
        text += f", one each {time_text(gap)} (median of the run {time_text(median.quantile(0.5) / 1e3)})"
    return f"{text}."


def request_advice(run: Run, need: CacheNeed | None, life: RequestLife) -> list[Advice]:
    """Returns what would have shortened the largest part of a request's time."""
    total = life.seconds("e2e_s")
    if total <= 0:
        return []
    parts = {name: life.seconds(name) / total for name in _NAMES}
    if parts["preempted_s"] >= _SIGNIFICANT:
        return cache_advice(run, need)
    if parts["queue_s"] >= 3 * _SIGNIFICANT:
        return queue_advice(run, need)
    if life.end.get("stall_cause") == "prefill":
        return prefill_advice(run, life.seconds("longest_stall_s"), life.seconds("itl_s"))
    return []


def _unfinished(run: Run, life: RequestLife) -> tuple[Record, list[str]]:
    age = Unit.of(run.end - life.arrival).text(run.end - life.arrival)
    where = "waits to run" if life.first_scheduled is None else "was running"
    if life.preempted and life.preempted[-1][1] is None:
        where = "is preempted and waits for blocks"
    elif life.first_scheduled is None and not run.at_debug:
        where = "was running"
    lines = [
        f"{shown(life.request_id)} had not finished {age} after it was first seen, where the log ends: it {where}."
    ]
    lines += [_preemption_sentence(run, one) for one in life.preemptions]
    facts = {
        "request_id": life.request_id,
        "engine": run.number,
        "cause": None,
        "state": where,
        "preemptions": [one.facts() for one in life.preemptions],
        "answer": lines[0],
    }
    return facts, lines
