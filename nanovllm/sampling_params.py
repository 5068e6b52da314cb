"""SamplingParams: how one request is sampled and when it ends."""

from __future__ import annotations

import copy
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.compat.unsupported import SAMPLING_FIELDS, accepts_without_effect
from nanovllm.errors import InvalidArgumentError, checks_argument_names
from nanovllm.utils.arguments import (
    COUNT,
    SWITCH,
    Rule,
    argument,
    check_arguments,
    is_integer,
    is_number,
    lists_arguments,
)

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
MAX_N = 16384
MAX_BIAS = 100.0


class RequestOutputKind(enum.Enum):
    """What the outputs of a request hold while it runs.

    CUMULATIVE: everything so far. DELTA: what is new since the previous output. FINAL_ONLY: there is one output, at the
    end.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def _json_rule(field: str, what: str) -> Rule:
    """Returns the rule of JSON, as a dictionary or as text. It is kept as text."""
    allowed = f"{what}, as a dictionary or as text"

    def text_of(value: object) -> str:
        try:
            text = value if isinstance(value, str) else json.dumps(value)
            json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            hint = f"Error when read as JSON: {error}."
            raise InvalidArgumentError(f"structured_outputs.{field}", value, allowed, hint) from None
        return text

    return Rule(allowed, lambda value: True, text_of)


def _is_sequence(value: object) -> bool:
    return isinstance(value, (list, tuple))


_JSON = _json_rule("json", "a JSON schema")
_STRUCTURAL_TAG = _json_rule("structural_tag", "a structural tag")
_TEXT = Rule("a text", lambda value: isinstance(value, str))
_CHOICE = Rule(
    "a list of one or more texts",
    lambda texts: _is_sequence(texts) and len(texts) > 0 and all(isinstance(text, str) for text in texts),
    tuple,
)
_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@checks_argument_names
@lists_arguments
@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an output must look like: one of `json`, `regex`, `choice`, `grammar`, `json_object` and `structural_tag`.

    Needs xgrammar (`pip install xgrammar`). Raises InvalidArgumentError (a ValueError), which names the field, for a
    value that is not allowed.
    """

    json: str | Mapping[str, Any] | None = argument(
        None, _JSON.or_none(), "A JSON schema. It is kept as text. Properties come in the order of the schema."
    )
    regex: str | None = argument(None, _TEXT.or_none(), "A regular expression that the whole text must match.")
    choice: Sequence[str] | None = argument(
        None, _CHOICE.or_none(), "The texts of which the output must be one. They are kept as a tuple."
    )
    grammar: str | None = argument(
        None,
        _TEXT.or_none(),
        "EBNF (rules `name ::= …`, the first one is `root`) or Lark (rules `name: …`, the first one is `start`).",
    )
    json_object: bool | None = argument(None, SWITCH.or_none(), "True: any JSON object.")
    disable_any_whitespace: bool = argument(
        False,
        SWITCH.or_none(),
        "With `json`, `json_object` and `structural_tag`: JSON has only the spaces that `json.dumps` writes.",
    )
    structural_tag: str | Mapping[str, Any] | None = argument(
        None,
        _STRUCTURAL_TAG.or_none(),
        "Any text in which what stands between certain tags fits a schema or a grammar, in xgrammar's form: "
        "{'format': …}, or {'structures': …, 'triggers': …}. It is kept as text.",
    )

    def __post_init__(self) -> None:
        check_arguments(self, prefix="structured_outputs.")
        if len(kinds := self._given()) != 1:
            raise InvalidArgumentError("structured_outputs", kinds, f"given exactly one of {', '.join(_KINDS)}")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [name for name in _KINDS if getattr(self, name) not in (None, False)]


def _is_token_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(is_integer(token) and token >= 0 for token in value)


def _token_tuple(tokens: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)


def _number(low: float, high: float, allowed: str) -> Rule:
    return Rule(allowed, lambda value: is_number(value) and low <= value <= high, float)


_TEMPERATURE = _number(0, 2, "a number from 0 (greedy) to 2")
_TOP_P = Rule("a number above 0, up to 1 (all tokens)", lambda value: is_number(value) and 0 < value <= 1, float)
_TOP_K = Rule("an integer ≥ 1, or 0 or -1 for all tokens", lambda value: is_integer(value) and value >= -1, int)
_MIN_P = _number(0, 1, "a number from 0 (all tokens) to 1")
_PENALTY = _number(-2, 2, "a number from -2 to 2 (0: none)")
_REPETITION_PENALTY = _number(1e-6, 1e6, "a number above 0 (1: none), no smaller than 1e-6 or larger than 1e6")
_MAX_TOKENS = COUNT.or_none(" for as many as the model's length allows")
_MIN_TOKENS = Rule("an integer from 0 to max_tokens", lambda value: is_integer(value) and value >= 0, int)
_SEED = Rule(
    "an integer from 0 to 2**63 - 1", lambda value: is_integer(value) and 0 <= value <= MAX_SEED, int
).or_none()
_N = Rule(
    f"an integer from 1 to {MAX_N}, and 1 with temperature 0",
    lambda value: is_integer(value) and 1 <= value <= MAX_N,
    int,
)
_LOGPROBS = Rule(
    f"0 to {MAX_LOGPROBS}, -1 for all tokens", lambda value: is_integer(value) and -1 <= value <= MAX_LOGPROBS, int
).or_none()
# Lists are kept as tuples: a caller's list may change later, and params are compared and hashed.
_STOP = Rule(
    "a string, a list of strings, none of them empty",
    lambda value: (
        (isinstance(value, str) or _is_sequence(value)) and value != "" and all(isinstance(t, str) and t for t in value)
    ),
    lambda value: (value,) if isinstance(value, str) else tuple(value) or None,
).or_none()
_STOP_TOKEN_IDS = Rule("a list of integers ≥ 0", _is_token_list, lambda tokens: _token_tuple(tokens) or None).or_none()
_ALLOWED_TOKEN_IDS = Rule(
    "a list of at least one integer ≥ 0", lambda value: _is_token_list(value) and len(value) > 0, _token_tuple
).or_none(" for all")
_BAD_WORDS = Rule(
    "a list of strings, none of them blank",
    lambda value: _is_sequence(value) and all(isinstance(word, str) and word.strip() for word in value),
    lambda words: tuple(words) or None,
).or_none()
_LOGIT_BIAS = Rule(
    "a dictionary of token ids ≥ 0 and numbers from -100 to 100",
    lambda value: (
        isinstance(value, Mapping)
        and _is_token_list(list(value))
        and all(is_number(bias) and -MAX_BIAS <= bias <= MAX_BIAS for bias in value.values())
    ),
    lambda value: {int(token): float(bias) for token, bias in value.items()} or None,
    hint="To forbid tokens, give bad_words or allowed_token_ids.",
).or_none()
_OUTPUT_KIND = Rule("a RequestOutputKind", lambda value: isinstance(value, RequestOutputKind)).or_none()
_STRUCTURED_OUTPUTS = Rule(
    "a StructuredOutputsParams, a dictionary of its fields",
    lambda value: (
        isinstance(value, StructuredOutputsParams)
        or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value))
    ),
    lambda value: StructuredOutputsParams(**value) if isinstance(value, Mapping) else value,
).or_none()


@accepts_without_effect(SAMPLING_FIELDS)
@checks_argument_names
@lists_arguments
@dataclass(slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Fields can be assigned to. A request copies and checks them when it is added; later assignments do not change it.

    They apply in this order: repetition, frequency and presence penalty, logit_bias, bans (bad_words,
    allowed_token_ids, min_tokens), temperature, min_p, top_k, top_p. If bans leave none of the allowed tokens, one of
    the allowed tokens is sampled anyway; a request for which this is known in advance is refused.

    Raises InvalidArgumentError (a ValueError), which names the field, for a value that is not allowed.
    """

    temperature: float = argument(
        1.0, _TEMPERATURE, "Logits are divided by it before a token is sampled. 0: greedy, the most likely token."
    )
    max_tokens: int | None = argument(64, _MAX_TOKENS, "Maximum number of tokens to generate.")
    ignore_eos: bool = argument(False, SWITCH, "Generate past the end-of-sequence token, for benchmarks.")
    seed: int | None = argument(
        None,
        _SEED,
        "With a seed, the tokens of a request do not depend on what runs beside it. None: a seed made from the "
        "engine's seed and the order of arrival.",
    )
    top_k: int = argument(
        0, _TOP_K, "Sample only from the k most likely tokens, and those as likely as the last of them."
    )
    top_p: float = argument(
        1.0,
        _TOP_P,
        "Sample only from the fewest most likely tokens whose probabilities, of those left by min_p and top_k, sum to "
        "this or more.",
    )
    min_p: float = argument(
        0.0, _MIN_P, "Sample only from tokens whose probability is at least this fraction of the most likely token's."
    )
    logprobs: int | None = argument(
        None,
        _LOGPROBS,
        "Number of most likely tokens whose log-probabilities are returned with each token, beside the token's own. "
        "They are raw: before temperature and everything else that changes logits.",
    )
    prompt_logprobs: int | None = argument(
        None,
        _LOGPROBS,
        "The same for each prompt token but the first. The whole prompt is then computed, even if it is cached.",
    )
    stop: str | Sequence[str] | None = argument(
        None,
        _STOP,
        "Strings that end the text at their first occurrence. They may span tokens. They are kept as a tuple.",
    )
    stop_token_ids: Sequence[int] | None = argument(
        None, _STOP_TOKEN_IDS, "Tokens that end the output as the end-of-sequence token does, also with ignore_eos."
    )
    include_stop_str_in_output: bool = argument(
        False, SWITCH, "Keep the stop string, or the stop token's text, at the end of the text."
    )
    detokenize: bool = argument(True, SWITCH, "False: return token ids only, with '' as the text.")
    skip_special_tokens: bool = argument(True, SWITCH, "False: show special tokens in the text.")
    presence_penalty: float = argument(
        0.0, _PENALTY, "Subtracted from the logit of each token that is in the output. Below 0: more likely again."
    )
    frequency_penalty: float = argument(
        0.0, _PENALTY, "The same, times the number of occurrences of the token in the output."
    )
    repetition_penalty: float = argument(
        1.0,
        _REPETITION_PENALTY,
        "For each token that is in the prompt or the output, a positive logit is divided by it and a negative one "
        "multiplied.",
    )
    logit_bias: Mapping[int, float] | None = argument(
        None, _LOGIT_BIAS, "Token ids and what is added to their logits.", hash=False
    )
    min_tokens: int = argument(
        0,
        _MIN_TOKENS,
        "Until this number of tokens, the end-of-sequence token and stop_token_ids are not sampled, and stop strings "
        "do not count.",
    )
    bad_words: Sequence[str] | None = argument(
        None,
        _BAD_WORDS,
        "Strings to forbid. Each is tokenised with and without a leading space, and its last token is not sampled "
        "after the others. They are kept as a tuple.",
    )
    allowed_token_ids: Sequence[int] | None = argument(
        None, _ALLOWED_TOKEN_IDS, "The only tokens that are sampled. They are kept as a tuple."
    )
    n: int = argument(
        1,
        _N,
        "Number of completions of the prompt (parallel sampling), with the seeds seed, seed + 1, … Prefix caching "
        "computes the prompt once for all of them.",
    )
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = argument(
        None,
        _STRUCTURED_OUTPUTS,
        "What the output must look like. The end-of-sequence token is sampled where nothing else may come, even before "
        "min_tokens, and bad_words where nothing else fits. max_tokens may cut the output short.",
    )
    speculate: bool = argument(
        True, SWITCH, "False: no tokens of this request are drafted, if the engine has a speculative_config."
    )

    output_kind: RequestOutputKind | None = argument(
        None,
        _OUTPUT_KIND,
        "What the outputs of `AsyncLLM.generate` and `LLM.stream` hold. None: CUMULATIVE for the first, DELTA for the "
        "second. `LLM.generate` returns final outputs.",
    )

    def __post_init__(self) -> None:
        check_arguments(self)
        if self.temperature == 0 and self.n > 1:
            raise InvalidArgumentError("n", self.n, _N.allowed, "Greedy completions of one prompt are all the same.")
        if self.seed is not None and self.seed > MAX_SEED - self.n + 1:
            raise InvalidArgumentError("seed", self.seed, f"at most 2**63 - n (n={self.n}), as each has its own")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgumentError(
                "min_tokens", self.min_tokens, _MIN_TOKENS.allowed, f"max_tokens is {self.max_tokens}."
            )
        if self.stop is not None and not self.detokenize:
            raise InvalidArgumentError(
                "stop", self.stop, "None with detokenize=False", "It is searched for in the text."
            )
        if self.structured_outputs is not None and self.ignore_eos:
            hint = "The output ends with the end-of-sequence token where nothing else may come."
            raise InvalidArgumentError("ignore_eos", True, "False with structured_outputs", hint)
        if self.structured_outputs is not None and self.allowed_token_ids is not None:
            raise InvalidArgumentError("allowed_token_ids", self.allowed_token_ids, "None with structured_outputs")

    def clone(self) -> SamplingParams:
        """Returns a checked copy. Raises InvalidArgumentError for a value that was assigned and is not allowed."""
        copied = copy.copy(self)
        copied.__post_init__()
        return copied

    @property
    def truncates(self) -> bool:
        """Whether tokens are sampled from less than the whole vocabulary."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before a token is sampled, other than by the temperature."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        others = (self.min_tokens, self.logit_bias, self.bad_words, self.allowed_token_ids)
        return any(others) or penalties != (1.0, 0.0, 0.0)
