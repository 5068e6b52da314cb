"""How one request is sampled and when it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from nanovllm.errors import InvalidArgumentError, checks_argument_names

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
MAX_N = 16384
MAX_BIAS = 100.0


@checks_argument_names
@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an output must look like: exactly one of the first five. Needs `pip install 'nanovllm[structured]'`.

    json: a JSON schema, as a dictionary or as text; kept as text. Properties come in the schema's order.
    regex: what the whole text must match.
    choice: the texts of which it must be one. Kept as a tuple.
    grammar: EBNF (rules `name ::= …`, the first one `root`), or Lark (rules `name: …`, the first one `start`).
    json_object: True for any JSON object.
    disable_any_whitespace: with `json` and `json_object`, only the spaces that `json.dumps` writes.

    Raises InvalidArgumentError (a ValueError) that names the field, for a value that is not allowed.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise InvalidArgumentError(f"structured_outputs.{name}", getattr(self, name), "True or False")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise InvalidArgumentError(f"structured_outputs.{name}", getattr(self, name), "a text")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            texts: object = self.choice
            if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
                raise InvalidArgumentError("structured_outputs.choice", texts, "a list of one or more texts")
            object.__setattr__(self, "choice", tuple(texts))
        if len(kinds := self._given()) != 1:
            raise InvalidArgumentError("structured_outputs", kinds, f"given exactly one of {', '.join(_KINDS)}")

    @property
    def kind(self) -> str:
        """The one that is given."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [name for name in _KINDS if getattr(self, name) not in (None, False)]


_KINDS = ("json", "regex", "choice", "grammar", "json_object")


def _schema_text(schema: object) -> str:
    """Raises InvalidArgumentError for what is no JSON."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        allowed = "a JSON schema, as a dictionary or as text"
        raise InvalidArgumentError("structured_outputs.json", schema, allowed, f"As JSON: {error}.") from None
    return text


@checks_argument_names
@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    n: completions of the prompt, up to 16384, with seeds seed, seed + 1, …; prefix caching computes the prompt once
        for all. Must be 1 with temperature 0, which would give the same each time.
    temperature: 0 is greedy; up to 2, logits are divided by it before a token is drawn.
    max_tokens: the most tokens to generate; None goes on to the model's length.
    ignore_eos: generate past the end-of-sequence token, for benchmarks.
    top_k: draw among the k likeliest tokens only, and those level with the last of them; 0 or -1: all.
    top_p: among the fewest likeliest tokens that have this much of the probability; above 0, 1: all.
    min_p: among tokens at least this much as likely as the likeliest; from 0 (all) to 1.
        Applied after temperature in the order min_p, top_k, top_p; top_p counts what the others leave.
    presence_penalty: taken off the logit of each token that the output has, -2 to 2; below 0 it is more likely again.
    frequency_penalty: the same, as many times as the output has the token.
    repetition_penalty: above 0; the logit of each token that prompt or output has is divided by it, or, if it is
        negative, multiplied. 1: none.
    logit_bias: token ids and what is added to their logits, -100 to 100.
    min_tokens: before so many tokens nothing ends the output but `max_tokens`: the end-of-sequence token and
        `stop_token_ids` are not drawn, and a stop string does not count.
    bad_words: texts that the output must not have, in the tokens that they have at its beginning and behind a space:
        the last of them is not drawn where the others are the end of the output. Kept as a tuple.
    allowed_token_ids: no other tokens are drawn. Kept as a tuple.
        In the order repetition, frequency, presence penalty, bias, then bans, all before temperature. Where bans leave
        none of the allowed tokens, which is refused if it can be seen beforehand, an allowed one is drawn all the same.
    logprobs: how many of the likeliest tokens' log-probabilities come with each token, 0 to 20 beside the token's
        own, -1: all. Raw: before temperature and whatever else changes logits.
    prompt_logprobs: the same of each prompt token but the first. Such a prompt is computed whole, whatever is cached.
    seed: a request with a seed draws the same tokens whatever runs beside it; None takes one from
        the engine's seed and the order of arrival.
    stop: a string, or several, whose first occurrence in the text ends it; it may span tokens. Kept as a tuple.
    stop_token_ids: tokens that end the output as the end-of-sequence token does, under `ignore_eos` too.
    include_stop_str_in_output: leave the stop string, or the stop token's text, at the end of the text.
    detokenize: False gives token ids only, and "" for the text.
    skip_special_tokens: False shows special tokens in the text.
    structured_outputs: what the output must look like, as a StructuredOutputsParams or a dictionary of its fields.
        Where nothing more may come, the end-of-sequence token does, before `min_tokens` too; `bad_words` are drawn
        where nothing else fits. `max_tokens` may cut it short.

    Raises InvalidArgumentError (a ValueError) that names the field, for a value that is not allowed.
    """

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    seed: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # a dictionary has no hash
    min_tokens: int = 0
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    n: int = 1
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not math.isfinite(self.temperature) or not 0 <= self.temperature <= 2:
            raise InvalidArgumentError("temperature", self.temperature, "a number from 0 (greedy) to 2")
        if self.max_tokens is not None and (not _is_integer(self.max_tokens) or self.max_tokens < 1):
            raise InvalidArgumentError(
                "max_tokens", self.max_tokens, "an integer ≥ 1, or None for as many as the model's length allows"
            )
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(name, getattr(self, name), "True or False")
        if self.seed is not None and (not _is_integer(self.seed) or not 0 <= self.seed <= MAX_SEED):
            raise InvalidArgumentError("seed", self.seed, "an integer from 0 to 2**63 - 1, or None")
        if not _is_integer(self.n) or not 1 <= self.n <= MAX_N or (self.temperature == 0 and self.n > 1):
            hint = "Greedy completions of one prompt are all the same." if self.temperature == 0 else ""
            raise InvalidArgumentError("n", self.n, f"an integer from 1 to {MAX_N}, and 1 with temperature 0", hint)
        if self.seed is not None and self.seed > MAX_SEED - self.n + 1:
            raise InvalidArgumentError("seed", self.seed, f"at most 2**63 - n (n={self.n}), as each has its own")
        if not _is_integer(self.top_k) or self.top_k < -1:
            raise InvalidArgumentError("top_k", self.top_k, "an integer ≥ 1, or 0 or -1 for all tokens")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InvalidArgumentError("top_p", self.top_p, "a number above 0, up to 1 (all tokens)")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise InvalidArgumentError("min_p", self.min_p, "a number from 0 (all tokens) to 1")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            if number is not None and (not _is_integer(number) or not -1 <= number <= MAX_LOGPROBS):
                raise InvalidArgumentError(name, number, f"0 to {MAX_LOGPROBS}, -1 for all tokens, or None")
        self._check_stop()
        self._check_logit_edits()
        self._check_structured_outputs()

    @property
    def truncates(self) -> bool:
        """Whether a token is drawn from fewer than all."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def edits_logits(self) -> bool:
        """Whether a token is drawn from other logits than the model's."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        others = (self.min_tokens, self.logit_bias, self.bad_words, self.allowed_token_ids)
        return any(others) or penalties != (1.0, 0.0, 0.0)

    def _check_logit_edits(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not _is_number(penalty := getattr(self, name)) or not -2 <= penalty <= 2:
                raise InvalidArgumentError(name, penalty, "a number from -2 to 2 (0: none)")
        penalty = self.repetition_penalty
        if not _is_number(penalty) or not 1e-6 <= penalty <= 1e6:
            raise InvalidArgumentError(
                "repetition_penalty", penalty, "a number above 0 (1: none), no smaller than 1e-6 or larger than 1e6"
            )
        if not _is_integer(self.min_tokens) or not 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens):
            allowed = "an integer from 0 to max_tokens" + (f" ({self.max_tokens})" if self.max_tokens else "")
            raise InvalidArgumentError("min_tokens", self.min_tokens, allowed)
        bias: object = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping) or not all(
            _is_integer(token) and token >= 0 and _is_number(value) and -MAX_BIAS <= value <= MAX_BIAS
            for token, value in bias.items()
        ):
            allowed = "a dictionary of token ids ≥ 0 and numbers from -100 to 100, or None"
            hint = "To forbid tokens, give bad_words or allowed_token_ids."
            raise InvalidArgumentError("logit_bias", self.logit_bias, allowed, hint)
        words: object = () if self.bad_words is None else self.bad_words
        if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) and word.strip() for word in words):
            raise InvalidArgumentError("bad_words", self.bad_words, "a list of strings, none of them blank, or None")
        ids: object = self.allowed_token_ids
        is_list = isinstance(ids, (list, tuple)) and all(_is_integer(token) and token >= 0 for token in ids)
        if not (ids is None or (is_list and ids)):
            raise InvalidArgumentError("allowed_token_ids", ids, "a list of at least one integer ≥ 0, or None for all")
        object.__setattr__(self, "logit_bias", {int(token): float(value) for token, value in bias.items()} or None)
        object.__setattr__(self, "bad_words", tuple(words) or None)
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(int(token) for token in self.allowed_token_ids))

    def _check_stop(self) -> None:
        stop: object = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidArgumentError("stop", self.stop, "a string, a list of strings, none of them empty, or None")
        if stop and not self.detokenize:
            raise InvalidArgumentError("stop", self.stop, "None with detokenize=False", "It is looked for in the text.")
        ids: object = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, (list, tuple)) or not all(_is_integer(token) and token >= 0 for token in ids):
            raise InvalidArgumentError("stop_token_ids", self.stop_token_ids, "a list of integers ≥ 0, or None")
        # Tuples: a caller's list may change later, and params are compared and hashed.
        object.__setattr__(self, "stop", tuple(stop) or None)
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in ids) or None)

    def _check_structured_outputs(self) -> None:
        asked: object = self.structured_outputs
        if isinstance(asked, Mapping) and all(isinstance(name, str) for name in asked):
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams(**asked))
        elif asked is not None and not isinstance(asked, StructuredOutputsParams):
            allowed = "a StructuredOutputsParams, a dictionary of its fields, or None"
            raise InvalidArgumentError("structured_outputs", asked, allowed)
        if asked is not None and self.ignore_eos:
            hint = "The output ends with the end-of-sequence token where nothing else may come."
            raise InvalidArgumentError("ignore_eos", True, "False with structured_outputs", hint)
        if asked is not None and self.allowed_token_ids is not None:
            raise InvalidArgumentError("allowed_token_ids", self.allowed_token_ids, "None with structured_outputs")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's integers included


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
