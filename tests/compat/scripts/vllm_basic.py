"""Completes a few texts, as scripts for vLLM's offline API do."""

import sys

from vllm import LLM, SamplingParams

prompts = [
    "count from 3 to 9",
    "What is 27 + 58?",
    "reverse the word planet",
    "introduce yourself",
]


def main():
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=11, max_tokens=16)
    llm = LLM(model=sys.argv[1], max_model_len=512, gpu_memory_utilization=0.5, enforce_eager=True)
    outputs = llm.generate(prompts, sampling_params)
    print("Generated Outputs:\n" + "-" * 60)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt:    {prompt!r}")
        print(f"Output:    {generated_text!r}")
        print("-" * 60)

    # One text alone, and parameters of its own for each prompt.
    (single,) = llm.generate(prompts[0], SamplingParams(temperature=0.0, max_tokens=32, stop=[" 8", "\n"]))
    completion = single.outputs[0]
    print("Single:", repr(completion.text), completion.finish_reason, completion.stop_reason)
    # Several completions of one prompt.
    (several,) = llm.generate([prompts[0]], SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8, ignore_eos=True))
    print("Several:", [completion.index for completion in several.outputs])
    print("Different:", len({tuple(completion.token_ids) for completion in several.outputs}) > 1)
    each = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in (1, 3, 5, 7)]
    print("Lengths:", [len(output.outputs[0].token_ids) for output in llm.generate(prompts, each, use_tqdm=False)])


if __name__ == "__main__":
    main()
