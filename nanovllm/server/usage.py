"""UsageCount: the tokens of a request so far."""

from __future__ import annotations

from nanovllm.outputs import RequestOutput
from nanovllm.server.exchange import Exchange
from nanovllm.server.protocol.base import Usage


class UsageCount:
    """Adds up the tokens of a request's prompts and outputs. The access log shows them."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._seen: set[str] = set()  # the engine's requests whose prompt is counted
        self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0

    def add(self, output: RequestOutput) -> None:
        """Counts an output, which holds only what is new."""
        if output.request_id not in self._seen:
            self._seen.add(output.request_id)
            self.num_prompt_tokens += len(output.prompt_token_ids)
            self.num_cached_tokens += output.num_cached_tokens
        self.num_output_tokens += sum(len(each.token_ids) for each in output.outputs)
        self._exchange.num_prompt_tokens = self.num_prompt_tokens
        self._exchange.num_output_tokens = self.num_output_tokens

    @property
    def usage(self) -> Usage:
        """The usage so far, in OpenAI's form."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
