"""Asks a chat model a few questions.

    python example.py                               the checkpoint that ships with nanovllm, on a GPU or a CPU
    python example.py --model Qwen/Qwen3-0.6B       any Qwen3: a folder or a Hugging Face id

The log shows what the engine does; with NANOVLLM_LOG_LEVEL=WARNING only the answers are printed.
"""

from __future__ import annotations

import argparse

from nanovllm import LLM, SamplingParams

QUESTIONS = [
    "introduce yourself",
    "list all prime numbers within 100",
    "count from 7 to 15",
    "reverse the word planet",
    "What is 27 + 58?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hugging Face id, or 'tiny' (default)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each answer (default 256)")
    parser.add_argument("--temperature", type=float, help="default 0 (always the likeliest token) on tiny, else 0.6")
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = 0.0 if args.model == "tiny" else 0.6

    # All questions are answered together: the engine batches them, token by token.
    with LLM(args.model, device=args.device, max_model_len=4096) as llm:
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        outputs = llm.chat(chats, SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens))

    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"\nPrompt: {question}\nCompletion: {output.outputs[0].text}")


if __name__ == "__main__":
    main()
