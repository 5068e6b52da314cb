"""tools/check_model.py: a model that agrees with transformers, and one that does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm.models.model_config import ModelConfig
from tests.models.checkpoints import make_checkpoint
from tools.check_model import Reference, compare, main, make_prompts, run_here


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_that_agrees(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path, family)
    assert main([str(tmp_path), "--tokens", "8"]) == 0
    told = capsys.readouterr().out
    assert f"of 8 tokens: {5 if family == 'gemma3' else 4} of" in told, "the longest prompt exceeds the window"
    assert told.endswith("Verdict: the same model.\n")


def test_a_model_that_differs(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one", "llama")
    make_checkpoint(tmp_path / "other", "llama", seed=1)
    prompts = make_prompts(ModelConfig.from_folder(tmp_path / "one"), 8)
    results = run_here(tmp_path / "one", prompts, 8, "cpu", "float32")
    found = compare(prompts, results, Reference(tmp_path / "other", "cpu", "float32"), 1e-3)
    assert found.largest_difference > 0.1
    assert not found.agrees(1e-3)
    same = Reference(tmp_path / "one", "cpu", "float32")
    assert compare(prompts, results, same, 1e-3).agrees(1e-3)
    wrong_token = [replace(result, token_ids=[*result.token_ids[:-1], 0]) for result in results]
    assert compare(prompts, wrong_token, same, 1e-3).num_equal == 0
    wrong_logprob = [replace(results[-1], logprobs=[{0: 0.0}])]
    assert not compare(prompts[-1:], wrong_logprob, same, 1e-3).agrees(1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["./nowhere"], "model='./nowhere': there is no such folder"), (["tiny", "--tokens", "0"], "max_tokens=0")],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"check_model.py: {message}")
