"""Lines of code by folder, against the budget of the engine proper. Being small is a feature.

Counted are lines with code on them: no blank lines, comments or docstrings. Exit status 1 over the budget.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

BUDGET = 6000
ENGINE_PROPER = ("engine", "models", "layers", "attention", "kernels", "utils")
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
    proper = sum(code for folder, (code, _) in counts.items() if folder in ENGINE_PROPER)
    print(f"engine proper: {proper} lines of code of {BUDGET}")
    return int(proper > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
