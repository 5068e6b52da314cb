"""The answer on a whole run: its figures, in words and as data."""

from __future__ import annotations

from dataclasses import asdict

from nanovllm.errors import shown
from nanovllm.report.advice import advice_text, cache_peak
from nanovllm.report.answer import Answer
from nanovllm.report.log_file import Record, count, number
from nanovllm.report.quantiles import QuantileSketch
from nanovllm.report.run import Run
from nanovllm.report.statistics import Rank
from nanovllm.report.summary import Summary
from nanovllm.report.verdict import Verdict, host_share, verdict
from nanovllm.report.words import listed, per_cent, plural, time_text

LATENCIES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "stall": "longest wait between two tokens",
    "e2e": "end to end",
    "queue": "queue time",
}
_LISTED = 50  # preemptions in the answer as data


def answer_summary(summary: Summary) -> Answer:
    """Describes every engine of the log."""
    lines: list[str] = []
    runs = []
    for run in summary.runs:
        judged = verdict(run)
        facts = run_facts(run, judged)
        runs.append(facts)
        if len(summary.runs) > 1:
            lines.append(f"Engine {run.number} of {len(summary.runs)}, process {run.pid}")
        lines += run_lines(run, facts, judged)
    if summary.counts.broken:
        lines.append(
            f"{summary.counts.broken:,} of {summary.counts.lines:,} lines are not records and are left out; the first: "
            f"{shown(summary.counts.first_broken)}."
        )
    if summary.num_left_out:
        lines.append(f"{plural(summary.num_left_out, 'later engine')} of the log: not described.")
    return Answer({"engines": runs, "lines": summary.counts.lines, "broken_lines": summary.counts.broken}, lines)


def run_facts(run: Run, judged: Verdict) -> Record:
    """Returns the figures of a run, and the verdict on it."""
    return {"verdict": asdict(judged), **run_figures(run)}


def run_figures(run: Run) -> Record:
    figures = run.statistics.figures()
    return {
        **_start_facts(run),
        "requests": {"by_cause": dict(run.requests.causes), "num_unfinished": len(run.requests.pending)},
        "seconds_of_requests": {name.removesuffix("_s"): value for name, value in run.requests.parts.items()},
        "latencies_ms": {name: _quantiles(run.requests.latencies[f"{name}_ms"]) for name in LATENCIES},
        "steps": {
            "num": number(figures, "num_steps") or run.num_steps or None,
            "wall_s": number(figures, "wall_s"),
            "device_s": number(figures, "device_s"),
            "host_share": host_share(run),
        },
        "tokens": {
            "prompt": number(figures, "num_prompt_tokens"),
            "output": number(figures, "num_output_tokens"),
            "prompt_per_second": _per_second(figures, "num_prompt_tokens"),
            "output_per_second": _per_second(figures, "num_output_tokens"),
        },
        "cache": {
            "num_blocks": run.setting("num_blocks"),
            "block_size": run.setting("block_size"),
            "peak_usage": cache_peak(run),
            "peak_at": run.moment(number(figures, "peak_kv_cache_at")),
            "hit_rate": run.statistics.hit_rate(),
            "num_hits": number(figures, "num_prefix_hits"),
            "num_queries": number(figures, "num_prefix_queries"),
        },
        "peak_waiting": {
            "num": number(figures, "peak_waiting"),
            "at": run.moment(number(figures, "peak_waiting_at")),
        },
        "slowest_step": {
            name.removeprefix("slowest_step_").replace("slowest_", ""): value
            for name, value in figures.items()
            if name.startswith("slowest_step")
        },
        "preemptions": {
            "num": run.num_preemptions,
            "peak_need": run.preemptions.peak_need or None,
            "first": [one.facts() for one in run.preemptions.first[:_LISTED]],
        },
        "speculation": run.settings.get("speculation.statistics"),
        "communication": {
            str(rank): {operation: dict(vars(one)) for operation, one in facts.messages.items()}
            for rank, facts in sorted(run.ranks.items())
        },
        "memory": {str(rank): facts.memory for rank, facts in sorted(run.ranks.items())},
        "problems": run.problems,
        "outcome": run.outcome,
        "covers_run": run.statistics.covers_run,
    }


def _start_facts(run: Run) -> Record:
    settings = run.settings
    versions = settings.get("engine.versions", {})
    return {
        "engine": run.number,
        "pid": run.pid,
        **{name: versions.get(name) for name in ("schema", "versions", "device", "variables")},
        "model": settings.get("engine.model", {}).get("model"),
        "configuration": {**settings.get("engine.config", {}), **settings.get("engine.resolved", {})},
        "backends": settings.get("attention.selected"),
        "startup": settings.get("engine.startup"),
    }


def _quantiles(sketch: QuantileSketch) -> Record | None:
    if not sketch.count:
        return None
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    values = {name: sketch.quantile(share) for name, share in shares.items()}
    return {**values, "mean": sketch.mean, "max": sketch.most, "count": sketch.count}


def _per_second(figures: Record, name: str) -> float | None:
    value, wall = number(figures, name), number(figures, "wall_s")
    return None if value is None or not wall else value / wall


def run_lines(run: Run, facts: Record, judged: Verdict) -> list[str]:
    """Returns the figures of a run as sentences, the verdict first."""
    lines = [f"Verdict: {judged.sentence} {advice_text(judged.advice)}".strip()]
    lines += [_requests(run), *_latencies(facts), _cache(run, facts), _preemptions(run), _speculation(facts)]
    lines += [_slowest_step(run, facts), _steps(facts), _communication(run)]
    lines += [_memory(rank, known) for rank, known in sorted(run.ranks.items())]
    lines += [_start_up(run), _backends(run), _versions(run), _configuration(facts)]
    if run.num_problems:
        lines.append(f"Warnings and errors: {run.num_problems:,}; the first: {run.problems[0]}")
    if not run.statistics.covers_run:
        lines.append("The engine had not ended where the log ends: totals are of the intervals that the log has.")
    return [line for line in lines if line]


def _requests(run: Run) -> str:
    causes = run.requests.causes
    if not causes:
        return f"Requests: none has ended, {len(run.requests.pending)} had begun."
    shares = run.requests.parts
    total = sum(shares.values()) or 1.0
    text = f"Requests: {plural(sum(causes.values()), 'end')} ("
    text += ", ".join(f"{number_} {cause}" for cause, number_ in causes.most_common()) + "). Their time: "
    text += ", ".join(f"{per_cent(seconds / total)} {name.removesuffix('_s')}" for name, seconds in shares.items())
    if run.requests.pending:
        text += f". {len(run.requests.pending)} had not ended"
    return f"{text}."


def _latencies(facts: Record) -> list[str]:
    lines = []
    for name, title in LATENCIES.items():
        values = facts["latencies_ms"][name]
        if values is not None:
            shown_values = ", ".join(f"{key} {time_text(values[key] / 1e3)}" for key in ("p50", "p90", "p99", "max"))
            lines.append(f"{title.capitalize()}: {shown_values}.")
    return lines


def _cache(run: Run, facts: Record) -> str:
    cache = facts["cache"]
    if cache["peak_usage"] is None:
        return ""
    text = f"KV cache: {per_cent(cache['peak_usage'])} of {cache['num_blocks']} blocks at its fullest"
    text += f", at {cache['peak_at']}" if cache["peak_at"] else ""
    rate = cache["hit_rate"]
    if rate is None:
        return f"{text}. Prefix cache: nothing was looked up."
    hits, queries = int(cache["num_hits"] or 0), int(cache["num_queries"])
    return f"{text}. Prefix cache: {hits:,} of {queries:,} prompt tokens found ({100 * rate:.1f} %)."


def _preemptions(run: Run) -> str:
    if not run.num_preemptions:
        return "Preemptions: none."
    shown_ones = [
        f"{shown(one.request_id)} at {run.moment(one.at)} (step {one.step}) for {one.beneficiary}, {one.shortage}"
        for one in run.preemptions.first[:_LISTED]
    ]
    return f"Preemptions: {run.num_preemptions}: {'; '.join(shown_ones[:5])}{'; …' if run.num_preemptions > 5 else ''}."


def _speculation(facts: Record) -> str:
    figures = facts["speculation"]
    if not figures:
        return ""
    right, drafted = count(figures, "num_accepted_tokens"), count(figures, "num_draft_tokens")
    length = number(figures, "mean_acceptance_length") or 0.0
    share = per_cent(right / max(drafted, 1))
    text = f"Speculative decoding: {right:,} of {drafted:,} drafted tokens were right ({share})"
    return f"{text}, {length:.1f} tokens for each step of a sequence with a draft."


def _slowest_step(run: Run, facts: Record) -> str:
    step = facts["slowest_step"]
    if number(step, "step") is None:
        return ""
    text = f"Slowest step: {count(step, 'step')}, {time_text((number(step, 'ms') or 0.0) / 1e3)}"
    gpu = number(step, "gpu_ms")
    text += "" if gpu is None else f" ({time_text(gpu / 1e3)} on the device)"
    text += f", {step.get('kind')} ({plural(count(step, 'prompt_tokens'), 'prompt token')}, "
    text += f"{count(step, 'decode_seqs')} decoding)"
    names = step.get("request_ids")
    if isinstance(names, list) and names:
        text += f", of {listed([shown(name) for name in names], 16)}"
    return f"{text}."


def _steps(facts: Record) -> str:
    steps = facts["steps"]
    if steps["wall_s"] is None:
        return ""
    text = f"Steps: {int(steps['num'] or 0):,} in {time_text(steps['wall_s'])}"
    if steps["device_s"] is None:
        return f"{text}; the device's time was not measured (it is on a GPU)."
    return (
        f"{text}: the device worked for {time_text(steps['device_s'])}, and waited for the host for "
        f"{time_text(max(steps['wall_s'] - steps['device_s'], 0.0))} ({per_cent(steps['host_share'])})."
    )


def _communication(run: Run) -> str:
    texts = [
        f"rank {rank} {operation} {one.text}"
        for rank, known in sorted(run.ranks.items())
        for operation, one in known.messages.items()
    ]
    if texts:
        return f"Communication: {'; '.join(texts[:12])}."
    if run.number_setting("tensor_parallel_size") == 1:
        return "Communication: none, there is one rank."
    return "Communication: not in the log. INFO does not have it: NANOVLLM_LOG_LEVEL=DEBUG adds each message."


def _memory(rank: int, known: Rank) -> str:
    parts = [f"{moment} {sizes}" for moment, sizes in known.memory_texts().items()]
    return f"Memory of rank {rank}: {'; '.join(parts)}." if parts else ""


def _start_up(run: Run) -> str:
    startup = run.settings.get("engine.startup", {})
    total = number(startup, "total_seconds")
    return "" if total is None else f"Start-up: {time_text(total)}: {startup.get('parts')}."


def _backends(run: Run) -> str:
    chosen = run.settings.get("attention.selected")
    if chosen is None:
        return ""
    return (
        f"Attention: prefill {chosen.get('prefill')} ({chosen.get('prefill_reason')}), "
        f"decode {chosen.get('decode')} ({chosen.get('decode_reason')})."
    )


def _versions(run: Run) -> str:
    known = run.settings.get("engine.versions")
    if known is None or not isinstance(known.get("versions"), dict):
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version is not None)
    return f"Versions: {versions}, device {known.get('device')}; log schema {known.get('schema')}."


def _configuration(facts: Record) -> str:
    settings = facts["configuration"]
    if not settings:
        return ""
    return "Configuration: " + ", ".join(f"{name}={value}" for name, value in settings.items()) + "."
