"""docs/adding-a-model.md: a toy architecture, built from the page's code alone, gives transformers' logits."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nanovllm.models import architectures
from nanovllm.models.model_config import ModelConfig
from tests.models.checkpoints import make_checkpoint
from tests.models.paged_model import PagedModel, load_model
from tests.models.test_families import reference_logits
from tests.models.test_qwen3 import TOLERANCE, in_two_chunks, largest_difference, prompts
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
MODEL_FILE, TABLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def toy(code: str) -> str:
    return code.replace("Llama", "Toy").replace("llama", "toy")


def test_the_page_shows_llama_s_file() -> None:
    assert (ROOT / "nanovllm" / "models" / "llama.py").read_text(encoding="utf-8") == MODEL_FILE
    assert f"Llama is {len(MODEL_FILE.splitlines())} lines in a file of its own" in PAGE


def test_a_toy_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nanovllm.models.toy")
    exec(toy(MODEL_FILE), vars(module))
    monkeypatch.setitem(sys.modules, "nanovllm.models.toy", module)
    tables: dict[str, Any] = {}
    exec(toy(TABLES), tables)
    for name in ("MODELS", "OF_MODEL_TYPE", "DEFAULTS"):
        for key, value in tables[name].items():
            monkeypatch.setitem(getattr(architectures, name), key, value)

    folder = make_checkpoint(tmp_path, "llama", "biases")
    tokens = prompts(320)
    expected = reference_logits(folder, tokens)
    fields = json.loads((folder / "config.json").read_text())
    del fields["architectures"]
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "toy"}))
    config = ModelConfig.from_folder(folder)
    assert config.architecture == "ToyForCausalLM"
    assert type(model := load_model(folder)) is vars(module)["ToyForCausalLM"]
    assert largest_difference(in_two_chunks(PagedModel(model, config), tokens), expected) < TOLERANCE
