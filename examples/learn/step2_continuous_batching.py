"""Step 2: continuous batching. A Gantt chart of requests that join and leave, against static batching.

Static batching gathers some requests, runs them until the last has ended, then takes the next ones. Continuous batching
(Orca, Yu et al., OSDI 2022) decides again in every step: a request that has ended leaves at once, and a waiting one
takes its row.

    python examples/learn/step2_continuous_batching.py
    python examples/learn/step2_continuous_batching.py --requests 24 --max-num-seqs 8 --plot batching.png

Read along: nanovllm/engine/scheduler.py.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from _drawing import LETTERS, begin, heading, lesson_parser, save_plot, say, table, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nanovllm.engine.llm_engine import LLMEngine

CHART_WIDTH = 90  # columns
REPEATS = 3  # the fastest run counts: other programs on this machine only ever slow one down


@dataclass(frozen=True)
class Request:
    name: str
    arrival: int  # the step before which it arrives
    prompt: list[int]
    num_output_tokens: int


@dataclass
class Schedule:
    """When each request ran. A step is one forward pass."""

    num_steps: int = 0
    seconds: float = 0.0
    batch_sizes: list[int] = field(default_factory=list)
    joined: dict[str, int] = field(default_factory=dict)  # the step that computed its prompt
    left: dict[str, int] = field(default_factory=dict)  # its last step
    tokens: dict[str, list[int]] = field(default_factory=dict)


def main() -> None:
    parser = lesson_parser(__doc__, plot=True)
    parser.add_argument("--requests", type=int, default=14, help="2 to 26 (default %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=4, help="that run at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths (default %(default)s)")
    args = begin(parser)
    if not 2 <= args.requests <= len(LETTERS):
        parser.error(f"--requests must be from 2 to {len(LETTERS)}")
    if args.max_num_seqs < 1:
        parser.error("--max-num-seqs must be 1 or more")

    from _engine import open_engine

    title("Step 2: continuous batching")
    draw = random.Random(args.seed)
    requests = [
        Request(
            LETTERS[index],
            arrival=3 * max(index - args.max_num_seqs + 1, 0),  # the first ones together
            prompt=[draw.randrange(256) for _ in range(draw.randint(8, 40))],
            # Answers are mostly short and sometimes long, as in practice.
            num_output_tokens=draw.choice((6, 8, 10, 12, 16, 60)),
        )
        for index in range(args.requests)
    ]
    num_tokens = sum(request.num_output_tokens for request in requests)
    say(
        f"{len(requests)} requests come, {args.max_num_seqs} at once and then one every three steps, and ask for "
        f"{num_tokens} tokens together. {args.max_num_seqs} may run at a time (max_num_seqs). Twice the same engine, "
        "the same requests:"
    )
    engine, _ = open_engine(max_num_seqs=args.max_num_seqs, max_model_len=256, enable_prefix_caching=False)
    with engine:
        serve(engine, requests[:1], static=False)  # warm: the first steps of a process are slower
        runs: dict[bool, list[Schedule]] = {True: [], False: []}
        for is_static in (True, False) * REPEATS:  # in turns: what slows the machine down slows both
            runs[is_static].append(serve(engine, requests, static=is_static, batch_size=args.max_num_seqs))
    static, continuous = (min(runs[is_static], key=lambda run: run.seconds) for is_static in (True, False))

    for name, schedule, how in (
        ("static", static, "A group starts when the one before has ended, and lasts as long as its longest member."),
        ("continuous", continuous, "A row that becomes free is taken in the next step."),
    ):
        heading(f"{name} batching: {schedule.num_steps} steps")
        say(how)
        print(
            "  · waits   ▓ prefill, the prompt is computed   █ decode, a token a step   ░ done, but the group is not\n"
        )
        print_gantt(requests, schedule, max(static.num_steps, continuous.num_steps), args.max_num_seqs, name)

    heading("Side by side")
    rows = []
    for name, schedule in (("static", static), ("continuous", continuous)):
        wait = sum(schedule.joined[r.name] - r.arrival for r in requests) / len(requests)
        stay = sum(schedule.left[r.name] + 1 - r.arrival for r in requests) / len(requests)
        mean = sum(schedule.batch_sizes) / schedule.num_steps
        speed = num_tokens / schedule.seconds
        rows.append([name, schedule.num_steps, f"{mean:.2f}", f"{wait:.1f}", f"{stay:.1f}", f"{speed:,.0f}"])
    table(["", "steps", "mean batch", "mean wait (steps)", "mean stay (steps)", "tokens/s"], rows)
    speedup = static.seconds / continuous.seconds
    print()
    if static.num_steps == continuous.num_steps:
        say("As many steps: no request waited for a group here. Try fewer rows, or more requests.")
    else:
        say(
            f"{static.num_steps / continuous.num_steps:.2f} times fewer steps for the same tokens, and here "
            f"{speedup:.2f} times the tokens/s. On a GPU a step takes nearly the same time for 1 request as for 4, "
            "since what takes time is reading the weights, so tokens/s grow almost as steps fall; on a CPU a larger "
            "batch costs more. What requests feel is the wait. (The static batching here is a cheap one: a "
            "request that has ended costs nothing more. One that pads its batch to the end computes the ░ too.)"
        )
    print(f"\n  the same tokens for every request, in either batch: {static.tokens == continuous.tokens}")
    save_plot(args.plot, lambda figure: plot(figure, requests, static, continuous), (10.0, 7.0))


def serve(engine: LLMEngine, requests: list[Request], *, static: bool, batch_size: int = 0) -> Schedule:
    """Runs the requests, each from its arrival on. static: `batch_size` at a time, the next when all have ended."""
    from nanovllm import SamplingParams

    schedule = Schedule()
    to_come, waiting = list(requests), list[Request]()
    step = 0
    while to_come or waiting or engine.has_unfinished_requests():
        while to_come and to_come[0].arrival <= step:
            waiting.append(to_come.pop(0))
        if not static or not engine.has_unfinished_requests():
            admitted, waiting = (waiting[:batch_size], waiting[batch_size:]) if static else (waiting, [])
            for request in admitted:
                params = SamplingParams(temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True)
                engine.add_request(request.name, request.prompt, params)
        if engine.has_unfinished_requests():
            before = engine.statistics.num_output_tokens
            started = time.perf_counter()
            outputs = engine.step()
            schedule.seconds += time.perf_counter() - started
            schedule.batch_sizes.append(engine.statistics.num_output_tokens - before)
            for output in outputs:
                schedule.left[output.request_id] = step
                schedule.tokens[output.request_id] = output.outputs[0].token_ids
            running = [sequence.request_id for sequence in engine.scheduler.rows.running()]
            for name in [*running, *(output.request_id for output in outputs)]:
                schedule.joined.setdefault(name, step)
        step += 1
    schedule.num_steps = step
    return schedule


def spans(request: Request, schedule: Schedule, *, static: bool) -> dict[str, range]:
    """Returns the steps in which the request waited, was prefilled, decoded, and had ended before its group."""
    joined, left = schedule.joined[request.name], schedule.left[request.name]
    group = [schedule.left[name] for name, step in schedule.joined.items() if step == joined]
    return {
        "wait": range(request.arrival, joined),
        "prefill": range(joined, joined + 1),
        "decode": range(joined + 1, left + 1),
        "hold": range(left + 1, max(group) + 1) if static else range(0),
    }


def print_gantt(requests: list[Request], schedule: Schedule, longest: int, rows: int, name: str) -> None:
    """Prints a line for each request; a column stands for one step, or for several if there are too many."""
    scale = -(-longest // CHART_WIDTH)
    symbols = {"wait": "·", "prefill": "▓", "decode": "█", "hold": "░"}
    for request in requests:
        line = [" "] * (-(-schedule.num_steps // scale))
        for kind in ("wait", "decode", "hold", "prefill"):  # the last is the shortest and must stay visible
            for step in spans(request, schedule, static=name == "static")[kind]:
                line[step // scale] = symbols[kind]
        print(f"  {request.name} {''.join(line).rstrip()}")
    size = [str(count) for count in schedule.batch_sizes[::scale]]
    full = sum(count == rows for count in schedule.batch_sizes)
    if max(schedule.batch_sizes) < 10:
        print(f"  n {''.join(size)}")
    columns = "" if scale == 1 else f" A column is {scale} steps."
    print(f"\n  n: rows that got a token. All {rows} rows were busy in {full} of {schedule.num_steps} steps.{columns}")


def plot(figure: Figure, requests: list[Request], static: Schedule, continuous: Schedule) -> None:
    axes = figure.subplots(2, 1, sharex=True)
    colours = {"wait": "#d0d0d0", "prefill": "#d95f02", "decode": "#1b9e77", "hold": "#f2c14e"}
    labels = {"wait": "waits", "prefill": "prefill", "decode": "decode", "hold": "ended, its group has not"}
    for axis, (name, schedule) in zip(axes, (("static", static), ("continuous", continuous)), strict=True):
        for place, request in enumerate(requests):
            for kind, steps in spans(request, schedule, static=name == "static").items():
                if len(steps):
                    axis.barh(place, len(steps), left=steps.start, color=colours[kind], height=0.8)
        axis.set_yticks(range(len(requests)), [request.name for request in requests])
        axis.invert_yaxis()
        axis.set_ylabel("request")
        axis.set_title(f"{name} batching: {schedule.num_steps} steps")
    axes[1].set_xlabel("step")
    handles = [axes[1].barh(0, 0, color=colours[kind], label=label) for kind, label in labels.items()]
    axes[1].legend(handles=handles, loc="lower right")


if __name__ == "__main__":
    main()
