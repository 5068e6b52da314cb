"""examples/learn/attention_variance.py: what its figures must be by theory, and the picture."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.examples.test_learn import LEARN, check_picture, lesson, one_line
from tests.processes import run_python

SCRIPT = "attention_variance"
ARGUMENTS = ("--dims", "4", "64", "1024", "--queries", "300")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attention_variance") / "picture.png"


@pytest.fixture(scope="module")
def text(picture: Path) -> str:
    """What the script prints; it runs once."""
    return lesson(SCRIPT, *ARGUMENTS, "--plot", str(picture))


def figures(section: str, text: str) -> dict[tuple[int, bool], float]:
    """(d, divided) → the figure beside its bar."""
    (part,) = re.findall(rf"^--- {section}\..*?(?=^---|\Z)", text, re.MULTILINE | re.DOTALL)
    found: dict[tuple[int, bool], float] = {}
    for dim, plain, divided in re.findall(r"d=(\d+) +q·k +(\S+).*\n +q·k / √d +(\S+)", part):
        found |= {(int(dim), False): float(plain), (int(dim), True): float(divided)}
    return found


def test_the_variance_is_the_dimension_and_after_the_division_one(text: str) -> None:
    rows = re.findall(r"^  (\d+) +([\d.]+) +(\d+) +([\d.]+) +1$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [4, 64, 1024]
    for dim, variance, expected, divided in rows:
        assert dim == expected
        assert float(variance) == pytest.approx(int(dim), rel=0.05)
        assert float(divided) == pytest.approx(1, rel=0.05)


def test_entropy_falls_without_the_division_and_stays_with_it(text: str) -> None:
    """Of normal logits of variance 1, softmax has about ln n − 1/2 nats."""
    entropy = figures("2", text)
    assert entropy[4, False] > 3 * entropy[64, False] > 9 * entropy[1024, False] > 0
    for dim in (4, 64, 1024):
        assert entropy[dim, True] == pytest.approx(math.log(128) - 0.5, abs=0.05)


def test_the_gradient_vanishes_without_the_division_and_stays_with_it(text: str) -> None:
    gradient = figures("3", text)
    assert gradient[1024, False] < gradient[4, False] / 100
    divided = [gradient[dim, True] for dim in (4, 64, 1024)]
    assert max(divided) < 1.15 * min(divided)
    # |J g| for p all equal is |g| / n less g's mean; unequal p give more: e^(σ²/2) for logits of variance 1.
    assert divided[-1] == pytest.approx(math.exp(0.5) / 128, rel=0.3)


def test_the_checkpoint_answers_with_its_own_scale_only(text: str) -> None:
    rows = re.findall(r"^  ([\d.]+) +([\d.]+) +(\d+)/40 +(-?[\d.]+)", text, re.MULTILINE)
    right = {float(factor): int(count) for factor, _, count, _ in rows}
    assert right[1] == 40
    assert right[0.125] == right[0.5] == 0
    assert [scale for factor, scale, _, _ in rows if factor in ("1", "8")] == ["0.1250", "1.0000"]
    assert "It answers best at times 1." in one_line(text)


def test_picture(picture: Path, text: str) -> None:
    check_picture(text, picture)


def test_help_names_what_to_read_and_nonsense_is_refused() -> None:
    shown = lesson(SCRIPT, "--help")
    assert f"python examples/learn/{SCRIPT}.py" in shown
    files = re.findall(r"nanovllm/[\w/]+\.py", shown)
    assert len(files) == 2
    assert all((LEARN.parents[1] / file).is_file() for file in files)
    done = run_python(str(LEARN / f"{SCRIPT}.py"), "--keys", "1")
    assert done.returncode == 2
    assert "--keys and --queries 2 or more" in done.stderr
