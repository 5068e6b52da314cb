"""Token ids in, token ids out; texts only where there are some."""

import sys

from vllm import LLM, SamplingParams

llm = LLM(model=sys.argv[1], tensor_parallel_size=1, max_model_len=512, block_size=16, num_gpu_blocks_override=256)
tokenizer = llm.get_tokenizer()
texts = ["count from 3 to 9", "What is 27 + 58?"]
token_ids = [tokenizer.encode(text) for text in texts]
params = SamplingParams(temperature=0, max_tokens=8, detokenize=True, skip_special_tokens=False)

by_ids = llm.generate([{"prompt_token_ids": ids} for ids in token_ids], sampling_params=params, use_tqdm=False)
by_text = llm.generate([{"prompt": text} for text in texts], sampling_params=params, use_tqdm=False)
for ids, from_ids, from_text in zip(token_ids, by_ids, by_text, strict=True):
    assert list(from_ids.prompt_token_ids) == ids == list(from_text.prompt_token_ids)
    assert from_ids.prompt is None
    assert list(from_ids.outputs[0].token_ids) == list(from_text.outputs[0].token_ids)
    print(from_ids.request_id != from_text.request_id, from_ids.finished, list(from_ids.outputs[0].token_ids))

(bare,) = llm.generate(
    {"prompt_token_ids": token_ids[0]}, SamplingParams(temperature=0, max_tokens=8, detokenize=False)
)
print(repr(bare.outputs[0].text), bare.outputs[0].token_ids == by_ids[0].outputs[0].token_ids)
print("cached", by_text[0].num_cached_tokens is not None)
