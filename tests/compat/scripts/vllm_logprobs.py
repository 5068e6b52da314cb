"""Log-probabilities of greedy outputs and of prompts, as scripts that compare two engines read them."""

import math
import sys

from vllm import LLM, SamplingParams

llm = LLM(model=sys.argv[1], max_model_len=256, enable_prefix_caching=False)
params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=1, ignore_eos=True)

for request in llm.generate(["What is 27 + 58?", "count from 3 to 9"], params):
    completion = request.outputs[0]
    total = 0.0
    for token_id, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        chosen = candidates[token_id]
        assert chosen.rank == 1, "temperature 0 takes the likeliest"
        assert chosen.logprob == max(candidate.logprob for candidate in candidates.values())
        total += chosen.logprob
        others = sorted(candidates.values(), key=lambda candidate: candidate.rank)
        print(token_id, [(candidate.decoded_token, round(candidate.logprob, 4)) for candidate in others])
    assert math.isclose(total, completion.cumulative_logprob, rel_tol=1e-6)
    print("cumulative", round(completion.cumulative_logprob, 4))

    assert request.prompt_logprobs[0] is None
    scores = [
        candidates[token_id].logprob
        for token_id, candidates in zip(request.prompt_token_ids[1:], request.prompt_logprobs[1:], strict=True)
    ]
    print("perplexity", round(math.exp(-sum(scores) / len(scores)), 3))
