"""Step 2: paged attention. Block tables drawn as they fill, are shared, freed, evicted and taken back.

The KV cache is cut into blocks of a few tokens. A request's block table says which block holds its tokens 0 … 7, which
the next eight, and so on: blocks need not lie side by side, and two requests that begin alike can hold the same one.

    python examples/learn/step2_paged_attention.py
    python examples/learn/step2_paged_attention.py --num-blocks 12      a smaller cache: more preemptions

Read along: nanovllm/engine/block_manager.py, and nanovllm/attention/torch_backend.py for the reading side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from _drawing import begin, heading, lesson_parser, say, table, title

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.sequence import Sequence

BLOCK_SIZE = 8
MAX_MODEL_LEN = 96
TEXT = "count from 3 to 17 and then list all prime numbers within 100, reverse the word planet, and add 27 and 58"


def main() -> None:
    parser = lesson_parser(__doc__)
    parser.add_argument("--num-blocks", type=int, default=14, help="of the cache, 12 to 18 (default %(default)s)")
    args = begin(parser)
    if not 12 <= args.num_blocks <= 18:
        parser.error("--num-blocks must be from 12 (any one request fits) to 18 (all of them together do not)")

    from _engine import open_engine, run

    from nanovllm import SamplingParams

    title("Step 2: paged attention")
    settings = {"kvcache_block_size": BLOCK_SIZE, "max_model_len": MAX_MODEL_LEN}
    engine, runner = open_engine(num_kvcache_blocks=args.num_blocks, **settings)
    page = list(runner.kv_caches[0].key.shape[1:])
    say(
        f"The cache has {args.num_blocks} blocks of {BLOCK_SIZE} tokens. Each layer has its own pages, {page} numbers "
        "a block for the keys and as many for the values; one block table serves all layers."
    )
    print("\n  How to read the drawings:  letters = requests that hold the block   · = free   ~ = free, but its tokens")
    print("  are still known: the next request that begins alike gets it back (a cached prefix)")

    assert engine.tokenizer is not None, "skip_tokenizer_init is off"
    words = engine.tokenizer.encode(TEXT)
    prompts = {"A": words[:20], "B": words[:16] + words[26:32], "C": words[-12:]}
    lengths = {"A": 12, "B": 40, "C": 40, "D": 40}
    params = {name: SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for name, n in lengths.items()}
    view = CacheView(engine)

    heading("1. Filling")
    engine.add_request("A", prompts["A"], params["A"])
    view.step()
    view.draw("A has a prompt of 20 tokens. Its prefill took 3 blocks; the last has room for 4 more.")
    while int(engine.scheduler.rows.num_computed[0]) < 25:
        view.step()
    view.draw("A decodes: a token a step. The 25th found no room in block 2, so A got one more block, and only then.")

    heading("2. Sharing")
    engine.add_request("B", prompts["B"], params["B"])
    computed = engine.statistics.num_prompt_tokens
    view.step()
    computed = engine.statistics.num_prompt_tokens - computed
    view.draw(
        f"B begins with the same 16 tokens as A. Two full blocks are held by both, and only {computed} of B's "
        f"{len(prompts['B'])} prompt tokens were computed. Nothing was copied: two tables name the same block."
    )
    engine.add_request("C", prompts["C"], params["C"])
    view.step()
    view.draw("C begins otherwise and shares nothing.")

    heading("3. From a position to a slot")
    name, sequence = "B", view.running()["B"]
    say(
        f"Where is {name}'s token at position p? In slot block_table[p // {BLOCK_SIZE}] * {BLOCK_SIZE} + p % "
        f"{BLOCK_SIZE}. Attention gathers the keys of a context from these slots, in the order of positions:"
    )
    print()
    blocks = sequence.block_table.blocks
    rows = [
        (
            p,
            f"blocks[{p // BLOCK_SIZE}] = {blocks[p // BLOCK_SIZE]}",
            blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE,
        )
        for p in (0, 7, 8, 15, 16, 21)
    ]
    table(["position", "block", "slot"], rows)

    heading("4. Freeing, and getting back")
    while "A" not in view.outputs:
        view.step()
    view.draw(
        "A has ended. The blocks that B holds too stay with B. A's other full blocks are free but remembered (~); "
        "its last block is not full, so it cannot be shared."
    )
    answer = view.outputs["A"].outputs[0].token_ids
    prompts["D"] = prompts["A"] + answer[:8]
    engine.add_request("D", prompts["D"], params["D"])
    view.step()
    view.draw("D goes on where A was, as the next turn of a chat does: it gets A's block back with its contents.")

    heading("5. Under pressure: eviction and preemption")
    say(
        "B, C and D go on growing, and together they need more blocks than there are. When none is free, the youngest "
        "request must give its blocks back and wait; it keeps its tokens, and is computed again when there is room. "
        "Remembered blocks (~) stay until they are needed: then they are evicted, least recently used first."
    )
    print()
    remembered, waiting, most, shown_eviction = view.remembered, set[str](), 0, False
    while engine.has_unfinished_requests():
        ended = view.step()
        most = max(most, len(view.running()))
        waits = {sequence.request_id for sequence in engine.scheduler.waiting}
        if waits - waiting:
            name = ", ".join(waits - waiting)
            view.draw(
                f"Step {view.num_steps}: no block was left. {name}, the youngest that ran, was preempted and waits."
            )
        elif waiting - waits:
            names = " and ".join(sorted(waiting - waits))
            view.draw(f"Step {view.num_steps}: there was room again: {names} came back.")
        elif remembered - view.remembered and not shown_eviction:
            block, shown_eviction = ", ".join(map(str, remembered - view.remembered)), True
            view.draw(
                f"Step {view.num_steps}: block {block} was evicted: its old tokens are forgotten, it has a new owner."
            )
        if ended:
            view.draw(f"Step {view.num_steps}: {', '.join(ended)} ended.")
        remembered, waiting = view.remembered, waits
    num_preemptions = engine.statistics.num_preemptions
    engine.scheduler.block_manager.check_integrity([])
    print(
        f"  {num_preemptions} preemption(s); blocks in use at the end: {engine.scheduler.block_manager.num_used_blocks}"
    )
    print("  check_integrity(): every block is free or remembered, none is lost, none is held twice")
    engine.exit()

    heading("6. What it is good for")
    slots = args.num_blocks * BLOCK_SIZE
    held = [len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 for output in view.outputs.values()]
    waste = [-num_tokens % BLOCK_SIZE for num_tokens in held]  # the last token is never computed, nor stored
    say(
        f"Without pages a request must reserve max_model_len={MAX_MODEL_LEN} slots in a row, because the "
        f"length of its answer is unknown: the {slots} slots of this cache would run {slots // MAX_MODEL_LEN} request "
        f"at a time. With pages {most} ran together, and what is wasted is the room left in a request's last "
        f"block: here {min(waste)} to {max(waste)} slots, never more than {BLOCK_SIZE - 1}."
    )
    print()
    alone = {}
    with open_engine(num_kvcache_blocks=64, enable_prefix_caching=False, **settings)[0] as roomy:
        for name, prompt in prompts.items():
            (output,) = run(roomy, [prompt], params[name])
            alone[name] = output.outputs[0].token_ids
    same = {name: output.outputs[0].token_ids for name, output in view.outputs.items()} == alone
    say(
        "None of this changes the tokens: each request alone, in a large cache without "
        f"sharing, gives the same tokens: {same}."
    )


class CacheView:
    """Steps an engine, keeps its outputs, and draws its blocks."""

    def __init__(self, engine: LLMEngine) -> None:
        from nanovllm import RequestOutput

        self.engine = engine
        self.outputs: dict[str, RequestOutput] = {}
        self.num_steps = 0

    def step(self) -> list[str]:
        """Runs one step. Returns the ids of the requests that ended."""
        ended = self.engine.step()
        self.num_steps += 1
        self.outputs |= {output.request_id: output for output in ended}
        return [output.request_id for output in ended]

    def running(self) -> dict[str, Sequence]:
        return {sequence.request_id: sequence for sequence in self.engine.scheduler.rows.running()}

    @property
    def remembered(self) -> set[int]:
        """Blocks that are free and whose tokens are still known."""
        return set(self.engine.scheduler.block_manager._evictable)  # private: read only

    def draw(self, caption: str) -> None:
        say(caption)
        manager, rows = self.engine.scheduler.block_manager, self.engine.scheduler.rows
        holders: dict[int, str] = {}
        filled: dict[int, int] = {}
        for name, sequence in sorted(self.running().items()):
            written = int(rows.num_computed[sequence.row])
            for index, block in enumerate(sequence.block_table.blocks):
                holders[block] = holders.get(block, "") + name
                filled[block] = max(0, min(written - index * BLOCK_SIZE, BLOCK_SIZE))
        remembered = self.remembered
        blocks = range(manager.num_blocks)
        names = [holders.get(block, "~" if block in remembered else "·") for block in blocks]
        tokens = [str(filled[block]) if block in filled else "" for block in blocks]
        print("\n    block   " + "".join(f"{block:>4}" for block in blocks))
        print("    held by " + "".join(f"{name:>4}" for name in names))
        print("    tokens  " + "".join(f"{count:>4}" for count in tokens))
        for name, sequence in sorted(self.running().items()):
            table_ = " ".join(f"{block:>2}" for block in sequence.block_table.blocks)
            print(f"    {name}: block_table = [{table_}], {int(rows.num_computed[sequence.row])} tokens in the cache")
        for sequence in self.engine.scheduler.waiting:
            print(f"    {sequence.request_id}: waits with {len(sequence.token_ids)} tokens and no block")
        print()


if __name__ == "__main__":
    main()
