"""Throughput over random token ids, in the form of nano-vllm's benchmark."""

import os
import sys
import time
from random import randint, seed

from nanovllm import LLM, SamplingParams


def main():
    seed(0)
    num_seqs, max_input_len, max_output_len, last_id = 24, 64, 32, 499  # as the model at hand allows

    path = os.path.expanduser(sys.argv[1])
    llm = LLM(path, enforce_eager=False, max_model_len=4096)

    prompt_token_ids = [[randint(0, last_id) for _ in range(randint(10, max_input_len))] for _ in range(num_seqs)]
    sampling_params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(10, max_output_len))
        for _ in range(num_seqs)
    ]

    llm.generate(["Benchmark: "], SamplingParams())
    start = time.time()
    llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
    elapsed = time.time() - start
    total_tokens = sum(params.max_tokens for params in sampling_params)
    throughput = total_tokens / elapsed
    print(f"Total: {total_tokens}tok, Time: {elapsed:.2f}s, Throughput: {throughput:.2f}tok/s")


if __name__ == "__main__":
    main()
