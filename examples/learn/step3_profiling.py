"""Step 3: profiling. The most expensive operators, and where a step's time goes, in prefill and in decode.

torch's profiler runs around real steps of the engine (`LLM.start_profile`). Marks around the engine's own calls and the
model's modules show which part an operator belongs to.

    python examples/learn/step3_profiling.py
    python examples/learn/step3_profiling.py --output profile      keeps the traces, for https://ui.perfetto.dev

Read along: nanovllm/diagnostics/profiler.py, nanovllm/engine/llm_engine.py, docs/performance.md.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _drawing import bar, begin, heading, lesson_parser, say, table, title

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.model_runner import ModelRunner

MARK = "learn: "
TOP = 8
PREFILLS = 7  # prefill steps that are profiled
WHOLE_STEP = "rest of step"
# The marks in the order of a step, each with its depth and what it is. Times are without those of the marks below.
PARTS = {
    "schedule": (0, "which requests run next: plain Python and numpy"),
    "launch": (0, "the batch to the device, inputs, LM head, sampling"),
    "embed_tokens": (1, "token ids → vectors"),
    "layernorm": (1, "RMS norms"),
    "qkv_proj": (1, "product: queries, keys, values"),
    "self_attn": (1, "norm and rotation of the heads, store into the cache"),
    "attention": (1, "scores and weighted values, from the pages"),
    "o_proj": (1, "product: attention's output"),
    "gate_up_proj": (1, "product: MLP up, silu(gate) · up"),
    "down_proj": (1, "product: MLP down"),
    "wait": (0, "for the tokens (on a CPU they are ready)"),
    "update": (0, "the result: which requests end, which blocks are full"),
    WHOLE_STEP: (0, "the loop around it, outputs"),
}
PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass
class Profile:
    """One step of a profile, that of median length: microseconds, each without what ran within it."""

    num_tokens: int
    operators: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def main() -> None:
    parser = lesson_parser(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="requests at a time, 1 to 64 (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each, 1 to 400 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="decode steps that are profiled (default %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the traces stay (default: nowhere)")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is silent, too
    args = begin(parser)
    if not (1 <= args.batch <= 64 and 1 <= args.prompt_tokens <= 400 and 1 <= args.steps <= 100):
        parser.error("--batch must be from 1 to 64, --prompt-tokens from 1 to 400, --steps from 1 to 100")

    from _engine import open_engine

    title("Step 3: profiling")
    engine, runner = open_engine(max_model_len=512, max_num_seqs=64, enable_prefix_caching=False)
    with engine, tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        shape = args.batch, args.prompt_tokens
        run_steps(engine, *shape, 5, decode=True)  # warm
        plain_prefill = run_steps(engine, *shape, PREFILLS, decode=False)
        plain_decode = run_steps(engine, *shape, args.steps, decode=True)
        plain_one = run_steps(engine, 1, args.prompt_tokens, args.steps, decode=True)
        heading("1. How long a step takes, without a profiler")
        num_prompt_tokens = args.batch * args.prompt_tokens
        table(
            ["step", "tokens", "ms", "µs a token"],
            [
                [name, count, f"{1e3 * seconds:.2f}", f"{1e6 * seconds / count:.0f}"]
                for name, count, seconds in (
                    ("prefill", num_prompt_tokens, plain_prefill),
                    (f"decode, {args.batch} requests", args.batch, plain_decode),
                    ("decode, 1 request", 1, plain_one),
                )
            ],
        )
        print()
        say(
            "A token is expensive in decode and cheap in prefill: every step calls the same operators and reads all "
            "weights, for many tokens or for few."
        )
        mark(engine, runner)
        run_steps(engine, *shape, PREFILLS, decode=False, into=folder / "prefill")
        profiled_decode = run_steps(engine, *shape, args.steps, decode=True, into=folder / "decode")
        run_steps(engine, 1, args.prompt_tokens, args.steps, decode=True, into=folder / "decode_one")
        profiles = {
            "prefill": read(folder / "prefill", num_prompt_tokens),
            "decode": read(folder / "decode", args.batch),
            "decode, 1 request": read(folder / "decode_one", 1),
        }
        # Each layer's four products: a multiplication and an addition for each weight and token.
        names = [f".{name}.weight" for name in PRODUCTS]
        flops = 2 * sum(p.numel() for name, p in runner.model.named_parameters() if name.endswith(tuple(names)))

    heading("2. The most expensive operators")
    for name in ("prefill", "decode"):
        profile = profiles[name]
        print(f"  {name}: {profile.num_tokens} tokens a step\n")
        longest = sorted(profile.operators.items(), key=lambda item: -item[1])[:TOP]
        whole = sum(profile.operators.values())
        rows = [(operator, profile.calls[operator], f"{us:,.0f}", f"{us / whole:.1%}") for operator, us in longest]
        table(["operator", "calls a step", "µs a step", "of all operators"], rows, indent=4)
        print()
    calls = sum(profiles["decode"].calls.values())
    say(
        f"mkldnn::_linear_pointwise is a matrix product. A decode step calls {calls:,.0f} operators, most of them for "
        "a microsecond of work, and the profiler takes its time at each: a step's median is "
        f"{1e3 * profiled_decode:.1f} ms with it, {1e3 * plain_decode:.1f} ms without. So read shares, not "
        "milliseconds."
    )

    heading("3. Where a step's time goes")
    print(f"  {'':<16}{'prefill':^32}{'decode':^32}")
    for part, (depth, what) in PARTS.items():
        shares = [profiles[name].parts[part] / profiles[name].total for name in ("prefill", "decode")]
        drawn = "".join(f"{share:>7.1%} {bar(share, 0.6, 22):<24}" for share in shares)
        print(f"  {'  ' * depth + part:<16}{drawn}{what}")
    print()
    launch = {name: sum(profiles[name].parts[part] for part in PRODUCTS) / profiles[name].total for name in profiles}
    say(
        f"The four products are {launch['prefill']:.0%} of a prefill step and {launch['decode']:.0%} of a decode "
        "step. What grows in decode is everything that costs the same for one token as for a thousand: Python, and "
        "calling operators. On a GPU a CUDA graph takes most of that away: the whole decode step becomes one launch."
    )

    heading("4. Why requests are decoded together")
    figures: list[list[object]] = []
    for name, profile in profiles.items():
        seconds = sum(profile.parts[part] for part in PRODUCTS) / 1e6
        figures.append(
            [name, profile.num_tokens, f"{1e3 * seconds:.2f}", f"{flops * profile.num_tokens / seconds / 1e9:.1f}"]
        )
    table(["step", "tokens", "ms in the four products", "GFLOP/s reached there"], figures)
    print()
    say(
        "The weights of a product are read once a step, however many tokens use them. With one token there is one "
        "multiplication for each weight that is read, and the processor waits for memory or for the next call; with "
        "many, it computes. (gate_up_proj's time has silu(gate) · up in it.) That is why requests are batched: "
        "step2_continuous_batching.py."
    )
    if args.output:
        print(f"\nTraces: {args.output}/*/profile_rank0.json, which https://ui.perfetto.dev opens. Tables beside them.")


def run_steps(
    engine: LLMEngine, batch: int, prompt_tokens: int, count: int, *, decode: bool, into: Path | None = None
) -> float:
    """Runs `count` decode steps of one batch, or prefill steps of a batch each; profiles them into the folder `into`.

    Returns the median of their times in seconds: other programs make some steps longer, and none shorter.
    """
    from nanovllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count + 1 if decode else 1, ignore_eos=True)

    def add_batch() -> None:
        for index in range(batch):
            prompt = [1 + (index * 31 + position * 7) % 250 for position in range(prompt_tokens)]
            engine.add_request(f"{index}", prompt, params)

    if decode:
        add_batch()
        engine.step()  # the prefill
    if into is not None:
        engine.diagnostics.start_profile(into)
    seconds = []
    for _ in range(count):
        if not decode:
            add_batch()
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    if into is not None:
        engine.diagnostics.stop_profile()
    assert not engine.has_unfinished_requests(), "every request has its tokens"
    return statistics.median(seconds)


def mark(engine: LLMEngine, runner: ModelRunner) -> None:
    """Puts a mark of the profiler around the engine's phases and the model's modules."""
    from torch.profiler import record_function

    from nanovllm.layers.attention import Attention
    from nanovllm.models.qwen3 import Qwen3DecoderLayer

    class MarkedAttention(Attention):
        """Attention is no module and has no `forward`: the mark is put around its call."""

        def __call__(self, *arguments: Any) -> Any:
            with record_function(MARK + "attention"):
                return super().__call__(*arguments)

    def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with record_function(MARK + part):
                return function(*arguments, **named)

        return call

    places: list[tuple[str, Any, str]] = [
        (WHOLE_STEP, engine, "step"),
        ("schedule", engine.scheduler, "schedule"),
        ("launch", engine.executor, "submit"),
        ("wait", engine.executor, "collect"),
        ("update", engine.scheduler, "update"),
    ]
    for name, module in runner.model.named_modules():
        part = "layernorm" if name.endswith("norm") else name.rpartition(".")[2]
        if part in PARTS:
            places.append((part, module, "forward"))
        if isinstance(module, Qwen3DecoderLayer):
            head_dim = module.self_attn.qkv_proj.head_dim
            plain = module.self_attn.attention
            module.self_attn.attention = MarkedAttention(head_dim, plain.backends, plain.step, plain.window)
    for part, owner, method in places:
        setattr(owner, method, marked(part, getattr(owner, method)))


def read(folder: Path, num_tokens: int) -> Profile:
    """Returns self times from the Chrome trace that the engine's profiler wrote: of operators, and of our marks."""
    events = json.loads((folder / "profile_rank0.json").read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    steps = sorted((span for span in spans if span["name"] == MARK + WHOLE_STEP), key=lambda span: span["dur"])
    step = steps[len(steps) // 2]
    spans = [span for span in spans if step["ts"] <= span["ts"] < step["ts"] + step["dur"]]
    profile = Profile(num_tokens)
    for name, microseconds in self_times([span for span in spans if span.get("cat") == "cpu_op"]):
        profile.operators[name] += microseconds
        profile.calls[name] += 1
    for name, microseconds in self_times([span for span in spans if span["name"].startswith(MARK)]):
        profile.parts[name.removeprefix(MARK)] += microseconds
    return profile


def self_times(spans: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Returns each span's name and its duration without the spans directly within it. All are of one thread."""
    times: list[list[Any]] = []
    open_: list[tuple[float, int]] = []  # end, index
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        while open_ and span["ts"] >= open_[-1][0]:
            open_.pop()
        if open_:
            times[open_[-1][1]][1] -= span["dur"]
        open_.append((span["ts"] + span["dur"], len(times)))
        times.append([span["name"], span["dur"]])
    return [(name, microseconds) for name, microseconds in times]


if __name__ == "__main__":
    main()
