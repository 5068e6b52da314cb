"""What max_m, the edges of an element, buys: recall, build time, query time and memory at max_m = 5, 6, 7, 8 and 16.

Writes compare_max_m.csv, .png and .md. About a minute. Runs with numpy alone: with hnswlib the same vectors go through
it too, with matplotlib there is a picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from _lab import (
    COLOURS,
    Measurement,
    build,
    decades,
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_M = (5, 6, 7, 8, 16)


def draw(figure: Figure, rows: list[Measurement], k: int) -> None:
    recall, query, build_time = figure.subplots(1, 3)
    values = sorted({row.max_m for row in rows})
    for library in dict.fromkeys(row.library for row in rows):
        for number, ef_search in enumerate(sorted({row.ef_search for row in rows})):
            own = sorted((r for r in rows if (r.library, r.ef_search) == (library, ef_search)), key=lambda r: r.max_m)
            style = {"color": COLOURS[library], "marker": "o", "linestyle": ("-", "--", ":", "-.")[number % 4]}
            max_m = [row.max_m for row in own]
            recall.plot(max_m, [row.recall for row in own], label=f"{library}, ef_search={ef_search}", **style)
            query.plot(max_m, [row.query_us for row in own], label=f"{library}, ef_search={ef_search}", **style)
        build_time.plot(max_m, [row.build_s for row in own], "o-", color=COLOURS[library], label=library)
    for axes, title, unit in (
        (recall, "Recall against brute force", f"recall@{k}"),
        (query, "Time of a query", "µs (one query a call, one thread)"),
        (build_time, "Time to build", "s (one thread)"),
    ):
        axes.set(title=title, xlabel="max_m", ylabel=unit, xticks=values)
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in (query, build_time):
        axes.set_yscale("log")
        decades(axes.yaxis)


def main() -> None:
    parser = lab_parser(__doc__, num_vectors=3000, queries=500)
    parser.add_argument(
        "--max-m", default=MAX_M, type=edge_limit, nargs="+", metavar="N", help="to compare (5 6 7 8 16)"
    )
    parser.add_argument("--ef-construction", default=200, type=positive, metavar="N", help="(%(default)s)")
    parser.add_argument("--ef-search", default=(50, 100), type=positive, nargs="+", metavar="N", help="(50 100)")
    args = parser.parse_args()

    heading("What is compared")
    data = make_data(args)
    facts = (
        f"{args.num_vectors:,} vectors and {args.queries:,} queries, drawn uniformly from [0, 1)^{args.dim}; "
        f"ef_construction={args.ef_construction}. An element keeps at most max_m edges on the upper layers and 2 · "
        f"max_m on layer 0. max_m also sets how many elements reach the next layer: about one in max_m."
    )
    say(facts)
    names = libraries()

    heading("Measuring")
    rows: list[Measurement] = []
    for max_m in args.max_m:
        for name in names:
            built = build(name, data, max_m=max_m, ef_construction=args.ef_construction, seed=args.seed)
            rows += [measure(built, data, ef_search) for ef_search in args.ef_search]
            found = ", ".join(f"{row.recall:.3f} at ef_search={row.ef_search}" for row in rows[-len(args.ef_search) :])
            print(f"max_m={max_m:<3} {name:<8} built in {built.build_s:7.2f} s, recall {found}", flush=True)

    heading("Result")
    results = table(
        ["library", "max_m", "ef_search", f"recall@{data.k}", "query (µs)", "distances", "build (s)", "edges (bytes)"],
        [
            (
                row.library,
                row.max_m,
                row.ef_search,
                f"{row.recall:.4f}",
                f"{row.query_us:.0f}",
                row.distances,
                f"{row.build_s:.2f}",
                edge_bytes(row.max_m),
            )
            for row in rows
        ],
    )
    print(results, "\n")
    verdict = conclusion([row for row in rows if row.library == "ours"])
    say(verdict)

    heading("Files")
    write_csv(args.out / "compare_max_m.csv", rows)
    drawn = write_png(args.out / "compare_max_m.png", lambda figure: draw(figure, rows, data.k), (15, 4.6))
    write_report(
        args.out / "compare_max_m.md",
        "What max_m buys",
        [
            facts,
            *(["![Recall, query time and build time by max_m](compare_max_m.png)"] if drawn else []),
            results,
            verdict,
        ],
    )


def edge_bytes(max_m: int) -> int:
    """Returns the bytes of an element's edges, ids of four bytes each.

    There are 2 · max_m on layer 0, and max_m on each of the 1 / (max_m − 1) layers above that an element reaches on
    average.
    """
    return round(4 * (2 * max_m + max_m / (max_m - 1)))


def conclusion(rows: list[Measurement]) -> str:
    """Returns the conclusion from the rows of one library."""
    ef_search = min(row.ef_search for row in rows)
    own = sorted((row for row in rows if row.ef_search == ef_search), key=lambda row: row.max_m)
    least, most = own[0], own[-1]
    if least is most:
        return f"One value, max_m={least.max_m}, compares with nothing."
    return (
        f"From max_m={least.max_m} to {most.max_m}, recall at ef_search={ef_search} goes from {least.recall:.3f} to "
        f"{most.recall:.3f}, for {(most.distances or 0) / (least.distances or 1):.1f} times the distances a query, "
        f"{most.query_us / least.query_us:.1f} times the query time, "
        f"{most.build_s / least.build_s:.1f} times the build time and "
        f"{edge_bytes(most.max_m) / edge_bytes(least.max_m):.1f} times the memory for edges. More edges a node mean "
        f"more distances a step and fewer dead ends; ef_search raises recall too, without memory."
    )


if __name__ == "__main__":
    main()
