"""The same questions behind one long text, without and with a prefix cache, on two engines in turn."""

import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

text = "The list of words: " + ", ".join(f"word {number}" for number in range(40)) + ". "
prompts = [text + question for question in ("count from 3 to 9", "reverse the word planet", "introduce yourself")]
sampling_params = SamplingParams(temperature=0.0, max_tokens=8)


def main():
    plain = LLM(model=sys.argv[1], enable_prefix_caching=False, gpu_memory_utilization=0.4, swap_space=0)
    expected = [output.outputs[0].text for output in plain.generate(prompts, sampling_params)]
    del plain
    cleanup_dist_env_and_memory()

    caching = LLM(model=sys.argv[1], enable_prefix_caching=True, gpu_memory_utilization=0.4)
    caching.generate(prompts[0], sampling_params)
    outputs = caching.generate(prompts, sampling_params)
    print("Same:", [output.outputs[0].text for output in outputs] == expected)
    print("Cached:", all(output.num_cached_tokens > 100 for output in outputs))
    (other,) = caching.generate({"prompt": prompts[0], "cache_salt": "somebody else"}, sampling_params)
    print("Salted:", other.num_cached_tokens, other.outputs[0].text == expected[0])


if __name__ == "__main__":
    main()
