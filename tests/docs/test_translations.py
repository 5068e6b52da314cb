"""docs/zh: each page is its original in Chinese, in step with it: headings, code, tables, figures in them, links.

What a sentence says nobody checks but a reader. But a section, an example, a row, a figure in a table or a link that
one of the two pages has and the other has not is found here, without knowing Chinese.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.test_docs_guides import DOCS, GUIDES, LINK, ROOT, without_code

ZH = DOCS / "zh"
ORIGINALS = {
    "README.md": ROOT / "README.md",
    "LOGGING.md": ROOT / "LOGGING.md",
    **{f"{guide}.md": DOCS / f"{guide}.md" for guide in GUIDES},
}
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# The tables that a script writes are in LOGGING.md alone. Where they stand, the translation has a link to them.
GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)
HAN = re.compile(r"[\u4e00-\u9fff]")


def original(name: str) -> str:
    return GENERATED.sub("", ORIGINALS[name].read_text(encoding="utf-8"))


def translation(name: str) -> str:
    return (ZH / name).read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each row of each table."""
    found: list[list[list[str]]] = [[]]
    for line in without_code(text).splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def figures(cells: list[str]) -> list[str]:
    """Numbers in a row's cells; those within a word or a name in code are none."""
    plain = LINK.sub(lambda link: link["text"], " ".join(cells))
    return sorted(re.findall(r"(?<![\w.])\d[\d.,]*\d|(?<![\w.])\d", plain, re.ASCII))


def links(name: str, page: Path, text: str) -> Counter[str]:
    """Where a page leads, without anchors; a translated page counts as its original, and its own as nothing."""
    found: Counter[str] = Counter()
    for link in LINK.finditer(without_code(text)):
        target = link["target"].partition("#")[0]
        if target.startswith(("http://", "https://")):
            found[target] += 1
            continue
        path = (page.parent / target).resolve() if target else page
        path = ORIGINALS.get(path.name, path) if path.parent == ZH else path
        if path != ORIGINALS[name]:
            found[str(path.relative_to(ROOT))] += 1
    return found


def test_every_translation_has_an_original_and_the_other_way_round() -> None:
    assert {path.name for path in ZH.iterdir()} == set(ORIGINALS)


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_same_sections(name: str) -> None:
    levels = [re.findall(r"^(#+) ", without_code(text), re.MULTILINE) for text in (original(name), translation(name))]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_same_code(name: str) -> None:
    assert CODE.findall(original(name)) == CODE.findall(translation(name))


@pytest.mark.parametrize("name", ORIGINALS)
def test_tables_have_the_same_rows_and_figures(name: str) -> None:
    ours, theirs = tables(original(name)), tables(translation(name))
    assert [[len(row) for row in table] for table in ours] == [[len(row) for row in table] for table in theirs]
    for table, translated in zip(ours, theirs, strict=True):
        for row, translated_row in zip(table, translated, strict=True):
            assert figures(row) == figures(translated_row), (row, translated_row)


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_same_links(name: str) -> None:
    page = ZH / name
    assert links(name, ORIGINALS[name], original(name)) == links(name, page, translation(name))


@pytest.mark.parametrize("name", ORIGINALS)
def test_it_is_chinese_and_leads_to_its_original(name: str) -> None:
    text = re.sub(r"`[^`]*`|\(\S*\)", "", without_code(translation(name)))
    assert len(HAN.findall(text)) > 0.3 * len(re.sub(r"\s", "", text))
    targets = (link["target"].partition("#")[0] for link in LINK.finditer(translation(name)))
    assert ORIGINALS[name] in {(ZH / target).resolve() for target in targets}


def test_generated_tables_are_not_copied() -> None:
    """They change with the code; a copy would have to be changed with them, or would be wrong."""
    assert "<!-- generated" not in translation("LOGGING.md")
    assert len(GENERATED.findall(ORIGINALS["LOGGING.md"].read_text(encoding="utf-8"))) == translation(
        "LOGGING.md"
    ).count("](../../LOGGING.md#")
