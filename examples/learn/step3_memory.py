"""Step 3: memory. Weights, KV cache, activations, and whether anything leaks.

    python examples/learn/step3_memory.py
    python examples/learn/step3_memory.py --num-blocks 5000

Read along: nanovllm/diagnostics/memory.py, nanovllm/diagnostics/leak_check.py, nanovllm/runner/kv_cache.py and
docs/kv-cache.md, which works the sizes out for a GPU.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from _drawing import bar, begin, heading, lesson_parser, say, table, title

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

MB = 10**6
STEP_TOKENS = (64, 128, 256, 512, 1024, 2048)
PROMPT_TOKENS = 512
RUNS = 6  # of a leak check
LEAKED_OBJECTS = 1000  # a run


def main() -> None:
    parser = lesson_parser(__doc__)
    parser.add_argument("--num-blocks", type=int, default=1600, help="of the cache, 1000 to 5000 (default %(default)s)")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is silent, too
    args = begin(parser)
    if not 1000 <= args.num_blocks <= 5000:
        parser.error("--num-blocks must be from 1000 to 5000")

    import torch
    from _engine import open_engine, run

    from nanovllm import LLM, SamplingParams
    from nanovllm.diagnostics.leak_check import MemoryUse, check_leak
    from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
    from nanovllm.models.model_config import ModelConfig
    from nanovllm.runner.kv_cache import KVCacheShape

    title("Step 3: memory")
    settings = {"max_model_len": 2560, "max_num_batched_tokens": 2048, "num_kvcache_blocks": args.num_blocks}
    engine, runner = open_engine(**settings)
    with engine:
        heading("1. Where it is: engine.diagnostics.memory_report(), or LLM.memory_report()")
        report = engine.diagnostics.memory_report()
        print(f"{report}\n")
        say(
            "Weights and cache stay for the life of the engine. 'other' is this process beside them: Python, torch, "
            "the tokenizer. On a GPU the report also knows CUDA graphs and activations, and all of it adds up to the "
            "device."
        )

        heading("2. Weights")
        model = ModelConfig.from_folder(engine.resolved.model)
        parts: dict[str, int] = defaultdict(int)
        for name, tensor in [*runner.model.named_parameters(), *runner.model.named_buffers()]:
            parts[part_of(name)] += tensor.numel() * tensor.element_size()
        for part, size in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {part:<46}{size:>11,} bytes  {bar(size, max(parts.values()), 30)}")
        total = sum(parts.values())
        print(f"  {'together':<46}{total:>11,} bytes; the report says {report.weights:,}: {total == report.weights}\n")
        print(
            "  A weight that embeds and is the LM head too (tied) counts once. bfloat16 would halve all but the table."
        )

        heading("3. KV cache: reserved at once, resident as it is written")
        shape = KVCacheShape.of(model, engine.resolved.block_size, torch.float32)
        print(
            "  bytes of a block = block_size × 2 (key, value) × num_layers × num_kv_heads × head_dim × bytes a number"
        )
        figures = (shape.block_size, 2, shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.dtype.itemsize)
        print(f"                   = {' × '.join(map(str, figures))} = {shape.block_bytes:,}")
        cache = (args.num_blocks + 1) * shape.block_bytes
        print(f"  cache            = ({args.num_blocks} + 1) × {shape.block_bytes:,} = {cache:,}; ", end="")
        print(f"the report says {report.kv_cache:,}: {cache == report.kv_cache}\n")
        say(
            "One block more than can be handed out: the null block, which takes what padding writes. The operating "
            "system gives memory to a page when it is first written, so the cache costs nothing before it is used:"
        )
        print()
        params = SamplingParams(temperature=0, max_tokens=1)
        each = PROMPT_TOKENS // shape.block_size  # blocks of a prompt
        run(engine, [[1] * PROMPT_TOKENS], params)  # warms up: the first long step allocates more than the cache
        engine.reset_prefix_cache()
        draw = random.Random(0)
        before, used = engine.diagnostics.memory_use()[0], each
        rows = [(used, "", f"{before / MB:,.1f}", "")]
        for quarter in range(1, 5):
            while used + each <= args.num_blocks * quarter // 4:
                # Other tokens each time: the blocks of those before stay in the prefix cache.
                run(engine, [[draw.randrange(250) for _ in range(PROMPT_TOKENS)]], params)
                used += each
            resident, written = engine.diagnostics.memory_use()[0], (used - each) * shape.block_bytes
            rows.append((used, f"{written / MB:,.1f}", f"{resident / MB:,.1f}", f"{(resident - before) / MB:,.1f}"))
        table(["blocks written", "newly written, MB", "process, MB", "grown by, MB"], rows, left=0)
        print()
        say(
            "(Give or take: a page may be of 2 MB, and each layer's keys and values lie apart; and the allocator "
            "keeps some of what the steps' own tensors took.)"
        )
        print()
        big = KVCacheShape.of(BUILTIN_SHAPES["qwen3-0.6b"], 16, torch.bfloat16).block_bytes
        say(
            f"Qwen3-0.6B's shape in bfloat16 takes {big:,} bytes a block, {big // 16:,} a token: 1,000 tokens of "
            f"context are {big // 16 * 1000 / MB:.0f} MB. That, and not the weights, is what limits how many requests "
            "run together."
        )

        heading("4. Activations: what a step needs while it runs")
        say(
            "Tensors between the layers live for a moment. torch's profiler writes down every piece of memory that "
            "torch takes and gives back; the highest level within a prefill step:"
        )
        print()
        peaks = {num_tokens: peak_of_step(engine, num_tokens) for num_tokens in STEP_TOKENS}
        for num_tokens, peak in peaks.items():
            print(
                f"  {num_tokens:>5} tokens {peak:>12,} bytes  {peak / num_tokens:>8,.0f} a token  "
                f"{bar(peak, max(peaks.values()), 34)}"
            )
        last = STEP_TOKENS[-1]
        print()
        say(
            "It grows with the tokens of the step: max_num_batched_tokens bounds it, and "
            f"longer prompts go in chunks. Attention never holds its matrix of scores, which for {last} tokens and "
            f"{model.num_heads} heads would be {last * last * model.num_heads * 4:,} bytes alone. On a GPU the engine "
            "runs its largest step once when it starts, reads the peak, and gives what is left to the cache."
        )

    heading("5. Does anything leak?")
    say(
        "LLM.check_memory_leak() generates the same text again and again. The first half of the runs fills caches of "
        "all kinds; in the second half nothing may grow: not the memory, not the number of Python objects, not the "
        "blocks in use."
    )
    print()
    with LLM("tiny", device="cpu", max_model_len=512, num_kvcache_blocks=64) as llm:
        honest = llm.check_memory_leak(num_runs=RUNS)
        print(f"{honest}\n")
        say(
            "The same check must fail when something leaks, here a history that is never emptied: "
            f"{LEAKED_OBJECTS:,} short lists a run."
        )
        print()
        history = []

        def leak() -> None:
            llm.generate("Hello", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
            history.append([[number] for number in range(LEAKED_OBJECTS - 1)])

        def measure() -> MemoryUse:
            engine = llm.llm_engine
            return MemoryUse(*engine.diagnostics.memory_use(), engine.scheduler.block_manager.num_used_blocks)

        leaking = check_leak(leak, measure, num_runs=RUNS)
        print(f"{leaking}\n")
    say(
        "The count of objects shows it at once. The process may grow later, because it uses its free memory first: "
        "this is why the check counts both."
    )
    print(f"\n  the engine settles: {honest.settles}; with the leak: {leaking.settles}")


def part_of(name: str) -> str:
    if "cos_sin" in name:
        return "table of rotary positions, float32"
    if "embed" in name or "lm_head" in name:
        return "embedding and LM head"
    if "norm" in name:
        return "norms"
    return "attention projections, all layers" if "self_attn" in name else "MLP, all layers"


def peak_of_step(engine: LLMEngine, num_tokens: int) -> int:
    """Returns the most bytes that torch allocated within one prefill step, beyond those allocated before it."""
    from torch.profiler import ProfilerActivity, profile

    from nanovllm import SamplingParams

    engine.reset_prefix_cache()
    prompt = [1 + position % 250 for position in range(num_tokens - 1)]
    engine.add_request("peak", [*prompt, 0], SamplingParams(temperature=0, max_tokens=1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        engine.step()
    assert not engine.has_unfinished_requests(), "one step computes all of the prompt"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recording.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


if __name__ == "__main__":
    main()
