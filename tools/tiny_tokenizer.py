"""Tokenizer and chat template of the checkpoint that ships with nanovllm, in the form in which Qwen3 publishes its own.

Byte-level BPE: every text encodes, every token sequence decodes, and one digit is one token, as in Qwen3. One thing
differs: a merge only ever lengthens a token that starts with a space. So frequent words (" numbers") are one token, but
the letters of any other word stay apart, and a model this small can see how the word that it must reverse is spelled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tiny_corpus import REVERSE_PROMPTS, Conversation, Corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")  # added but not special, as in Qwen3: they show in decoded text
NUM_MERGES = VOCAB_SIZE - 256 - len(SPECIAL_TOKENS) - len(THINK_TOKENS)

# How Qwen2 and Qwen3 split text before BPE; transformers rebuilds the same from tokenizer_class.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The thinking switch works as in Qwen3: only enable_thinking=False says that nothing is thought. This model never
# thinks and is trained on both forms. Earlier thoughts are left out of the history.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('role must be system, user or assistant, not ' ~ message.role) }}
    {%- endif %}
    {%- set text = namespace(value='') %}
    {%- if message.content is string %}
        {%- set text.value = message.content %}
    {%- else %}
        {%- for part in message.content %}
            {%- set text.value = text.value ~ part.text %}
        {%- endfor %}
    {%- endif %}
    {%- if message.role == 'assistant' and '</think>' in text.value %}
        {%- set text.value = text.value.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ text.value ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def build_tokenizer(seed: int) -> Tokenizer:
    """Returns a byte-level BPE of 512 tokens, its merges counted on a sample of the corpus."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = prefix_merges(frequent_words(Corpus(seed)), NUM_MERGES)
    tokens = alphabet + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return tokenizer


def frequent_words(corpus: Corpus) -> Counter[str]:
    """Counts each word after a space in 20,000 documents, words to reverse apart; 'Ġ' stands for the space."""
    texts = list(REVERSE_PROMPTS) * 300
    for document in corpus.documents(20_000):
        if isinstance(document, Conversation):
            texts += [text for turn in document.turns if turn.kind != "reverse" for text in (turn.prompt, turn.answer)]
    words = (word.strip(".,?!:\"'") for text in texts for word in text.split(" ")[1:])
    return Counter("Ġ" + word for word in words if word.isascii() and word.isalpha())


def prefix_merges(words: Counter[str], num_merges: int) -> list[tuple[str, str]]:
    """Returns merges that grow words from their first character: always the most frequent (prefix, next letter)."""
    prefix_length = dict.fromkeys(words, 1)
    merges: list[tuple[str, str]] = []
    for _ in range(num_merges):
        grown: Counter[str] = Counter()
        for word, count in words.items():
            if len(word) > prefix_length[word]:
                grown[word[: prefix_length[word] + 1]] += count
        best = min(grown, key=lambda prefix: (-grown[prefix], prefix))
        merges.append((best[:-1], best[-1]))
        for word in words:
            if word.startswith(best) and prefix_length[word] == len(best) - 1:
                prefix_length[word] = len(best)
    return merges


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Returns tokenizer_config.json with Qwen3's keys."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in SPECIAL_TOKENS + THINK_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def render(document: Conversation | str, empty_thought: bool) -> Iterable[tuple[str, bool]]:
    """Yields a document as the chat template writes it, in pieces: (text, whether it is to be learnt).

    Joined, the pieces are the document. No token spans two pieces: each one ends with a line end or a special token.
    """
    if isinstance(document, str):
        yield document + "<|endoftext|>", True
        return
    if document.system is not None:
        yield f"<|im_start|>system\n{document.system}<|im_end|>\n", False
    for turn in document.turns:
        thought = "<think>\n\n</think>\n\n" if empty_thought and turn is document.turns[-1] else ""
        yield f"<|im_start|>user\n{turn.prompt}<|im_end|>\n<|im_start|>assistant\n{thought}", False
        yield f"{turn.answer}<|im_end|>", True
        yield "\n", False
