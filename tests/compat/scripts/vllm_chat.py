"""Holds conversations, one and several at a time, with and without the template's switches."""

import sys

from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype="auto", max_num_seqs=16, seed=0)
sampling_params = SamplingParams(temperature=0, max_tokens=48)


def print_outputs(outputs):
    for output in outputs:
        print(f"Prompt: {output.prompt!r}")
        print(f"Generated text: {output.outputs[0].text!r}")


conversation = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "count from 3 to 9"},
]
print_outputs(llm.chat(conversation, sampling_params, use_tqdm=False))

questions = ["What is 27 + 58?", "reverse the word planet", "introduce yourself"]
conversations = [[{"role": "user", "content": question}] for question in questions]
print_outputs(llm.chat(messages=conversations, sampling_params=sampling_params, use_tqdm=True))

print_outputs(
    llm.chat(conversations[0], sampling_params, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
)

# The same by hand: the template, then generate.
tokenizer = llm.get_tokenizer()
text = tokenizer.apply_chat_template(conversations[1], tokenize=False, add_generation_prompt=True)
print_outputs(llm.generate([text], sampling_params, use_tqdm=False))
