"""The verdict on a run: what took most of its requests' time, and which setting would change that."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.report.advice import (
    Advice,
    CacheNeed,
    cache_advice,
    cache_peak,
    is_cache_short,
    prefill_advice,
    queue_advice,
)
from nanovllm.report.log_file import number
from nanovllm.report.run import Run
from nanovllm.report.words import per_cent, plural, time_text

_SMALL = 0.05  # of the requests' time; less is no limit worth a word


@dataclass(frozen=True)
class Verdict:
    limit: str  # preemption, queue, prefill, decode, host, or nothing
    sentence: str
    advice: list[Advice]


def verdict(run: Run) -> Verdict:
    """Returns what limited the run."""
    total = sum(run.requests.parts.values())
    if total <= 0:
        return Verdict("nothing", "No request has ended.", [])
    share = {name.removesuffix("_s"): seconds / total for name, seconds in run.requests.parts.items()}
    need = CacheNeed.of(run)
    if share["preempted"] >= _SMALL and is_cache_short(run):
        text = (
            f"The KV cache was too small: {plural(run.num_preemptions, 'preemption')}, in which requests spent "
            f"{per_cent(share['preempted'])} of their time, and {per_cent(share['queue'])} in the queue."
        )
        return Verdict("preemption", text, cache_advice(run, need))
    if share["queue"] > max(share["prefill"], share["decode"]):
        return _queue(run, need, share["queue"])
    if share["prefill"] > share["decode"]:
        text = f"Prompts: requests spent {per_cent(share['prefill'])} of their time between first step and first token."
        return Verdict("prefill", text, [])
    return _decode(run, share["decode"])


def _queue(run: Run, need: CacheNeed | None, share: float) -> Verdict:
    text = f"Admission: requests spent {per_cent(share)} of their time in the queue"
    usage, limit = cache_peak(run), run.number_setting("max_num_seqs")
    if is_cache_short(run):
        text += f", since the KV cache was full ({plural(run.num_preemptions, 'preemption')})"
    elif limit is not None and run.most_running >= limit:
        text += f": max_num_seqs={int(limit)} sequences were running"
    elif usage is not None and usage >= 0.9:
        text += f", since {per_cent(usage)} of the KV cache was in use"
    return Verdict("queue", text + ".", queue_advice(run, need))


def _decode(run: Run, share: float) -> Verdict:
    host = host_share(run)
    if host is not None and host > 0.3:
        text = f"The host: the device waited for {per_cent(host)} of the steps' time."
        return Verdict("host", text, [])
    gaps = run.requests.latencies["itl_ms"]
    text = f"Decoding: requests spent {per_cent(share)} of their time in it"
    if gaps.count:
        text += f", at {time_text(gaps.quantile(0.5) / 1e3)} a token (median)"
    if run.most_running:
        text += f" and up to {plural(run.most_running, 'sequence')} a step"
    stalls = run.requests.latencies["stall_ms"]
    advice = prefill_advice(run, stalls.quantile(0.5) / 1e3, gaps.quantile(0.5) / 1e3) if stalls.count else []
    return Verdict("decode", text + ".", advice)


def host_share(run: Run) -> float | None:
    """Returns the share of the steps' wall time in which the device did not work; None if it was not measured."""
    figures = run.statistics.figures()
    wall, device = number(figures, "wall_s"), number(figures, "device_s")
    return max(1 - device / wall, 0.0) if wall and device is not None else None
