"""On a GPU: every backend, graphs against eager, and Qwen3-0.6B's shape against transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams
from tests.end_to_end.test_oracle import random_prompts, reference_tokens

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 151_936
HALF_PRECISION_BACKENDS = ["triton", "torch"] + ["flash_attn"] * (importlib.util.find_spec("flash_attn") is not None)


@pytest.fixture(scope="module")
def qwen3_06b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in Qwen3-0.6B's shape, saved by transformers."""
    folder = tmp_path_factory.mktemp("qwen3-0.6b")
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        dtype="float32",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # transformers' small initial embeddings, tied, would only ever repeat the last token
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(3)
            layer.mlp.down_proj.weight.mul_(3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def make_llm(folder: Path, **settings: object) -> LLM:
    arguments = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_seqs": 64, "num_kvcache_blocks": 2048}
    if settings.get("attention_backend") == "flash_attn":
        arguments["num_kvcache_blocks"] = 256  # pages of 256 tokens
    return LLM(str(folder), **{**arguments, **settings})


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_fp32_tokens_equal_those_of_transformers(qwen3_06b: Path, backend: str, enforce_eager: bool) -> None:
    prompts = random_prompts(VOCAB_SIZE, num_prompts=16) + [p * 9 for p in random_prompts(VOCAB_SIZE, 1, 4)]
    settings = {"dtype": "float32", "attention_backend": backend, "enforce_eager": enforce_eager}
    with make_llm(qwen3_06b, **settings) as llm:
        tokens = [output["token_ids"] for output in llm.generate(prompts, greedy(32), use_tqdm=False)]
    expected = reference_tokens(qwen3_06b, prompts, 32, device="cuda")
    assert tokens == expected
    assert len({token for output in expected for token in output}) > 50, "the oracle only repeats itself"


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_fp32_tokens_of_small_batches_equal_those_of_transformers(qwen3_06b: Path, num_prompts: int) -> None:
    """Few rows have products of their own, with norms, gate and residual folded in."""
    prompts = random_prompts(VOCAB_SIZE, 5, num_prompts)
    with make_llm(qwen3_06b, dtype="float32", attention_backend="triton") as llm:
        tokens = [output["token_ids"] for output in llm.generate(prompts, greedy(32), use_tqdm=False)]
    assert tokens == reference_tokens(qwen3_06b, prompts, 32, device="cuda")


@pytest.mark.parametrize("backend", HALF_PRECISION_BACKENDS)
def test_bf16_logits_are_close_to_those_of_transformers(qwen3_06b: Path, backend: str) -> None:
    """Prefill, then a decode step, against transformers in bf16 on the same tokens."""
    prompts = [p * 9 for p in random_prompts(VOCAB_SIZE, 2, 8)]
    recorded: list[torch.Tensor] = []
    with make_llm(qwen3_06b, dtype="bfloat16", attention_backend=backend, enforce_eager=True) as llm:
        model = llm.llm_engine.executor._runner.model
        compute_logits = model.compute_logits

        def record(hidden: torch.Tensor) -> torch.Tensor:
            logits = compute_logits(hidden)
            recorded.append(logits.float())
            return logits

        model.compute_logits = record
        outputs = llm.generate(prompts, greedy(2), use_tqdm=False)
    reference = Qwen3ForCausalLM.from_pretrained(qwen3_06b, dtype=torch.bfloat16).cuda().eval()
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # so decode rows go
    for step, logits in enumerate(recorded):
        for row, index in enumerate(longest_first if step else range(len(prompts))):
            tokens = torch.tensor([prompts[index] + outputs[index]["token_ids"][:step]], device="cuda")
            with torch.inference_mode():
                expected = reference(tokens).logits[0, -1].float()
            error = ((logits[row] - expected).norm() / expected.norm()).item()
            print(f"{backend} step {step} row {row}: relative error {error:.2e}")
            assert error < 2e-2
    assert len(recorded) == 2


@pytest.mark.parametrize("num_prompts", [1, 2, 16])
@pytest.mark.parametrize("backend", HALF_PRECISION_BACKENDS[:1] + HALF_PRECISION_BACKENDS[2:])
def test_bf16_graphs_give_the_tokens_of_eager(qwen3_06b: Path, backend: str, num_prompts: int) -> None:
    """A batch whose size has a graph of its own runs the same kernels on the same shapes: equal to the bit."""
    prompts = random_prompts(VOCAB_SIZE, 3, 16)[:num_prompts]
    params = [SamplingParams(temperature=t, max_tokens=100, ignore_eos=True, seed=7) for t in (0, 0.8) * 8][
        :num_prompts
    ]
    tokens = []
    for enforce_eager in (False, True):
        with make_llm(qwen3_06b, attention_backend=backend, dtype="bfloat16", enforce_eager=enforce_eager) as llm:
            assert llm.llm_engine.resolved.use_cuda_graphs is not enforce_eager
            tokens.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
    assert tokens[0] == tokens[1]


def test_bf16_with_an_fp8_cache(qwen3_06b: Path) -> None:
    """Graphs give the tokens of eager to the bit; Triton's logits are those of torch on the same cache."""
    prompts = [p * 9 for p in random_prompts(VOCAB_SIZE, 3, 16)]
    params = [SamplingParams(temperature=t, max_tokens=60, ignore_eos=True, seed=7) for t in (0, 0.8) * 8]
    tokens = []
    for enforce_eager in (False, True):
        with make_llm(qwen3_06b, dtype="bfloat16", kv_cache_dtype="fp8", enforce_eager=enforce_eager) as llm:
            resolved = llm.llm_engine.resolved
            assert resolved.kv_cache_dtype == "fp8_e4m3"
            assert resolved.prefill_backend == resolved.decode_backend == "triton"
            tokens.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
    assert tokens[0] == tokens[1]
    logits = [fp8_logits(qwen3_06b, backend, prompts) for backend in ("triton", "torch")]
    error = (logits[0] - logits[1]).norm(dim=-1) / logits[1].norm(dim=-1)
    print(f"FP8 cache, Triton against torch: largest relative error of logits {error.max().item():.2e}")
    assert error.max() < 6e-2  # a bf16 rounding becomes an FP8 rounding where it crosses a border


def fp8_logits(folder: Path, backend: str, prompts: list[list[int]]) -> torch.Tensor:
    """Of a prefill that reads from the cache what an earlier one stored: [num_prompts, vocab_size] float32."""
    settings = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "enforce_eager": True}
    recorded: list[torch.Tensor] = []
    with make_llm(folder, attention_backend=backend, **settings) as llm:
        model = llm.llm_engine.executor._runner.model
        compute_logits = model.compute_logits

        def record(hidden: torch.Tensor) -> torch.Tensor:
            recorded.append(compute_logits(hidden))
            return recorded[-1]

        llm.generate(prompts, greedy(1), use_tqdm=False)
        model.compute_logits = record
        llm.generate([[*prompt, 7] for prompt in prompts], greedy(1), use_tqdm=False)
    return torch.cat(recorded).float()


def test_fp32_graphs_give_the_tokens_of_eager_at_every_size(qwen3_06b: Path) -> None:
    """Sequences end one after another, so that every batch size from 20 down to 1 runs, padded or not."""
    prompts = random_prompts(VOCAB_SIZE, 4, 20)
    params = [SamplingParams(temperature=0, max_tokens=2 + 2 * i, ignore_eos=True) for i in range(20)]
    tokens = []
    for enforce_eager in (False, True):
        with make_llm(qwen3_06b, attention_backend="triton", dtype="float32", enforce_eager=enforce_eager) as llm:
            tokens.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
    assert tokens[0] == tokens[1]


def test_the_cache_takes_what_is_allowed_and_gives_it_back() -> None:
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info()
    with LLM("tiny", gpu_memory_utilization=0.5, max_num_seqs=32) as llm:
        llm.generate([[1, 2, 3]] * 32, greedy(20), use_tqdm=False)
        used = free_before - torch.cuda.mem_get_info()[0]
        assert 0.4 * total < used < 0.52 * total
    assert free_before - torch.cuda.mem_get_info()[0] < 0.02 * total


def test_no_step_waits_for_the_device(qwen3_06b: Path) -> None:
    """Admission, prefill in chunks, mixed steps and decode: only reading a step's tokens waits, on its event."""
    prompts = random_prompts(VOCAB_SIZE, num_prompts=12)
    with make_llm(qwen3_06b, dtype="bfloat16", max_num_seqs=8, max_num_batched_tokens=64) as llm:
        engine = llm.llm_engine
        expected = [output["token_ids"] for output in llm.generate(prompts, greedy(24), use_tqdm=False)]  # compiles
        engine.reset_prefix_cache()
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, greedy(24))
        finished = {}
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):
                torch.ones(1, device="cuda").item()  # the watchdog is awake
            while engine.has_unfinished_requests():
                finished.update({output.request_id: output.outputs[0].token_ids for output in engine.step()})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [finished[str(index)] for index in range(len(prompts))] == expected


def test_overlap_changes_no_token(qwen3_06b: Path) -> None:
    prompts = random_prompts(VOCAB_SIZE, num_prompts=24)
    params = [SamplingParams(temperature=0.8, seed=index, max_tokens=8 + index) for index in range(24)]
    outputs = []
    for depth in (1, 2, 3):
        settings = {"dtype": "float32", "pipeline_depth": depth, "max_num_seqs": 8, "num_kvcache_blocks": 96}
        with make_llm(qwen3_06b, **settings) as llm:
            assert llm.llm_engine.resolved.pipeline_depth == depth
            outputs.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
    assert outputs[0] == outputs[1] == outputs[2]


def test_rows_that_share_a_prefix_give_the_tokens_of_rows_that_do_not(qwen3_06b: Path) -> None:
    """40 requests in two groups and some of their own, with graphs and without; four at a time, none of them shares."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()

    prefixes = [tokens(2000), tokens(1500)]
    prompts = [(prefixes[index % 2] if index % 5 else []) + tokens(3 + index) for index in range(40)]
    outputs = []
    for settings in ({}, {"enforce_eager": True}, {"max_num_seqs": 4}):
        with make_llm(qwen3_06b, dtype="float32", max_model_len=2100, **settings) as llm:
            outputs.append([output["token_ids"] for output in llm.generate(prompts, greedy(24), use_tqdm=False)])
            graphs = llm.llm_engine.executor._runner._graphs
            if not settings:
                assert any(needs.shares_prefix for _, needs in graphs._captured), "nothing was shared"
    assert outputs[0] == outputs[1] == outputs[2]
