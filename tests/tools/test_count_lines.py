"""tools/count_lines.py: what counts as a line of code, as a function, as a kernel; and what exceeds a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.count_lines import (
    MAX_FILE,
    MAX_FUNCTION,
    MAX_PATH,
    PACKAGE,
    File,
    code_lines,
    count_file,
    count_package,
    count_path,
    find_problems,
    main,
)


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("", 0),
        ('"""A module."""\n\n# A comment.\n', 0),
        ("x = 1  # with a comment\n\n\ny = 2\n", 2),
        ('class A:\n    """A\n    docstring."""\n\n    x = 1\n', 2),
        ('def f():\n    """Docstring."""\n    return 1\n', 2),
        ('async def f():\n    """Docstring\n    of three\n    lines."""\n    return 1\n', 2),
        ('x = """a string\nof two lines"""\n', 2),
        ('def f():\n    x = 1\n    """no docstring"""\n', 3),
        ("f(\n    1,\n\n    # a comment\n    2,\n)\n", 4),
    ],
)
def test_blank_lines_comments_and_docstrings_do_not_count(source: str, code: int) -> None:
    assert len(code_lines(source)) == code


def test_functions_have_names_and_include_decorators_and_inner_functions() -> None:
    source = """
@decorated
def outer(
    value: int,
) -> int:
    '''Docstring.'''
    # A comment.
    def inner() -> int:
        return value

    return inner()

class Thing:
    async def method(self) -> None:
        pass

if True:
    def conditional() -> None: ...
"""
    functions = count_file(Path("engine/thing.py"), source).functions
    assert [(function.name, function.code) for function in functions] == [
        ("outer", 7),
        ("Thing.method", 2),
        ("conditional", 1),
    ]


@pytest.mark.parametrize("decorator", ["jit", "triton.jit", "jit()", "gluon_jit(num_warps=4)", "jit_with_varying('n')"])
def test_a_kernel_is_a_compiled_function_of_the_kernels(decorator: str) -> None:
    source = f"@{decorator}\ndef kernel():\n    pass\n"
    assert [function.is_kernel for function in count_file(Path("kernels/a.py"), source).functions] == [True]
    assert [function.is_kernel for function in count_file(Path("layers/a.py"), source).functions] == [False]


def test_other_decorators_make_no_kernel() -> None:
    source = "@cache\n@jitter\ndef f():\n    pass\n\ndef g():\n    pass\n"
    assert [function.is_kernel for function in count_file(Path("kernels/a.py"), source).functions] == [False, False]


def file_of(path: str, num_lines: int) -> File:
    return count_file(Path(path), "x = 1\n" * num_lines)


def test_a_path_is_made_of_files_and_folders() -> None:
    files = [file_of("llm.py", 3), file_of("layers/a.py", 4), file_of("layers/b.py", 5), file_of("layers_too/a.py", 6)]
    assert count_path(files, ("llm.py", "layers", "sampler.py")) == {"llm.py": 3, "layers": 9, "sampler.py": None}


def test_limits_may_be_reached_but_not_exceeded() -> None:
    function = "def f():\n" + "    x = 1\n" * (MAX_FUNCTION - 1)
    files = [file_of("llm.py", MAX_FILE), count_file(Path("a.py"), function)]
    assert find_problems(files, {"llm.py": MAX_PATH}) == []


def test_each_limit_exceeded_is_named() -> None:
    function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION
    files = [
        file_of("llm.py", MAX_FILE + 1),
        count_file(Path("a.py"), function),
        count_file(Path("kernels/a.py"), f"@triton.jit\n{function}"),
        count_file(Path("kernels/b.py"), function),
    ]
    assert find_problems(files, {"llm.py": MAX_PATH + 1, "sampler.py": None}) == [
        f"llm.py: {MAX_FILE + 1} lines of code, at most {MAX_FILE}",
        f"a.py: f has {MAX_FUNCTION + 1} lines of code, at most {MAX_FUNCTION}",
        f"kernels/b.py: f has {MAX_FUNCTION + 1} lines of code, at most {MAX_FUNCTION}",
        "sampler.py: on the reader's path, but missing",
        f"the reader's path: {MAX_PATH + 1} lines of code, at most {MAX_PATH}",
    ]


def test_every_folder_and_file_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "engine" / "deeper").mkdir(parents=True)
    (tmp_path / "llm.py").write_text("x = 1\n")
    (tmp_path / "engine" / "loop.py").write_text("# A comment.\nx = 1\ny = 2\n")
    (tmp_path / "engine" / "deeper" / "part.py").write_text("z = 3\n")
    assert main(tmp_path) == 1  # the path's files are missing
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.split("\n\n")[0].splitlines()]
    assert rows == [
        ["folder", "files", "code", "lines"],
        [".", "1", "1", "1"],
        ["engine", "2", "3", "4"],
        ["total", "3", "4", "5"],
    ]
    assert "engine/llm_engine.py: on the reader's path, but missing" in captured.err


def test_the_package_is_counted_whole() -> None:
    files = count_package(PACKAGE)
    assert {PACKAGE / file.path for file in files} == set(PACKAGE.rglob("*.py"))
    assert all(0 <= file.code <= file.lines for file in files)
