"""The parts of the page that are tables: the verdict, requests, preemptions, memory, and two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nanovllm.report.advice import CacheNeed, advice_text
from nanovllm.report.answer import request_advice
from nanovllm.report.answer_run import run_figures
from nanovllm.report.comparison import Pair, differing_settings, pairs
from nanovllm.report.log_file import number
from nanovllm.report.preemptions import KEPT
from nanovllm.report.requests import LISTED, RequestLife
from nanovllm.report.run import Run
from nanovllm.report.verdict import verdict
from nanovllm.report.words import clock_text

_NUM_SLOWEST = 10  # of each kind
_HEADS = ("end to end", "queued", "prefill", "preempted", "decoding", "longest wait", "first token")
_FIELDS = ("e2e_s", "queue_s", "prefill_s", "preempted_s", "decode_s", "longest_stall_s", "ttft_s")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], ids: Sequence[str] = (), search: str = "") -> str:
    """Returns a table whose rows become blocks on a narrow screen. Cells are markup; `ids` are those of the rows."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = []
    for index, row in enumerate(rows):
        anchor = f' id="{ids[index]}"' if ids else ""
        cells = "".join(
            f'<td data-label="{escape(name)}"{_class(cell)}>{cell}</td>' for name, cell in zip(heads, row, strict=True)
        )
        body.append(f"<tr{anchor}>{cells}</tr>")
    box = f'<input type="search" placeholder="{escape(search)}" aria-label="{escape(search)}">' if search else ""
    return f'{box}<div class="scroll"><table class="cards-if-narrow"><tr>{head}</tr>{"".join(body)}</table></div>'


def _class(cell: str) -> str:
    return "" if cell else ' class="none"'


def verdict_panel(run: Run) -> str:
    judged = verdict(run)
    advice = f"<p>{escape(advice_text(judged.advice))}</p>" if judged.advice else ""
    return f'<div class="panel verdict"><h3>{escape(judged.sentence)}</h3>{advice}</div>'


def request_table(run: Run) -> str:
    """Returns the slowest requests of each kind, and those that failed or were refused."""
    slowest = {life.request_id: life for kind in run.requests.slowest.values() for life in kind.first()[:_NUM_SLOWEST]}
    lives = sorted(slowest.values(), key=lambda life: -life.seconds("e2e_s"))
    lives += [life for life in run.requests.unsuccessful if life.request_id not in slowest]
    if not lives:
        return ""
    need = CacheNeed.of(run)
    rows = [_request_row(run, need, life) for life in lives]
    note = (
        "The slowest by time to first token, end to end, longest wait and queue, and at most "
        f"{LISTED} that failed or were refused. Times are in seconds."
    )
    heads = ("request", "ended", *_HEADS, "tokens", "why")
    ids = [f"run{run.number}-request-{index}" for index in range(len(rows))]
    return (
        f'<div class="panel"><h3>Requests</h3><p class="note">{note}</p>'
        f"{table(heads, rows, ids, 'Search the requests')}</div>"
    )


def _request_row(run: Run, need: CacheNeed | None, life: RequestLife) -> list[str]:
    times = [
        "" if (value := number(life.end, name)) is None else f'<span class="num">{value:.3f}</span>' for name in _FIELDS
    ]
    why = str(life.end.get("error") or life.end.get("stall_reason") or "")[:200]
    settings = ", ".join(one.setting for one in request_advice(run, need, life))
    if settings:
        why += f" → {settings}"
    tokens = f"{life.num_prompt_tokens:,} + {life.output_len:,}"
    return [f"<code>{escape(life.request_id)}</code>", escape(life.cause), *times, tokens, escape(why)]


def preemption_table(run: Run) -> str:
    """Returns the preemptions, each with its time, its step, and the blocks that were missing."""
    ones = run.preemptions.first
    if not ones:
        return ""
    rows = [
        [
            escape(clock_text(run.start, one.at)),
            f"{one.step:,}",
            f"<code>{escape(one.request_id)}</code> (seq {one.seq_id})",
            escape(one.beneficiary if one.for_request_id is None else f"{one.beneficiary}, {one.for_request_id}"),
            f"{one.needed} needed, {one.free_before} free",
            f"{one.num_tokens:,}",
        ]
        for one in ones
    ]
    more = f" (the first {KEPT})" if run.num_preemptions > len(ones) else ""
    heads = ("at (UTC)", "step", "preempted", "for", "blocks", "tokens to compute again")
    ids = [f"run{run.number}-preemption-{index}" for index in range(len(rows))]
    drawn = table(heads, rows, ids, "Search the preemptions")
    return f'<div class="panel"><h3>{run.num_preemptions:,} preemptions{more}</h3>{drawn}</div>'


def memory_table(run: Run) -> str:
    """Returns the memory and the messages of each rank."""
    rows = []
    for rank, known in sorted(run.ranks.items()):
        rows += [[str(rank), f"memory {moment}", sizes] for moment, sizes in known.memory_texts().items()]
        rows += [[str(rank), escape(operation), one.text] for operation, one in known.messages.items()]
    if not rows:
        return ""
    drawn = table(("rank", "what", "size or time"), rows)
    return f'<div class="panel"><h3>Memory and communication of each rank</h3>{drawn}</div>'


def comparison_panel(first: Run, second: Run, names: tuple[str, str]) -> str:
    """Returns the figures of two runs side by side, and the settings that differ."""
    one, two = run_figures(first), run_figures(second)
    rows = []
    for pair in filter(Pair.is_known, pairs(one, two)):
        change = "–" if pair.change is None else f"{100 * pair.change:+.0f} %"
        rows.append([escape(pair.name), pair.text(pair.first), pair.text(pair.second), change])
    for name, (old, new) in differing_settings(one, two).items():
        rows.append([f"<code>{escape(str(name))}</code>", escape(str(old)[:80]), escape(str(new)[:80]), "–"])
    return f'<div class="panel"><h3>Two runs</h3>{table(("figure", *names, "change"), rows)}</div>'
