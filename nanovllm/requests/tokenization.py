"""Tokenization: turns a prompt, in any of its forms, into checked token ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nanovllm.compat.unsupported import PROMPT_KEYS, without_effect
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import IntArray
from nanovllm.errors import InvalidArgumentError, ModelLoadError, RequestTooLargeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARGIN = 1000  # tokens that the end of a cut text may have more than the text has there


class TemplatedText(str):
    """A prompt that a chat template wrote. It has its special tokens already."""


# A text, token ids, or as in vLLM {"prompt": text} or {"prompt_token_ids": ids}, with a "cache_salt" if wanted.
Prompt: TypeAlias = "str | list[int] | Mapping[str, Any]"


class Tokenization:
    """Turns the prompts of one model into token ids. tokenizer: None if prompts must be token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, resolved: ResolvedConfig) -> None:
        self._tokenizer = tokenizer
        self._resolved = resolved

    def read(self, prompt: Prompt) -> tuple[str | None, IntArray, bytes]:
        """Returns the text, if any, the token ids [num_tokens] and the cache salt. Raises as `LLMEngine.prepare`."""
        text: str | None = prompt if isinstance(prompt, str) else None
        token_ids: Any = prompt
        cache_salt: Any = None
        if isinstance(prompt, Mapping):
            prompt = without_effect("prompt", prompt, PROMPT_KEYS, prefix="prompt.")
            unknown = prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}
            cache_salt = prompt.get("cache_salt")
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if unknown or not (text is None or isinstance(text, str)) or (text is None and token_ids is None):
                raise InvalidArgumentError(
                    "prompt", prompt, "a dictionary with 'prompt' (a text) or 'prompt_token_ids' (a list), no other key"
                )
            if cache_salt is not None and not (isinstance(cache_salt, str) and cache_salt):
                raise InvalidArgumentError("prompt.cache_salt", cache_salt, "a text of at least one character, or None")
        if text is not None and (token_ids is None or token_ids is prompt):
            token_ids = self._encode_prompt(text)
        token_ids = self._check_token_ids(token_ids)
        if not len(token_ids):
            raise InvalidArgumentError("prompt", prompt, "at least one token long")
        self._check_length(len(token_ids))
        return None if text is None else str(text), token_ids, (cache_salt or "").encode("utf-8", "surrogatepass")

    def _encode_prompt(self, text: str) -> Any:
        """Returns the token ids of a prompt. Beginnings of a long text are encoded first.

        So a text that cannot fit is refused soon. No bound on its characters would do: a tokenizer may drop spaces, or
        make one token of any number of unknown characters. A cut changes only tokens near it, so a text has at least
        half of the tokens that its beginning has, apart from `_MARGIN`.
        """
        add_special_tokens = not isinstance(text, TemplatedText)
        limit = 2 * self._resolved.max_model_len + _MARGIN
        size = 8 * limit  # characters; most texts have four or five in a token
        while size < len(text):
            num_tokens = len(self.encode(text[:size], add_special_tokens=False))
            if num_tokens > limit:
                raise RequestTooLargeError(
                    "prompt",
                    f"{len(text)} characters",
                    f"at most {self._resolved.max_model_len - 1} tokens long",
                    f"Its first {size} characters alone have about {num_tokens} tokens. Shorten the prompt.",
                )
            size *= 4
        return self.encode(text, add_special_tokens=add_special_tokens)

    def encode(self, text: str, field: str = "prompt", add_special_tokens: bool = True) -> Any:
        """Returns the token ids of `text`. field: the name of the argument, for errors."""
        if self._tokenizer is None:
            allowed = f"{'token ids' if field == 'prompt' else 'None'}, since there is no tokenizer"
            raise InvalidArgumentError(field, text, allowed, "Leave skip_tokenizer_init out.")
        try:
            # Not verbose: transformers would warn of texts that are refused, or cut, anyway.
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        except (TypeError, UnicodeError):
            allowed = "a text without half of a surrogate pair, which UTF-8 cannot encode"
            raise InvalidArgumentError(field, text, allowed) from None

    def _check_token_ids(self, prompt: Any) -> IntArray:
        allowed = f"a text or a list of token ids from 0 to {self._resolved.vocab_size - 1}"
        try:
            prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # a tensor or an array
            token_ids = np.asarray(prompt)
        except Exception:  # objects of the caller's may raise any kind
            raise InvalidArgumentError("prompt", prompt, allowed) from None
        if token_ids.size == 0 and token_ids.ndim == 1:
            return np.empty(0, dtype=np.int32)
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            raise InvalidArgumentError("prompt", prompt, allowed)
        bits = np.flatnonzero(token_ids <= 1).tolist() if isinstance(prompt, (list, tuple)) else ()
        if any(isinstance(prompt[index], (bool, np.bool_)) for index in bits):  # NumPy reads [True, 5] as [1, 5]
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


def load_tokenizer(config: EngineConfig, folder: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that `config` names, or the one in the model's `folder`.

    Raises ModelLoadError when there is none: such a model needs `tokenizer` or `skip_tokenizer_init`.
    """
    from transformers import AutoTokenizer

    from nanovllm.models.checkpoint import resolve_model_folder

    source = resolve_model_folder(config.tokenizer, with_weights=False) if config.tokenizer else Path(folder)
    problem: object = "it has no tokenizer files"
    if any(source.glob("tokenizer*")) or any(source.glob("vocab.*")):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, config=_config_of_tokenizer(source), trust_remote_code=config.trust_remote_code
            )
            if tokenizer.vocab_size > len(tokenizer.all_special_ids):
                return tokenizer
            problem = "it has no vocabulary (tokenizer.json, or what its kind of tokenizer has instead)"
        except Exception as error:  # transformers raises many kinds
            problem = error
    raise ModelLoadError(
        f"{source} gives no tokenizer: {problem}. Name one with tokenizer=…, or give skip_tokenizer_init=True and "
        "prompts as token ids."
    )


def _config_of_tokenizer(folder: Path) -> Any:
    """Returns a config with the fields by which transformers chooses a tokenizer's class.

    From a folder transformers would read the whole config.json, and fail for a field that no tokenizer needs.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    from nanovllm.utils.model_files import read_json

    path = folder / "config.json"
    fields = read_json(path) if path.exists() else {}
    make = CONFIG_MAPPING.get(str(fields.get("model_type")), PretrainedConfig)
    return make(tokenizer_class=fields.get("tokenizer_class"), name_or_path=fields.get("_name_or_path", ""))
