"""Two engines with the same seed give the same texts."""

import os
import sys

from vllm import LLM, SamplingParams

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

prompts = ["count from 3 to 9", "What is 27 + 58?", "Hello"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=12)


def texts(seed):
    llm = LLM(model=sys.argv[1], seed=seed)
    return [output.outputs[0].text for output in llm.generate(prompts, sampling_params)]


def main():
    first = texts(42)
    print("Again the same:", texts(42) == first)
    print("Another seed:", texts(43) == first)
    print("No seed is seed 0:", texts(None) == texts(0))


if __name__ == "__main__":
    main()
