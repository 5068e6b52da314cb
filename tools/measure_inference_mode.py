"""Measures what torch.inference_mode gains: `python tools/measure_inference_mode.py` (docs/inference-mode.md).

Three tables on a CPU, on the checkpoint that ships: single torch calls, decode steps of our engine, and what autograd
keeps of one forward pass of the same model in transformers, whose weights can be trained. Modes alternate, so that
other load on the machine affects all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": nullcontext,
}
CALLS_PER_ROUND = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each mode (default 15)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens a request decodes in a turn (default 200)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the forward pass in transformers")
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; {args.rounds} rounds, medians (quartiles)")
    measure_calls(args.rounds)
    measure_engine(args.rounds, args.tokens)
    measure_graph(args.rounds, args.prompt)


def measure_calls(rounds: int) -> None:
    """Times one small torch call: a mode costs the same whatever the call computes."""
    print("\none torch call, ns        view            add in place")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in MODES}
    for _, name in turns(rounds):
        with MODES[name]():
            hidden, weight = torch.zeros(1, 256), torch.ones(1, 256)
            seconds[name].append((repeat(lambda h=hidden: h.view(256)), repeat(lambda h=hidden, w=weight: h.add_(w))))
    for name, pairs in seconds.items():
        columns = (described([pair[index] / CALLS_PER_ROUND for pair in pairs], 1e9, 0) for index in (0, 1))
        print(f"{name:<16}{'   '.join(columns)}")


def repeat(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(CALLS_PER_ROUND):
        call()
    return time.perf_counter() - started


def measure_engine(rounds: int, num_tokens: int) -> None:
    """Measures an engine of its own for each mode, since a tensor made in inference mode stays an inference tensor."""
    print(f"\ndecode step of the engine, one request of {num_tokens} tokens, µs")
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    answers = set()
    with ExitStack() as stack:
        engines = {}
        for name in MODES:
            with engine_runs_in(name):
                llm = LLM("tiny", device="cpu", max_num_seqs=1, max_model_len=num_tokens + 16)
            engines[name] = stack.enter_context(llm)
        for round_, name in turns(rounds + 1):  # the first warms up
            engine = engines[name].llm_engine
            before = engine.statistics.copy()
            with engine_runs_in(name):
                (output,) = engines[name].generate([[1, 2, 3, 4]], params, use_tqdm=False)
            done = engine.statistics.since(before)
            answers.add(tuple(output.outputs[0].token_ids))
            if round_:
                seconds[name].append(done.decode_seconds / (num_tokens - 1))
    assert len(answers) == 1, "the mode must not change a token"
    for name, samples in seconds.items():
        ratio = statistics.median(samples) / statistics.median(seconds["inference_mode"]) - 1
        print(f"{name:<16}{described(samples, 1e6, 0)}   {ratio:+.1%}")


@contextmanager
def engine_runs_in(name: str) -> Iterator[None]:
    """Replaces torch.inference_mode, which the runner enters itself, by another mode."""
    with mock.patch.object(torch, "inference_mode", MODES[name]):
        yield


def measure_graph(rounds: int, prompt_len: int) -> None:
    """Measures transformers' model, whose weights require gradients: `grad` records a graph and keeps its tensors."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_FOLDER, dtype=torch.float32)
    prompt = torch.arange(prompt_len).remainder(256).unsqueeze(0)
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    kept: dict[str, int] = {}
    for round_, name in turns(rounds + 1):
        with MODES[name]():
            started = time.perf_counter()
            logits = model(prompt, use_cache=False).logits
            elapsed = time.perf_counter() - started
            if round_:
                seconds[name].append(elapsed)
            else:
                kept[name] = saved_bytes(lambda: model(prompt, use_cache=False).logits, model)
        del logits
    weights = sum(weight.nbytes for weight in model.parameters())
    print(
        f"\nforward pass of {prompt_len} tokens in transformers, ms, and MB kept for a backward pass "
        f"(the weights are {weights / 1e6:.1f} MB)"
    )
    for name, samples in seconds.items():
        print(f"{name:<16}{described(samples, 1e3, 1)}   {kept[name] / 1e6:6.1f} MB")


def saved_bytes(forward: Callable[[], torch.Tensor], model: torch.nn.Module) -> int:
    """Returns the bytes of all storages that the graph of `forward` keeps alive, weights apart."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept_alive = forward()  # else storages would be freed, and their addresses counted twice
    del kept_alive
    return sum(sizes.values())


def turns(rounds: int) -> Iterator[tuple[int, str]]:
    """Yields (round, mode): each mode once a round, in an order that rotates."""
    names = list(MODES)
    for round_ in range(rounds):
        for offset in range(len(names)):
            yield round_, names[(round_ + offset) % len(names)]


def described(samples: list[float], unit: float, digits: int) -> str:
    low, median, high = statistics.quantiles(samples, n=4)
    return f"{median * unit:8.{digits}f} ({low * unit:.{digits}f}–{high * unit:.{digits}f})"


if __name__ == "__main__":
    main()
