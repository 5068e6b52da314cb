"""An HNSW index at work: how it is built, the way of a query, and what 1,000 queries find compared with brute force.

Writes demo.csv, demo.png and demo.md. Half a minute or less; --num-vectors 1000 takes a few seconds. Runs with numpy
alone: with hnswlib the same vectors go through it too, with matplotlib there is a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from _lab import (
    COLOURS,
    HNSWLIB_RULES,
    RULES,
    Data,
    Measurement,
    Ours,
    build,
    call_us,
    edge_limit,
    heading,
    lab_parser,
    libraries,
    make_data,
    measure,
    positive,
    say,
    table,
    write_csv,
    write_png,
    write_report,
)
from hnsw import FloatArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EF_SEARCH = (10, 20, 50, 100, 200)
NUM_WALKS = 100  # queries whose way is followed


@dataclass(frozen=True)
class Stage:
    """The state of queries after one layer, on average."""

    name: str
    distances: float  # computed so far
    nearest: float  # squared distance to the nearest element found


def descend(index: Ours, queries: FloatArray, ef_search: int) -> list[Stage]:
    """Does what `search` does, layer by layer, from the entry point on top. Returns the state after each layer."""
    before = index.num_distances
    nearest = [[index.entry(query)] for query in queries]
    stages = []
    for layer in range(len(index.layers), -1, -1):
        if layer < len(index.layers):
            ef = 1 if layer else ef_search
            nearest = [index.search_layer(q, n, ef, layer) for q, n in zip(queries, nearest, strict=True)]
        name = f"layer {layer}" if layer < len(index.layers) else "entry point"
        computed = (index.num_distances - before) / len(queries)
        stages.append(Stage(name, computed, sum(found[0][0] for found in nearest) / len(queries)))
    return stages


def layer_rows(index: Ours) -> list[tuple[int, int, str, str]]:
    """Returns each layer, its elements, those expected from floor(−ln U · mL), and an element's mean edges."""
    return [
        (
            layer,
            len(edges),
            f"{len(index) / index.max_m**layer:.1f}",
            f"{sum(map(len, edges.values())) / len(edges):.1f}",
        )
        for layer, edges in reversed(list(enumerate(index.layers)))
    ]


def time_spent(index: Ours, data: Data, row: Measurement) -> str:
    """Returns a text on where the time of a query goes."""
    assert row.distances is not None
    assert row.steps is not None
    fixed = call_us(index, data, 1)
    extra = max(call_us(index, data, 129) - fixed, 0.0) / 128
    in_calls, in_distances = row.steps * fixed, row.distances * extra
    return (
        f"At ef_search={row.ef_search} a query of ours takes {row.query_us:.0f} µs: {row.steps:.0f} steps, each to the "
        f"unseen neighbours of a node, compute {row.distances:.0f} distances. The call of numpy that a step makes for "
        f"them costs {fixed:.1f} µs before the first distance and {extra * 1000:.0f} ns for each further one. So about "
        f"{in_calls:.0f} µs go into calling numpy, {in_distances:.0f} µs into the distances, and the remaining "
        f"{max(row.query_us - in_calls - in_distances, 0):.0f} µs into Python: heaps, tuples, what was seen."
    )


def draw(
    figure: Figure, index: Ours, stages: list[Stage], exact: float, num_queries: int, rows: list[Measurement], k: int
) -> None:
    layers, way, recall = figure.subplots(1, 3)

    numbers = range(len(index.layers))
    sizes = [len(edges) for edges in index.layers]
    layers.bar(numbers, sizes, color=COLOURS["ours"], label="elements")
    expected = [len(index) / index.max_m**number for number in numbers]
    layers.plot(numbers, expected, "o--", color="#444444", label=f"expected: n / {index.max_m}^layer")
    layers.set(yscale="log", ylim=(0.5, 3 * len(index)), xticks=list(numbers), xlabel="layer", ylabel="elements")
    layers.set_title("Elements on each layer")
    layers.legend()

    way.plot(
        [s.distances for s in stages], [s.nearest for s in stages], "o-", color=COLOURS["ours"], label="found so far"
    )
    way.axhline(exact, color="#444444", linestyle="--", label="true nearest")
    for stage in stages:
        at = (stage.distances, stage.nearest)
        way.annotate(stage.name, at, xytext=(6, 6), textcoords="offset points")
    way.set(xscale="log", xlabel="distances computed", ylabel="squared distance of the nearest")
    way.margins(x=0.2, y=0.12)
    way.set_title(f"From layer to layer (mean of {num_queries} queries)")
    way.legend(loc="upper right")

    for library in dict.fromkeys(row.library for row in rows):
        own = [row for row in rows if row.library == library]
        style = "s--" if library == "hnswlib" else "o-"
        ef_search, found = [row.ef_search for row in own], [row.recall for row in own]
        recall.plot(ef_search, found, style, color=COLOURS[library], label=library)
    ticks = sorted({row.ef_search for row in rows})
    recall.set(xscale="log", xticks=ticks, xticklabels=map(str, ticks), xlabel="ef_search", ylabel=f"recall@{k}")
    recall.minorticks_off()
    recall.grid(alpha=0.3)
    recall.set_title("Recall against brute force")
    recall.legend(loc="lower right")


def main() -> None:
    parser = lab_parser(__doc__, num_vectors=2500, queries=1000)
    parser.add_argument("--max-m", default=16, type=edge_limit, metavar="N", help="(%(default)s)")
    parser.add_argument("--ef-construction", default=200, type=positive, metavar="N", help="(%(default)s)")
    parser.add_argument("--ef-search", default=EF_SEARCH, type=positive, nargs="+", metavar="N", help="%(default)s")
    parser.add_argument(
        "--rules-apart", action="store_true", help="measure the two rules in which hnswlib differs apart"
    )
    args = parser.parse_args()

    heading("The data")
    data = make_data(args)
    facts = (
        f"{args.num_vectors:,} vectors and {args.queries:,} queries, drawn uniformly from [0, 1)^{args.dim}. Exact "
        f"answers by brute force compute {args.num_vectors:,} distances and take {data.exact_us:.0f} µs a query in "
        f"numpy."
    )
    say(facts)

    heading("Building")
    names = [*(RULES if args.rules_apart else ("ours", HNSWLIB_RULES)), *libraries()[1:]]
    say(
        f"Each vector gets a top layer, floor(−ln U · mL) with mL = 1 / ln {args.max_m}; it walks down to there, finds "
        f"{args.ef_construction} candidates (ef_construction) on each layer from there on, and makes edges to some of "
        f"them that lie in different directions: at most {args.max_m} (max_m), {2 * args.max_m} (max_m0) on layer 0."
    )
    print()
    indexes = []
    for name in names:
        indexes.append(build(name, data, max_m=args.max_m, ef_construction=args.ef_construction, seed=args.seed))
        print(f"{name}: {indexes[-1].build_s:.2f} s", flush=True)
    ours = indexes[0].index
    assert isinstance(ours, Ours)
    layers = table(["layer", "elements", "expected", "edges an element"], layer_rows(ours))
    print(f"\n{layers}\n")
    variant = (
        f'"{HNSWLIB_RULES}" is our code, except that a new element makes {args.max_m} edges on layer 0 too '
        f"(m=max_m), and that edges which the heuristic leaves free stay free (keep_pruned=False)."
    )
    say(variant)

    heading("The way of a query")
    walks = data.queries[:NUM_WALKS]
    stages = descend(ours, walks, max(args.ef_search))
    true_nearest = zip(walks, data.exact, strict=False)
    exact = sum(float(ours.distances(query, ids[:1])[0]) for query, ids in true_nearest) / len(walks)
    way = table(
        ["after", "distances computed", "nearest so far (squared)"],
        [(stage.name, f"{stage.distances:.1f}", f"{stage.nearest:.3f}") for stage in stages],
    )
    print(way, "\n")
    verdict = (
        f"Means of {len(walks)} queries; the true nearest is at {exact:.3f}. Above layer 0 a walk is greedy: it goes "
        f"to the nearest neighbour until none is nearer, and begins layer 0 at a good place. There it "
        f"goes on until {max(args.ef_search)} candidates (ef_search) are nearer than what is left to look at."
    )
    say(verdict)

    heading(f"{args.queries:,} queries, {data.k} neighbours each")
    rows = [measure(built, data, ef_search) for built in indexes for ef_search in args.ef_search]
    results = table(
        ["library", "ef_search", f"recall@{data.k}", "query (µs)", "distances", "steps"],
        [(r.library, r.ef_search, f"{r.recall:.4f}", f"{r.query_us:.0f}", r.distances, r.steps) for r in rows],
    )
    print(results, "\n")
    spent = time_spent(ours, data, next(row for row in rows if row.ef_search == max(args.ef_search)))
    say(spent)

    heading("Files")
    write_csv(args.out / "demo.csv", rows)
    drawn = write_png(
        args.out / "demo.png", lambda figure: draw(figure, ours, stages, exact, len(walks), rows, data.k), (15, 4.6)
    )
    builds = ", ".join(f"{built.library} in {built.build_s:.2f} s" for built in indexes)
    write_report(
        args.out / "demo.md",
        "HNSW at work",
        [
            facts,
            *(["![Layers, the way of a query, recall](demo.png)"] if drawn else []),
            "## Building",
            f"Built {builds}. {variant}\n\nThe layers of ours:\n\n{layers}",
            "## The way of a query",
            f"{way}\n\n{verdict}",
            "## Recall and time",
            f"{results}\n\n{spent}",
        ],
    )


if __name__ == "__main__":
    main()
