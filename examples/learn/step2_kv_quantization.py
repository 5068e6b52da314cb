"""Step 2: a KV cache in 8 bits. Error per layer, memory saved, and the tokens that change.

FP8 (e4m3) is real: `LLM(..., kv_cache_dtype="fp8")` works on a CPU as on a GPU. For INT8 and INT4 the engine has no
cache. They are SIMULATED: in a real run of the engine, each token's keys and values are rounded to what such a cache
could hold, in the float32 pages, at the place where it would store them. FP8 is simulated too, to check the simulation.

    python examples/learn/step2_kv_quantization.py
    python examples/learn/step2_kv_quantization.py --plot errors.png

Read along: nanovllm/runner/kv_cache.py, nanovllm/kernels/qk_norm_rope_store.py (what is stored), docs/kv-cache.md.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from _drawing import bar, begin, heading, lesson_parser, save_plot, say, table, title

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from nanovllm import RequestOutput
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.model_runner import ModelRunner

NUM_TOKENS = 24  # of each answer to a random prompt
SIMULATED = ("fp8", "int8", "int4")


@dataclass
class Errors:
    """Sums over everything that was stored, for each layer: of the squared error, and of the squares."""

    error: list[float] = field(default_factory=lambda: [0.0] * 16)
    total: list[float] = field(default_factory=lambda: [0.0] * 16)

    def relative(self, layer: int) -> float:
        return float((self.error[layer] / self.total[layer]) ** 0.5)


def main() -> None:
    parser = lesson_parser(__doc__, plot=True)
    parser.add_argument("--prompts", type=int, default=24, help="of each kind (default %(default)s)")
    args = begin(parser)
    if args.prompts < 2:
        parser.error("--prompts must be 2 or more")

    import torch
    from _engine import open_engine

    from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
    from nanovllm.models.model_config import ModelConfig
    from nanovllm.runner.kv_cache import KVCacheShape

    title("Step 2: a KV cache in 8 bits")
    say(
        "A decode step reads the keys and values of every token before it. In half the bytes the cache holds twice the "
        "tokens, and on a GPU, which mostly waits for memory then, a step takes less time. The price is precision."
    )

    heading("1. One head of one token, in each format")
    exact_engine, exact_runner = open_engine(**SETTINGS)
    prompts = random_prompts(args.prompts)
    exact_pages = pages_after_prefill(exact_engine, exact_runner, prompts[0])
    head = exact_pages[0][0][-1, 0]  # layer 0's key of the last token, KV head 0: [head_dim]
    say(
        "Each head of a token is divided by a scale of its own, kept beside it as a float32, so that its largest "
        "component becomes the format's largest number: 448 in e4m3, 127 in INT8, 7 in INT4. Then it is rounded. A "
        "key of layer 0:"
    )
    print()
    show = [0, 1, 2, 3, 4, int(head.abs().argmax())]
    rows: list[Sequence[object]]
    columns = [f"[{index}]" for index in show[:-1]] + [f"largest [{show[-1]}]"]
    rows = [["float32", *(f"{value:.4f}" for value in head[show].tolist())]]
    for name in SIMULATED:
        rows.append([name, *(f"{value:.4f}" for value in ROUNDING[name](head)[show].tolist())])
    table(["format", *columns], rows)
    print()
    say(
        "INT8's steps are all of one size, so small numbers lose most of their precision. e4m3 has three bits of "
        "mantissa: an error of up to 6 % of each number, large or small."
    )

    heading("2. Memory")
    model = ModelConfig.from_folder(exact_engine.resolved.model)
    rows = []
    for name, shape, dtypes in (
        ("tiny", model, (torch.float32, torch.bfloat16, torch.float8_e4m3fn)),
        ("Qwen3-0.6B's shape", BUILTIN_SHAPES["qwen3-0.6b"], (torch.bfloat16, torch.float8_e4m3fn)),
    ):
        first = KVCacheShape.of(shape, 16, dtypes[0]).block_bytes
        for dtype in dtypes:
            size = KVCacheShape.of(shape, 16, dtype).block_bytes
            dtype_name = {torch.float8_e4m3fn: "fp8 (and int8)"}.get(dtype, str(dtype).removeprefix("torch."))
            rows.append((name, dtype_name, f"{size:,}", f"{size // 16:,}", f"{size / first:.1%}"))
    table(["model", "cache", "bytes a block of 16", "bytes a token", "of the first"], rows, left=2)
    print()
    say(
        "A head of head_dim numbers takes head_dim bytes and 4 for its scale, so the larger the head, the closer to "
        "half of bfloat16. INT8 would need the same bytes as FP8."
    )

    heading("3. Is the simulation right?")
    questions, sums = additions(args.prompts)
    runs: dict[str, Answers] = {"float32": Answers.of(exact_engine, questions, prompts)}
    exact_bytes = exact_engine.diagnostics.memory_report().kv_cache
    exact_engine.exit()
    engine, runner = open_engine(kv_cache_dtype="fp8", **SETTINGS)
    with engine:
        fp8_pages = pages_after_prefill(engine, runner, prompts[0])
        runs["fp8, the engine's"] = Answers.of(engine, questions, prompts)
        fp8_bytes = engine.diagnostics.memory_report().kv_cache
    errors: dict[str, tuple[Errors, Errors]] = {}
    for name in SIMULATED:
        engine, runner = open_engine(**SETTINGS)
        with engine:
            errors[name] = simulate(runner, ROUNDING[name])
            runs[f"{name}, simulated"] = Answers.of(engine, questions, prompts)
    agree = runs["fp8, the engine's"].tokens == runs["fp8, simulated"].tokens
    num_answers = len(questions) + len(prompts)
    say(
        f"The engine with a real FP8 cache and the simulation of one gave the same tokens for all {num_answers} "
        f"prompts: {agree}. The caches, measured by memory_report(): {exact_bytes / 1e6:.2f} MB in float32, "
        f"{fp8_bytes / 1e6:.2f} MB in FP8, {fp8_bytes / exact_bytes:.1%}. (The simulation saves nothing: its pages "
        "are float32.)"
    )

    heading("4. Error per layer: rounding when a token is stored")
    largest = max(
        part.relative(layer) for pair in errors.values() for part in pair for layer in range(model.num_layers)
    )
    for name in SIMULATED:
        for layer, (part, what) in itertools.product(
            range(model.num_layers), zip(errors[name], ("keys", "values"), strict=True)
        ):
            error = part.relative(layer)
            print(f"  {name:<5} layer {layer} {what:<7}{error:>8.3%}  {bar(error, largest)}")
        print()
    say("Relative error: the norm of the rounding error over the norm of the exact values, over all tokens.")
    print()
    rows = []
    for layer, (exact, rounded) in enumerate(zip(exact_pages, fp8_pages, strict=True)):
        drift = [float((b - a).norm() / a.norm()) for a, b in zip(exact, rounded, strict=True)]
        rows.append(
            [layer, *(f"{part.relative(layer):.2%}" for part in errors["fp8"]), *(f"{value:.2%}" for value in drift)]
        )
    table(["layer", "keys: own rounding", "values: own rounding", "keys: in all", "values: in all"], rows)
    print()
    say(
        "In all: the pages of the engine with an FP8 cache against those with float32, for one prompt. Layer 0 has "
        "only its own rounding; a later layer computes its keys from the output of layers that were rounded too, "
        "and the errors add up."
    )

    heading("5. The tokens that change")
    rows = []
    for name, answers in runs.items():
        right = sum(
            output.outputs[0].text == f"{a} + {b} = {a + b}" for output, (a, b) in zip(answers.sums, sums, strict=True)
        )
        same = sum(map(same_tokens, answers.sums, runs["float32"].sums))
        prefixes = list(map(common_prefix, answers.random, runs["float32"].random))
        unchanged = sum(prefix == NUM_TOKENS for prefix in prefixes)
        changed = sum(NUM_TOKENS - prefix for prefix in prefixes)
        rows.append(
            [
                name,
                f"{right} of {len(sums)}",
                f"{same} of {len(sums)}",
                f"{unchanged} of {len(prompts)}",
                f"{changed} of {NUM_TOKENS * len(prompts)}",
            ]
        )
    table(
        ["cache", "sums right", "sums: same tokens", "random: same tokens", "random: tokens from the first change on"],
        rows,
    )
    print()
    say(
        "Where the model is sure, 8 bits change nothing. On random prompts it is unsure everywhere, and two tokens "
        "that are nearly level change places; after the first such place the rest is another text, not a worse one. "
        "INT8 loses less than FP8 here, as no component of a head stands far out; one that did would coarsen all "
        "others of its head in INT8, and none in FP8. INT4, with one scale for a whole head, shows where it begins to "
        "hurt."
    )
    save_plot(args.plot, lambda figure: plot(figure, errors, model.num_layers))


SETTINGS: dict[str, Any] = {"max_model_len": 256, "num_kvcache_blocks": 1024, "max_num_seqs": 64}


def round_integer(heads: torch.Tensor, largest: int) -> torch.Tensor:
    """Rounds heads [..., head_dim] to the nearest of 2 · largest + 1 evenly spaced numbers, with a scale per head."""
    scale = heads.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    return (heads / scale).round() * scale


def round_fp8(heads: torch.Tensor) -> torch.Tensor:
    """Rounds heads [..., head_dim] to what the engine's FP8 cache returns for them."""
    import torch

    from nanovllm.kernels.qk_norm_rope_store import FP8_MAX

    amax = heads.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (heads * (FP8_MAX / amax)).to(torch.float8_e4m3fn).float() * (amax / FP8_MAX)


ROUNDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp8": round_fp8,
    "int8": lambda heads: round_integer(heads, 127),
    "int4": lambda heads: round_integer(heads, 7),
}


def simulate(runner: ModelRunner, rounding: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Errors, Errors]:
    """Rounds what each step stores, in every layer, before attention reads it.

    Returns the errors of keys and of values, which grow while the engine runs.
    """
    import torch

    from nanovllm.attention.interface import AttentionMetadata, LayerKVCache
    from nanovllm.layers.attention import Attention
    from nanovllm.models.qwen3 import Qwen3DecoderLayer

    class RoundingAttention(Attention):
        """The engine's attention, which first rounds what the step has stored."""

        def __init__(self, plain: Attention, layer: int) -> None:
            vars(self).update(vars(plain), layer=layer)

        def __call__(self, query: torch.Tensor, metadata: AttentionMetadata, kv_cache: LayerKVCache) -> torch.Tensor:
            for pages, errors in zip((kv_cache.key, kv_cache.value), both, strict=True):
                slots = pages.view(-1, *pages.shape[2:])  # [num_slots, num_kv_heads, head_dim]
                exact = slots[metadata.slot_mapping]
                rounded = rounding(exact)
                slots[metadata.slot_mapping] = rounded
                errors.error[self.layer] += float((rounded - exact).square().sum())
                errors.total[self.layer] += float(exact.square().sum())
            return super().__call__(query, metadata, kv_cache)

    both = Errors(), Errors()  # of keys, of values
    layers = runner.model.get_submodule("model.layers")
    assert isinstance(layers, torch.nn.ModuleList)
    for index, layer in enumerate(layers):
        assert isinstance(layer, Qwen3DecoderLayer)
        layer.self_attn.attention = RoundingAttention(layer.self_attn.attention, index)
    return both


def pages_after_prefill(engine: LLMEngine, runner: ModelRunner, prompt: list[int]) -> list[tuple[torch.Tensor, ...]]:
    """Returns each layer's keys and values of the prompt as attention reads them.

    Each is [num_tokens, num_kv_heads, head_dim] in float32.
    """
    from nanovllm import SamplingParams

    engine.add_request("prefill", prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    engine.step()
    (sequence,) = engine.scheduler.rows.running()
    blocks = sequence.block_table.blocks
    layers = []
    for cache in runner.kv_caches:
        parts = []
        for pages, scales in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
            heads = pages[blocks].float()  # [num_blocks, block_size, num_kv_heads, head_dim]
            if scales is not None:
                heads = heads * scales[blocks].transpose(1, 2).unsqueeze(-1)
            parts.append(heads.flatten(0, 1)[: len(prompt)])
        layers.append(tuple(parts))
    while engine.has_unfinished_requests():
        engine.step()
    engine.reset_prefix_cache()
    return layers


@dataclass
class Answers:
    sums: list[RequestOutput]
    random: list[RequestOutput]

    @classmethod
    def of(cls, engine: LLMEngine, questions: list[str], prompts: list[list[int]]) -> Answers:
        from _engine import run

        from nanovllm import SamplingParams

        assert engine.tokenizer is not None, "skip_tokenizer_init is off"
        chats = [
            engine.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        return cls(
            run(engine, chats, SamplingParams(temperature=0, max_tokens=20)),
            run(engine, prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)),
        )

    @property
    def tokens(self) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in self.sums + self.random]


def additions(count: int) -> tuple[list[str], list[tuple[int, int]]]:
    draw = random.Random(1)
    sums = [(draw.randint(10, 49), draw.randint(10, 49)) for _ in range(count)]
    return [f"What is {a} + {b}?" for a, b in sums], sums


def random_prompts(count: int) -> list[list[int]]:
    """Returns prompts of 40 random token ids."""
    draw = random.Random(2)
    return [[draw.randrange(500) for _ in range(40)] for _ in range(count)]


def common_prefix(one: RequestOutput, other: RequestOutput) -> int:
    pairs = zip(one.outputs[0].token_ids, other.outputs[0].token_ids, strict=True)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def same_tokens(one: RequestOutput, other: RequestOutput) -> bool:
    return one.outputs[0].token_ids == other.outputs[0].token_ids


def plot(figure: Figure, errors: dict[str, tuple[Errors, Errors]], num_layers: int) -> None:
    axis = figure.subplots()
    colours = ("#1b9e77", "#7570b3", "#d95f02")
    for index, (name, pair) in enumerate(errors.items()):
        for part, (what, hatch) in zip(pair, (("keys", ""), ("values", "//")), strict=True):
            place = 2 * index + (what == "values")
            bars = [100 * part.relative(layer) for layer in range(num_layers)]
            at = [layer + 0.13 * (place - 2.5) for layer in range(num_layers)]
            axis.bar(at, bars, 0.12, color=colours[index], hatch=hatch, edgecolor="white", label=f"{name} {what}")
    axis.set_yscale("log")
    axis.set_ylim(0.3, 60)
    axis.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axis.minorticks_off()
    axis.set_xticks(range(num_layers), [f"layer {layer}" for layer in range(num_layers)])
    axis.set_ylabel("relative error of what is stored (%)")
    axis.set_title("Rounding error of keys and values, one scale for each token and head")
    axis.legend(ncols=3, loc="upper center")


if __name__ == "__main__":
    main()
