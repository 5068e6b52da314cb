"""Generates the tables of LOGGING.md from the code that they describe.

python tools/generate_logging_docs.py          rewrites what is between the markers
python tools/generate_logging_docs.py --check  exit status 1 if that would change anything
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm.logs.events import EVENTS
from nanovllm.logs.fields import FIELDS, fields_of
from nanovllm.logs.records import Event
from nanovllm.utils import env

DOCUMENT = Path(__file__).resolve().parents[1] / "LOGGING.md"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    columns = [name.strip() for name in header.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(*words: str) -> str:
    return ", ".join(f"`{word}`" for word in words)


def type_name(annotation: Any) -> str:
    name = annotation.__name__ if isinstance(annotation, type) and "[" not in str(annotation) else str(annotation)
    return name.replace("None", "null")


def default_of(variable: env.Variable[Any]) -> str:
    if variable.unset:
        return variable.unset
    default = variable.default
    return code(
        str(int(default)) if isinstance(default, bool) else f"{default:g}" if default != str(default) else default
    )


def environment() -> str:
    rows = (
        [code(variable.name), variable.kind.name, default_of(variable), variable.kind.allowed, variable.meaning]
        for variable in env.VARIABLES
    )
    return table("variable | type | default | allowed | meaning", rows)


def levels_of(event: Event) -> tuple[int, ...]:
    return (event.levels,) if isinstance(event.levels, int) else event.levels


def events(*levels: int) -> str:
    """Returns the table of the events whose first level is one of `levels`."""
    rows = []
    for event in EVENTS.values():
        if levels_of(event)[0] not in levels:
            continue
        names = [f"`{name}`" if always else f"`{name}`?" for name, (_, always) in fields_of(event).items()]
        rows.append(
            [
                code(event.name),
                ", ".join(map(logging.getLevelName, levels_of(event))),
                code(*event.loggers.split()) or "yours",
                code(event.sentence.replace("\n", " ")),
                ", ".join([*names, event.others] if event.others else names),
            ]
        )
    return table("event | level | logger | line | fields", rows)


def fields() -> str:
    used: dict[str, list[str]] = {name: [] for name in FIELDS}
    for event in EVENTS.values():
        for name in fields_of(event):
            used[name].append(event.name)
    return table(
        "field | type | meaning",
        ([code(name), code(type_name(field.type)), field.meaning] for name, field in FIELDS.items() if used[name]),
    )


def unseen() -> str:
    return "".join(f"- `{event.name}` needs {event.unseen}\n" for event in EVENTS.values() if event.unseen)


BLOCKS = {
    "environment": environment,
    "events INFO": lambda: events(logging.INFO),
    "events DEBUG": lambda: events(logging.DEBUG),
    "events WARNING": lambda: events(logging.WARNING, logging.ERROR),
    "fields": fields,
    "unseen": unseen,
}


def generate(document: str, blocks: Mapping[str, Callable[[], str]] = BLOCKS) -> str:
    """Returns `document` with current tables. Raises ValueError unless each of `blocks` is in it once."""
    names = [block["name"] for block in BLOCK.finditer(document)]
    if sorted(names) != sorted(blocks):
        raise ValueError(f"the document has the blocks {names}, not each of {list(blocks)} once")
    return BLOCK.sub(lambda block: f"{block[1]}\n{blocks[block['name']]()}\n{block[3]}", document)


def update(path: Path, generate: Callable[[str], str]) -> int:
    """Rewrites the document, or with --check on the command line compares it only. Returns the exit status."""
    before = path.read_text("utf-8")
    after = generate(before)
    if "--check" in sys.argv:
        if before != after:
            print(f"{path.name} differs from the code: run python {sys.argv[0]}", file=sys.stderr)
        return int(before != after)
    path.write_text(after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(update(DOCUMENT, generate))
