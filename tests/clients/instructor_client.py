"""instructor: a typed answer, in each of its modes for OpenAI's API."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel


class Review(BaseModel):
    """A review."""

    mood: Literal["good", "bad"]
    is_long: bool


def main(url: str, no_space: dict[str, int]) -> None:
    """no_space: a logit_bias. A schema allows white space, of which the tiny model would write too much."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    fields: Any = {"model": "tiny", "temperature": 0, "max_tokens": 100, "max_retries": 0, "logit_bias": no_space}
    messages: Any = [{"role": "user", "content": "Review it."}]
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        patched = instructor.from_openai(client, mode=mode)
        review = patched.chat.completions.create(response_model=Review, messages=messages, **fields)
        assert isinstance(review, Review), (mode, review)
    *_, last = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(
        response_model=Review, messages=messages, **fields
    )
    assert isinstance(last.is_long, bool), last


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
