"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt.

    text: decoded tokens, without the end-of-sequence token; "" when the engine has no tokenizer.
    token_ids: every generated token, the end-of-sequence token included.
    finish_reason: "stop" (the model ended it), "length" (max_tokens or the model's length), "abort".
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class RequestOutput:
    """A request's result. nano-vllm's form works on the same object: `output["text"]`, `output["token_ids"]`.

    prompt: the text that was given, None when the prompt was token ids.
    num_cached_tokens: prompt tokens whose keys and values were found in the prefix cache at first scheduling.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids"):
            raise KeyError(f"RequestOutput has the keys 'text' and 'token_ids', not {key!r}")
        return getattr(self.outputs[0], key)
