"""A draft model: the same tokens as without, whatever it drafts, and a KV cache that is right where it drafts.

A draft model that equals the model drafts exactly the tokens that are sampled, at any temperature. So a wrong key in
its cache, after chunks of prompts, prefix hits, preemption or refused drafts, shows as a draft that is refused. Where
it is left out of steps, prefix hits lack tokens, and such a draft may be wrong.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, InvalidArgumentError, LLMEngine, ModelLoadError, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.scheduler import _MAX_ADMISSIONS
from nanovllm.engine_factory import make_speculation
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER, num_tokenizer_tokens
from nanovllm.report.__main__ import main as report
from nanovllm.runner.draft_model import ModelWithDraft
from nanovllm.speculation import draft_model, drafter
from nanovllm.speculation.draft_length import DraftRate, draft_length
from tests.distributed.rank_processes import ONLY_LINUX
from tests.end_to_end.test_real_schedules import DETERMINISTIC, Request
from tests.engine.random_policy import RandomPolicy
from tests.engine.simulated_executor import SimulatedExecutor, make_config
from tests.engine.test_schedules import Request as SimulatedRequest
from tests.engine.test_schedules import cache_sizes, check_answers, engines
from tests.engine.test_schedules import requests as simulated_requests
from tests.models.checkpoints import make_checkpoint
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.properties import examples
from tests.runner.cpu_graphs import GraphLoader
from tests.runner.test_mixed_schedules import AROUND_SIZES, LENGTHS, answer, answers_as_they_arrive, check_same
from tests.small_llm import assert_empty, generate, token_ids
from tests.speculation.test_tokens import DEVICES, ENGINES, requests

MAX_DRAFT = 5
PROMPTS = ["a b c d e f a b c d e f a b c", "count from 3 to 30", "one two three one two three one two"]


def speculating(params: SamplingParams, speculate: bool) -> SamplingParams:
    params = params.clone()
    params.speculate = speculate
    return params


# No request refuses drafts, so that no step leaves the draft model out, and its cache has all tokens.
drafting_requests = requests.map(lambda drawn: [replace(each, params=speculating(each.params, True)) for each in drawn])


def drafted_by(folder: Path | str, **more: Any) -> dict[str, Any]:
    return {"speculative_config": {"model": str(folder), "num_speculative_tokens": MAX_DRAFT, **more}}


def as_long_as_possible(share: float, num_rows: int, longest: int, **settings: Any) -> int:
    """Stands in for `draft_length`: drafts whether they pay or not."""
    return longest


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_model, "draft_length", as_long_as_possible)


@dataclass(frozen=True)
class Folders:
    """A model, and draft models for it."""

    model: Path
    drafts: dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    def new(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    model = make_qwen3_checkpoint(new("qwen3"))
    smaller = {"num_hidden_layers": 1, "head_dim": 16, "num_key_value_heads": 1, "hidden_size": 32}
    drafts = {"the model itself": model, "a random one": make_qwen3_checkpoint(new("draft"), seed=1, **smaller)}
    for family, variant in (("llama", "group_size_4_tied"), ("gemma3", None), ("opt", None)):
        drafts[family] = make_checkpoint(new(family), family, variant, vocab_size=320, max_position_embeddings=256)
    return Folders(model, drafts)


@pytest.fixture(scope="module", params=DEVICES)
def loader(request: pytest.FixtureRequest, folders: Folders) -> GraphLoader:
    return GraphLoader(folders.model, request.param, "_mixed_graphs", **LENGTHS)


@pytest.fixture(scope="module")
def plain(loader: GraphLoader) -> Iterator[LLM]:
    with loader(use_graphs=False, max_num_seqs=16, enable_prefix_caching=False) as llm:
        yield llm


class Watch:
    """Notes the batches of an engine."""

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[ScheduledBatch] = []
        schedule = engine.scheduler.schedule

        def note() -> ScheduledBatch | None:
            if (batch := schedule()) is not None:
                self.batches.append(batch)
            return batch

        monkeypatch.setattr(engine.scheduler, "schedule", note)

    @property
    def runs(self) -> list[bool]:
        """Whether the draft model computes the tokens, of each batch."""
        return [not batch.needs.skips_draft_model for batch in self.batches]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("use_graphs", "depth"), [(True, 1), (False, 2)])
@pytest.mark.parametrize(
    ("name", "draft"), [*((name, "the model itself") for name in ENGINES), ("a small cache", "a random one")]
)
def test_drafts_change_no_token(
    loader: GraphLoader, plain: LLM, folders: Folders, *, name: str, draft: str, use_graphs: bool, depth: int
) -> None:
    loader.replays.clear()
    settings_of_draft = drafted_by(folders.drafts[draft])
    with loader(use_graphs, pipeline_depth=depth, **ENGINES[name], **settings_of_draft) as llm:

        @settings(DETERMINISTIC, max_examples=examples(40))
        @given(seed=st.integers(0, 2**32), drawn=drafting_requests if draft == "the model itself" else requests)
        def check(seed: int, drawn: list[Request]) -> None:
            check_answers_of(llm, plain, seed, drawn)

        check()
        statistics = llm.llm_engine.statistics
        share = statistics.num_accepted_tokens / statistics.num_draft_tokens
        assert statistics.num_draft_tokens > 100
        assert share >= 0.99 if draft == "the model itself" else share < 0.5
        assert (statistics.num_preemptions > 0) == (name == "a small cache")
        assert statistics.num_prefix_hits > 0
    batches: list[ScheduledBatch] = [batch for batch, _, _ in loader.replays]
    if use_graphs and name != "one at a time":
        assert any(len(batch.section("proposals")) for batch in batches), "drafts after steps with prompt tokens"
        assert any(batch.needs.skips_draft_model for batch in batches) == (draft == "a random one")


def check_answers_of(llm: LLM, plain: LLM, seed: int, drawn: list[Request]) -> None:
    """Requests get the tokens of an engine without drafts. seed: of a random schedule."""
    engine = llm.llm_engine
    engine.scheduler.policy = RandomPolicy(engine.resolved, seed, AROUND_SIZES)
    outputs = plain.generate([r.prompt for r in drawn], [r.params for r in drawn], use_tqdm=False)
    check_same(answers_as_they_arrive(llm, drawn), [answer(output) for output in outputs])


@pytest.mark.parametrize(("use_graphs", "depth"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("draft", ["the model itself", "a random one"])
def test_steps_without_the_draft_model_change_no_token(
    loader: GraphLoader,
    plain: LLM,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
    *,
    draft: str,
    use_graphs: bool,
    depth: int,
) -> None:
    """Rows are given up, and others are not, beside more rows than may draft, preemption and incomplete prefixes."""
    monkeypatch.setattr(draft_model, "MAX_DRAFTING_ROWS", 3)
    monkeypatch.setattr(drafter, "MAX_DRAFTING_ROWS", 3)
    monkeypatch.setattr(ModelWithDraft, "draft_cost", 0.05)  # the model itself can pay
    sizes = {"max_num_seqs": 8, "num_kvcache_blocks": 14}  # room for the largest request
    with loader(use_graphs, pipeline_depth=depth, **sizes, **drafted_by(folders.drafts[draft])) as llm:
        watch, ran = Watch(llm.llm_engine, monkeypatch), set[int]()
        model: Any = llm.llm_engine.executor._runner.model  # type: ignore[attr-defined]
        model.draft.register_forward_hook(lambda *_: ran.add(len(watch.batches) - 1))

        @settings(DETERMINISTIC, max_examples=examples(40))
        @given(seed=st.integers(0, 2**32), drawn=requests)
        def check(seed: int, drawn: list[Request]) -> None:
            check_answers_of(llm, plain, seed, drawn)

        check()
        statistics = llm.llm_engine.statistics
        assert statistics.num_draft_tokens > 100 or draft == "a random one"
        assert statistics.num_prefix_hits > 0
        assert statistics.num_preemptions > 0
    wanted = {step for step, runs in enumerate(watch.runs) if runs}
    has_cuda_graphs = use_graphs and loader.device == "cuda"  # whose replays run no hook
    assert ran <= wanted if has_cuda_graphs else ran == wanted
    assert max(len(batch.decode_rows) for batch in watch.batches) > 3
    decodes = [runs for runs, batch in zip(watch.runs, watch.batches, strict=True) if len(batch.decode_rows)]
    assert 0.1 < sum(decodes) / len(decodes) < 0.95


@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    engines,
    st.lists(simulated_requests, min_size=1, max_size=12),
    st.integers(0, 20),
    st.none() | st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from([1, 2, 64]),
    st.integers(1, 9),
)
def test_answers_do_not_depend_on_drafts(
    engine_values: dict[str, int],
    wanted: list[SimulatedRequest],
    spare_blocks: int,
    policy_seed: int | None,
    always_drafts: bool,
    max_drafting_rows: int,
    max_draft: int,
) -> None:
    """The simulated device also checks what the draft model's cache holds."""
    sizes = cache_sizes(engine_values["block_size"], wanted, spare_blocks)
    resolved = make_config(**engine_values, **sizes, draft_cost=0.1)
    speculative = {"model": "simulated", "num_speculative_tokens": max_draft}
    config = EngineConfig("simulated", skip_tokenizer_init=True, speculative_config=speculative)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_model, "MAX_DRAFTING_ROWS", max_drafting_rows)
        patch.setattr(drafter, "MAX_DRAFTING_ROWS", max_drafting_rows)
        if always_drafts:
            patch.setattr(draft_model, "draft_length", as_long_as_possible)
        engine = LLMEngine(
            config, lambda config, stopwatch: SimulatedExecutor(resolved), make_speculation=make_speculation
        )
        check_answers(engine, wanted, policy_seed)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("draft", ["llama", "gemma3", "opt", "fp8", "int4"])
def test_any_model_with_the_same_vocabulary_drafts(folders: Folders, draft: str) -> None:
    """Other families, head sizes and windows, and quantised weights, which guess most tokens of the model itself."""
    quantised = draft not in folders.drafts
    speculative = drafted_by(folders.model, quantization=draft) if quantised else drafted_by(folders.drafts[draft])
    prompts = [[*range(20, 70), index] for index in range(4)]
    params = [SamplingParams(temperature=t, seed=5, max_tokens=40, ignore_eos=True) for t in (0, 0, 0.6, 1.0)]
    answers = []
    for more in ({}, speculative):
        with LLM(str(folders.model), device="cpu", skip_tokenizer_init=True, max_model_len=200, **more) as llm:
            answers.append(token_ids(generate(llm, prompts, params)))
            statistics = llm.llm_engine.statistics
            assert_empty(llm)
    assert answers[0] == answers[1]
    assert statistics.num_draft_tokens > 20
    if quantised:
        assert statistics.num_accepted_tokens > statistics.num_draft_tokens / 4


def load(**settings: Any) -> LLM:
    return LLM("tiny", **{"device": "cpu", "max_model_len": 256, "num_kvcache_blocks": 128, **settings})


@ONLY_LINUX
@pytest.mark.usefixtures("always")
def test_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=60, ignore_eos=True) for i, t in enumerate((0, 0.3, 0.9))
    ]
    with load() as llm:
        expected = token_ids(generate(llm, PROMPTS, params))
    refusing = [speculating(each, False) for each in params]
    with load(tensor_parallel_size=2, pipeline_depth=2, **drafted_by("tiny")) as llm:
        assert token_ids(generate(llm, PROMPTS, params)) == expected
        statistics = llm.llm_engine.statistics
        assert statistics.num_accepted_tokens >= 0.99 * statistics.num_draft_tokens > 50
        watch = Watch(llm.llm_engine, monkeypatch)
        assert token_ids(generate(llm, PROMPTS, refusing)) == expected
        assert token_ids(generate(llm, PROMPTS, [params[0], *refusing[1:]])) == expected
        assert sorted({*watch.runs}) == [False, True], "steps with the draft model and without it"


@pytest.mark.usefixtures("always")
def test_stop_rules_completions_and_aborts() -> None:
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=60, ignore_eos=True, n=3, logprobs=1)
    answers = []
    for more in ({}, {**drafted_by("tiny"), "pipeline_depth": 2}):
        with load(**more) as llm:
            outputs = [each for output in generate(llm, PROMPTS, params) for each in output.outputs]
            text = outputs[0].text
            stopped = [params.clone() for _ in range(4)]
            for index, each in enumerate(stopped):
                each.n, each.stop = 1, text[20 + 7 * index :][:3]
            outputs += [output.outputs[0] for output in generate(llm, [PROMPTS[0]] * 4, stopped)]
            answers.append([(each.text, each.token_ids, each.finish_reason) for each in outputs])
            assert all(len(each.logprobs or []) == len(each.token_ids) for each in outputs)
            engine = llm.llm_engine
            for num_steps in range(1, 6):  # aborted with drafts in flight, before and after they are verified
                engine.add_request("left", PROMPTS[0], SamplingParams(temperature=0, max_tokens=99, ignore_eos=True))
                for _ in range(num_steps):
                    engine.step()
                engine.abort_request("left")
                while engine.has_unfinished_requests():
                    engine.step()
            assert_empty(llm)
    assert answers[0] == answers[1]


@pytest.mark.usefixtures("always")
def test_drafts_show_in_the_log_the_metrics_and_the_report(
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "log.jsonl"
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(log))
    monkeypatch.setenv("NANOVLLM_LOG_FORMAT", "json")
    caplog.set_level(logging.INFO, logger="nanovllm")
    takes = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    refuses = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, speculate=False)
    with load(**drafted_by("tiny")) as llm:
        generate(llm, PROMPTS, [takes, takes, refuses])
        statistics = llm.llm_engine.statistics
        metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        finished = [record.fields for record in caplog.records if record.event == "request.finished"]
    assert sorted("num_draft_tokens" in fields for fields in finished) == [False, True, True]
    assert sum(fields.get("num_draft_tokens", 0) for fields in finished) == statistics.num_draft_tokens > 0
    assert metrics["vllm:spec_decode_num_draft_tokens"] == statistics.num_draft_tokens
    assert metrics["vllm:spec_decode_num_accepted_tokens"] == statistics.num_accepted_tokens
    loaded = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(line.get("event") == "model.config" for line in loaded) == 2, "both models are logged"
    report([str(log), "--summary"])
    assert f"of {statistics.num_draft_tokens} drafted tokens were right" in capsys.readouterr().out


def test_a_draft_model_that_cannot_pay_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model of the model's own size: the steps are those without it."""
    steps = []
    for more in ({}, drafted_by("tiny")):
        with load(**more) as llm:
            watch = Watch(llm.llm_engine, monkeypatch)
            generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
            steps.append([len(batch.buffer) for batch in watch.batches])
            assert any(watch.runs) == (not more)
    assert steps[0] == steps[1]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_row_whose_drafts_never_pay_is_given_up(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_rows: int, depth: int
) -> None:
    """After a few steps the draft model runs no more, until another request comes; a refused one does not run it."""
    caplog.set_level(logging.INFO, logger="nanovllm")
    settings_of_draft = drafted_by(folders.drafts["a random one"])
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    prompts = [[*range(20 + row, 40 + row)] for row in range(num_rows)]
    with LLM(
        str(folders.model),
        device="cpu",
        skip_tokenizer_init=True,
        max_model_len=200,
        pipeline_depth=depth,
        **settings_of_draft,
    ) as llm:
        num_runs = 0

        def count(*arguments: Any) -> None:
            nonlocal num_runs
            num_runs += 1

        model: Any = llm.llm_engine.executor._runner.model  # type: ignore[attr-defined]
        model.draft.register_forward_hook(count)
        watch = Watch(llm.llm_engine, monkeypatch)
        for _ in range(2):  # the second time, most of the prompt is cached
            num_runs = 0
            watch.batches.clear()
            generate(llm, prompts, params)
            off = [record.fields["why"] for record in caplog.records if record.event == "speculation.off"]
            assert off == ["drafts do not pay"] * num_rows
            caplog.clear()
            runs, num_drafted = watch.runs, sum(len(batch.section("proposals")) > 0 for batch in watch.batches)
            assert runs == sorted(runs, reverse=True), "given up once and for all"
            assert 1 < sum(runs) <= 30 < 90 < len(runs)
            assert sum(runs) + num_drafted <= num_runs <= sum(runs) + MAX_DRAFT * num_drafted
        num_runs = 0
        generate(llm, prompts, speculating(params, False))
        assert num_runs == 0
        assert_empty(llm)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, 512), (8, 256), (64, 40), (65, 40), (256, 40)])
def test_drafts_that_are_all_wrong_cost_little(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_tokens: int, depth: int
) -> None:
    """At most 2 % of the time, when a run of the draft model takes 15 % of a step."""
    monkeypatch.setattr(SimulatedExecutor, "_draft", lambda self, row, num_tokens: [0] * num_tokens)
    resolved = make_config(
        draft_cost=0.09,
        num_blocks=4000,
        max_model_len=600,
        max_num_batched_tokens=512,
        max_num_seqs=num_rows,
        pipeline_depth=depth,
    )
    config = EngineConfig("simulated", skip_tokenizer_init=True, **drafted_by("simulated"))
    engine = LLMEngine(config, lambda config, stopwatch: SimulatedExecutor(resolved), make_speculation=make_speculation)
    watch = Watch(engine, monkeypatch)
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    check_answers(engine, [SimulatedRequest([1 + row % 40, 2], params, 0) for row in range(num_rows)], None)
    num_rounds = sum(max(batch.section("proposals")["num_tokens"], default=0) for batch in watch.batches)
    assert len(watch.batches) == num_tokens + (num_rows - 1) // _MAX_ADMISSIONS  # so many steps admit before the last
    assert 0.15 * (sum(watch.runs) + num_rounds) <= 0.02 * num_tokens
    assert any(watch.runs) == (num_rows < 64)


def test_a_share_that_cannot_be_reached_is_known_beforehand() -> None:
    rate = DraftRate()
    expected = rate.after(5)
    assert rate.share < expected < rate.after(12) < 1
    rate.observe(num_right=5, num_wrong=0)
    assert rate.share == pytest.approx(expected)


def test_a_draft_is_shorter_the_more_its_tokens_cost() -> None:
    for overlaps in (False, True):
        for share in (0.5, 0.7, 0.9, 0.99):
            lengths = [
                draft_length(share, 1, 16, overlaps=overlaps, token_cost=cost) for cost in (0.0, 0.1, 0.3, 0.6, 1.1)
            ]
            assert lengths == sorted(lengths, reverse=True)
            assert lengths[-1] == 0
    assert draft_length(0.9, 1, 16, overlaps=True, token_cost=0.2) >= 4


# ---- errors


def with_vocabulary(folder: Path, size: int) -> Path:
    """Copies the tiny checkpoint with fewer tokens in its tokenizer."""
    for path in TINY_MODEL_FOLDER.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: index for token, index in vocab.items() if index < size}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_model_that_cannot_draft_is_refused_before_it_is_loaded(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"config\.model=.* the vocabulary of model='tiny': 512.*is 320"):
        load(**drafted_by(folders.model))
    num_tokens = num_tokenizer_tokens(TINY_MODEL_FOLDER)
    assert num_tokens is not None
    draft = with_vocabulary(tmp_path, 300)
    with pytest.raises(InvalidArgumentError, match=rf"config\.model=.* same tokenizer.*tokens, .* has {num_tokens}"):
        load(**drafted_by(draft))
    with pytest.raises(ModelLoadError, match="nowhere"):
        load(**drafted_by("./nowhere"))
    odd = make_qwen3_checkpoint(tmp_path / "odd", num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(InvalidArgumentError, match=r"tensor_parallel_size=2 .* one of 1.*draft model, .*odd"):
        LLM(str(folders.model), device="cpu", skip_tokenizer_init=True, tensor_parallel_size=2, **drafted_by(odd))
    longer = {"max_position_embeddings": 4096}
    with pytest.raises(InvalidArgumentError, match=r"at least max_model_len=2048 tokens.*max_model_len=256"):
        LLM(
            str(folders.model),
            device="cpu",
            skip_tokenizer_init=True,
            max_model_len=2048,
            hf_overrides=longer,
            **drafted_by(folders.model),
        )
    assert num_tokenizer_tokens(folders.model) is None
