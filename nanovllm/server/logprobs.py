"""Log-probabilities in the forms of the two OpenAI endpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanovllm.outputs import Logprob
from nanovllm.server.protocol.chat import ChatLogprobs, TokenLogprob
from nanovllm.server.protocol.completions import CompletionLogprobs

Row = dict[int, Logprob]  # the log-probabilities at a position: the token's own first, then the most likely ones

_LOWEST = -9999.0  # for a probability of 0, as JSON has no infinity


def prompt_logprobs(rows: Sequence[Row | None]) -> list[dict[str, Any] | None]:
    """Returns the rows of a prompt in vLLM's form."""
    return [None if row is None else {str(token_id): _fields(each) for token_id, each in row.items()} for row in rows]


def _fields(each: Logprob) -> dict[str, Any]:
    return {"logprob": _finite(each.logprob), "rank": each.rank, "decoded_token": each.decoded_token}


class CompletionRows:
    """Makes the `logprobs` of /v1/completions. as_ids: tokens are written as `token_id:17`."""

    def __init__(self, as_ids: bool) -> None:
        self._as_ids = as_ids
        self._offset = 0  # characters of the tokens so far

    def add(self, rows: Sequence[Row | None], first: str) -> CompletionLogprobs:
        """Returns the next rows. first: the text of a row that is None, which is that of a prompt's first token."""
        made: CompletionLogprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        own: float | None
        top: dict[str, float] | None
        for row in rows:
            token, own, top = first, None, None
            if row is not None:
                texts = [_text(token_id, each, self._as_ids) for token_id, each in row.items()]
                values = [_finite(each.logprob) for each in row.values()]
                token, own = texts[0], values[0]
                # Two tokens may have the same text: the more likely one comes first and stays.
                top = dict(zip(reversed(texts), reversed(values), strict=True))
            made["text_offset"].append(self._offset)
            made["tokens"].append(token)
            made["token_logprobs"].append(own)
            made["top_logprobs"].append(top)
            self._offset += len(token)
        return made


def chat_logprobs(rows: Sequence[Row], num_top: int, as_ids: bool) -> ChatLogprobs:
    """Returns the `logprobs` of /v1/chat/completions, with the `num_top` most likely tokens of each row; -1: all."""
    content: list[TokenLogprob] = []
    for row in rows:
        entries = [_entry(token_id, each, as_ids) for token_id, each in row.items()]
        top = [
            entry for entry, each in zip(entries, row.values(), strict=True) if num_top == -1 or each.rank <= num_top
        ]
        own = entries[0].copy()
        own["top_logprobs"] = sorted(top, key=lambda entry: -entry["logprob"])
        content.append(own)
    return {"content": content}


def _entry(token_id: int, each: Logprob, as_ids: bool) -> TokenLogprob:
    text = _text(token_id, each, as_ids)
    return {"token": text, "logprob": _finite(each.logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _text(token_id: int, each: Logprob, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids or each.decoded_token is None else each.decoded_token


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST
