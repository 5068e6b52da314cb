"""Outputs that must fit: choices, a regex, a JSON schema, a grammar."""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

MAX_TOKENS = 60

choice = StructuredOutputsParams(choice=["Positive", "Negative"])
sampling_params_choice = SamplingParams(structured_outputs=choice, seed=1)

regex = StructuredOutputsParams(regex=r"[a-z]{1,8}@[a-z]{1,8}\.com")
sampling_params_regex = SamplingParams(structured_outputs=regex, max_tokens=MAX_TOKENS, seed=2)

schema = {
    "type": "object",
    "properties": {
        "brand": {"enum": ["sedan", "truck"]},
        "year": {"type": "integer", "minimum": 1990, "maximum": 2030},
    },
    "required": ["brand", "year"],
}
as_json = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
sampling_params_json = SamplingParams(structured_outputs=as_json, max_tokens=MAX_TOKENS, seed=3)

sql = """
root ::= "SELECT " column " FROM table_" number
column ::= "id" | "name"
number ::= [1-3]
"""
sampling_params_grammar = SamplingParams(structured_outputs=StructuredOutputsParams(grammar=sql), max_tokens=MAX_TOKENS)


def generate_output(prompt, sampling_params, llm):
    outputs = llm.generate(prompt, sampling_params=sampling_params)
    return outputs[0].outputs[0].text


def main():
    llm = LLM(model=sys.argv[1], max_model_len=256)
    print("choice:", generate_output("Classify this sentiment: it is wonderful!", sampling_params_choice, llm))
    print("regex:", generate_output("Write an email address:", sampling_params_regex, llm))
    print("json:", json.loads(generate_output("Describe a car as JSON:", sampling_params_json, llm)))
    print("grammar:", generate_output("Write a query:", sampling_params_grammar, llm))


if __name__ == "__main__":
    main()
