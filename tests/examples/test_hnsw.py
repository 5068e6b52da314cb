"""examples/hnsw: the index against brute force and at its edges, and every script as a reader runs it."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import run_python

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "hnsw"
sys.path.insert(0, str(FOLDER))  # its scripts are run from there, and import each other so

from hnsw import HNSW, FloatArray, IntArray  # noqa: E402


def random_vectors(num_vectors: int, dim: int, seed: int) -> FloatArray:
    return np.random.default_rng(seed).random((num_vectors, dim), dtype=np.float32)


def exact(vectors: FloatArray, query: FloatArray, k: int) -> IntArray:
    return np.argsort(((vectors - query) ** 2).sum(axis=1), kind="stable")[:k].astype(np.int32)


def recall(index: HNSW, queries: FloatArray, k: int, ef_search: int) -> float:
    """By distance, so that any of several equally near elements counts."""
    found = 0
    for query in queries:
        farthest = ((index.vectors[exact(index.vectors, query, k)[-1]] - query) ** 2).sum()
        ids, _ = index.search(query, k, ef_search)
        assert len(set(ids.tolist())) == len(ids)
        found += int((((index.vectors[ids] - query) ** 2).sum(axis=1) <= farthest * (1 + 1e-6)).sum())
    return found / (k * len(queries))


LARGE_INDEX = pytest.mark.heavy("an index of 2,000 vectors with the README's settings, in pure Python")


@pytest.fixture(scope="module")
def index() -> HNSW:
    index = HNSW(64, max_m=16, ef_construction=200)
    index.add(random_vectors(2000, 64, seed=0))
    return index


# The graph.


@LARGE_INDEX
def test_recall_with_the_settings_of_the_readme(index: HNSW) -> None:
    """On 2,000 vectors, since 10,000 take half a minute; a walk finds more among fewer, hence the stricter bound."""
    assert recall(index, random_vectors(200, 64, seed=1), k=10, ef_search=100) >= 0.99


@LARGE_INDEX
def test_ef_search_and_ef_construction_each_raise_recall(index: HNSW) -> None:
    queries = random_vectors(200, 64, seed=1)
    few, more, most = (recall(index, queries, 10, ef_search) for ef_search in (10, 40, 100))
    assert few + 0.1 < more
    assert more + 0.02 < most
    hasty = HNSW(64, max_m=16, ef_construction=10)
    hasty.add(index.vectors)
    assert recall(hasty, queries, 10, 40) + 0.05 < more


@LARGE_INDEX
def test_a_walk_computes_a_part_of_the_distances(index: HNSW) -> None:
    before = index.num_distances
    index.search(random_vectors(1, 64, seed=1)[0], k=10, ef_search=20)
    assert 50 < index.num_distances - before < len(index) / 2


@LARGE_INDEX
def test_the_graph_is_what_it_must_be(index: HNSW) -> None:
    index.check_integrity()
    degrees = [len(neighbours) for neighbours in index.layers[0].values()]
    assert max(degrees) == 32
    assert max(len(neighbours) for edges in index.layers[1:] for neighbours in edges.values()) == 16


def test_layers_have_the_sizes_of_the_formula() -> None:
    """floor(−ln U · mL) is at least l with probability max_m^−l."""
    index = HNSW(2, max_m=4, ef_construction=4)
    index.add(random_vectors(4000, 2, seed=0))
    index.check_integrity()
    assert len(index.layers) >= 5
    for layer, edges in enumerate(index.layers):
        expected = 4000 / 4**layer
        assert abs(len(edges) - expected) <= 4 * math.sqrt(expected)


def test_limits_hold_and_are_independent() -> None:
    for max_m, max_m0, m in ((3, 3, 1), (4, 20, 4), (5, None, None)):
        index = HNSW(8, max_m=max_m, max_m0=max_m0, m=m, ef_construction=30)
        index.add(random_vectors(300, 8, seed=0))
        index.check_integrity()
        limit = 2 * max_m if max_m0 is None else max_m0
        assert max(len(neighbours) for neighbours in index.layers[0].values()) == limit


def test_the_same_seed_gives_the_same_graph() -> None:
    vectors = random_vectors(200, 8, seed=0)
    graphs = []
    for seed, parts in ((0, 1), (0, 7), (1, 1)):
        index = HNSW(8, max_m=4, seed=seed)
        for part in np.array_split(vectors, parts):
            index.add(part)
        graphs.append([{i: edges.tolist() for i, edges in layer.items()} for layer in index.layers])
    assert graphs[0] == graphs[1], "one by one or at once"
    assert graphs[0] != graphs[2]


def test_the_heuristic_takes_one_element_of_a_cluster() -> None:
    """A cluster on the left, one element on the right, farther away: an edge goes to each side."""
    index = HNSW(2, max_m=2, max_m0=2, ef_construction=10, keep_pruned=False)
    index.add([[-1.0, 0.0], [-1.1, 0.0], [-1.2, 0.0], [2.0, 0.0]])
    index.add([[0.0, 0.0]])
    assert set(index.layers[0][4].tolist()) == {0, 3}
    nearest_only = HNSW(2, max_m=2, max_m0=4, m=3, ef_construction=10, keep_pruned=True)
    nearest_only.add([[-1.0, 0.0], [-1.1, 0.0], [-1.2, 0.0], [2.0, 0.0]])
    nearest_only.add([[0.0, 0.0]])
    assert set(nearest_only.layers[0][4].tolist()) == {0, 1, 3}, "the free edge goes to the nearest one discarded"


# Edges of its use.


def test_an_empty_index_finds_nothing() -> None:
    index = HNSW(4)
    index.add(np.empty((0, 4)))
    ids, distances = index.search([0, 0, 0, 0], k=3)
    assert (len(index), ids.shape, distances.shape) == (0, (0,), (0,))


def test_one_element() -> None:
    index = HNSW(3)
    index.add([1, 2, 3])
    ids, distances = index.search([1, 2, 5], k=10)
    assert (ids.tolist(), distances.tolist()) == ([0], [4.0])


def test_k_beyond_the_number_of_elements_gives_all_of_them_in_order() -> None:
    vectors = random_vectors(30, 5, seed=0)
    index = HNSW(5, max_m=8, ef_construction=20)
    index.add(vectors)
    query = random_vectors(1, 5, seed=1)[0]
    ids, distances = index.search(query, k=100, ef_search=1)
    assert ids.tolist() == exact(vectors, query, 30).tolist()
    np.testing.assert_allclose(distances, ((vectors[ids] - query) ** 2).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("max_m", [2, 4, 16])
def test_copies_of_one_vector_are_all_found(max_m: int) -> None:
    """More copies than an element has edges, and than an insertion has candidates."""
    index = HNSW(4, max_m=max_m, ef_construction=20)
    index.add(np.ones((300, 4)))
    index.check_integrity()
    ids, distances = index.search(np.zeros(4), k=50, ef_search=50)
    assert len(set(ids.tolist())) == 50
    assert distances.tolist() == [4.0] * 50
    index.add([[-0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert sorted(index.search(np.zeros(4), k=2)[0].tolist()) == [300, 301]


def test_copies_do_not_cut_off_the_others() -> None:
    """A third of the elements is one vector: those are found, and so is the rest, wherever a walk begins."""
    vectors = random_vectors(900, 16, seed=0)
    vectors[np.random.default_rng(1).permutation(900)[:300]] = 0.5
    index = HNSW(16, max_m=8, ef_construction=50)
    index.add(vectors)
    index.check_integrity()
    assert index.search(np.full(16, 0.5), k=20, ef_search=50)[1].tolist() == [0.0] * 20
    assert recall(index, random_vectors(100, 16, seed=2), k=5, ef_search=100) > 0.97


def test_wrong_input_is_refused_and_adds_nothing() -> None:
    index = HNSW(4)
    index.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"vectors of shape \[2, 5\]: must be \[n, 4\] or \[4\]"):
        index.add(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        index.add(np.array([[0, 0, 0, 0], [0, 0, 0, math.nan]]))
    with pytest.raises(ValueError, match=r"query of shape \[3\]"):
        index.search([1, 2, 3])
    with pytest.raises(ValueError, match="query has 2 rows"):
        index.search(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="k=0, ef_search=50: both must be at least 1"):
        index.search(np.zeros(4), k=0)
    with pytest.raises(ValueError, match="k=1, ef_search=0"):
        index.search(np.zeros(4), k=1, ef_search=0)
    assert len(index) == 2
    index.check_integrity()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: must be at least 1"),
        ({"max_m": 1}, "max_m=1: must be at least 2"),
        ({"ef_construction": 0}, "ef_construction=0: must be at least 1"),
        ({"max_m": 8, "max_m0": 7}, "max_m0=7: must be at least max_m=8"),
        ({"max_m": 8, "m": 17}, "m=17: must be from 1 to max_m0=16"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HNSW(**{"dim": 4, **settings})  # type: ignore[arg-type]


# The scripts.


def run_script(name: str, *arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """without: modules that are as if not installed."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({without!r})); sys.path.insert(0, {str(FOLDER)!r});"
        f"sys.argv = [{name!r}, *{arguments!r}]; runpy.run_path({str(FOLDER / name)!r}, run_name='__main__')"
    )
    done = run_python("-c", code) if without else run_python(str(FOLDER / name), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done


SMALL = ("--num-vectors", "300", "--dim", "16", "--queries", "20", "--seed", "3")
SCRIPTS = {
    "demo": ("--ef-search", "10", "40"),
    "compare_max_m": ("--max-m", "3", "8", "--ef-search", "10"),
    "compare_ef": ("--ef-construction", "5", "50", "--ef-search", "10", "60"),
}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_writes_figures_picture_and_report(script: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run_script(f"{script}.py", *SMALL, *SCRIPTS[script], "--out", str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{script}.{e}" for e in ("csv", "md", "png")]

    rows = [row for row in read_csv(tmp_path / "out" / f"{script}.csv") if row["library"] == "ours"]
    assert len(rows) == {"demo": 2, "compare_max_m": 2, "compare_ef": 4}[script]
    assert all(0 < float(row["recall"]) <= 1 and float(row["query_us"]) > 1 for row in rows)
    assert float(rows[0]["recall"]) < float(rows[-1]["recall"]), "the last has more candidates or edges"
    assert float(rows[0]["distances"]) < float(rows[-1]["distances"]) < 300

    report = (tmp_path / "out" / f"{script}.md").read_text(encoding="utf-8")
    assert f"]({script}.png)" in report
    assert f"Made by `python examples/hnsw/{script}.py {' '.join([*SMALL, *SCRIPTS[script]])}` with Python" in report
    tables = [line for line in report.splitlines() if line.startswith("| ")]
    assert len(tables) >= 4  # title, rule, and at least two of ours
    assert all(line in done.stdout for line in tables), "the terminal shows what the report has"

    from matplotlib.image import imread

    pixels = imread(tmp_path / "out" / f"{script}.png")
    assert min(pixels.shape[:2]) > 400
    assert pixels[..., :3].std() > 0.1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_with_numpy_alone(script: str, tmp_path: Path) -> None:
    arguments = (*SMALL, *SCRIPTS[script], "--out", str(tmp_path))
    done = run_script(f"{script}.py", *arguments, without=("matplotlib", "hnswlib"))
    lines = " ".join(done.stdout.split())
    assert "hnswlib is not installed, so its columns are missing." in lines
    assert f"matplotlib is not installed, so {script}.png is not drawn: pip install '.[examples]'" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{script}.csv", f"{script}.md"]
    assert "png" not in (tmp_path / f"{script}.md").read_text(encoding="utf-8")
    assert "hnswlib" not in {row["library"] for row in read_csv(tmp_path / f"{script}.csv")}


def test_hnswlib_finds_what_we_find_by_its_rules(tmp_path: Path) -> None:
    """Two implementations of one algorithm, on the same vectors: their recalls differ by chance alone."""
    pytest.importorskip("hnswlib")
    arguments = (
        "--num-vectors",
        "1000",
        "--dim",
        "32",
        "--queries",
        "200",
        "--ef-search",
        "15",
        "--ef-construction",
        "50",
    )
    run_script("demo.py", *arguments, "--out", str(tmp_path))
    recalls = {row["library"]: float(row["recall"]) for row in read_csv(tmp_path / "demo.csv")}
    assert abs(recalls["hnswlib"] - recalls["ours, hnswlib's rules"]) < 0.03
    assert recalls["ours"] > recalls["ours, hnswlib's rules"] + 0.03


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_refusals(script: str) -> None:
    shown = run_script(f"{script}.py", "--help").stdout
    for argument in ("--num-vectors", "--dim", "--queries", "--seed", "--out", "--max-m", "--ef-search"):
        assert argument in shown
    done = run_python(str(FOLDER / f"{script}.py"), "--max-m", "1")
    assert done.returncode == 2
    assert "argument --max-m: 1: must be at least 2" in done.stderr
