"""Streams answers from AsyncLLM: what is new, everything so far, or the end alone."""

import asyncio
import sys

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM


async def answer(engine: AsyncLLM, prompt: str, request_id: str, kind: RequestOutputKind) -> str:
    params = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, seed=42, output_kind=kind)
    parts = []
    async for output in engine.generate(request_id=request_id, prompt=prompt, sampling_params=params):
        for completion in output.outputs:
            parts.append(completion.text)
        if output.finished:
            break
    return "".join(parts) if kind is RequestOutputKind.DELTA else parts[-1]


async def main():
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=sys.argv[1], enforce_eager=True, enable_log_requests=False)
    )
    try:
        for number, prompt in enumerate(["introduce yourself", "count from 3 to 9"]):
            kinds = list(RequestOutputKind)
            asked = (answer(engine, prompt, f"{number}-{kind.name}", kind) for kind in kinds)
            texts = await asyncio.gather(*asked)
            print(f"{len(set(texts))} text from {len(kinds)} streams:", bool(texts[0]))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
