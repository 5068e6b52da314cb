"""Lines of code by folder, against the budgets of the engine proper and of the kernels. Being small is a feature.

Counted are lines with code on them: no blank lines, comments or docstrings. Exit status 1 over a budget.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

BUDGETS = {
    "engine proper": (6500, ("engine", "models", "layers", "attention", "utils")),
    "kernels": (3100, ("kernels",)),
}
PACKAGE = Path(__file__).resolve().parents[1] / "nanovllm"


def code_lines(source: str) -> int:
    """Lines that hold a token which is neither a comment nor part of a docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)


def main() -> int:
    counts: dict[str, tuple[int, int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        folder = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else "."
        code, total = counts.get(folder, (0, 0))
        counts[folder] = (code + code_lines(source), total + len(source.splitlines()))
    print(f"{'folder':<12}{'code':>8}{'lines':>8}")
    for folder, (code, total) in counts.items():
        print(f"{folder:<12}{code:>8}{total:>8}")
    exceeded = False
    for name, (budget, folders) in BUDGETS.items():
        code = sum(counts[folder][0] for folder in folders)
        print(f"{name}: {code} lines of code of {budget}")
        exceeded |= code > budget
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main())
