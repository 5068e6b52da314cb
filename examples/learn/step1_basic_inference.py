"""Step 1: one request on its way from text to tokens, every stage with its shapes.

What `LLM.generate` does is done here by hand, with the engine's own parts: tokenizer, Sequence, Scheduler, ModelRunner.

    python examples/learn/step1_basic_inference.py
    python examples/learn/step1_basic_inference.py --question "reverse the word planet"

Read along: nanovllm/engine/llm_engine.py (`LLMEngine._step` is this loop) and nanovllm/models/decoder.py.
"""

from __future__ import annotations

from typing import Any

from _drawing import bar, begin, heading, lesson_parser, say, table, title


def main() -> None:
    parser = lesson_parser(__doc__)
    parser.add_argument("--question", default="What is 27 + 58?", help="what to ask (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer (default %(default)s)")
    args = begin(parser)

    import torch

    from nanovllm import LLM, SamplingParams
    from nanovllm.config import EngineConfig
    from nanovllm.engine.model_runner import ModelRunner
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.engine.sequence import Sequence
    from nanovllm.models.model_config import ModelConfig
    from nanovllm.requests.tokenization import load_tokenizer

    title("Step 1: from text to token")
    config = EngineConfig("tiny", device="cpu", max_model_len=512, num_kvcache_blocks=32)
    runner = ModelRunner(config)
    scheduler = Scheduler(runner.resolved)
    tokenizer = load_tokenizer(config, runner.resolved.model)
    shape = ModelConfig.from_folder(runner.resolved.model)
    num_parameters = sum(p.numel() for p in {id(p): p for p in runner.model.parameters()}.values())
    say(
        f"The model 'tiny' is a real Qwen3 with {shape.num_layers} layers, hidden_size={shape.hidden_size}, "
        f"{shape.num_heads} query heads and {shape.num_kv_heads} key/value heads of {shape.head_dim}, a vocabulary of "
        f"{shape.vocab_size} tokens and {num_parameters:,} parameters. It runs on the {runner.device} in "
        f"{runner.resolved.dtype}."
    )

    heading("1. Text: the chat template says where the question ends and the answer begins")
    messages = [{"role": "user", "content": args.question}]
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    print(f"  {args.question!r}\n  becomes\n  {prompt!r}")

    heading("2. Text becomes token ids")
    token_ids = tokenizer.encode(prompt)
    if len(token_ids) >= runner.resolved.max_model_len:
        parser.error(f"--question must be shorter than {runner.resolved.max_model_len} tokens, its template included")
    pieces = [tokenizer.decode([token_id]) for token_id in token_ids]
    print(f"  {len(prompt)} characters -> {len(token_ids)} tokens:\n")
    for first in range(0, len(token_ids), 8):
        row = zip(pieces[first : first + 8], token_ids[first : first + 8], strict=True)
        print("  " + "  ".join(f"{piece!r}={token_id}" for piece, token_id in row))

    heading("3. The request waits as a Sequence, and the Scheduler plans a step")
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    sequence = Sequence.from_prompt(0, "lesson", token_ids, params, max_model_len=512, seed=0, prompt=prompt)
    scheduler.add(sequence)
    print(
        f"  before schedule(): status={sequence.status.name}, row={sequence.row}, blocks={sequence.block_table.blocks}"
    )
    batch = scheduler.schedule()
    assert batch is not None, "one request waits, and the cache is empty"
    print(
        f"  after  schedule(): status={sequence.status.name}, row={sequence.row}, "
        f"blocks={sequence.block_table.blocks}\n"
    )
    say(
        f"The prompt needs {len(sequence.block_table.blocks)} blocks of {runner.resolved.block_size} tokens for its "
        "keys and values. The plan is one int32 buffer made of changes, the only thing that goes from deciding to "
        "computing:"
    )
    words = [(name, part.end - part.offset, part.record.itemsize // 4) for name, part in batch.sections.items()]
    table(["section", "items", "words each", "words"], [(name, n // each, each, n) for name, n, each in words])
    row, start, length = batch.chunks[0].tolist()
    print(
        f"\n  chunk: row {row} computes its tokens {start} … {start + length - 1}, so {length} tokens: a PREFILL step"
    )

    heading("4. The ModelRunner computes the step: prefill, all prompt tokens at once")
    trace = ShapeTrace(runner.model)
    handle = runner.submit(batch)
    result = handle.wait()
    trace.show(shape)
    cache = runner.kv_caches[0]
    size = runner.resolved.block_size
    slots = [sequence.block_table.blocks[p // size] * size + p % size for p in range(len(token_ids))]
    keys = cache.key.flatten(0, 1)  # [num_slots, num_kv_heads, head_dim]
    written = int((keys.abs().sum(dim=(1, 2)) > 0).sum())
    print()
    say(
        f"Each layer stored its keys and values in its pages, {list(cache.key.shape)} for the keys = [blocks and one "
        f"for padding, block_size, num_kv_heads, head_dim]. In layer 0 exactly {written} slots are no longer zero: "
        f"slots {slots[0]} … {slots[-1]}, one for each prompt token. No later step computes them again."
    )

    heading("5. Logits become a token")
    with torch.inference_mode():
        logits = runner.model.compute_logits(trace.hidden[-1:])  # [1, vocab_size]
    probabilities = logits.softmax(dim=-1)[0]
    say(
        f"Only the last position is asked for logits, {list(logits.shape)}: a number for each token of the vocabulary. "
        "Softmax makes probabilities of them; with temperature=0 the likeliest token is taken."
    )
    print()
    for probability, token_id in zip(*probabilities.topk(5), strict=True):
        piece, share = repr(tokenizer.decode([int(token_id)])), float(probability)
        print(f"  {int(token_id):>4}  {piece:<12}{share:>8.2%}  {bar(share, 1.0)}")
    print(f"\n  sampled by the engine: {result.token_ids.tolist()} = {tokenizer.decode(result.token_ids.tolist())!r}")
    ended = scheduler.update(batch, result)
    print(f"  after update(): status={sequence.status.name}. The first token came from the prefill step.")

    heading("6. Decode: one token in, one token out, until the model says that it is done")
    while not ended:
        batch = scheduler.schedule()
        assert batch is not None, "the sequence has not ended"
        first_decode = scheduler.rows.num_tokens[0] == len(token_ids) + 1
        if first_decode:
            trace = ShapeTrace(runner.model)
        result = runner.submit(batch).wait()
        if first_decode:
            trace.show(shape, brief=True)
            print()
            say(
                "The same layers, one token wide: its query reads the keys and values of all tokens before it from the "
                f"cache. The batch that asked for it was {batch.buffer.nbytes} bytes: a header and the row to run. "
                "The token itself is in the device's rows already, where the step before wrote it."
            )
            print()
        blocks = list(sequence.block_table.blocks)
        ended = scheduler.update(batch, result)
        token = result.token_ids.tolist()
        print(f"  step {batch.step:>2}: token {token[0]:>3} {tokenizer.decode(token)!r:<14} blocks {blocks}")
    output = sequence.output_token_ids.tolist()
    answer = tokenizer.decode(output, skip_special_tokens=True)
    print(f"\n  finish_reason={sequence.finish_reason!r}; {len(output)} tokens -> {answer!r}")
    print(f"  blocks in use now: {scheduler.block_manager.num_used_blocks} (they went back when the sequence ended)")
    runner.shutdown()

    heading("7. The same in one call")
    with LLM("tiny", device="cpu", max_model_len=512, num_kvcache_blocks=32) as llm:
        same = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    print("  LLM('tiny').generate(prompt, SamplingParams(temperature=0, …))")
    print(f"  {same.text!r}\n  the same tokens as by hand: {same.token_ids == output}")


class ShapeTrace:
    """Records what each module of the next forward pass returns, in the order of the calls."""

    def __init__(self, model: Any) -> None:
        self.shapes: dict[str, list[int]] = {}
        self.hidden: Any = None  # of the last norm: what the LM head reads; [num_tokens, hidden_size]
        self._model = model
        self._hooks = [module.register_forward_hook(self._note(name)) for name, module in model.named_modules() if name]
        self._hooks.append(model.register_forward_hook(self._end))

    def _note(self, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self.shapes[name] = list(first.shape)
            if name.endswith("qkv_proj"):
                for part, heads in zip(("query", "key", "value"), module.split_heads(first), strict=True):
                    self.shapes[f"{name}.{part}"] = list(heads.shape)

        return hook

    def _end(self, module: Any, inputs: Any, output: Any) -> None:
        self.hidden = output
        for hook in self._hooks:
            hook.remove()

    def show(self, shape: Any, *, brief: bool = False) -> None:
        layer = "model.layers.0."
        names = {
            "model.embed_tokens": "token ids looked up in the table: a vector each",
            f"{layer}self_attn.qkv_proj": "layer 0: RMS norm, then one product for queries, keys and values",
            f"{layer}self_attn.qkv_proj.query": f"  its queries: {shape.num_heads} heads of {shape.head_dim}",
            f"{layer}self_attn.qkv_proj.key": f"  its keys: {shape.num_kv_heads} heads, each for "
            f"{shape.num_heads // shape.num_kv_heads} query heads; normed, rotated, stored",
            f"{layer}self_attn.qkv_proj.value": "  its values, stored beside the keys",
            f"{layer}self_attn.o_proj": "  attention's result, back to hidden_size; added to the stream",
            f"{layer}mlp.gate_up_proj": "  MLP: silu(gate) · up",
            f"{layer}mlp.down_proj": f"  and down; layers 1 … {shape.num_layers - 1} do the same",
            "model.norm": "the last norm",
        }
        if brief:
            names = {
                name: text for name, text in names.items() if not name.endswith(("query", "value", "gate_up_proj"))
            }
        rows = [(name.replace("model.", "", 1), str(self.shapes[name]), text) for name, text in names.items()]
        table(["module", "output shape", "what it is"], rows, left=3)


if __name__ == "__main__":
    main()
