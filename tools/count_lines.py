"""Counts the package's lines of code and holds them to limits: `python tools/count_lines.py`.

A line of code holds a token that is neither a comment nor part of a docstring. The limits: MAX_FILE for a file,
MAX_FUNCTION for a function (kernels apart), MAX_PATH for the files that a reader follows to understand the engine.
Exit status 1 when a limit is exceeded or a file of the path is missing.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nanovllm"
MAX_FILE = 400
MAX_FUNCTION = 60
MAX_PATH = 2600
# The files on the way of a request, in reading order; a folder stands for all of its files.
PATH = (
    "llm.py",
    "feed.py",
    "engine/llm_engine.py",
    "engine/scheduler.py",
    "engine/block_manager.py",
    "engine/sequence.py",
    "engine/batch.py",
    "engine/row_table.py",
    "engine/model_runner.py",
    "runner/sampler.py",
    "models/decoder.py",
    "models/qwen3.py",
    "layers",
    "attention/interface.py",
    "attention/torch_backend.py",
)
NUM_LONGEST = 5  # files, and functions, that are listed
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function or a method, with the functions inside it."""

    name: str  # "LLM.generate"
    code: int
    is_kernel: bool


@dataclass(frozen=True)
class File:
    """A file of the package. `path` is relative to the package."""

    path: Path
    lines: int
    code: int
    functions: tuple[Function, ...]

    @property
    def folder(self) -> str:
        """The package that the file belongs to, "." for the top one."""
        return self.path.parts[0] if len(self.path.parts) > 1 else "."


def code_lines(source: str) -> set[int]:
    """Returns the numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, FunctionNode)) and ast.get_docstring(node) is not None:
            lines.difference_update(lines_of(node.body[0]))
    return lines


def lines_of(node: ast.stmt) -> range:
    """Returns the numbers of a statement's lines, decorators included."""
    decorators = node.decorator_list if isinstance(node, (ast.ClassDef, FunctionNode)) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return range(first, (node.end_lineno or node.lineno) + 1)


def functions_of(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, FunctionNode]]:
    """Yields the functions and methods of a module with their qualified names, without nested functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield prefix + child.name, child
        else:
            name = f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix
            yield from functions_of(child, name)


def is_kernel(function: FunctionNode) -> bool:
    """Returns whether a decorator compiles the function for the device: `triton.jit`, `gluon_jit()` and the like."""
    for decorator in function.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        if "jit" in name.split("_"):
            return True
    return False


def count_file(path: Path, source: str) -> File:
    """Counts a file; `path` is relative to the package."""
    code = code_lines(source)
    functions = tuple(
        Function(
            name=name,
            code=len(code.intersection(lines_of(node))),
            is_kernel=path.parts[0] == "kernels" and is_kernel(node),
        )
        for name, node in functions_of(ast.parse(source))
    )
    return File(path, lines=len(source.splitlines()), code=len(code), functions=functions)


def count_package(package: Path) -> list[File]:
    """Counts every Python file of the package, in all folders."""
    return [
        count_file(path.relative_to(package), path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    ]


def count_path(files: list[File], path: tuple[str, ...] = PATH) -> dict[str, int | None]:
    """Returns the lines of code of each entry of the reader's path; None for one that does not exist."""
    counts: dict[str, int | None] = {}
    for entry in path:
        found = [file.code for file in files if file.path.as_posix() == entry or file.path.is_relative_to(entry)]
        counts[entry] = sum(found) if found else None
    return counts


def find_problems(files: list[File], path: dict[str, int | None]) -> list[str]:
    """Returns a line for each limit that is exceeded."""
    problems = [f"{file.path}: {file.code} lines of code, at most {MAX_FILE}" for file in files if file.code > MAX_FILE]
    problems += [
        f"{file.path}: {function.name} has {function.code} lines of code, at most {MAX_FUNCTION}"
        for file in files
        for function in file.functions
        if function.code > MAX_FUNCTION and not function.is_kernel
    ]
    problems += [f"{entry}: on the reader's path, but missing" for entry, code in path.items() if code is None]
    total = sum(code or 0 for code in path.values())
    if total > MAX_PATH:
        problems.append(f"the reader's path: {total} lines of code, at most {MAX_PATH}")
    return problems


def print_folders(files: list[File]) -> None:
    """Prints a line for each folder of the package, and the total."""
    folders: dict[str, list[File]] = defaultdict(list)
    for file in files:
        folders[file.folder].append(file)
    print(f"{'folder':<14}{'files':>8}{'code':>8}{'lines':>8}")
    for folder, members in [*sorted(folders.items()), ("total", files)]:
        code, lines = sum(file.code for file in members), sum(file.lines for file in members)
        print(f"{folder:<14}{len(members):>8}{code:>8}{lines:>8}")


def print_longest(files: list[File]) -> None:
    """Prints the longest files, and the longest functions that are no kernels."""
    print(f"\nlongest files (at most {MAX_FILE} lines of code)")
    for file in sorted(files, key=lambda file: -file.code)[:NUM_LONGEST]:
        print(f"{file.code:>6}  {file.path}")
    print(f"\nlongest functions, kernels apart (at most {MAX_FUNCTION} lines of code)")
    functions = [(function, file) for file in files for function in file.functions if not function.is_kernel]
    for function, file in sorted(functions, key=lambda pair: -pair[0].code)[:NUM_LONGEST]:
        print(f"{function.code:>6}  {file.path}: {function.name}")


def print_path(path: dict[str, int | None]) -> None:
    """Prints the entries of the reader's path and their total."""
    print(f"\nthe reader's path (at most {MAX_PATH} lines of code)")
    for entry, code in path.items():
        print(f"{'-' if code is None else code:>6}  {entry}")
    print(f"{sum(code or 0 for code in path.values()):>6}  total")


def main(package: Path = PACKAGE) -> int:
    """Prints the tables. Returns the exit status."""
    files = count_package(package)
    path = count_path(files)
    print_folders(files)
    print_longest(files)
    print_path(path)
    problems = find_problems(files, path)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
