"""Logs as an engine writes them, made up: of known figures, or of any size.

python -m tests.report.synthetic_log big.jsonl 500    # megabytes: the log that docs/debugging.md measures
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_EPOCH = datetime(2026, 11, 21, 8, 0, tzinfo=timezone.utc)
BOOT = 5000.0  # what the monotonic clock shows when the program starts


def line(at: float, event: str, level: str = "DEBUG", message: str = "", pid: int = 4711, **fields: Any) -> Line:
    """A record `at` seconds after the program's start."""
    ts = (_EPOCH + timedelta(seconds=at)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    head = {"ts": ts, "mono": BOOT + at, "level": level, "logger": "nanovllm.engine", "event": event}
    return {**head, "message": message or event, "pid": pid, "rank": 0, **fields}


def write(path: Path, lines: Iterator[Line] | list[Line]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for record in lines:
            file.write(json.dumps(record) + "\n")
    return path


def startup(pid: int = 4711, model: str = "/models/qwen3-0.6b", at: float = 0.0) -> list[Line]:
    seconds = {"imports": 2.9, "configuration": 0.05, "weights": 0.6, "largest steps": 2.6, "KV cache": 0.02}
    config = {"tensor_parallel_size": 1, "max_num_seqs": 64, "gpu_memory_utilization": 0.9}
    resolved = {"model": model, "device": "cuda:0", "dtype": "bfloat16", "num_blocks": 1000, "block_size": 16}
    versions = {"nanovllm": "0.1.0", "torch": "2.9.0", "cuda": "12.8"}
    return [
        line(at, "engine.versions", "INFO", "…", pid, schema=1, versions=versions, device="H100", variables={}),
        line(at, "rule", "INFO", "=" * 80, pid),
        line(at, "engine.init", "INFO", "Initializing LLMEngine", pid),
        line(at, "engine.model", "INFO", f"Model: {model}", pid, model=model),
        line(at, "engine.config", "INFO", "Configuration: …", pid, **config),
        line(at + 6.1, "engine.resolved", "INFO", "Resolved: …", pid, **resolved),
        line(
            at + 6.2, "engine.startup", "INFO", "Start-up: 6.17s", pid, total_seconds=6.17, parts="…", seconds=seconds
        ),
    ]


def simulated(
    num_requests: int, *, seed: int = 0, num_blocks: int = 1000, max_output: int = 200, debug_noise: int = 0
) -> Iterator[Line]:
    """A run of the whole life: arrivals, prefill beside decode, preemption, prefix hits, a graph capture now and then.

    `debug_noise`: other DEBUG lines a step, as an engine writes them, that a report has no use for.
    """
    rng = random.Random(seed)
    yield from startup()
    now, step, decode_step = 7.0, 0, 0
    next_statistics = now + 2.0
    arrivals = [now]
    for _ in range(num_requests - 1):
        arrivals.append(arrivals[-1] + rng.expovariate(30.0))
    waiting: list[Line] = []
    running: list[Line] = []
    captured: set[int] = set()
    added = 0
    while added < num_requests or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[added])
        while added < num_requests and arrivals[added] <= now:
            prompt, output = rng.randint(50, 900), rng.randint(2, max_output)
            request = {
                "request_id": f"generate-{added}", "seq_id": added, "prompt": prompt, "left": output, "out": 0,
                "arrival": arrivals[added], "scheduled": None, "token": None, "preemptions": 0,
                "cached": rng.choice([0, 0, 48, 512]) if prompt > 600 else 0,
            }  # fmt: skip
            who = {"request_id": request["request_id"], "seq_id": added}
            yield line(arrivals[added], "request.added", num_prompt_tokens=prompt, max_tokens=output, **who)
            waiting.append(request)
            added += 1
        step += 1
        used = sum((r["prompt"] + r["out"]) // 16 + 1 for r in running)
        preempted = 0
        while used > num_blocks * 0.9 and len(running) > 1:
            victim = running.pop()
            used -= (victim["prompt"] + victim["out"]) // 16 + 1
            victim["preemptions"] += 1
            preempted += 1
            who = {"request_id": victim["request_id"], "seq_id": victim["seq_id"]}
            tokens = victim["prompt"] + victim["out"]
            message = f"Preempted seq_id={victim['seq_id']}"
            shortage = {"needed": 3, "free_before": 0, "for_seq_id": running[0]["seq_id"], "step": step}
            shortage |= {"for_request_id": running[0]["request_id"], "coming": 0, "freed": tokens // 16}
            yield line(now, "sequence.preempted", "INFO", message, **who, **shortage, num_tokens=tokens)
            waiting.insert(0, victim)
        decoding, chunks, budget = list(running), [], 2048
        while waiting and budget > 0 and len(running) < 64 and not preempted:
            request = waiting[0]
            blocks = (request["prompt"] + request["out"]) // 16 + 1
            if used + blocks > num_blocks * 0.8:
                break
            waiting.pop(0)
            used += blocks
            yield line(
                now, "blocks.allocated", seq_id=request["seq_id"], new=blocks, cache_hits=request["cached"] // 16
            )
            request["scheduled"] = request["scheduled"] or now
            tokens = max(request["prompt"] + request["out"] - request["cached"], 1)
            chunks.append(tokens)
            budget -= tokens
            running.append(request)
        began = now
        if chunks:
            yield line(now, "batch.prefill", "INFO", step=step, size=len(chunks), batched_tokens=sum(chunks), seqs=[])
        if decoding:
            decode_step += 1
            level = "INFO" if decode_step % 10 == 1 or chunks or preempted else "DEBUG"
            size = {"size": len(decoding), "preempted": preempted}
            yield line(now, "batch.decode", level, step=step, decode_step=decode_step, **size, seqs=[])
        wall = (1.8 + 0.012 * sum(chunks) + 0.008 * len(decoding)) * rng.uniform(0.95, 1.1)
        if decoding and not chunks and len(decoding) // 8 not in captured:
            captured.add(len(decoding) // 8)
            yield line(now + 0.001, "graph.captured", size=len(decoding) // 8 * 8 + 8, elapsed_ms=180.0)
            wall += 180.0
        if rng.random() < 0.001:
            wall += 60
        for number in range(debug_noise):
            yield line(now, "section.end", section=f"layer {number}", wall_ms=0.4, gpu_ms=0.3, failed=False)
        now += wall / 1e3
        ended = []
        for request in running:
            request["out"] += 1
            request["left"] -= 1
            request["token"] = request["token"] or now
            if request["left"] <= 0:
                ended.append(request)
        outputs = len(running)
        running = [r for r in running if r["left"] > 0]
        yield line(
            now, "step.done", step=step, kind="mixed" if chunks and decoding else "prefill" if chunks else "decode",
            num_prefill_tokens=sum(chunks), num_prefill_seqs=len(chunks), num_decode_seqs=len(decoding),
            num_output_tokens=outputs, preempted=preempted, num_running=len(running), num_waiting=len(waiting),
            used_blocks=sum((r["prompt"] + r["out"]) // 16 + 1 for r in running), num_blocks=num_blocks,
            wall_ms=(now - began) * 1e3, gpu_ms=(now - began) * 900,
        )  # fmt: skip
        for request in ended:
            yield finished(request, now)
        if now >= next_statistics:
            next_statistics += 2.0
            yield line(
                now, "engine.statistics", "INFO", prompt_tokens_per_second=9000.0, generation_tokens_per_second=3000.0,
                num_running=len(running), num_waiting=len(waiting), preemptions=0, prefix_cache_hit_rate=0.25,
                kv_cache_usage=sum((r["prompt"] + r["out"]) // 16 + 1 for r in running) / num_blocks,
            )  # fmt: skip
    yield line(
        now, "generation.complete", "INFO", num_steps=step, total_output_tokens=0, prefill_time=1.0, decode_time=2.0
    )


def finished(request: Line, at: float) -> Line:
    """The end of a request as `request.finished` says it."""
    out, first = request["out"], request["token"]
    preempted = request.get("preempted_s", 0.0)
    return line(
        at, "request.finished", "INFO", request_id=request["request_id"], seq_ids=[request["seq_id"]],
        cause=request.get("cause", "length"), finish_reason="length", stop_reason=None, e2e_s=at - request["arrival"],
        queue_s=request["scheduled"] - request["arrival"], prefill_s=first - request["scheduled"],
        decode_s=at - first - preempted, preempted_s=preempted, ttft_s=first - request["arrival"],
        itl_s=(at - first) / (out - 1) if out > 1 else None, longest_stall_s=0.1 if out > 1 else None,
        stall_cause="decode" if out > 1 else None, stall_step=2 if out > 1 else None,
        stall_reason="step 2 decoded 2 sequences" if out > 1 else None, num_prompt_tokens=request["prompt"],
        num_cached_tokens=request["cached"], num_output_tokens=out, num_preemptions=request["preemptions"],
        queued_behind=request.get("behind", 0), kv_cache_usage=request.get("usage", 0.0),
        arrival=BOOT + request["arrival"], finished=BOOT + at, first_step=1, last_step=9,
    )  # fmt: skip


def main(path: Path, megabytes: float) -> None:
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for record in simulated(1_000_000, debug_noise=4):
            size += file.write(json.dumps(record) + "\n")
            if size > megabytes * 1e6:
                return


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
