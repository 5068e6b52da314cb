"""Profiles one call of generate."""

import sys

from vllm import LLM, SamplingParams


def main():
    folder = "./profile"
    llm = LLM(sys.argv[1], tensor_parallel_size=1, profiler_config={"profiler": "torch", "torch_profiler_dir": folder})
    llm.start_profile()
    outputs = llm.generate(["count from 3 to 9", "introduce yourself"], SamplingParams(temperature=0.8, top_p=0.95))
    llm.stop_profile()
    print("Texts:", [type(output.outputs[0].text).__name__ for output in outputs])


if __name__ == "__main__":
    main()
