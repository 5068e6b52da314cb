"""Advice: which setting to change, and to what, computed from the figures of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nanovllm.report.log_file import Record, number
from nanovllm.report.run import Run
from nanovllm.report.words import per_cent, plural

_FULL = 0.9  # a cache of which so much is in use admits few requests


@dataclass(frozen=True)
class Advice:
    setting: str
    value: float | None  # None: it depends on what the log does not say
    sentence: str

    def facts(self) -> Record:
        return asdict(self)


@dataclass(frozen=True)
class CacheNeed:
    """How many blocks would have been enough."""

    num_blocks: int
    peak: int  # blocks that the sequences that had begun needed together, when they needed most
    peak_step: int | None
    num_seqs: int  # sequences that may run together
    enough: int  # blocks that hold any `num_seqs` sequences of the run at their full lengths
    fitting: int  # so many of its longest sequences fit into `num_blocks`

    @classmethod
    def of(cls, run: Run) -> CacheNeed | None:
        """Returns None if the log does not say how large the cache is."""
        num_blocks, block_size = run.number_setting("num_blocks"), run.number_setting("block_size")
        if not num_blocks or not block_size:
            return None
        blocks = run.requests.lengths.blocks(int(block_size))
        num_seqs = int(run.number_setting("max_num_seqs") or run.most_running or 1)
        fitting, total = 0, 0
        for need in blocks:
            total += need
            if total > num_blocks:
                break
            fitting += 1
        return cls(
            num_blocks=int(num_blocks),
            peak=run.preemptions.peak_need,
            peak_step=run.preemptions.peak_step,
            num_seqs=num_seqs,
            enough=sum(blocks[:num_seqs]),
            fitting=max(fitting, 1),
        )


def cache_advice(run: Run, need: CacheNeed | None, *, admits_all: bool = False) -> list[Advice]:
    """Returns what keeps sequences from being preempted; with `admits_all`, from waiting for blocks as well."""
    if need is None:
        return []
    advice = []
    wanted = need.peak if need.peak and not admits_all else max(need.enough, need.peak)
    if wanted > need.num_blocks:
        why = f"{need.enough:,} hold any {plural(need.num_seqs, 'sequence')} of this run at full length"
        if need.peak:
            why = f"the sequences that had begun needed {need.peak:,} at step {need.peak_step}; {why}"
        advice.append(_more_blocks(run, need, wanted, why))
    if need.fitting < need.num_seqs and not admits_all:
        advice.append(
            Advice(
                "max_num_seqs",
                need.fitting,
                f"lower max_num_seqs from {need.num_seqs} to {need.fitting} (so many of its longest sequences fit "
                "into the cache together)",
            )
        )
    return advice


def _more_blocks(run: Run, need: CacheNeed, wanted: int, why: str) -> Advice:
    sizing = run.settings.get("kv_cache.sizing", {})
    total, utilization = number(sizing, "total_gb"), number(sizing, "utilization")
    cache = number(run.settings.get("kv_cache.allocated", {}), "total_gb")
    if not total or utilization is None or not cache:  # the number was given
        return Advice(
            "num_kvcache_blocks",
            wanted,
            f"raise num_kvcache_blocks from {need.num_blocks:,} to {wanted:,} or more ({why})",
        )
    more = cache / need.num_blocks * (wanted - need.num_blocks)
    share = utilization + more / total
    if share <= 0.97:
        return Advice(
            "gpu_memory_utilization",
            round(share + 0.005, 2),
            f"raise gpu_memory_utilization from {utilization:g} to {share + 0.005:.2f}, for {wanted:,} blocks instead "
            f"of {need.num_blocks:,} ({why})",
        )
    return Advice(
        "kv_cache_dtype",
        None,
        f"the GPU lacks {more:.1f} GB for {wanted:,} blocks instead of {need.num_blocks:,} ({why}): set "
        "kv_cache_dtype='fp8', or use more GPUs with tensor_parallel_size",
    )


def seats_advice(run: Run, need: CacheNeed | None) -> list[Advice]:
    """Returns what admits more sequences, if max_num_seqs was reached and the cache had room."""
    limit, usage = run.number_setting("max_num_seqs"), cache_peak(run)
    if not limit or run.most_running < limit:
        return []
    waiting = int(number(run.statistics.figures(), "peak_waiting") or 0)
    wanted = int(limit) + max(waiting, 1)
    room = "" if usage is None else f", and {per_cent(usage)} of the cache was in use at most"
    if need is not None and need.fitting < limit:
        return []  # the cache is the narrower limit
    return [
        Advice(
            "max_num_seqs",
            wanted,
            f"raise max_num_seqs from {int(limit)} to {wanted} (all were running{room}; up to {waiting} waited)",
        )
    ]


def prefill_advice(run: Run, stall_s: float, itl_s: float) -> list[Advice]:
    """Returns the bound on prompt tokens beside decoding that makes such a stall about two gaps long."""
    tokens = run.largest_mixed_prefill
    if not tokens or stall_s <= 2 * itl_s or itl_s <= 0:
        return []
    bound = max(int(tokens * 2 * itl_s / stall_s) // 16 * 16, 16)
    if bound >= tokens:
        return []
    return [
        Advice(
            "max_prefill_tokens_beside_decode",
            bound,
            f"set max_prefill_tokens_beside_decode to {bound:,} (steps computed up to {tokens:,} prompt tokens beside "
            "decoding sequences)",
        )
    ]


def queue_advice(run: Run, need: CacheNeed | None) -> list[Advice]:
    """Returns what shortens the queue: the limit that was reached."""
    seats = [] if is_cache_short(run) else seats_advice(run, need)
    if not seats and (is_cache_short(run) or (cache_peak(run) or 0.0) >= _FULL):
        return cache_advice(run, need, admits_all=True)
    return seats


def is_cache_short(run: Run) -> bool:
    return run.num_preemptions > 0


def cache_peak(run: Run) -> float | None:
    """Returns the largest share of the blocks in use; None if the log does not say."""
    if run.num_blocks:
        return max(run.peak_blocks / run.num_blocks, number(run.statistics.figures(), "peak_kv_cache_usage") or 0.0)
    return number(run.statistics.figures(), "peak_kv_cache_usage")


def advice_text(advice: list[Advice]) -> str:
    """Returns the advice as one sentence."""
    text = ", or ".join(each.sentence for each in advice)
    return text[:1].upper() + text[1:] + "." if text else ""
