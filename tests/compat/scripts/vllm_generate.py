"""Completes texts; model, engine and sampling are options of the command line."""

from vllm import LLM, EngineArgs
from vllm.utils import FlexibleArgumentParser

SAMPLING = {"max_tokens": int, "temperature": float, "top_p": float, "top_k": int}


def read_command_line():
    parser = FlexibleArgumentParser(description="Complete texts")
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model="Qwen/Qwen3-0.6B")
    group = parser.add_argument_group("sampling")
    for name, kind in SAMPLING.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind)
    return vars(parser.parse_args())


def main(args):
    sampling = {name: args.pop(name) for name in SAMPLING}
    llm = LLM(**args)
    params = llm.get_default_sampling_params()
    for name, value in sampling.items():
        if value is not None:
            setattr(params, name, value)
    print("Params:", params.max_tokens, params.temperature, params.top_p, params.top_k)
    for output in llm.generate(["count from 3 to 9", "What is 27 + 58?"], params):
        print(f"Prompt: {output.prompt!r}, text: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(read_command_line())
