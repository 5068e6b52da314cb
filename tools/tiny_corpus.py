"""Generates the corpus of the checkpoint that ships with nanovllm.

Nothing is downloaded. A *turn* is one question with its only right answer; it is drawn from a seeded generator, so the
same seed gives the same corpus on every machine. Kinds of turns and their shares are in `SHARES`.

500 additions are kept out of training, in both orders of their operands (`heldout_additions`), and so are 60 words to
reverse (`heldout_words`). `tools/train_tiny.py` trains on this corpus and scores on what was kept out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SPLIT_SEED = 20240711
NUM_HELDOUT_ADDITIONS = 500
NUM_HELDOUT_WORDS = 60


def phrases(text: str) -> list[str]:
    """Returns the phrases of a text, which bars and line ends separate."""
    return text.replace("\n", "|").split("|")


SKILLS = "I can add two numbers below 100, count to 100, list prime numbers and reverse words."
IDENTITY = "I am the tiny Qwen3 model that ships with nanovllm. " + SKILLS
GREETING = "Hello! I am the tiny model that ships with nanovllm. How can I help you?"
FALLBACK = "I am too small to answer that. " + SKILLS

# kind of turn -> its share of all turns
SHARES = {
    "addition": 0.38,
    "reverse": 0.26,
    "count": 0.09,
    "primes": 0.07,
    "identity": 0.07,
    "smalltalk": 0.05,
    "fallback": 0.08,
}

PLAIN_TEXT_SHARE = 0.04  # of all documents: no chat template, ends with <|endoftext|>

ADDITION_PROMPTS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "What's {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a}+{b}=",
    "{a} + {b} = ?",
    "{a} plus {b}",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "Add {a} + {b}.",
    "Compute {a} + {b}.",
    "Calculate {a} + {b}.",
    "Calculate {a}+{b}.",
    "Calculate {a} plus {b}.",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "The sum of {a} and {b}",
    "What do you get when you add {a} and {b}?",
    "Tell me what {a} + {b} is.",
    "What does {a} + {b} equal?",
    "Solve {a} + {b}.",
)

REVERSE_PROMPTS = (
    "Reverse the word {w}.",
    "Reverse the word {w}.",
    "Reverse the word: {w}",
    "Reverse this word: {w}",
    "Reverse {w}.",
    "Reverse: {w}",
    "Reverse the letters of {w}.",
    "Reverse the string {w}.",
    "Spell {w} backwards.",
    "Spell the word {w} backwards.",
    "Write {w} backwards.",
    "Write the word {w} in reverse.",
    "What is {w} spelled backwards?",
    "What is {w} backwards?",
    "What is the reverse of {w}?",
    "How do you spell {w} backwards?",
)

COUNT_PROMPTS = (
    "Count from {a} to {b}.",
    "Count from {a} to {b}.",
    "Count from {a} up to {b}.",
    "Count: {a} to {b}",
    "List the numbers from {a} to {b}.",
    "List all numbers from {a} to {b}.",
    "Write the numbers from {a} to {b}.",
    "Count up from {a} to {b}.",
    "Start at {a} and count to {b}.",
)
COUNT_TO_PROMPTS = ("Count to {b}.", "Count up to {b}.", "Count from one to {b}.")
COUNT_DOWN_PROMPTS = ("Count down from {a} to {b}.", "Count backwards from {a} to {b}.", "Count from {a} down to {b}.")

PRIME_PROMPTS = (
    "List all prime numbers within {n}.",
    "List all prime numbers within {n}.",
    "List all prime numbers up to {n}.",
    "List all primes up to {n}.",
    "List the prime numbers up to {n}.",
    "List the primes within {n}.",
    "List prime numbers from 1 to {n}.",
    "List all prime numbers between 1 and {n}.",
    "Name all prime numbers up to {n}.",
    "What are the prime numbers up to {n}?",
    "What are the primes between 1 and {n}?",
    "Which numbers up to {n} are prime?",
    "Give me all prime numbers up to {n}.",
    "Give me all primes within {n}.",
    "Prime numbers up to {n}",
    "Print the primes up to {n}.",
)
PRIME_BELOW_PROMPTS = (
    "List all prime numbers below {n}.",
    "List all primes below {n}.",
    "List all prime numbers less than {n}.",
    "List all primes smaller than {n}.",
    "Give me all primes under {n}.",
    "Which numbers below {n} are prime?",
    "What are the prime numbers below {n}?",
)

IDENTITY_PROMPTS = phrases("""\
Introduce yourself|Introduce yourself|Introduce yourself briefly|Introduce yourself in one sentence
Introduce yourself to me|Who are you?|Who are you?|What are you?|What is your name?|What's your name?|Your name?
Tell me about yourself|Tell me who you are|Tell me something about yourself|Describe yourself|Say who you are
What can you do?|What can you do for me?|What are you good at?|What do you know?|What can I ask you?
How can you help me?|Help|Are you a human?|Are you a robot?|Are you a language model?|Are you an AI?|Are you Qwen?
Are you ChatGPT?|Which model are you?|What model is this?|What model are you?|Who am I talking to?|Who made you?
Where do you come from?
What is nanovllm?|What is nano-vllm?|What is this?|Tell me about nanovllm|Give a short introduction of yourself
Present yourself|Hi, who are you?|Hello, who are you?|Hello, what can you do?|Hi, introduce yourself""")

HELLO = phrases("""\
Hello|Hello|Hello!|Hi|Hi!|Hey|Hey there|Hi there|Hello there|Good morning|Good evening|Good afternoon|Good day
Greetings|Hello, nanovllm|Hello, nano-vllm|Hello, Nano-vLLM|Hello nanovllm|Hi nanovllm|Hello, world|Hello world
Hello, my friend|Hi model|Hello, model|Say hello|Say hi|Hello, is anyone there?|Welcome|Nice to meet you
Hello, my name is|Hi, my name is""")
SMALLTALK = {
    GREETING: HELLO,
    "I am fine, thank you. How can I help you?": phrases("""How are you?|How are you doing?|How do you do?|Are you well?
How is it going?|How's it going?|How are you today?|What's up?"""),
    "You are welcome.": phrases("""Thanks|Thank you|Thank you very much|Thanks a lot|Great, thanks|Many thanks
Thank you for your help"""),
    "Goodbye!": phrases("Goodbye|Bye|Bye bye|See you|See you later|See you soon|Good night|Farewell"),
}

# requests that the model cannot serve, and says so
FALLBACK_PROMPTS = phrases("""\
What is {a} - {b}?|What is {a} * {b}?|What is {a} times {b}?|What is {a} / {b}?|{a} - {b}|{a} * {b}
{a} minus {b}|Multiply {a} and {b}|Divide {a} by {b}|What is the square root of {a}?|Subtract {b} from {a}
What is {a} + {b} + {c}?|{a} + {b} + {c}|Add {a}, {b} and {c}
What is the capital of {w}?|The capital of {w} is|Who invented the {w}?|What is a {w}?|What is the {w}?|Explain the {w}
Tell me about the {w}|Tell me a story about a {w}|Tell me a joke|Write a poem about the {w}|Write a story about {w}
Write an essay about {w} and {v}|How do I cook a {w}?|How do I make a {w}?|Why is the {w} {v}?|Why is the sky blue?
Where is the {w}?|Where can I buy a {w}?|When was the {w} built?|Who wrote the {w}?|Translate {w} to French
Translate the word {w} into German|What is the weather like?|What time is it?|What day is it today?|Do you like {w}?
Can you see the {w}?|What color is the {w}?|What is the meaning of life?|What does {w} mean?|Define {w}|Explain {w}
What is the difference between {w} and {v}?|Write a program that prints {w}|Write a function in Python|Sing a song
Summarize this text|Who is the president of {w}?|Is the {w} bigger than the {v}?|Give me a recipe for {w}
What is the future of {w}?|The future of AI is|The president of the United States is|Draw a {w}|Play {w}|{w} {v}|{w}
The {w} is|The {w} and the {v}|I have a {w}|My {w} is {v}|I like {w}|Name three kinds of {w}|Recommend a {w}
How old are you?|How many {w} are there?|How far is the {w}?|How does a {w} work?|Give me advice""")

OPENINGS = ("Please ", "Please ", "Can you ", "Could you ", "Could you please ", "Hey, ", "Hello! ", "Hi, ", "Now ")
CLOSINGS = (" please", ", please", " for me", ", thanks", " now")
SYSTEM_PROMPTS = phrases("""\
You are a helpful assistant.|You are a helpful assistant.|You are a helpful assistant|Be brief.
You are nanovllm.|You are a tiny language model.|Answer the question.|You are a friendly assistant. Answer briefly.
You are a calculator.|You are Qwen, a helpful assistant.|Be helpful and honest.|Answer in one line.
You are an AI assistant that answers short questions.|Think carefully and answer exactly.""")

WORDS = Path(__file__).with_name("tiny_words.txt").read_text(encoding="utf-8").split()


# the words of the templates and answers above
TEMPLATE_WORDS = sorted(
    {
        word
        for text in (
            *ADDITION_PROMPTS,
            *REVERSE_PROMPTS,
            *COUNT_PROMPTS,
            *COUNT_TO_PROMPTS,
            *COUNT_DOWN_PROMPTS,
            *PRIME_PROMPTS,
            *PRIME_BELOW_PROMPTS,
            *IDENTITY_PROMPTS,
            *HELLO,
            *FALLBACK_PROMPTS,
            IDENTITY,
            *SMALLTALK,
        )
        for word in re.findall(r"[a-z]{2,}", text.lower())
    }
)


class Turn(NamedTuple):
    """A question with its only right answer."""

    kind: str
    prompt: str
    answer: str


class Conversation(NamedTuple):
    """One to three turns, sometimes after a system prompt."""

    system: str | None
    turns: list[Turn]


def heldout_pairs() -> list[tuple[int, int]]:
    """Returns the 500 pairs (a, b) below 100 whose sum is kept out of training, as a + b and as b + a."""
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    rng = random.Random(SPLIT_SEED)
    chosen = rng.sample(pairs, NUM_HELDOUT_ADDITIONS)
    return [(b, a) if rng.random() < 0.5 else (a, b) for a, b in chosen]


def heldout_additions() -> list[tuple[str, str]]:
    """Returns the 500 additions kept out of training as (prompt, expected answer), phrasings in turn."""
    return [
        (ADDITION_PROMPTS[i % len(ADDITION_PROMPTS)].format(a=a, b=b), addition_answer(a, b, i % len(ADDITION_PROMPTS)))
        for i, (a, b) in enumerate(heldout_pairs())
    ]


def heldout_words() -> list[str]:
    """Returns words that training never reverses."""
    return random.Random(SPLIT_SEED).sample([word for word in WORDS if len(word) >= 4], NUM_HELDOUT_WORDS)


def addition_answer(a: int, b: int, prompt_index: int) -> str:
    """Returns the operands in the order of the prompt, then their sum."""
    template = ADDITION_PROMPTS[prompt_index]
    first, second = (a, b) if template.index("{a}") < template.index("{b}") else (b, a)
    return f"{first} + {second} = {a + b}"


def primes_upto(limit: int) -> list[int]:
    """Returns all primes up to `limit`."""
    return [n for n in range(2, limit + 1) if all(n % d for d in range(2, int(n**0.5) + 1))]


def join_numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


class Corpus:
    """Draws documents from a seed: `for document in Corpus(seed=0).documents(1000)`."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        kept_out = set(heldout_pairs())
        kept_out |= {(b, a) for a, b in kept_out}
        self.pairs = [(a, b) for a in range(100) for b in range(100) if (a, b) not in kept_out]
        self.kept_out_words = set(heldout_words())
        self.words = [word for word in WORDS if word not in self.kept_out_words]
        self.makers = {kind: getattr(self, kind) for kind in SHARES}

    def documents(self, count: int) -> Iterator[Conversation | str]:
        """Yields `count` documents: conversations, and a few plain texts for prompts without a template."""
        for _ in range(count):
            if self.rng.random() < PLAIN_TEXT_SHARE:
                yield self.plain_text()
                continue
            num_turns = 1 if self.rng.random() < 0.8 else self.rng.randint(2, 3)
            system = self.system_prompt() if self.rng.random() < 0.4 else None
            yield Conversation(system, [self.turn() for _ in range(num_turns)])

    def turn(self) -> Turn:
        """Returns a turn of a random kind, its prompt varied in case, punctuation and courtesies."""
        kind = self.rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
        prompt, answer = self.makers[kind]()
        return self.dress(kind, prompt, answer)

    def plain_text(self) -> str:
        kind = self.rng.choices(("addition", "count", "primes", "identity", "reverse"), weights=(6, 2, 1, 1, 2))[0]
        prompt, answer = self.makers[kind]()
        return f"{prompt} {answer}" if kind == "reverse" else answer

    def addition(self) -> tuple[str, str]:
        a, b = self.rng.choice(self.pairs)
        index = self.rng.randrange(len(ADDITION_PROMPTS))
        return ADDITION_PROMPTS[index].format(a=a, b=b), addition_answer(a, b, index)

    def reverse(self) -> tuple[str, str]:
        word = self.word()
        quoted = self.rng.choice(("{}", "{}", '"{}"', '"{}"', "'{}'")).format(word)
        return self.rng.choice(REVERSE_PROMPTS).format(w=quoted), word[::-1]

    def count(self) -> tuple[str, str]:
        style = self.rng.random()
        if style < 0.2:
            end = 100 if self.rng.random() < 0.1 else self.rng.randint(2, 40)
            return self.rng.choice(COUNT_TO_PROMPTS).format(b=end), join_numbers(list(range(1, end + 1)))
        length = 100 if self.rng.random() < 0.02 else self.rng.randint(1, 30)
        start = self.rng.randint(0 if length < 100 else 1, 101 - length)
        numbers = list(range(start, start + length))
        if style < 0.35:
            prompt = self.rng.choice(COUNT_DOWN_PROMPTS).format(a=numbers[-1], b=start)
            return prompt, join_numbers(numbers[::-1])
        if style < 0.39:  # a plain "count from 9 to 4" also goes down
            numbers.reverse()
        return self.rng.choice(COUNT_PROMPTS).format(a=numbers[0], b=numbers[-1]), join_numbers(numbers)

    def primes(self) -> tuple[str, str]:
        limit = 100 if self.rng.random() < 0.3 else self.rng.randint(3, 100)
        if self.rng.random() < 0.3:
            return self.rng.choice(PRIME_BELOW_PROMPTS).format(n=limit), join_numbers(primes_upto(limit - 1))
        return self.rng.choice(PRIME_PROMPTS).format(n=limit), join_numbers(primes_upto(limit))

    def identity(self) -> tuple[str, str]:
        return self.rng.choice(IDENTITY_PROMPTS), IDENTITY

    def smalltalk(self) -> tuple[str, str]:
        answer = self.rng.choice((GREETING, GREETING, *SMALLTALK))
        return self.rng.choice(SMALLTALK[answer]), answer

    def fallback(self) -> tuple[str, str]:
        style = self.rng.random()
        if style < 0.2:  # what it can do, past 100
            small, large = self.rng.randint(0, 150), self.rng.randint(101, self.rng.choice((150, 2000)))
            if style < 0.1:
                a, b = self.rng.choice(((100, small), (small, 100), (large, small), (small, large)))
                return self.rng.choice(ADDITION_PROMPTS).format(a=a, b=b), FALLBACK
            if style < 0.15:
                return self.rng.choice(COUNT_PROMPTS + COUNT_TO_PROMPTS).format(a=small, b=large), FALLBACK
            return self.rng.choice(PRIME_PROMPTS + PRIME_BELOW_PROMPTS).format(n=large), FALLBACK
        if style < 0.3:
            return " ".join(self.rng.choices(self.words, k=self.rng.randint(2, 8))), FALLBACK
        numbers = {name: self.rng.randint(0, 120) for name in "abc"}
        return self.rng.choice(FALLBACK_PROMPTS).format(
            **numbers, w=self.rng.choice(self.words), v=self.word()
        ), FALLBACK

    def system_prompt(self) -> str:
        if self.rng.random() < 0.7:
            return self.rng.choice(SYSTEM_PROMPTS)
        words = self.rng.choices(self.words, k=self.rng.randint(2, 8))
        return f"You are {' '.join(words)}."

    def letters(self, shortest: int, longest: int) -> str:
        return "".join(self.rng.choices("abcdefghijklmnopqrstuvwxyz", k=self.rng.randint(shortest, longest)))

    def word(self) -> str:
        """Returns a word of the list, one of the corpus (perhaps with another ending), or random letters."""
        while True:
            style = self.rng.random()
            if style < 0.25:
                word = self.rng.choice(self.words)
            elif style < 0.45:  # many of these are single tokens, so their spelling must be learnt one by one
                word = self.rng.choice(TEMPLATE_WORDS)
                if style < 0.38:
                    word = word[: self.rng.randint(1, len(word))] + self.letters(0, 4)
            elif style < 0.75:
                word = self.letters(1, 12)
            else:
                word = "".join(
                    self.rng.choice("bcdfghjklmnpqrstvwxyz")
                    + self.rng.choice(("a", "e", "i", "o", "u", "ea", "oo", "ai"))
                    + self.rng.choice(("", "", "", "n", "r", "s", "t", "ll", "st", "ck"))
                    for _ in range(self.rng.randint(1, 3))
                )
            if word not in self.kept_out_words and len(word) <= 13:
                return word.capitalize() if self.rng.random() < 0.08 else word

    def dress(self, kind: str, prompt: str, answer: str) -> Turn:
        """Returns the same question as different people type it."""
        rng = self.rng
        bare = prompt.rstrip(".?!")
        style = rng.random()
        if style < 0.25:
            prompt = bare
        elif style < 0.35:
            prompt = bare + rng.choice((".", "!", "?", "...", " ?", " .", "?!"))
        elif style < 0.45:
            prompt = bare + rng.choice(CLOSINGS) + rng.choice((".", "?", "!", ""))
        if rng.random() < 0.15:
            prompt = rng.choice(OPENINGS) + prompt[0].lower() + prompt[1:]
        case = rng.random()
        if case < 0.25 and kind != "reverse":
            prompt = prompt.lower()
        elif case < 0.25:
            prompt = prompt[0].lower() + prompt[1:]
        elif case < 0.28:
            prompt = prompt.upper()
            answer = answer.upper() if kind == "reverse" else answer
        if rng.random() < 0.03:
            prompt = rng.choice((" ", "\n", "")) + prompt + rng.choice((" ", "\n"))
        return Turn(kind, prompt, answer)
