"""Step 3: speculative decoding, with the drafts of every step as they are accepted and refused.

The tiny checkpoint answers a question, and the same question again: the second answer is drafted from the first one,
which is part of its prompt. Then it answers a question whose answer is longer, and one in which only commas repeat.
Each answer is also generated without drafts, and has the same tokens.

    python examples/learn/step3_speculation.py
    python examples/learn/step3_speculation.py --method ngram --draft 4 --temperature 0.8

Read along: docs/speculation.md, nanovllm/speculation/drafter.py, proposers.py and draft_length.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from _drawing import begin, heading, lesson_parser, say, table, title

if TYPE_CHECKING:
    from nanovllm import SamplingParams
    from nanovllm.engine.llm_engine import LLMEngine

PRIMES, MORE_PRIMES = "list all prime numbers within 60", "list all prime numbers within 100"
COUNT = "count from 3 to 40"


@dataclass
class Draft:
    """What a step drafted for the request, and the tokens that it then got."""

    step: int
    drafted: list[int]
    accepted: int
    tokens: list[int]


@dataclass
class Answer:
    text: str
    token_ids: list[int]
    num_steps: int
    drafts: list[Draft] = field(default_factory=list)


def main() -> None:
    parser = lesson_parser(__doc__)
    parser.add_argument("--method", choices=["suffix", "ngram"], default="suffix", help="default %(default)s")
    parser.add_argument("--draft", type=int, default=8, metavar="N", help="tokens at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default %(default)s")
    args = begin(parser)
    config: dict[str, object] = {"method": args.method, "num_speculative_tokens": args.draft}
    if args.method == "ngram":
        config |= {"prompt_lookup_min": 3, "prompt_lookup_max": 5}

    from nanovllm import SamplingParams

    params = SamplingParams(temperature=args.temperature, seed=7, max_tokens=120)
    title("Step 3: speculative decoding")
    say(
        "A decode step reads all weights to compute one token. For a few tokens more it takes hardly longer, so the "
        "engine guesses the next tokens of a request (a draft), computes all of them in one step, and keeps those "
        "that are right. On this tiny model and a CPU a step gets no cheaper; what the lesson counts is steps."
    )

    heading("1. The same question twice")
    first = ask(PRIMES, [], params, config)
    print(f"  question: {PRIMES}\n  answer:   {first.text}\n")
    second = ask(PRIMES, [PRIMES, first.text], params, config)
    say(
        "Asked again, the answer stands in the prompt. After its first tokens they are found there, and what followed "
        "them is the draft. ✓ is a drafted token that was right, ✗ the first that was wrong; + is the token that the "
        "step samples after the right ones, which every step has."
    )
    print()
    show(second)

    heading("2. Text that repeats with changes")
    longer = ask(MORE_PRIMES, [PRIMES, first.text], params, config)
    print(f"  question: {MORE_PRIMES}\n  answer:   {longer.text}\n")
    say(
        "The drafts are right up to the end of the first answer, where this one goes on. What stands after the first "
        "wrong token of a draft was computed from it, and is dropped. Its keys stay in the cache until later tokens "
        "overwrite them."
    )
    print()
    show(longer)
    counting = ask(COUNT, [], params, config)
    print(f"\n  question: {COUNT}\n  answer:   {counting.text}\n")
    say("Here commas and spaces repeat, but what follows them is never what followed them before:")
    print()
    show(counting)
    print()
    say(
        "The engine keeps the share of a request's drafted tokens that were right, the latest ones counting most. It "
        "drafts a token only if it is likely enough to be right. Where too few are, the request runs without drafts."
    )

    heading("3. The same tokens, in fewer steps")
    cells, same = [], True
    for name, before, question, answer in (
        ("the primes", [], PRIMES, first),
        ("the primes again", [PRIMES, first.text], PRIMES, second),
        ("more primes", [PRIMES, first.text], MORE_PRIMES, longer),
        ("counting", [], COUNT, counting),
    ):
        plain = ask(question, before, params, None)
        same = same and plain.token_ids == answer.token_ids
        drafted = sum(len(draft.drafted) for draft in answer.drafts)
        accepted = sum(draft.accepted for draft in answer.drafts)
        cells.append((name, len(answer.token_ids), plain.num_steps, answer.num_steps, drafted, accepted))
    table(["answer", "tokens", "steps without", "steps with drafts", "drafted", "right"], cells)
    print()
    say(
        f"All tokens are the same with and without drafts: {same}. That holds at any temperature (try --temperature "
        "0.8): the noise of a draw is a function of the seed and the position, so the token at a position is decided "
        "before it is computed. A draft only tells in advance what will be drawn."
    )


def ask(question: str, before: list[str], params: SamplingParams, config: dict[str, object] | None) -> Answer:
    """Runs one question on an engine of its own. before: earlier questions and answers in turns."""
    from _engine import open_engine

    from nanovllm.engine.batch import ScheduledBatch
    from nanovllm.engine.observer import EngineObserver, VerifiedDrafts
    from nanovllm.engine.row_table import RowTable

    class Watch(EngineObserver):
        """Keeps the drafts of each step, and what became of them."""

        def __init__(self) -> None:
            self.drafts: list[Draft] = []

        def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
            self.batch, self.rows = batch, rows

        def drafts_verified(self, drafts: VerifiedDrafts) -> None:
            ((sequence, gained),) = drafts.gained
            known = sequence.token_ids if sequence.row is None else self.rows.known_tokens(sequence.row)
            drafted = self.batch.section("drafts")["token_id"].tolist()
            new = known[len(known) - 1 - gained :].tolist()
            self.drafts.append(Draft(self.batch.step, drafted, drafts.num_accepted[0], new))

    watch = Watch()
    engine, _ = open_engine([watch], max_model_len=1024, num_kvcache_blocks=64, speculative_config=config)
    with engine:
        prompt = prompt_of(engine, [*before, question])
        engine.add_request("question", {"prompt_token_ids": prompt}, params)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        completion = outputs[0].outputs[0]
        return Answer(completion.text, completion.token_ids, engine.statistics.num_steps, watch.drafts)


def prompt_of(engine: LLMEngine, turns: list[str]) -> list[int]:
    """Returns the tokens of a conversation that ends with a question."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
    tokenizer = engine.get_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token_ids


def show(answer: Answer) -> None:
    """Prints the steps that had a draft: its tokens as text, and the one that the step sampled after the right ones."""
    from transformers import AutoTokenizer

    from nanovllm.models.checkpoint import resolve_model_folder

    tokenizer = AutoTokenizer.from_pretrained(resolve_model_folder("tiny", None, with_weights=False))

    def word(token_id: int) -> str:
        return str(tokenizer.decode([token_id])).replace(" ", "␣")

    for draft in answer.drafts:
        right = [f"{word(token_id)}✓" for token_id in draft.drafted[: draft.accepted]]
        wrong = [f"{word(token_id)}✗" for token_id in draft.drafted[draft.accepted :][:1]]
        left = len(draft.drafted) - len(right) - len(wrong)
        rest = f" (and {left} after it)" if left else ""
        added = f"+{word(draft.tokens[-1])}" if len(draft.tokens) > draft.accepted else ""
        print(f"  step {draft.step:>3}  {' '.join([*right, *wrong])}{rest}  {added}")


if __name__ == "__main__":
    main()
