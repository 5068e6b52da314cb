"""Shared by the scripts of this folder: data, exact answers, measuring our index and hnswlib's, output files."""

from __future__ import annotations

import os

# Set before numpy is loaded: one thread for our index, as for hnswlib's. On matrices of 200 rows, BLAS's threads would
# wait for each other longer than they work.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", VECLIB_MAXIMUM_THREADS="1")

import argparse
import csv
import importlib.metadata
import math
import platform
import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from hnsw import HNSW, FloatArray, IntArray

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

RESULTS = Path(tempfile.gettempdir()) / "nanovllm-hnsw"
LEAST_SECONDS = 0.2  # of measuring: a pass of hnswlib's takes some milliseconds
WIDTH = 100  # columns of a paragraph
HNSWLIB_RULES = "ours, hnswlib's rules"
# The variants of our index, each with the arguments that differ from our defaults. hnswlib's rules differ in both.
RULES = {
    "ours": (),
    "ours, m=max_m": ("m",),
    "ours, keep_pruned=False": ("keep_pruned",),
    HNSWLIB_RULES: ("m", "keep_pruned"),
}
COLOURS = dict(zip([*RULES, "hnswlib"], ["#1f6f8b", "#8265a7", "#c9a227", "#7a9e3a", "#d1603d"], strict=True))


# The command line.


def positive(text: str, least: int = 1) -> int:
    """Parses an argument: an integer ≥ `least`."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
    return value


def edge_limit(text: str) -> int:
    """Parses --max-m: an integer ≥ 2, since one edge per element makes no layers."""
    return positive(text, least=2)


def lab_parser(doc: str, *, num_vectors: int, queries: int) -> argparse.ArgumentParser:
    """Returns a parser with the arguments of all scripts. doc: the script's docstring, which is its --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: dict[str, Any] = {"type": positive, "metavar": "N"}
    parser.add_argument("--num-vectors", default=num_vectors, help="vectors in the index (%(default)s)", **number)
    parser.add_argument("--dim", default=64, help="length of a vector (%(default)s)", **number)
    parser.add_argument("--queries", default=queries, help="queries to measure with (%(default)s)", **number)
    parser.add_argument("--k", default=10, help="neighbours asked for: recall@k (%(default)s)", **number)
    parser.add_argument("--seed", default=0, type=int, help="of the vectors and of the levels (%(default)s)")
    parser.add_argument(
        "--out",
        default=RESULTS,
        type=Path,
        metavar="FOLDER",
        help="where CSV, PNG and report go (%(default)s)",
    )
    return parser


# Data and its exact answers.


@dataclass(frozen=True)
class Data:
    vectors: FloatArray  # [num_vectors, dim]
    queries: FloatArray  # [num_queries, dim]
    exact: IntArray  # [num_queries, min(k, num_vectors)]: ids of each query's true neighbours, nearest first
    exact_us: float  # the time of an exact answer with numpy, in microseconds per query

    @property
    def k(self) -> int:
        return int(self.exact.shape[1])


def make_data(args: argparse.Namespace) -> Data:
    """Returns vectors and queries, independent and uniform in [0, 1)^dim: the hardest case, nothing is near."""
    rng = np.random.default_rng(args.seed)
    vectors = rng.random((args.num_vectors, args.dim), dtype=np.float32)
    queries = rng.random((args.queries, args.dim), dtype=np.float32)
    started = time.process_time()
    exact = np.stack([exact_neighbours(vectors, query, args.k) for query in queries])
    return Data(vectors, queries, exact, (time.process_time() - started) / len(queries) * 1e6)


def exact_neighbours(vectors: FloatArray, query: FloatArray, k: int) -> IntArray:
    """Returns the ids of the k nearest, nearest first, by computing all distances."""
    offsets = vectors - query
    return np.argsort(np.einsum("nd,nd->n", offsets, offsets), kind="stable")[:k].astype(np.int32)


def hits(found: IntArray, exact: IntArray) -> int:
    """Returns the number of true neighbours that were found."""
    return int(np.isin(exact, found).sum())


# Measuring.


class Index(Protocol):
    """An index that is measured: ours or hnswlib's."""

    def add(self, vectors: FloatArray) -> None: ...

    def nearest(self, query: FloatArray, k: int, ef_search: int) -> IntArray: ...

    @property
    def num_distances(self) -> int | None: ...

    @property
    def num_steps(self) -> int | None: ...


class Ours(HNSW):
    def nearest(self, query: FloatArray, k: int, ef_search: int) -> IntArray:
        return self.search(query, k, ef_search)[0]


class Hnswlib:
    """hnswlib with the same parameters, the same order of insertion and one thread. It draws levels of its own."""

    num_distances = num_steps = None  # it does not count them for Python

    def __init__(self, dim: int, max_m: int, ef_construction: int, seed: int) -> None:
        import hnswlib  # type: ignore[import-untyped]

        self._index = hnswlib.Index(space="l2", dim=dim)
        self._settings = {"M": max_m, "ef_construction": ef_construction, "random_seed": seed}

    def add(self, vectors: FloatArray) -> None:
        self._index.init_index(max_elements=len(vectors), **self._settings)
        self._index.add_items(vectors, num_threads=1)

    def nearest(self, query: FloatArray, k: int, ef_search: int) -> IntArray:
        self._index.set_ef(max(ef_search, k))
        ids: IntArray = self._index.knn_query(query, k, num_threads=1)[0][0].astype(np.int32)
        return ids


def has_hnswlib() -> bool:
    try:
        import hnswlib  # noqa: F401
    except ImportError:
        return False
    return True


def libraries() -> tuple[str, ...]:
    """Returns the libraries that are installed. Prints how to install the missing one."""
    if has_hnswlib():
        return "ours", "hnswlib"
    say("hnswlib is not installed, so its columns are missing. It compiles itself: pip install '.[examples]'")
    return ("ours",)


@dataclass(frozen=True)
class Built:
    """An index with its vectors in it, and the time that adding them took."""

    library: str
    max_m: int
    ef_construction: int
    index: Index
    build_s: float


def build(library: str, data: Data, *, max_m: int, ef_construction: int, seed: int) -> Built:
    """Returns an index with the vectors in it. library: a key of COLOURS."""
    dim = data.vectors.shape[1]
    index: Index
    if library == "hnswlib":
        index = Hnswlib(dim, max_m, ef_construction, seed)
    else:
        rules: dict[str, Any] = {"m": max_m, "keep_pruned": False}
        rules = {name: rules[name] for name in RULES[library]}
        index = Ours(dim, max_m=max_m, ef_construction=ef_construction, seed=seed, **rules)
    started = time.process_time()
    index.add(data.vectors)
    return Built(library, max_m, ef_construction, index, time.process_time() - started)


@dataclass(frozen=True)
class Measurement:
    """One line of the CSV. Times are processor times of one thread, which other programs' work does not
    change. Each call has one query, and the fastest of several passes counts."""

    library: str
    max_m: int
    ef_construction: int
    ef_search: int
    build_s: float
    recall: float  # share of the true k neighbours that were found
    query_us: float
    distances: float | None  # computed per query
    steps: float | None  # nodes per query whose edges led to elements not seen before


def measure(built: Built, data: Data, ef_search: int) -> Measurement:
    index = built.index
    distances, steps = index.num_distances, index.num_steps
    passes: list[float] = []
    while not passes or sum(passes) < LEAST_SECONDS:
        started = time.process_time()
        found = [index.nearest(query, data.k, ef_search) for query in data.queries]
        passes.append(time.process_time() - started)
    num_queries = len(passes) * len(found)
    return Measurement(
        library=built.library,
        max_m=built.max_m,
        ef_construction=built.ef_construction,
        ef_search=ef_search,
        build_s=round(built.build_s, 4),
        recall=round(sum(map(hits, found, data.exact)) / data.exact.size, 4),
        query_us=round(min(passes) / len(found) * 1e6, 1),
        distances=growth(distances, index.num_distances, num_queries),
        steps=growth(steps, index.num_steps, num_queries),
    )


def growth(before: int | None, after: int | None, num_queries: int) -> float | None:
    return None if before is None or after is None else round((after - before) / num_queries, 1)


def call_us(index: HNSW, data: Data, size: int) -> float:
    """Returns the microseconds of a call that computes `size` distances, to elements as scattered as neighbours."""
    rng = np.random.default_rng(0)
    calls = [(query, rng.integers(len(index), size=size, dtype=np.int32)) for query in data.queries]
    seconds = []
    for _ in range(5):
        started = time.process_time()
        for query, ids in calls:
            index.distances(query, ids)
        seconds.append((time.process_time() - started) / len(calls))
    return min(seconds) * 1e6  # the others were disturbed


# What is shown and written.


def say(text: str) -> None:
    """Prints a paragraph, wrapped."""
    print(textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False), flush=True)


def heading(text: str) -> None:
    print(f"\n--- {text} {'-' * max(WIDTH - len(text) - 5, 0)}\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table whose columns line up in a terminal; all but the first are aligned right."""
    cells = [["–" if cell is None else str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headers))]
    lines = [
        [
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    rule = ["-" * width if not column else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def write_csv(path: Path, rows: Sequence[Measurement]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Measurement)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
    print(f"Wrote {path}")


def write_png(path: Path, draw: Callable[[Figure], None], size: tuple[float, float]) -> bool:
    """Lets `draw` fill a figure and writes it; without matplotlib says so and returns False."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say(f"matplotlib is not installed, so {path.name} is not drawn: pip install '.[examples]'")
        return False
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # pixels without a display, and without pyplot's process-wide state
    draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"Wrote {path}")
    return True


def decades(axis: Axis) -> None:
    """Makes an axis logarithmic, from a power of ten to a power of ten, with plain figures at powers of ten only."""
    from matplotlib.ticker import NullFormatter

    low, high = axis.get_data_interval()
    low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
    axis.set_view_interval(10.0**low, 10.0**high, ignore=True)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def write_report(path: Path, title: str, parts: Sequence[str]) -> None:
    """Writes a Markdown page: title, the command that made it, where it ran, and the parts."""
    # As typed, without the folder: a report does not depend on where it is written.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--out=")]
    if "--out" in arguments:
        del arguments[arguments.index("--out") : arguments.index("--out") + 2]
    command = shlex.join(["python", f"examples/hnsw/{Path(sys.argv[0]).name}", *arguments])
    versions = [f"numpy {np.__version__}"]
    if has_hnswlib():
        versions.append(f"hnswlib {importlib.metadata.version('hnswlib')}")
    where = f"Python {platform.python_version()}, {', '.join(versions)}, one thread of {processor()}."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n\n".join([f"# {title}", f"Made by `{command}` with {where} Times are that thread's own.", *parts]) + "\n",
        encoding="utf-8",
    )
    print(f"Wrote {path}")


def processor() -> str:
    """Returns the processor's name, if the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
