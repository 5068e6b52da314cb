"""Between text and token ids: what a prompt may be, and what an output reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import IntArray, LogitEdits
from nanovllm.engine.sequence import Sequence, TokenLogprob
from nanovllm.errors import InvalidArgumentError, ModelLoadError, RequestTooLargeError
from nanovllm.outputs import Logprob
from nanovllm.requests.detokenizer import Detokenizer, StopStrings, decode
from nanovllm.requests.logit_edits import read_logit_edits
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A text, token ids, or vLLM's {"prompt": text} and {"prompt_token_ids": ids}.
Prompt: TypeAlias = "str | list[int] | Mapping[str, Any]"


class NewTokens(NamedTuple):
    """Output tokens of a request, and, where it asked for them, log-probabilities as `CompletionOutput` has them."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None

    def extend(self, new: NewTokens) -> None:
        """Takes in the tokens that follow."""
        self.token_ids.extend(new.token_ids)
        if self.logprobs is not None and new.logprobs is not None:
            self.logprobs.extend(new.logprobs)


class Tokenizing:
    """Reads prompts and decodes outputs of one model. tokenizer None: prompts are token ids, outputs have no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, resolved: ResolvedConfig) -> None:
        self._tokenizer = tokenizer
        self._resolved = resolved

    def read(self, prompt: Prompt) -> tuple[str | None, IntArray]:
        """The text, where there is one, and the token ids [num_tokens]. Raises as `LLMEngine.add_request` says."""
        text: str | None = prompt if isinstance(prompt, str) else None
        token_ids: Any = prompt
        if isinstance(prompt, Mapping):
            unknown = sorted(prompt.keys() - {"prompt", "prompt_token_ids"})
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if unknown or not (text is None or isinstance(text, str)) or (text is None and token_ids is None):
                raise InvalidArgumentError(
                    "prompt", prompt, "a dictionary with 'prompt' (a text) or 'prompt_token_ids' (a list), no other key"
                )
        if text is not None and (token_ids is None or token_ids is prompt):
            token_ids = self._encode(text)
        token_ids = self._check_token_ids(token_ids)
        if not len(token_ids):
            raise InvalidArgumentError("prompt", prompt, "at least one token long")
        self._check_length(len(token_ids))
        return text, token_ids

    def _encode(self, text: str, field: str = "prompt", add_special_tokens: bool = True) -> Any:
        if self._tokenizer is None:
            allowed = f"{'token ids' if field == 'prompt' else 'None'}, since there is no tokenizer"
            raise InvalidArgumentError(field, text, allowed, "Leave skip_tokenizer_init out.")
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError) as error:  # lone surrogates, which no UTF-8 has
            raise InvalidArgumentError(field, text, f"a text that can be encoded ({error})") from None

    def _check_token_ids(self, prompt: Any) -> IntArray:
        allowed = f"a text or a list of token ids from 0 to {self._resolved.vocab_size - 1}"
        try:
            token_ids = np.asarray(prompt)
        except ValueError:
            raise InvalidArgumentError("prompt", prompt, allowed) from None
        if token_ids.size == 0 and token_ids.ndim == 1:
            return np.empty(0, dtype=np.int32)
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            raise InvalidArgumentError("prompt", prompt, allowed)
        outside = token_ids[(token_ids < 0) | (token_ids >= self._resolved.vocab_size)]
        if len(outside):
            hint = "If it came from a text, the tokenizer is not this model's."
            raise InvalidArgumentError("prompt_token_ids", int(outside[0]), allowed, hint)
        return token_ids.astype(np.int32)

    def _check_length(self, num_tokens: int) -> None:
        resolved = self._resolved
        if num_tokens >= resolved.max_model_len:
            blocks = -(-(num_tokens + 1) // resolved.block_size)
            cache = f", and num_kvcache_blocks to {blocks} or more (" if blocks > resolved.num_blocks else " ("
            raise RequestTooLargeError(
                "prompt",
                f"{num_tokens} tokens",
                f"at most {resolved.max_model_len - 1} tokens long, so that one more fits into "
                f"max_model_len={resolved.max_model_len}",
                f"Raise max_model_len to {num_tokens + 1} or more, as far as the model goes{cache}the KV cache has "
                f"{resolved.num_blocks} blocks of {resolved.block_size} tokens), or shorten the prompt.",
            )

    def stop_strings(self, params: SamplingParams) -> StopStrings | None:
        """What looks for the request's stop strings; None when it has none. Raises as `LLMEngine.add_request` says."""
        if not params.stop:
            return None
        if self._tokenizer is None:
            hint = "Leave skip_tokenizer_init out, or give stop_token_ids."
            raise InvalidArgumentError("stop", params.stop, "None, since there is no tokenizer", hint)
        detokenizer = Detokenizer(self._tokenizer, params.skip_special_tokens)
        return StopStrings(tuple(params.stop), detokenizer, params.include_stop_str_in_output, params.min_tokens)

    def logit_edits(self, params: SamplingParams, num_prompt_tokens: int) -> LogitEdits | None:
        """What the request does to its logits, if anything. Raises as `LLMEngine.add_request` says."""
        vocab_size = self._resolved.vocab_size
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(params, name) or ():
                if token >= vocab_size:
                    raise InvalidArgumentError(name, token, f"token ids from 0 to {vocab_size - 1}")
        if not params.edits_logits:
            return None
        ends = {*(() if params.ignore_eos else self._resolved.eos_token_ids), *(params.stop_token_ids or ())}
        return read_logit_edits(params, num_prompt_tokens, ends, self._bad_words(params), vocab_size)

    def _bad_words(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """As tokens, at the beginning of a text and behind a space."""
        words: dict[tuple[int, ...], None] = {}  # in their order, each once
        for word in params.bad_words or ():
            for text in (word.lstrip(), f" {word.lstrip()}"):
                token_ids = self._encode(text, "bad_words", add_special_tokens=False)
                if not token_ids:
                    raise InvalidArgumentError("bad_words", word, "texts of at least one token")
                words[tuple(token_ids)] = None
        return list(words)

    def output_text(self, sequence: Sequence) -> str:
        """The text of an output that has ended; "" without a tokenizer, or where none is wanted."""
        params, reason = sequence.params, sequence.stop_reason
        if self._tokenizer is None or not params.detokenize:
            return ""
        if isinstance(reason, str) and sequence.stop_strings is not None:
            return sequence.stop_strings.text
        token_ids = sequence.output_token_ids.tolist()
        if sequence.finish_reason == "stop" and (reason is None or not params.include_stop_str_in_output):
            token_ids.pop()  # EOS, or the stop token
        return decode(self._tokenizer, token_ids, params.skip_special_tokens)

    def new_tokens(self, sequence: Sequence, token_ids: IntArray, start: int) -> NewTokens:
        """Of `token_ids`, the sequence's prompt and output, the output tokens from `start` on."""
        new = token_ids[sequence.num_prompt_tokens + start :].tolist()
        asked = sequence.params.logprobs is not None
        return NewTokens(new, self._logprobs(new, sequence.logprobs[start:]) if asked else None)

    def prompt_logprobs(self, sequence: Sequence) -> list[dict[int, Logprob] | None] | None:
        """`RequestOutput.prompt_logprobs`: of an aborted request as many as there are."""
        if sequence.params.prompt_logprobs is None:
            return None
        scores = sequence.prompt_logprobs
        return [None, *self._logprobs(sequence.prompt_token_ids[1 : len(scores) + 1], scores)]

    def _logprobs(self, token_ids: list[int], scores: list[TokenLogprob]) -> list[dict[int, Logprob]]:
        rows: list[dict[int, Logprob]] = []
        for token_id, own in zip(token_ids, scores, strict=True):
            row = {token_id: Logprob(own.logprob, own.rank, self._token(token_id))}
            for rank, (top_id, logprob) in enumerate(zip(own.top_ids.tolist(), own.top.tolist(), strict=True), 1):
                if top_id != token_id:
                    row[top_id] = Logprob(logprob, rank, self._token(top_id))
            rows.append(row)
        return rows

    def _token(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else str(self._tokenizer.decode([token_id]))


def load_tokenizer(config: EngineConfig, folder: str) -> PreTrainedTokenizerBase:
    """Raises ModelLoadError when there is none: a model without one needs `tokenizer` or `skip_tokenizer_init`."""
    from transformers import AutoTokenizer

    from nanovllm.models.checkpoint import resolve_model_folder

    source = resolve_model_folder(config.tokenizer, with_weights=False) if config.tokenizer else Path(folder)
    problem: object = "it has no tokenizer files"
    if any(source.glob("tokenizer*")) or any(source.glob("vocab.*")):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, trust_remote_code=config.trust_remote_code
            )
            return tokenizer
        except Exception as error:  # transformers raises many kinds
            problem = error
    raise ModelLoadError(
        f"{source} gives no tokenizer: {problem}. Name one with tokenizer=…, or give skip_tokenizer_init=True and "
        "prompts as token ids."
    )
