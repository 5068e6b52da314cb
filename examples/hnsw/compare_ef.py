"""The two candidate lists compared: ef_construction, paid when building, and ef_search, paid with each query.

Every ef_construction builds an index, and every ef_search queries it. Writes compare_ef.csv, .png and .md. About a
minute. Runs with numpy alone: with hnswlib the same vectors go through it too, with matplotlib there is a picture.
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

EF_CONSTRUCTION = (10, 25, 50, 100, 200)
EF_SEARCH = (10, 20, 50, 100, 200)


def draw(figure: Figure, rows: list[Measurement], k: int) -> None:
    from matplotlib import colormaps

    recall, trade, build_time = figure.subplots(1, 3)
    searches = sorted({row.ef_search for row in rows})
    constructions = sorted({row.ef_construction for row in rows})
    for library in dict.fromkeys(row.library for row in rows):
        ours = library == "ours"
        for number, ef_construction in enumerate(constructions):
            own = [row for row in rows if (row.library, row.ef_construction) == (library, ef_construction)]
            own.sort(key=lambda row: row.ef_search)
            shade = colormaps["viridis"](0.9 * number / max(len(constructions) - 1, 1))
            style = {
                "color": shade,
                "linestyle": "-" if ours else "--",
                "marker": "o" if ours else "s",
                "markersize": 4,
            }
            label = f"{library}, {ef_construction}"
            recall.plot([row.ef_search for row in own], [row.recall for row in own], label=label, **style)
            trade.plot([row.query_us for row in own], [row.recall for row in own], **style)
        first = {row.ef_construction: row.build_s for row in rows if row.library == library}
        build_time.plot(*zip(*sorted(first.items()), strict=True), "o-", color=COLOURS[library], label=library)
    recall.set(title="Recall by ef_search", xlabel="ef_search", ylabel=f"recall@{k}", xscale="log")
    recall.set(xticks=searches, xticklabels=[str(value) for value in searches])
    recall.minorticks_off()
    recall.legend(title="library, ef_construction", fontsize="small", title_fontsize="small")
    trade.set(
        title="Recall by time", xlabel="query (µs, one query a call, one thread)", ylabel=f"recall@{k}", xscale="log"
    )
    build_time.set(title="Time to build", xlabel="ef_construction", ylabel="s (one thread)", yscale="log")
    build_time.set(xticks=constructions)
    decades(trade.xaxis)
    decades(build_time.yaxis)
    build_time.legend(loc="lower right")
    for axes in (recall, trade, build_time):
        axes.grid(alpha=0.3)


def main() -> None:
    parser = lab_parser(__doc__, num_vectors=3000, queries=500)
    parser.add_argument("--max-m", default=16, type=edge_limit, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--ef-construction", default=EF_CONSTRUCTION, type=positive, nargs="+", metavar="N", help="(10 25 50 100 200)"
    )
    parser.add_argument(
        "--ef-search", default=EF_SEARCH, type=positive, nargs="+", metavar="N", help="(10 20 50 100 200)"
    )
    args = parser.parse_args()

    heading("What is compared")
    data = make_data(args)
    facts = (
        f"{args.num_vectors:,} vectors and {args.queries:,} queries, drawn uniformly from [0, 1)^{args.dim}; "
        f"max_m={args.max_m}. ef_construction is how many candidates an insertion finds before it chooses edges among "
        f"them: it shapes the graph, once. ef_search is how many a query keeps: it can be chosen anew for each query. "
        f"At least k={data.k} are kept, whatever ef_search says."
    )
    say(facts)
    names = libraries()

    heading("Measuring")
    rows: list[Measurement] = []
    for ef_construction in args.ef_construction:
        for name in names:
            built = build(name, data, max_m=args.max_m, ef_construction=ef_construction, seed=args.seed)
            new = [measure(built, data, ef_search) for ef_search in args.ef_search]
            rows += new
            found = " ".join(f"{row.recall:.3f}" for row in new)
            print(
                f"ef_construction={ef_construction:<4} {name:<8} built in {built.build_s:6.2f} s, recall {found}",
                flush=True,
            )

    heading("Result")
    results = "\n\n".join(
        f"{name}: recall@{data.k}, with the microseconds of a query in brackets.\n\n{grid(rows, name)}"
        for name in names
    )
    print(results, "\n")
    verdict = conclusion([row for row in rows if row.library == "ours"])
    say(verdict)

    heading("Files")
    write_csv(args.out / "compare_ef.csv", rows)
    drawn = write_png(args.out / "compare_ef.png", lambda figure: draw(figure, rows, data.k), (15, 4.6))
    write_report(
        args.out / "compare_ef.md",
        "ef_construction and ef_search",
        [facts, *(["![Recall and times by both parameters](compare_ef.png)"] if drawn else []), results, verdict],
    )


def grid(rows: list[Measurement], library: str) -> str:
    """Returns a table with ef_construction down and ef_search across."""
    own = {(row.ef_construction, row.ef_search): row for row in rows if row.library == library}
    constructions = list(dict.fromkeys(ef_construction for ef_construction, _ in own))
    searches = list(dict.fromkeys(ef_search for _, ef_search in own))
    return table(
        ["ef_construction", "build (s)", *(f"ef_search={value}" for value in searches)],
        [
            (
                ef_construction,
                f"{own[ef_construction, searches[0]].build_s:.2f}",
                *(f"{own[ef_construction, s].recall:.3f} ({own[ef_construction, s].query_us:.0f})" for s in searches),
            )
            for ef_construction in constructions
        ],
    )


def conclusion(rows: list[Measurement]) -> str:
    """Returns the conclusion from the rows of one library."""
    by_parameters = {(row.ef_construction, row.ef_search): row for row in rows}
    constructions, searches = (sorted(set(values)) for values in zip(*by_parameters, strict=True))
    low, high = by_parameters[constructions[0], searches[-1]], by_parameters[constructions[-1], searches[-1]]
    quick = by_parameters[constructions[-1], searches[0]]
    return (
        f"Down the table of ours: with ef_search={searches[-1]}, raising ef_construction from {constructions[0]} to "
        f"{constructions[-1]} takes recall from {low.recall:.3f} to {high.recall:.3f}, for "
        f"{high.build_s / low.build_s:.1f} times the build time and "
        f"{(high.distances or 0) / (low.distances or 1):.2f} times the distances a query: the price is paid once, when "
        f"building. Across it: with ef_construction={constructions[-1]}, raising ef_search from {searches[0]} to "
        f"{searches[-1]} takes recall from {quick.recall:.3f} to {high.recall:.3f}, for "
        f"{(high.distances or 0) / (quick.distances or 1):.1f} times the distances, in every query. Edges chosen among "
        f"few candidates lead less directly to what is near, and queries make up for it with a larger ef_search."
    )


if __name__ == "__main__":
    main()
