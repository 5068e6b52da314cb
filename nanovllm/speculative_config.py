"""SpeculativeConfig: the argument `speculative_config`, under the names that vLLM uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.errors import InvalidArgumentError, checks_argument_names
from nanovllm.utils.arguments import (
    Rule,
    argument,
    check_arguments,
    choice,
    declaration,
    is_integer,
    is_number,
    lists_arguments,
)

MAX_DRAFT = 64  # tokens
MAX_STEP_DRAFTS = 128  # tokens that a step drafts, for all rows together, unless one row may draft more
MAX_DRAFTING_ROWS = 64  # where more rows decode, a draft costs as much as it saves
QUANTIZATIONS = ("fp8", "int8", "int4", "awq", "gptq", "compressed-tensors")
_DEFAULT_LOOKUP = 5  # tokens


def _integer(low: int, high: int) -> Rule:
    return Rule(f"an integer from {low} to {high}", lambda value: is_integer(value) and low <= value <= high, int)


_METHOD = choice("ngram", "suffix", "draft_model")
_METHOD_HINT = "Not supported: EAGLE, MTP and Medusa (see docs/speculation.md)."
_TEXT = Rule("a text", lambda value: isinstance(value, str) and bool(value)).or_none()
_LENGTH = _integer(1, MAX_DRAFT)
_LOOKUP = _LENGTH.or_none()
_FACTOR = Rule("a number above 0", lambda value: is_number(value) and value > 0, float)
_PROBABILITY = Rule("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1, float)


@checks_argument_names
@lists_arguments
@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are drafted. Raises InvalidArgumentError, which names the field, for a value that is not allowed."""

    method: str = field(
        metadata=declaration(
            Rule(_METHOD.allowed, _METHOD.accepts, hint=_METHOD_HINT),
            "'ngram' continues the last occurrence of the last tokens in the prompt and the output. 'suffix' looks for "
            "the longest match, also in recent outputs of other requests, and continues it as far as it was continued "
            "the same way. 'draft_model', the default where `model` is given, asks a smaller model.",
        )
    )
    num_speculative_tokens: int | None = argument(
        None,
        _LENGTH.or_none(),
        "The longest draft. It is shorter where drafts were refused, and where many sequences run. Needed for 'ngram' "
        "and 'draft_model'. None for 'suffix': suffix_decoding_max_tree_depth.",
    )
    prompt_lookup_min: int | None = argument(
        None, _LOOKUP, "'ngram': the fewest last tokens that must occur before. None: prompt_lookup_max, or 5."
    )
    prompt_lookup_max: int | None = argument(
        None,
        _LOOKUP,
        "'ngram': of several occurrences, the one with more equal tokens before it is continued, up to this number. "
        "None: prompt_lookup_min, or 5.",
    )
    suffix_decoding_max_tree_depth: int = argument(24, _integer(4, MAX_DRAFT), "'suffix': the longest match.")
    suffix_decoding_max_cached_requests: int = argument(
        1000,
        _integer(0, 100_000),
        "'suffix': number of recent outputs of other requests that are searched, too. Requests with a cache_salt "
        "are not among them, and search none.",
    )
    suffix_decoding_max_spec_factor: float = argument(
        1.0, _FACTOR, "'suffix': a draft is at most this many times as long as its match."
    )
    suffix_decoding_min_token_prob: float = argument(
        0.1, _PROBABILITY, "'suffix': a draft ends before a token that continued fewer of its matches than this share."
    )
    model: str | None = argument(
        None, _TEXT, "'draft_model': a folder or a Hugging Face id, of a model with the same vocabulary. Needed for it."
    )
    revision: str | None = argument(None, _TEXT, "'draft_model': version of its repository. None: the latest.")
    quantization: str | None = argument(
        None, choice(*QUANTIZATIONS).or_none(), "'draft_model': how its weights are quantised, as for the model itself."
    )

    def __post_init__(self) -> None:
        check_arguments(self, prefix="speculative_config.")
        if self.method != "suffix" and self.num_speculative_tokens is None:
            hint = f"It is the longest draft, and method={self.method!r} has no default."
            raise InvalidArgumentError("speculative_config.num_speculative_tokens", None, _LENGTH.allowed, hint)
        if self.method == "draft_model" and self.model is None:
            allowed = "a folder, or a Hugging Face id, of a smaller model with the same vocabulary"
            raise InvalidArgumentError("speculative_config.model", None, allowed)
        for name in ("model", "revision", "quantization"):
            if self.method != "draft_model" and (value := getattr(self, name)) is not None:
                hint = "Only method='draft_model' loads a model."
                raise InvalidArgumentError(f"speculative_config.{name}", value, "None", hint)
        shortest, longest = self.lookup
        if shortest > longest:
            name = "speculative_config.prompt_lookup_min"
            raise InvalidArgumentError(name, shortest, f"at most prompt_lookup_max={longest}")

    @property
    def max_draft(self) -> int:
        """The longest draft, in tokens."""
        return self.num_speculative_tokens or self.suffix_decoding_max_tree_depth

    @property
    def lookup(self) -> tuple[int, int]:
        """prompt_lookup_min and prompt_lookup_max, with their defaults."""
        shortest, longest = self.prompt_lookup_min, self.prompt_lookup_max
        return shortest or longest or _DEFAULT_LOOKUP, longest or shortest or _DEFAULT_LOOKUP

    def num_draft_rows(self, max_num_seqs: int) -> int:
        """Returns how many tokens a step may draft, for all sequences together."""
        return min(max_num_seqs * self.max_draft, max(self.max_draft, MAX_STEP_DRAFTS))

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> SpeculativeConfig | None:
        """Returns the value of the argument `speculative_config`; None for None."""
        return None if values is None else cls(**{"method": "draft_model", **values})
