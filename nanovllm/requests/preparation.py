"""PreparedRequest: a request that is tokenised and checked, but not queued yet; RequestPreparation makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.config import ResolvedConfig
from nanovllm.engine.batch import IntArray, LogitEdits
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidArgumentError
from nanovllm.requests.default_params import read_default_params
from nanovllm.requests.detokenizer import Detokenizer, StopStrings
from nanovllm.requests.grammar_compiler import GrammarCompiler
from nanovllm.requests.logit_edits import read_logit_edits
from nanovllm.requests.stop_search import StopSearch
from nanovllm.requests.tokenization import Prompt, Tokenization
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from nanovllm.utils.caller import Caller, active_span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedRequest:
    """A request as `LLMEngine.prepare` returns it and `LLMEngine.enqueue` takes it."""

    prompt: str | None  # None if it was given as token ids
    token_ids: IntArray  # [num_prompt_tokens]
    cache_salt: bytes  # the prefix cache shares blocks only between requests with the same salt
    params: SamplingParams
    logit_edits: LogitEdits | None  # None: its logits are not changed
    grammar: StructuredOutputsParams | None  # read, not compiled yet
    stop_search: StopSearch | None  # None: it has no stop strings
    client_request_id: str | None = None  # the client's own name of it, for the log


class RequestPreparation:
    """Prepares requests for one model. Any thread may use it, as it holds no state of the engine.

    default_params: of requests without any; None: what the checkpoint recommends.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        resolved: ResolvedConfig,
        grammars: GrammarCompiler,
        default_params: SamplingParams | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.resolved = resolved
        self._grammars = grammars
        self._tokenization = Tokenization(tokenizer, resolved)
        self.default_params = default_params or read_default_params(Path(resolved.model))

    def prepare(self, prompt: Prompt, params: SamplingParams | None) -> PreparedRequest:
        """Tokenises and checks a request. Raises as `LLMEngine.prepare` says."""
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidArgumentError("sampling_params", params, "a SamplingParams")
        params = params.clone()  # its fields may have been assigned to, and may be again
        text, token_ids, cache_salt = self._tokenization.read(prompt)
        if params.stop and self._tokenizer is None:
            hint = "Leave skip_tokenizer_init out, or give stop_token_ids."
            raise InvalidArgumentError("stop", params.stop, "None, since there is no tokenizer", hint)
        wanted = params.structured_outputs
        return PreparedRequest(
            prompt=text,
            token_ids=token_ids,
            cache_salt=cache_salt,
            params=params,
            logit_edits=self._logit_edits(params, len(token_ids)),
            grammar=self._grammars.read(wanted) if isinstance(wanted, StructuredOutputsParams) else None,
            stop_search=StopSearch(tuple(params.stop)) if params.stop else None,
        )

    def sequence(
        self, request: PreparedRequest, seq_id: int, request_id: str, params: SamplingParams, seed: int
    ) -> Sequence:
        """Returns a waiting sequence. params: those of this completion. seed: used if `params` has none."""
        sequence = Sequence.from_prompt(
            seq_id,
            request_id,
            request.token_ids,
            params,
            max_model_len=self.resolved.max_model_len,
            seed=seed,
            prompt=request.prompt,
        )
        sequence.cache_salt = request.cache_salt
        sequence.logit_edits = request.logit_edits
        sequence.caller = Caller(active_span(), request.client_request_id)
        if request.params.n > 1:
            sequence.parent_id = request_id.rpartition("/")[0]
        if request.stop_search is not None:
            detokenizer = Detokenizer(self._tokenizer, params.skip_special_tokens)
            include_stop = params.include_stop_str_in_output
            sequence.stop_strings = StopStrings(request.stop_search, detokenizer, include_stop, params.min_tokens)
        return sequence

    def _logit_edits(self, params: SamplingParams, num_prompt_tokens: int) -> LogitEdits | None:
        """Returns the request's logit edits; None if it has none. Raises InvalidArgumentError for unknown token ids."""
        vocab_size = self.resolved.vocab_size
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(params, name) or ():
                if token >= vocab_size:
                    raise InvalidArgumentError(name, token, f"token ids from 0 to {vocab_size - 1}")
        if not params.edits_logits:
            return None
        ends = {*(() if params.ignore_eos else self.resolved.eos_token_ids), *(params.stop_token_ids or ())}
        return read_logit_edits(params, num_prompt_tokens, ends, self._bad_words(params), vocab_size)

    def _bad_words(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """Returns the tokens of each word, with and without a leading space."""
        words: dict[tuple[int, ...], None] = {}  # a dictionary, to keep the order and drop duplicates
        for word in params.bad_words or ():
            for text in (word.lstrip(), f" {word.lstrip()}"):
                token_ids = self._tokenization.encode(text, "bad_words", add_special_tokens=False)
                if not token_ids:
                    raise InvalidArgumentError("bad_words", word, "texts of at least one token")
                words[tuple(token_ids)] = None
        return list(words)
