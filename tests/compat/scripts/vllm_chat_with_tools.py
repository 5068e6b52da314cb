"""Lets the model call a function, runs it, and hands the answer back into the conversation."""

import json
import sys

from vllm import LLM
from vllm.sampling_params import SamplingParams, StructuredOutputsParams


def add(left: int, right: int) -> str:
    return f"{left} + {right} = {left + right}"


functions = {"add": add}
integer = {"type": "integer", "minimum": 0, "maximum": 99}
arguments = {"type": "object", "properties": {"left": integer, "right": integer}, "required": ["left", "right"]}
tools = [{"type": "function", "function": {"name": "add", "description": "Add numbers", "parameters": arguments}}]
call = {
    "type": "object",
    "properties": {"name": {"enum": list(functions)}, "arguments": arguments},
    "required": ["name", "arguments"],
}

llm = LLM(model=sys.argv[1], tokenizer_mode="auto", max_model_len=1024)
params = SamplingParams(max_tokens=64, temperature=0.0)
forced = SamplingParams(
    max_tokens=80, temperature=0.0, structured_outputs=StructuredOutputsParams(json=call, disable_any_whitespace=True)
)
messages = [{"role": "user", "content": "What is 27 + 58?"}]

asked = llm.chat(messages, sampling_params=forced, tools=tools, use_tqdm=False)
text = asked[0].outputs[0].text.strip()
print("Prompt has the tool:", '"name": "add"' in asked[0].prompt)
wanted = json.loads(text)
answer = functions[wanted["name"]](**wanted["arguments"])
print("Answer:", answer)

messages += [{"role": "assistant", "content": text}, {"role": "tool", "content": answer, "tool_call_id": "abcdefghi"}]
told = llm.chat(messages, params, tools=tools, use_tqdm=False)
print("Prompt has the answer:", answer in told[0].prompt)
print("Text:", repr(told[0].outputs[0].text.strip()))
