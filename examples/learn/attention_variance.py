"""Why attention divides by √d: the variance of q·k, the softmax it leaves, and the gradient that comes through it.

Queries and keys are random vectors whose components have mean 0 and variance 1, as a fresh layer's roughly have. For
each head dimension d, their products are put through softmax as they are and divided by √d (Vaswani et al., "Attention
is all you need", arXiv 1706.03762, section 3.2.1). Last, the tiny checkpoint answers with other scales than its own.

    python examples/learn/attention_variance.py
    python examples/learn/attention_variance.py --dims 8 32 128 512 --keys 1024 --plot variance.png

Read along: nanovllm/layers/attention.py (the scale), nanovllm/attention/torch_backend.py (where it is used).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from _drawing import bar, begin, heading, lesson_parser, save_plot, say, table, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIMS = (4, 16, 64, 128, 256, 1024)
FACTORS = (1 / 8, 1 / 2, 1 / 1.5, 1, 1.5, 2, 8)
NUM_QUESTIONS = 40
NAMES = {False: "q·k", True: "q·k / √d"}
COLOURS = {False: "#d95f02", True: "#1b9e77"}


@dataclass(frozen=True)
class Softmax:
    """The softmax of the products, for one head dimension."""

    dim: int
    scaled: bool  # divided by √d
    variance: float  # of the products
    entropy: float  # in nats, mean over the queries; ln(num_keys) where all keys count the same
    largest: float  # probability of a query's likeliest key, mean over the queries
    gradient: float  # median over the queries of the norm of the gradient at the products


def main() -> None:
    parser = lesson_parser(__doc__, plot=True)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="head dimensions (default 4 … 1024)")
    parser.add_argument("--keys", type=int, default=128, help="that each query sees (default %(default)s)")
    parser.add_argument("--queries", type=int, default=1000, help="to measure with (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = begin(parser)
    if min(args.dims) < 1 or args.keys < 2 or args.queries < 2:
        parser.error("--dims must be 1 or more, --keys and --queries 2 or more")
    dims = sorted(set(args.dims))

    title("Why attention divides by the square root of the head dimension")
    say(
        "q·k is a sum of d products. Each has mean 0 and variance 1 here, and they are independent, so variances add: "
        "the sum has variance d. Divided by √d it has variance 1, whatever d is."
    )
    results = [
        measure(dim, scaled, num_queries=args.queries, num_keys=args.keys, seed=args.seed)
        for dim in dims
        for scaled in (False, True)
    ]
    plain, divided = ([result for result in results if result.scaled is scaled] for scaled in (False, True))

    heading("1. The variance of q·k")
    table(
        ["d", "variance of q·k", "expected", "of q·k / √d", "expected"],
        [(a.dim, f"{a.variance:.2f}", a.dim, f"{b.variance:.3f}", 1) for a, b in zip(plain, divided, strict=True)],
    )

    heading(f"2. What softmax makes of it, over {args.keys} keys")
    most = math.log(args.keys)
    say(
        f"Entropy measures over how many keys a query spreads its attention: ln {args.keys} = {most:.2f} if all "
        "count the same, 0 if one key has everything."
    )
    print()
    show_bars(results, [(result.entropy, f"{result.entropy:5.2f}") for result in results], most)
    last, last_divided = plain[-1], divided[-1]
    print()
    say(
        f"At d={last.dim}, the likeliest key of a query has {last.largest:.0%} of its attention on average without the "
        f"division, {last_divided.largest:.0%} with it. Nothing was learned yet: which key wins is chance."
    )

    heading("3. The gradient that comes through")
    say(
        "Softmax passes a gradient g back as (diag(p) − p pᵀ) g. Where one probability is almost 1 and the others "
        "almost 0, that matrix is almost 0 and nothing can be learned. A random g of length 1 is sent back for each "
        "query; the bars are the length of what arrives at the products, the median over the queries."
    )
    print()
    longest = max(result.gradient for result in results)
    show_bars(results, [(result.gradient, f"{result.gradient:8.2g}") for result in results], longest)
    print()
    peak = max(plain, key=lambda result: result.gradient)
    say(
        f"Without the division the gradient is largest at d={peak.dim}, where softmax has begun to choose, and "
        f"{peak.gradient / max(last.gradient, 1e-30):.3g} times smaller at d={last.dim}. With it, it is the same at "
        f"every d: {min(r.gradient for r in divided):.2g} to {max(r.gradient for r in divided):.2g}. A model may still "
        "become sure of a key, by learning longer queries and keys; it does not begin that way."
    )

    heading("4. A trained model and its scale")
    say(
        f"The tiny checkpoint learned with its scale, 1/√d, and has learned since to be sure where it has to be. With "
        f"the scale of all layers multiplied, {NUM_QUESTIONS} additions:"
    )
    print()
    answers = [(factor, *answers_with(factor)) for factor in FACTORS]
    table(
        ["times", "scale", "right", "log-probability of an answer", f"to {question(0)!r}"],
        [
            (f"{factor:g}", f"{scale:.4f}", f"{right}/{NUM_QUESTIONS}", f"{logprob:.4f}", repr(text))
            for factor, scale, right, logprob, text in answers
        ],
    )
    print()
    best = max(answers, key=lambda row: (row[2], row[3]))
    say(
        f"It answers best at times {best[0]:g}. A scale is a part of the model: engines must take the one that it was "
        "trained with, and a wrong one shows as nonsense or, worse, as slightly worse answers."
    )
    save_plot(args.plot, lambda figure: plot(figure, results, args.keys), (13.0, 4.2))


def measure(dim: int, scaled: bool, *, num_queries: int, num_keys: int, seed: int) -> Softmax:
    """Measures one head dimension, with the same queries and keys whether scaled or not."""
    import torch

    generator = torch.Generator().manual_seed(seed + dim)
    scale = dim**-0.5 if scaled else 1.0
    variances, entropies, largest, gradients = [], [], [], []
    for begin_at in range(0, num_queries, 50):  # in pieces: all keys of d=1024 at once are half a gigabyte
        count = min(50, num_queries - begin_at)
        query = torch.randn(count, dim, generator=generator)
        keys = torch.randn(count, num_keys, dim, generator=generator)
        products = (torch.einsum("qd,qkd->qk", query, keys) * scale).requires_grad_()  # [count, num_keys]
        probabilities = products.softmax(dim=-1)
        upstream = torch.randn(count, num_keys, generator=generator)
        probabilities.backward(upstream / upstream.norm(dim=-1, keepdim=True))
        assert products.grad is not None
        with torch.no_grad():
            variances.append(products.square().mean(dim=-1))  # their mean is 0
            entropies.append(torch.special.entr(probabilities).sum(dim=-1))
            largest.append(probabilities.max(dim=-1).values)
            gradients.append(products.grad.norm(dim=-1))
    return Softmax(
        dim=dim,
        scaled=scaled,
        variance=float(torch.cat(variances).mean()),
        entropy=float(torch.cat(entropies).mean()),
        largest=float(torch.cat(largest).mean()),
        gradient=float(torch.cat(gradients).median()),
    )


def question(number: int) -> str:
    return f"What is {20 + 7 * number % 73} + {11 + 31 * number % 83}?"


def answers_with(factor: float) -> tuple[float, int, float, str]:
    """Runs the checkpoint's additions with the scale of its attention multiplied.

    Returns that scale, how many greedy answers are right, their mean log-probability, and the first one.
    """
    from _engine import open_engine, run

    from nanovllm import SamplingParams

    engine, runner = open_engine()
    with engine:
        model: Any = runner.model
        tokenizer: Any = engine.tokenizer
        attentions = [layer.self_attn.attention for layer in model.model.layers]
        for attention in attentions:
            attention.scale *= factor
        questions = [question(number) for number in range(NUM_QUESTIONS)]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in questions
        ]
        outputs = run(engine, prompts, SamplingParams(temperature=0, max_tokens=16, logprobs=0))
    texts = [output.outputs[0].text for output in outputs]
    sums = [[int(part) for part in text.removeprefix("What is ")[:-1].split(" + ")] for text in questions]
    right = sum(text == f"{a} + {b} = {a + b}" for text, (a, b) in zip(texts, sums, strict=True))
    logprobs = [output.outputs[0].cumulative_logprob or 0.0 for output in outputs]
    return attentions[0].scale, right, sum(logprobs) / len(logprobs), texts[0]


def show_bars(results: list[Softmax], values: list[tuple[float, str]], most: float) -> None:
    """Prints a line for each result: its bar and its figure, from `values`."""
    for result, (value, shown) in zip(results, values, strict=True):
        dim = f"d={result.dim}" if not result.scaled else ""
        print(f"  {dim:<7} {NAMES[result.scaled]:<9} {shown} {bar(value, most)}")


def plot(figure: Figure, results: list[Softmax], num_keys: int) -> None:
    axes = figure.subplots(1, 3)
    for scaled in (False, True):
        own = [result for result in results if result.scaled is scaled]
        dims = [result.dim for result in own]
        style = {"marker": "o", "color": COLOURS[scaled], "label": NAMES[scaled]}
        axes[0].plot(dims, [result.variance for result in own], **style)
        axes[1].plot(dims, [result.entropy for result in own], **style)
        axes[2].plot(dims, [result.gradient for result in own], **style)
    axes[0].set(title="Variance of the products", ylabel="variance", yscale="log")
    axes[1].axhline(math.log(num_keys), color="#666666", linestyle=":", label=f"uniform: ln {num_keys}")
    axes[1].set(title=f"Entropy of softmax over {num_keys} keys", ylabel="nats", ylim=(0, None))
    axes[2].set(title="Gradient that arrives", ylabel="median norm, of 1 sent back", yscale="log")
    for axis in axes:
        ticks = sorted({result.dim for result in results})
        axis.set(xscale="log", xlabel="head dimension d", xticks=ticks, xticklabels=[str(dim) for dim in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()


if __name__ == "__main__":
    main()
