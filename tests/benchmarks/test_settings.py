"""What a benchmark runs: defaults by device, workloads that fit the model, and the options of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.benchmarks import settings as settings_module
from nanovllm.benchmarks.settings import BenchmarkSettings, WorkloadError, choose_workloads, make_plan
from nanovllm.benchmarks.workloads import WORKLOADS
from nanovllm.cli.bench import parse_arguments, settings_of
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER
from nanovllm.utils import env


def settings_from(*arguments: str) -> BenchmarkSettings:
    return settings_of(parse_arguments(arguments, "bench.py"))


def test_without_a_gpu_the_tiny_checkpoint_runs_mixed() -> None:
    said: list[str] = []
    plan = make_plan(settings_from("--device", "cpu", "--num-seqs", "2"), said.append)
    assert (plan.model, plan.load_format, list(plan.workloads)) == ("tiny", "auto", ["mixed"])
    assert plan.workloads["mixed"] == WORKLOADS["mixed"].draw(2, plan.model_config.vocab_size, seed=0)
    assert plan.max_model_len == 4096
    assert len(said) == 1


def test_with_a_gpu_the_shape_runs_classic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "has_gpu", lambda device: True)
    said: list[str] = []
    plan = make_plan(settings_from("--num-seqs", "2"), said.append)
    assert (plan.model, plan.load_format, list(plan.workloads)) == ("qwen3-0.6b", "dummy", ["classic"])
    assert said == []


def test_the_longest_workload_settles_max_model_len() -> None:
    arguments = ("--model", "qwen3-0.6b", "--workload", "long", "mixed", "--num-seqs", "1", "--device", "cpu")
    assert make_plan(settings_from(*arguments), print).max_model_len == WORKLOADS["long"].longest
    assert make_plan(settings_from(*arguments, "--max-model-len", "9000"), print).max_model_len == 9000


def test_all_leaves_out_what_is_too_long() -> None:
    said: list[str] = []
    names = choose_workloads(["all"], "tiny", 4096, said.append)
    assert names == [name for name in WORKLOADS if name != "long"]
    assert said == ["Left out: workload 'long' has requests of 8256 tokens, and 'tiny' takes 4096."]
    with pytest.raises(WorkloadError, match="raise --max-model-len"):
        choose_workloads(["mixed", "long"], "tiny", 4096, said.append)


def test_a_workload_named_twice_runs_once() -> None:
    assert choose_workloads(["mixed", "single", "mixed"], str(TINY_MODEL_FOLDER), 4096, print) == ["mixed", "single"]


def test_engine_options_that_are_not_given_keep_llms_defaults() -> None:
    given = settings_from("--dtype", "float32", "--no-prefix-caching", "--enforce-eager")
    assert given.engine_options == {
        "dtype": "float32",
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "max_num_seqs": 512,
    }


def test_a_default_of_the_environment_gives_way_to_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", " ")
    env.log_level.set_default("WARNING")
    assert env.log_level() == "WARNING"
    env.log_level.set_default("ERROR")
    assert env.log_level() == "WARNING"


def test_the_modules_say_what_they_hold() -> None:
    """The package's docstring names each module."""
    import nanovllm.benchmarks

    text = nanovllm.benchmarks.__doc__ or ""
    for path in Path(nanovllm.benchmarks.__path__[0]).glob("[a-z]*.py"):
        assert f"`{path.stem}`" in text
