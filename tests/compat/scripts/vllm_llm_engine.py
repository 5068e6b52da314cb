"""Drives the engine's loop: requests arrive between steps, and some are aborted."""

import argparse

from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.utils import FlexibleArgumentParser


def requests():
    return [
        ("count from 3 to 9", SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1)),
        ("introduce yourself", SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2)),
        ("What is 27 + 58?", SamplingParams(n=2, temperature=0.8, top_p=0.95, frequency_penalty=0.1)),
        ("reverse the word planet", SamplingParams(max_tokens=1000, ignore_eos=True)),
        ("Hello", SamplingParams(max_tokens=1000, ignore_eos=True)),
    ]


def run(engine: LLMEngine):
    waiting, request_id = requests(), 0
    while waiting or engine.has_unfinished_requests():
        if waiting:
            prompt, params = waiting.pop(0)
            engine.add_request(str(request_id), prompt, params)
            request_id += 1
        elif request_id:
            engine.abort_request(["3", "4"])
        request_outputs: list[RequestOutput] = engine.step()
        for output in request_outputs:
            if output.finished:
                reasons = [completion.finish_reason for completion in output.outputs]
                print(output.request_id, len(output.outputs), reasons, output.prompt_logprobs is not None)


def main(args: argparse.Namespace):
    run(LLMEngine.from_engine_args(EngineArgs.from_cli_args(args)))


if __name__ == "__main__":
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description="Drive the engine"))
    main(parser.parse_args())
