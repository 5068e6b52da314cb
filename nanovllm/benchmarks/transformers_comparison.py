"""The same work in transformers: the same weights, prompts and output lengths (`--compare transformers`).

All prompts form one batch, padded on the left, and are generated up to the longest output, as a user of `generate`
does. End-of-sequence tokens are off, as they are in the benchmark itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from nanovllm.attention.selection import select_attention
from nanovllm.benchmarks.report import spread_of
from nanovllm.benchmarks.settings import Say
from nanovllm.benchmarks.workloads import Requests
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES, PUBLISHED
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.model_context import ModelContext
from nanovllm.models.registry import get_model_class
from nanovllm.utils.loader import CheckpointForm, load_dummy_weights, weight_plan

EXPLANATION = (
    "\ntransformers: the same weights, prompts and output lengths; all prompts in one batch, padded on the left, "
    "generated up to the longest output (its end-of-sequence tokens are off), of which each request keeps its own."
)


@dataclass(frozen=True)
class TransformersRun:
    """One `generate` in transformers: its wall time, and the tokens that each request keeps."""

    seconds: float
    token_ids: list[list[int]]


class TransformersModel:
    """A model in transformers with the same weights as an engine's, on its device and in its dtype."""

    def __init__(self, name: str, *, device: torch.device, dtype: torch.dtype, dummy_seed: int | None) -> None:
        """Loads the folder `name`, or takes the engine's random weights of `dummy_seed` for a folder or a shape."""
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device = device
        if dummy_seed is None:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
        else:
            shape = BUILTIN_SHAPES.get(name)
            config = AutoConfig.from_pretrained(name) if shape is None else transformers_config(name)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            shape = ModelConfig.from_folder(name) if shape is None else shape
            model.load_state_dict(_dummy_checkpoint(shape, device, dtype, dummy_seed))
        self.model: Any = model.eval()

    def generate(self, requests: Requests, temperature: float) -> TransformersRun:
        """Generates for all requests once, from token ids to token ids. Temperature 0 is greedy."""
        started = time.perf_counter()
        longest = max(map(len, requests.prompts))
        input_ids = torch.zeros(len(requests.prompts), longest, dtype=torch.long)  # [num_seqs, longest]
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(requests.prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        # Replaced, because `generate` merges in the checkpoint's own (its end tokens, its top-k).
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max(requests.output_lens), pad_token_id=0, **sampling
        )
        output = self.model.generate(input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device))
        rows = output[:, longest:].tolist()
        tokens = [row[:count] for row, count in zip(rows, requests.output_lens, strict=True)]
        return TransformersRun(time.perf_counter() - started, tokens)


def compare_workload(
    result: dict[str, Any], runs: Sequence[TransformersRun], engine_tokens: list[list[int]] | None, say: Say
) -> dict[str, Any]:
    """Returns the entry `transformers` for the engine's `result`. The first of `runs` is the warm-up.

    With `engine_tokens` (greedy runs) it has the share of equal tokens.
    """
    entry = {"warm_up_seconds": runs[0].seconds, **spread_of([run.seconds for run in runs[1:]])}
    entry["ratio_of_best"] = entry["best_seconds"] / result["best_seconds"]
    entry["ratio_of_median"] = entry["median_seconds"] / result["median_seconds"]
    text = (
        f"  {result['workload']}: best {entry['best_seconds']:.3f} s, median {entry['median_seconds']:.3f} s "
        f"(warm-up {entry['warm_up_seconds']:.3f} s); nanovllm is {entry['ratio_of_best']:.2f}× as fast "
        f"by the best runs, {entry['ratio_of_median']:.2f}× by the medians"
    )
    if engine_tokens is not None:
        entry["equal_tokens"] = share_equal(engine_tokens, runs[-1].token_ids)
        text += f"; {entry['equal_tokens']:.1%} of the tokens are the same"
    say(text)
    return entry


def share_equal(left: list[list[int]], right: list[list[int]]) -> float:
    """Returns the share of positions with the same token in both."""
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


def transformers_config(name: str) -> Any:
    """Returns a built-in shape as a transformers configuration."""
    return AutoConfig.for_model(**PUBLISHED[name])


def _dummy_checkpoint(
    shape: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """Returns the engine's dummy weights (a function of seed, device and shape) by their names in a checkpoint."""
    attention = select_attention("torch", device, dtype, shape.head_dim, None)  # nothing is computed with it
    context = ModelContext(config=shape, backends=attention, parallel=TensorParallel(), dtype=dtype, device=device)
    model = get_model_class(shape.architecture)(context)
    load_dummy_weights(model, device, seed)
    parameters = dict(model.named_parameters())
    checkpoint = {
        _name_in_checkpoint(part.name, model.checkpoint_form): parameters[name][part.row :][: part.num_rows] - part.plus
        for name, parts in weight_plan(model).items()
        for part in parts
        if part.name is not None
    }
    if shape.tie_word_embeddings:
        table = _name_in_checkpoint("model.embed_tokens.weight", model.checkpoint_form)
        checkpoint["lm_head.weight"] = checkpoint[table]
    return checkpoint


def _name_in_checkpoint(name: str, form: CheckpointForm) -> str:
    for prefix, instead in form.prefixes.items():
        if instead is not None and name.startswith(instead):
            return prefix + name.removeprefix(instead)
    return name
