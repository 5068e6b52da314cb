"""Step 2: prefix caching. A request does not compute again what an earlier one with the same beginning has computed.

Full blocks of the KV cache are registered under a hash of their tokens and of all before them. A new request takes the
longest run of blocks that it finds; the rest it computes.

    python examples/learn/step2_prefix_caching.py
    python examples/learn/step2_prefix_caching.py --block-size 64       coarser sharing

Read along: nanovllm/engine/block_manager.py (`allocate`, `register`, `_match`).
"""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import TYPE_CHECKING

from _drawing import bar, begin, heading, lesson_parser, say, table, title

if TYPE_CHECKING:
    from nanovllm import RequestOutput

SYSTEM = (
    "You are a careful assistant that lives in a small model. You add two numbers below 100, you count up to 100, you "
    "list prime numbers, and you reverse words. You answer in one line, you never explain, and you never make things "
    "up. "
) * 4
QUESTIONS = [
    "What is 27 + 58?",
    "reverse the word planet",
    "count from 3 to 17",
    "introduce yourself",
    "What is 9 + 4?",
]
CELLS = 60  # characters of the widest drawing


def main() -> None:
    parser = lesson_parser(__doc__)
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block, 1 to 256 (default %(default)s)")
    args = begin(parser)
    if not 1 <= args.block_size <= 256:
        parser.error("--block-size must be from 1 to 256")
    size: int = args.block_size

    import numpy as np

    from nanovllm import LLM, SamplingParams
    from nanovllm.engine.block_manager import BlockManager

    title("Step 2: prefix caching")
    heading("1. A block is known by its tokens and by all that came before")
    say(
        "First without a model: a BlockManager of 8 blocks of 4 tokens. One prompt of 12 tokens is allocated and "
        "registered; then others ask what they could share with it."
    )

    def owner(number: int) -> SimpleNamespace:  # whom the blocks belong to; in the engine, a sequence
        return SimpleNamespace(seq_id=number, request_id=str(number))

    manager = BlockManager(8, 4)
    first = np.arange(12, dtype=np.int32)
    table_ = manager.allocate(owner(0), 0, first)
    assert table_ is not None, "the manager is empty"
    manager.register(table_, first)
    manager.release(owner(0), 0, table_)
    trials = [
        (
            "the same 12 tokens",
            [*range(12)],
            "the last block is not shared: one token must be computed, to have logits",
        ),
        ("the same, and 3 more", [*range(12), 50, 51, 52], "all three full blocks"),
        (
            "other tokens from the 6th on",
            [*range(5), 90, 91, *range(7, 12)],
            "only whole blocks: 4 of the 5 equal tokens",
        ),
        ("another first token", [99, *range(1, 12)], "the later blocks have equal tokens, but another past: no hit"),
    ]
    rows = []
    for number, (what, tokens, why) in enumerate(trials, start=1):
        found = manager.allocate(owner(number), number, np.array(tokens, dtype=np.int32))
        assert found is not None, "8 blocks are enough"
        rows.append((what, why, found.num_registered))
        manager.release(owner(number), number, found)
    print()
    table(["a prompt with", "what it finds", "blocks shared"], rows, left=2)
    print()
    say(
        "The hash alone is never trusted: a hit must have the same tokens and the same parent block. Keys depend on "
        "everything before them, so a block with equal tokens and another past would be wrong, and wrong in silence."
    )

    heading("2. Five questions to an assistant with a long system prompt")
    params = SamplingParams(temperature=0, max_tokens=24)
    runs: dict[bool, list[RequestOutput]] = {}
    times: dict[bool, float] = {}
    computed: dict[bool, int] = {}
    for enabled in (False, True):
        with LLM(
            "tiny", device="cpu", max_model_len=1024, kvcache_block_size=size, enable_prefix_caching=enabled
        ) as llm:
            warm = [1 + token % 250 for token in range(600)]
            llm.generate(warm, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)  # other tokens: no hits
            before = llm.llm_engine.statistics.copy()
            runs[enabled] = [
                llm.chat(
                    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
                    params,
                    use_tqdm=False,
                )[0]
                for question in QUESTIONS
            ]
            computed[enabled] = llm.llm_engine.statistics.since(before).num_prompt_tokens
            first_token = [first_token_ms(output) for output in runs[enabled]]
            times[enabled] = statistics.median(first_token[1:])
            if enabled:
                llm.reset_prefix_cache()
                again = llm.generate(runs[True][1].prompt_token_ids, params, use_tqdm=False)[0]
    longest = max(len(output.prompt_token_ids) for output in runs[True])
    print("  ▒ found in the cache    █ computed\n")
    for output, without in zip(runs[True], runs[False], strict=True):
        cached, length = output.num_cached_tokens, len(output.prompt_token_ids)
        drawn = bar(cached, longest, CELLS).replace("█", "▒") + bar(length - cached, longest, CELLS)
        ttft, slow = first_token_ms(output), first_token_ms(without)
        times_ = f"first token after {ttft:5.1f} ms (without: {slow:5.1f} ms)"
        print(f"  {drawn:<{CELLS + 2}} {cached:>3} of {length}   {times_}")
    cached = min(output.num_cached_tokens for output in runs[True][1:])
    print()
    say(
        f"The first question found nothing. Each later one found {cached} tokens, {cached // size} blocks of {size}: "
        "the system prompt and the template around it, as far as whole blocks go. Prompt tokens computed: "
        f"{computed[True]:,} instead of {computed[False]:,}. Median time to the first token of the later four: "
        f"{times[True]:.1f} ms instead of {times[False]:.1f} ms."
    )
    same = [o.outputs[0].token_ids for o in runs[True]] == [o.outputs[0].token_ids for o in runs[False]]
    print(f"\n  the same answers with and without: {same}")
    print(f"  after reset_prefix_cache() the second question finds: {again.num_cached_tokens} tokens")

    heading("3. What to remember")
    say(
        "Put what is common first: a date or a user's name at the beginning of a system prompt makes every prompt "
        "differ in its first block, and nothing is shared (row 4 of the first table). Smaller blocks share more "
        "finely; try --block-size 64. Blocks that no request holds are evicted when blocks are needed, least "
        "recently used first, tails before heads: step2_paged_attention.py draws it."
    )


def first_token_ms(output: RequestOutput) -> float:
    """Returns the time from arrival to the first token, in milliseconds."""
    assert output.metrics is not None, "the request has finished"
    return 1e3 * (output.metrics.time_to_first_token or 0.0)


if __name__ == "__main__":
    main()
