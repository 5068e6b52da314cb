"""langchain-openai: a message, a stream, tools and structured outputs."""

from __future__ import annotations

import json
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION, ANSWER = "What is 27 + 58?", "27 + 58 = 85"


class Review(BaseModel):
    """A review."""

    mood: Literal["good", "bad"]
    is_long: bool


def main(url: str, no_space: dict[str, int]) -> None:
    """no_space: a logit_bias. A schema allows white space, of which the tiny model would write too much."""
    model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=100)
    message = model.invoke(QUESTION)
    assert message.content == ANSWER, message
    assert message.usage_metadata["output_tokens"] > 0, message
    chunks = list(model.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == ANSWER, chunks
    compact = model.model_copy(update={"logit_bias": no_space})
    for method, chat in (("json_schema", compact), ("function_calling", model)):
        review = chat.with_structured_output(Review, method=method).invoke("Review it.")
        assert isinstance(review, Review), (method, review)
    calls = (
        model.bind_tools([Review], tool_choice="required", parallel_tool_calls=False).invoke("Review it.").tool_calls
    )
    assert [call["name"] for call in calls] == ["Review"], calls
    assert model.bind_tools([Review]).invoke(QUESTION).content == ANSWER
    responses = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="tiny", temperature=0, use_responses_api=True)
    assert responses.invoke(QUESTION).text == ANSWER


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
