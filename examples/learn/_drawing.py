"""Shared by the lessons: the command line, and drawing in a terminal and, with matplotlib, in a PNG."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 100  # columns of a paragraph
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lesson_parser(doc: str, *, plot: bool = False) -> argparse.ArgumentParser:
    """Returns a parser whose --help is the script's docstring. plot: adds --plot FILE.png."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the picture with matplotlib, too")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line, and prepares the process: only the lesson is printed, on one thread.

    The model is so small that a second thread would mostly wait for the first.
    """
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    import torch  # after --help and mistakes on the command line, which are reported at once

    torch.set_num_threads(1)
    return args


def title(text: str) -> None:
    print(f"{'=' * WIDTH}\n{text}\n{'=' * WIDTH}")


def heading(text: str) -> None:
    print(f"\n--- {text} {'-' * max(WIDTH - len(text) - 5, 0)}\n")


def say(text: str) -> None:
    """Prints a paragraph, wrapped."""
    print(textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1, indent: int = 2) -> None:
    """Prints columns as wide as their longest cell, the first `left` aligned left, the others right."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    print(textwrap.indent("\n".join(lines), " " * indent))


def bar(value: float, largest: float, width: int = 40) -> str:
    """Returns `value` of `largest` as a bar; a value above 0 is a thin line at least."""
    if value <= 0 or largest <= 0:
        return ""
    return "█" * round(width * min(value / largest, 1.0)) or "▏"


def save_plot(path: Path | None, draw: Callable[[Figure], None], size: tuple[float, float] = (9.0, 5.0)) -> None:
    """Lets `draw` fill a figure and writes it as a PNG, if there is a path. Says so when matplotlib is missing."""
    if path is None:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"\nmatplotlib is not installed, so {path} is not drawn: pip install matplotlib. ", end="")
        print("The drawing above shows the same.")
        return
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # pixels without a display, and without pyplot's process-wide state
    draw(figure)
    figure.savefig(path, dpi=120)
    print(f"\nPicture: {path}")
