"""docs/api.md: all of its code runs, and every public name is in it."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import nanovllm
from tools.generate_api_docs import generate_api

PATH = Path(nanovllm.__file__).resolve().parents[1] / "docs" / "api.md"
TEXT = PATH.read_text(encoding="utf-8")


def test_the_page_s_code_gives_what_the_page_says() -> None:
    results = doctest.testfile(str(PATH), module_relative=False, encoding="utf-8")
    assert results.attempted > 30
    assert results.failed == 0


def test_every_public_name_is_imported_on_the_page() -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
    assert {name for name in nanovllm.__all__ if not re.search(rf"\b{name}\b", code)} == set()


def test_the_tables_of_arguments_are_up_to_date() -> None:
    assert generate_api(TEXT) == TEXT, "run python tools/generate_api_docs.py"
